"""Trackers on the same detections: boxes alone against RoI features beside them, on moving shapes.

    detector shapes --video --out data/moving --train 1 --val 10 --frames 80
    detector predict checkpoint=runs/quickstart/best.pt input=data/moving/val output=found track=bytetrack \\
        tracking.appearance=0.5 draw=false
    python benchmarks/tracking.py --truth data/moving/annotations/instances_val.json --found found

The detections and their RoI features are read from found/*/frames.jsonl, so the network is not asked again: an id is
what detector predict would give with that tracker and that share. HOTA, AssA, MOTA, IDF1 in percent over the videos
that were found; "against" is the difference to the tracker with boxes alone, with a 95 % interval of a bootstrap over
the videos.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from detector.evaluation.tracks import INTERVALS, Film, intervals, measure, read_films
from detector.inference.tracks import NONE, Tracking, Tracks, unpacked
from detector.inference.video import entries_of

WAYS = tuple((tracker, share) for tracker in ("sort", "ocsort", "bytetrack") for share in (0.0, 0.3))


def followed(journal: Path, names: dict[int, str], tracker: str, share: float, rate: float, least: float) -> Film:
    """The objects of one video as this tracker follows them."""
    tracks, film = Tracks(tracker, rate, least, Tracking(appearance=share)), Film(journal.parent.name)
    labels = {number: label for label, number in enumerate(names, 1)}
    for entry in entries_of(journal):
        objects = entry["objects"]
        boxes = np.array([one["bbox"] for one in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([one["score"] for one in objects], np.float32)
        kinds = np.array([labels[one["category_id"]] for one in objects], np.int64)
        vectors = np.array([unpacked(one["vector"]) for one in objects]) if share and objects else None
        ids = tracks.update(boxes, scores, kinds, vectors)
        film.frames[entry["frame"]] = [
            (number, names[one["category_id"]], *one["bbox"], True)
            for one, number in zip(objects, ids)
            if number != NONE
        ]
    return film


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--truth", type=Path, required=True)
    options.add_argument("--found", type=Path, required=True)
    options.add_argument("--rate", type=float, default=25.0)
    options.add_argument("--threshold", type=float, default=0.5, help="score from which on a detection begins a track")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    journals = sorted(args.found.glob("*/frames.jsonl"))
    truth = [film for film in read_films(args.truth) if film.name in {journal.parent.name for journal in journals}]
    names = {c["id"]: c["name"] for c in json.loads(args.truth.read_text(encoding="utf-8"))["categories"]}
    measured = []
    for tracker, share in WAYS:
        films = [followed(journal, names, tracker, share, args.rate, args.threshold) for journal in journals]
        measured.append(measure(truth, films))
    rows, saved = [], []
    for (tracker, share), one in zip(WAYS, measured):
        numbers, apart, alone = one.numbers["all"], {}, measured[WAYS.index((tracker, 0.0))]
        if one is not alone:
            around = intervals(one, alone)
            apart = {k: [numbers[k] - alone.numbers["all"][k], *around[k]] for k in INTERVALS}
        cells = [f"{100 * numbers[k]:.1f}" for k in INTERVALS] + [f"{numbers['IDSW']:.0f}"]
        against = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in apart["HOTA"])) if apart else ""
        rows.append([f"{tracker}, appearance {share:g}", *cells, against])
        saved.append({"tracker": tracker, "appearance": share, "numbers": numbers, "against_boxes_alone": apart})
    print(harness.table(["", *INTERVALS, "IDSW", "HOTA against boxes alone"], rows))
    print(f"{len(truth)} videos, {sum(len(film.frames) for film in truth)} frames")
    if args.json:
        harness.save(args.json, "cpu", videos=len(truth), tracking=saved)


if __name__ == "__main__":
    main()
