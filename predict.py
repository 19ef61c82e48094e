"""Detect objects in images with a trained model.

    python predict.py checkpoint=runs/quickstart/best.pt images=photos
    python predict.py checkpoint=... 'images=photos/*.jpg' threshold=0.3 output=found
    python predict.py checkpoint=... 'images=[a.png,b.png]' draw=false
    python predict.py checkpoint=... images=photos model.box_head.detections_per_image=300

Writes annotated pictures and predictions.json (COCO's format, with scores). In Python:

    detector.load(checkpoint).predict(image)

Exit codes: 0 done (unreadable files are named), 1 none of the files was readable, 2 a setting cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detector.config import entry_point


@dataclass
class Keys:
    """The top level of configs/predict.yaml."""

    checkpoint: str
    images: str | list[str]
    output: str
    threshold: float
    draw: bool
    batch_size: int
    max_pixels: int | None
    device: str
    paste: Literal["aligned", "torchvision"]
    precision: Literal["fp32", "bf16", "fp16"]
    model: dict


@entry_point("predict", Keys)
def main(cfg):
    """The work is done in detector/inference/predict.py."""
    from detector.commands.predict import predict_files

    predict_files(cfg)


if __name__ == "__main__":
    main()
