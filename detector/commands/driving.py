"""AP of driving data by how hard, how high and how far objects are, as KITTI's benchmark has it.

detector driving annotations=data/kitti/annotations/kitti_val.json predictions=runs/kitti/eval_best/predictions.json
detector driving annotations=... predictions=... output=driving.json

annotations: what `detector convert kitti` or `bdd100k` writes. predictions: the results that `detector eval` writes.

Exit codes: 0 done, 2 the files cannot be measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detector.checkpoint import write_json
from detector.config import ConfigError, as_program, config_errors
from detector.evaluation.coco import check_annotations, check_predictions
from detector.evaluation.driving import by_difficulty
from detector.evaluation.tables import percent, table


def measure_driving(annotations: str, predictions: str, *, output: str | None = None) -> dict[str, Any]:
    """Print and return `by_difficulty`. configs/driving.yaml says what the arguments mean."""
    contents = []
    for key, path in (("annotations", annotations), ("predictions", predictions)):
        try:
            contents.append(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {path} cannot be read: {error}") from None
    truth, results = contents
    with config_errors("annotations"):
        checked = check_annotations(truth)
    with config_errors("predictions"):
        check_predictions(results, checked)
    numbers = by_difficulty(truth, results)
    for title, names in (
        ("AP", ("easy", "moderate", "hard")),
        ("AP by height, px", "height"),
        ("recall by distance, m", "distance"),
    ):
        rows = {kind: row if title == "AP" else row.get(names, {}) for kind, row in numbers.items()}
        heads = names if title == "AP" else list(next(iter(rows.values())))
        if heads:
            print(
                table([title, *heads], [[kind, *(percent(row[n]) for n in heads)] for kind, row in rows.items()]) + "\n"
            )
    if output:
        write_json(output, numbers, indent=1)
    return numbers


main = as_program("driving", measure_driving, __doc__)
