"""From a foreign detector's file to a checkpoint of ours that `detector.load`, eval.py and predict.py take as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detector import checkpoint
from detector.config import compose
from detector.weights.architecture import build_model, model_config
from detector.weights.loading import read_foreign
from detector.weights.presets import RESIZING

COCO_91 = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # by COCO's ids; "N/A" where there is none
COCO_IDS = [i for i, name in enumerate(COCO_91) if i and name != "N/A"]
VOC = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa
train tvmonitor
""".split()  # noqa: SIM905


def convert(
    source: str | Path,
    out: str | Path,
    framework: str | None = None,
    style: str | None = None,
    categories: list[str] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint of a foreign detector as ours, and return its config.

    Args:
        source, framework, style: see `load_foreign`.
        out: the file to write.
        categories: names of the classes in the order of the weights; None for those of COCO (80 classes, torchvision's
            90, or 1: person) and Pascal VOC (20).

    Raises FileNotFoundError, and ValueError where keys do not fit or the categories are another number.
    """
    weights, framework = read_foreign(source, framework, style)
    config = model_config(*weights)
    names, ids = category_names(config["num_classes"], categories)
    model = build_model(weights)
    data = "coco_keypoints" if "keypoint_head" in config else "coco"
    usual = compose("train", ["experiment=none", "augment=default", f"data={data}"])  # images of 800 to 1333 px, as all
    usual = {key: OmegaConf.to_container(usual[key], resolve=True) for key in ("augment", "data")}
    for split in ("train", "val"):
        usual["augment"][split][0] |= RESIZING[framework]
    config = {"model": config, **usual, "seed": 0}
    state = {"model": model.state_dict(), "ema": None, "config": config, "categories": names, "category_ids": ids}
    checkpoint.save(state | {"iteration": 0, "metrics": {}, "best": {}}, Path(out))
    return config


def category_names(num_classes: int, given: list[str] | None) -> tuple[list[str], list[int]]:
    """Names and COCO ids of the classes 1..num_classes."""
    if given is not None:
        if len(given) != num_classes:
            raise ValueError(f"categories: {len(given)} names for the {num_classes} classes of these weights")
        return list(given), list(range(1, num_classes + 1))
    if num_classes == len(COCO_IDS):
        return [COCO_91[i] for i in COCO_IDS], COCO_IDS
    if num_classes == 90:  # torchvision counts by COCO's ids, those that do not exist included
        return [f"unused {i}" if name == "N/A" else name for i, name in enumerate(COCO_91)][1:], list(range(1, 91))
    if num_classes == 1:
        return ["person"], [1]
    if num_classes == len(VOC):
        return VOC, list(range(1, 21))
    raise ValueError(f"these weights have {num_classes} classes, of unknown names: give them with --categories")
