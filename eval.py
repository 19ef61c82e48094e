"""Evaluate a checkpoint with COCO's metrics.

    python eval.py checkpoint=runs/quickstart/best.pt
    python eval.py checkpoint=... evaluator=pycocotools           the reference implementation: the same numbers
    python eval.py checkpoint=... data.val.annotations=annotations/other.json data.val.images=other
    python eval.py checkpoint=... model.box_head.score_threshold=0.001
    python eval.py checkpoint=... flip=true 'scales=[0.75,1,1.25]'         test-time augmentation
    torchrun --nproc-per-node=2 eval.py checkpoint=...                     each image on one of the ranks

Exit codes: 0 done, 1 failed, 2 a setting, the checkpoint or the data cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detector.config import entry_point


@dataclass
class Keys:
    """The top level of configs/eval.yaml."""

    checkpoint: str
    output: str | None
    evaluator: Literal["hotcoco", "pycocotools"]
    iou_types: list[Literal["bbox", "segm", "boundary", "keypoints", "voc"]] | None
    sigmas: list[float] | None
    batch_size: int
    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    workers: int
    threads: int | None
    paste: Literal["aligned", "torchvision"]
    flip: bool
    scales: list[float]
    data: dict
    model: dict


@entry_point("eval", Keys)
def main(cfg):
    """The work is done in detector/commands/evaluate.py."""
    from detector.commands.evaluate import evaluate_checkpoint

    evaluate_checkpoint(cfg)


if __name__ == "__main__":
    main()
