"""What the classes 1..K of somebody's weights are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detector.weights.presets import has

COCO_91 = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # by COCO's ids; "N/A" where there is none
COCO_IDS = [i for i, name in enumerate(COCO_91) if i and name != "N/A"]
UNUSED = r"unused \d+"  # a class that stands for such an id
VOC = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa
train tvmonitor
""".split()  # noqa: SIM905


def published(num_classes: int) -> tuple[list[str], list[int]] | None:
    """Names and COCO ids of the classes of published models with so many; None if there are none."""
    if num_classes == len(COCO_IDS):
        return [COCO_91[i] for i in COCO_IDS], COCO_IDS
    if num_classes == 90:  # torchvision counts by COCO's ids, those that do not exist included
        return [f"unused {i}" if name == "N/A" else name for i, name in enumerate(COCO_91)][1:], list(range(1, 91))
    if num_classes == 1:
        return ["person"], [1]
    if num_classes == len(VOC):
        return VOC, list(range(1, 21))
    return None


def categories_of(
    contents: Mapping[str, Any], state: Mapping[str, Tensor], given: list[str] | None = None
) -> list[str] | None:
    """Names of the classes 1..K in the order of the predictors' rows; None where there are no classes or nothing tells.

    Args:
        contents: of the file: ours and mmdetection's tell the names. Those of other frameworks are COCO's or Pascal
            VOC's where there are as many; a single class is COCO's person if it has keypoints.
        state: the weights under our names.
        given: what the user says.

    Raises ValueError if `given` are another number.
    """
    rows = [len(value) for key, value in state.items() if key.endswith("predictor.class_logits.bias")]
    if not rows:
        return None
    count = rows[0] - 1
    if given is not None:
        if len(given) != count:
            raise ValueError(f"categories: {len(given)} names for the {count} classes of these weights")
        return list(given)
    meta = contents.get("meta") if isinstance(contents.get("meta"), dict) else {}
    data = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}
    for names in (contents.get("categories"), data.get("classes"), data.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(names, list | tuple) and len(names) == count and all(isinstance(name, str) for name in names):
            return list(names)
    known = published(count) if count > 1 or has(state, "keypoint_head.") else None
    return known[0] if known else None
