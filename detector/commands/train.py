"""Train a detector. The same command started again continues the run, or leaves it as it is when it is finished.

detector train                                   the quickstart: Mask R-CNN on generated shapes, on a CPU or a GPU
detector train experiment=finetune data=custom data.root=my_data                  your own data in COCO's format
detector train experiment=mask_rcnn_r50_fpn_1x   a recipe of a paper, on COCO
detector train roi=deformable roi.gamma=0.2      another RoI method in all heads, with a setting of its own
detector train roi@model.mask_head.roi=warp      ... in one head
detector train -m roi=pool,align seed=0,1        four runs, one after the other
torchrun --nproc-per-node=2 -m detector train    on two GPUs, or two CPU processes
detector train --config-dir my_configs roi=mine  options of your own beside those below

Keys that people change (detector train --cfg job shows all):
    data.root=FOLDER                    where the data set is
    model.weights=FILE                  ours, another framework's or, choosing the model too, a published one (detector
                                        weights list): detectron2:mask_rcnn_R_50_FPN_3x, hf://owner/repo, https://...
    model.rpn.anchor_sizes=[[8],...]    for objects of other sizes, one list for each level
    training.batch_size=8               images in a step, over all GPUs
    training.freeze=[backbone,rpn]      parts that do not learn; training.thaw_at=0.5: for half of the run
    optimizer.lr=0.01                   for 16 images in a step, scaled to batch_size
    schedule.max_epochs=24              or schedule.max_iterations; evaluation.every=0.1: ten times in the run
    logger=[tensorboard,wandb]          and csv, mlflow: where numbers and pictures go
    runtime.precision=bf16              or fp16, fp32; runtime.device=cpu, runtime.workers=8
    seed=1                              run_dir, name: where the run lies; resume=none: start anew

Exit codes: 0 done, 1 failed, 2 a setting or the data cannot work, 128 + n stopped by signal n with everything
saved. Of several runs, those that are finished are skipped, a failing one does not stop the others (the code is 1
then), and NAME-multirun.json beside their folders says what became of each.
"""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import OmegaConf

from detector.comparison.run_report import Evaluated, write_run_report
from detector.config import as_program, literal
from detector.data.read_coco import read_json
from detector.engine.state import Run, State
from detector.engine.train import train as run_training
from detector.evaluation.coco import Results
from detector.evaluation.evaluator import ground_truth, measure
from detector.evaluation.operating_point import kept_matches, main_kind, operating_point
from detector.evaluation.tables import SHOWN_CLASSES, class_csv, class_table
from detector.settings import Data
from detector.weights.zoo import implied

log = logging.getLogger(__name__)


def train(
    *,
    name: str,
    run_dir: str,
    resume: str,
    seed: int,
    model: dict[str, Any],
    weights: dict[str, Any],
    roi: dict[str, Any],
    data: Data,
    augment: dict[str, Any],
    optimizer: dict[str, Any],
    schedule: dict[str, Any],
    training: dict[str, Any],
    evaluation: dict[str, Any],
    runtime: dict[str, Any],
    logger: dict[str, Any],
) -> float | None:
    """Run, or continue, the training that the nodes of configs/train.yaml describe; see `engine.train.train`.

    All of them are needed: `**config.arguments("train", ["data=custom", "data.root=my_data"])` has them.
    """
    return run_training(OmegaConf.create(literal(locals())), at_end=conclude)


def conclude(run: Run, state: State) -> None:
    """The table of classes, classes.csv and report.html of a run that has ended. If they fail, it has not."""
    if not (state.operating_point and (run.folder / "predictions.json").is_file()):
        return
    try:
        found = evaluated(run, state)
        table = class_csv(found.metrics, found.truth, found.point["classes"])
        (run.folder / "classes.csv").write_text(table, encoding="utf-8")
        shown = class_table(found.metrics, found.truth, SHOWN_CLASSES)
    except Exception as error:
        log.warning("no table of classes: %s: %s", type(error).__name__, error)
        return
    file = write_run_report(found, run.folder / "report.html")
    log.info("%s\n\nreport       %s", shown, file or "none: see above")


def evaluated(run: Run, state: State) -> Evaluated:
    """The last evaluation of a run, by class, and the operating point of its last weights."""
    truth, limits = ground_truth(run.val_set), run.evaluation.max_detections
    results = Results(read_json(run.folder / "predictions.json", "prediction"))
    kinds = [kind for kind in ("bbox", "segm") if kind in state.metrics]
    measured = measure(truth, results, kinds, "hotcoco", True, max_detections=limits)
    kind = main_kind(measured)
    point = operating_point(kept_matches(truth, results, kind, limits[-1]), kind)
    return Evaluated(
        *(str(run.folder), truth, results, measured, point, limits, run.val_set.folders, run.val_set.pictures),
        *(run.folder / "log.jsonl", run.config),
    )


main = as_program("train", train, __doc__, implied)
