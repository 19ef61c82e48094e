"""Train a detector.

    python train.py                                   the quickstart: Mask R-CNN on generated shapes, on a CPU or a GPU
    python train.py experiment=mask_rcnn_r50_fpn_1x   a recipe of configs/experiment
    python train.py roi=deformable                    another RoI method in all heads
    python train.py roi@model.mask_head.roi=warp      ... in one head
    python train.py roi=deformable roi.gamma=0.2      a setting of the method, for all heads that have it
    python train.py -m roi=pool,align seed=0,1        four runs, one after the other
    torchrun --nproc-per-node=2 train.py              on two GPUs, or two CPU processes
    python train.py --cfg job                         show the configuration

Start the same command again to continue an interrupted run (`resume=auto`). Exit codes: 0 done, 1 failed, 2 a setting
or the data cannot work, 128 + n stopped by signal n with everything saved. Of several runs, those that are finished are
skipped, a failing one does not stop the others (the code is 1 then), and multirun.json beside their folders says what
became of each.
"""

from __future__ import annotations

from detector.config import entry_point
from detector.config.program import TrainKeys as Keys


@entry_point("train", Keys)
def main(cfg):
    """The training loop is detector/engine/train.py."""
    from detector.engine.train import train  # after the check, which needs no torch of its own

    return train(cfg)


if __name__ == "__main__":
    main()
