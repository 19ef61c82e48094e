"""How well objects of videos are followed: HOTA, MOTA and IDF1, for each class and over all.

detector tracks truth=data/moving/annotations/instances_val.json found=found
detector tracks truth=MOT17/train found=[a,b]         MOT's folders; results of two ways, and whether they differ
detector tracks truth=... found=... output=tracks.json

truth: a COCO-VID file (docs/video.md), or a folder of MOT sequences. found: the output of detector predict track=..., a
folder of several, or MOT's text files. Videos are matched by their names. Several results are compared with the first:
intervals of 95 % are over videos, drawn anew with replacement.

Exit codes: 0 done, 2 the files cannot be measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detector.checkpoint import write_json
from detector.config import ConfigError, as_program
from detector.evaluation.tables import table
from detector.evaluation.tracks import INTERVALS, NUMBERS, check_installed, intervals, measure, read_films, summary


def measure_tracks(
    truth: str, found: str | list[str], *, output: str | None = None, samples: int = 1000
) -> dict[str, Any]:
    """Print and return the numbers. configs/tracks.yaml says what the arguments mean."""
    check_installed()
    if samples < 100:
        raise ConfigError(f"samples = {samples}: must be at least 100")
    films, everything, first = read_films(Path(truth)), {}, None
    for name in [found] if isinstance(found, str) else found:
        measured = measure(films, read_films(Path(name)))
        ranges = intervals(measured, samples=samples)
        print(f"{name}: {len(films)} videos\n{table(['', *NUMBERS], summary(measured))}")
        if ranges:
            print("all: " + ", ".join(f"{k} {100 * low:.1f} to {100 * high:.1f}" for k, (low, high) in ranges.items()))
        known = {"numbers": measured.numbers, "videos": measured.videos, "intervals": ranges}
        if first is not None:
            apart = {k: measured.numbers["all"][k] - first.numbers["all"][k] for k in INTERVALS}
            around = intervals(measured, first, samples)
            known["difference_to_the_first"] = {k: [value, *around.get(k, ())] for k, value in apart.items()}
            print("against the first: " + ", ".join(_difference(k, apart[k], around.get(k)) for k in INTERVALS))
        first = first or measured
        everything[str(name)] = known
        print()
    if output:
        write_json(output, everything, indent=1)
    return everything


def _difference(name: str, value: float, around: tuple[float, float] | None) -> str:
    text = f"{name} {100 * value:+.1f}"
    return text if around is None else f"{text} ({100 * around[0]:+.1f} to {100 * around[1]:+.1f})"


main = as_program("tracks", measure_tracks, __doc__)
