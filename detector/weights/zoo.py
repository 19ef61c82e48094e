"""Published detectors by name: where their files lie, how good they were measured, and which of our models they are of.

    detectron2:mask_rcnn_R_50_FPN_3x      mmdet:mask-rcnn_r50_fpn_1x_coco      torchvision:maskrcnn_resnet50_fpn_v2

zoo.csv holds what the model zoos of detectron2 (MODEL_ZOO.md, model_zoo.py, projects/ViTDet) and mmdetection
(configs/*/metafile.yml and README.md) say of the two-stage models that the import supports; torchvision tells of its
own. AP in percent, as published there; recall: AR of 1,000 proposals.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torchvision.models import detection, get_model_weights, get_weight, list_models

from detector.config.schema import near
from detector.ops.checks import ConfigError

LICENCES = {
    "detectron2": "CC BY-SA 3.0",  # of the files, says MODEL_ZOO.md
    "mmdet": "Apache-2.0 (the project's)",
    "torchvision": "BSD-3-Clause (the project's)",
}
DIGESTS = {
    "detectron2": "md5",
    "mmdet": "sha256",
    "torchvision": "sha256",
}  # the names of files end with its first digits
OURS = {  # the model config that torchvision's two-stage detectors are of
    "fasterrcnn_resnet50_fpn": "model=faster_rcnn",
    "fasterrcnn_resnet50_fpn_v2": "model=faster_rcnn_v2",
    "maskrcnn_resnet50_fpn": "model=mask_rcnn",
    "maskrcnn_resnet50_fpn_v2": "model=mask_rcnn_v2",
    "keypointrcnn_resnet50_fpn": "model=keypoint_rcnn",
}
NAMED = re.compile(r"(detectron2|mmdet|torchvision):(.+)")
COLUMNS = {"box": "box AP", "mask": "mask AP", "keypoints": "keypoint AP", "recall": "AR"}


@dataclass(frozen=True)
class Published:
    """A file of published weights."""

    framework: str  # one of `loading.SOURCES`
    name: str
    url: str
    settings: str  # overrides that make the model that the weights are of
    data: str = ""  # what they were trained on
    box: str = ""  # AP in percent; "" where nothing is published
    mask: str = ""
    keypoints: str = ""
    recall: str = ""
    size: float | None = None  # MB, where it is published

    @property
    def digest(self) -> tuple[str, str] | None:
        """(algorithm, first digits) that the file's name carries."""
        found = re.search(r"[-_]([0-9a-f]{6}|[0-9a-f]{8})\.(pkl|pth)$", self.url)
        return (DIGESTS[self.framework], found[1]) if found else None

    @property
    def licence(self) -> str:
        return LICENCES[self.framework]

    def __str__(self) -> str:
        """'COCO, box AP 41.0, mask AP 37.2, CC BY-SA 3.0'"""
        measured = [f"{label} {getattr(self, key)}" for key, label in COLUMNS.items() if getattr(self, key)]
        return ", ".join([self.data, *measured, self.licence])


@cache
def published() -> dict[str, Published]:
    """All that are known, by 'framework:name', in the order of the tables."""
    with open(Path(__file__).with_name("zoo.csv"), encoding="utf-8", newline="") as file:
        rows = [Published(**row) for row in csv.DictReader(file)]
    for name in list_models(module=detection):
        if name in OURS:
            rows.append(of_torchvision(name, get_model_weights(name).DEFAULT))
    found: dict[str, Published] = {}
    for row in rows:  # detectron2's names are of use without their folder, where that is not another data set's
        short = f"{row.framework}:{row.name.rpartition('/')[2]}"
        found[short if short not in found else f"{row.framework}:{row.name}"] = row
    return found


def of_torchvision(name: str, weights: Any) -> Published:
    """What torchvision says of its weights of the model `name`."""
    (data, numbers), *_ = weights.meta["_metrics"].items()
    keys = {"box": "box_map", "mask": "mask_map", "keypoints": "kp_map"}
    measured = {key: str(numbers[theirs]) for key, theirs in keys.items() if theirs in numbers}
    size = weights.meta.get("_file_size")
    return Published("torchvision", name, weights.url, OURS.get(name, ""), data, **measured, size=size)


def find(text: str) -> Published | None:
    """The weights of a name such as 'mmdet:mask-rcnn_r50_fpn_1x_coco'; None for what is no such name.

    mmdetection's names are found in the words of its versions 2 and 3, detectron2's with their folder and '.yaml' too,
    and torchvision's by its classes of weights ('MaskRCNN_ResNet50_FPN_Weights.COCO_V1') and by any model's name.

    Raises ValueError, with near matches, for a name that the framework does not have.
    """
    named = NAMED.fullmatch(text)
    if named is None:
        return None
    framework, name = named.groups()
    known = published()
    for key, row in known.items():
        if row.framework == framework and words(name) in (words(row.name), words(key.partition(":")[2])):
            return row
    if framework == "torchvision":
        try:
            weights = get_weight(name) if "." in name else get_model_weights(name).DEFAULT
        except ValueError:
            pass
        else:
            model = next((m for m in list_models() if weights in get_model_weights(m)), name)
            return of_torchvision(model, weights)
    names = [key.partition(":")[2] for key, row in known.items() if row.framework == framework]
    raise ValueError(
        f"{text!r}: {framework} has no such weights, or none that fit here{near(name, names)} `detector weights list` "
        "shows all"
    )


def words(name: str) -> list[str]:
    """What a name is made of: mmdetection orders, joins and calls its words in two ways."""
    later = {"mstrain": "ms", "fp16": "amp"}
    return sorted(later.get(word, word) for word in re.split(r"[-_/]", name.removesuffix(".yaml")))


def listing(word: str = "") -> list[tuple[str, Published]]:
    """(name, weights) of those that have all words of `word` in their name, data or settings."""
    wanted = word.lower().split()
    texts = {key: f"{key} {row.data} {row.settings}".lower() for key, row in published().items()}
    return [(key, published()[key]) for key, text in texts.items() if all(w in text for w in wanted)]


def implied(overrides: Sequence[str]) -> list[str]:
    """The overrides that `model.weights=NAME` brings along on a command line, as far as the line leaves them open: the
    model that the weights are of, and that new classes start anew.

    Raises ConfigError for names that are not known, and for a sweep over weights of several models.
    """
    given = dict(text.lstrip("+").partition("=")[::2] for text in overrides)
    names = [name.strip("'\" ") for name in given.get("model.weights", "").split(",")]
    try:
        rows = [find(name) for name in names]
    except ValueError as error:
        raise ConfigError(f"model.weights: {error}") from error
    settings = {row.settings if row else "" for row in rows}
    if not any(settings):
        return []
    if len(settings) > 1:
        raise ConfigError(
            f"model.weights={given['model.weights']}: these are of several models ({'; '.join(sorted(settings))}); "
            "start a run for each"
        )
    anew = [] if "weights.strict" in given else ["weights.reset_heads=true"]
    return [text for text in (*settings.pop().split(), *anew) if not is_chosen(text, given)]


def is_chosen(override: str, given: dict[str, str]) -> bool:
    """Whether the command line has said this itself: the key, or the option of the group that the key belongs to."""
    key = override.lstrip("+").partition("=")[0]
    groups = {"roi.": "roi", "model.backbone.": "backbone@model.backbone"}
    return key in given or any(key.startswith(part) and group in given for part, group in groups.items())
