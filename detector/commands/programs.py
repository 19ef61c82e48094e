"""The programs that Hydra configures: the keys at the top of each one's config, its help, and what does the work.

That is imported after the check of the configuration: a misspelt key need not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detector.config import entry_point
from detector.config.program import Data

Trust = str | list[str] | None


@dataclass
class TrainKeys:
    """The top level of configs/train.yaml."""

    name: str
    run_dir: str
    resume: str
    seed: int
    model: dict
    weights: dict
    roi: dict
    data: Data
    augment: dict
    optimizer: dict
    schedule: dict
    training: dict
    evaluation: dict
    runtime: dict


@entry_point("train", TrainKeys)
def train(cfg):
    """Train a detector. The same command started again continues the run, or leaves it as it is when it is finished.

    detector train                                   the quickstart: Mask R-CNN on generated shapes, on a CPU or a GPU
    detector train experiment=finetune data=custom data.root=my_data                  your own data in COCO's format
    detector train experiment=mask_rcnn_r50_fpn_1x   a recipe of a paper, on COCO
    detector train roi=deformable roi.gamma=0.2      another RoI method in all heads, with a setting of its own
    detector train roi@model.mask_head.roi=warp      ... in one head
    detector train -m roi=pool,align seed=0,1        four runs, one after the other
    torchrun --nproc-per-node=2 -m detector train    on two GPUs, or two CPU processes
    detector train --config-dir my_configs roi=mine  options of your own beside those below
    detector train --cfg job                         show the configuration

    Keys that people change (detector train --cfg job shows all):
        data.root=FOLDER                    where the data set is
        model.weights=FILE                  start from a checkpoint, ours or another framework's
        model.rpn.anchor_sizes=[[8],...]    for objects of other sizes, one list for each level
        training.batch_size=8               images in a step, over all GPUs
        training.accumulate=2               in so many parts
        optimizer.lr=0.01                   for 16 images in a step, scaled to batch_size
        schedule.max_epochs=24              or schedule.max_iterations
        evaluation.every=0.1                a share of the run, "2 epochs" or iterations
        runtime.precision=bf16              or fp16, fp32; runtime.device=cpu, runtime.workers=8
        seed=1                              run_dir, name: where the run lies; resume=none: start anew

    Exit codes: 0 done, 1 failed, 2 a setting or the data cannot work, 128 + n stopped by signal n with everything
    saved. Of several runs, those that are finished are skipped, a failing one does not stop the others (the code is 1
    then), and multirun.json beside their folders says what became of each.
    """
    from detector.engine.train import train

    return train(cfg)


@dataclass
class EvaluateKeys:
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
    trust: Trust


@entry_point("eval", EvaluateKeys)
def evaluate(cfg):
    """Evaluate a checkpoint with COCO's metrics.

    detector eval checkpoint=runs/quickstart/best.pt
    detector eval checkpoint=... evaluator=pycocotools           the reference implementation: the same numbers
    detector eval checkpoint=... data.val.annotations=annotations/other.json data.val.images=other
    detector eval checkpoint=... model.box_head.score_threshold=0.001
    detector eval checkpoint=... flip=true 'scales=[0.75,1,1.25]'                  test-time augmentation
    detector eval checkpoint=... trust=my_package                a model with parts of your own
    torchrun --nproc-per-node=2 -m detector eval checkpoint=...  each image on one of the ranks

    Exit codes: 0 done, 1 failed, 2 a setting, the checkpoint or the data cannot work.
    """
    from detector.commands.evaluate import evaluate_checkpoint

    evaluate_checkpoint(cfg)


@dataclass
class PredictKeys:
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
    trust: Trust


@entry_point("predict", PredictKeys)
def predict(cfg):
    """Detect objects in images with a trained model.

    detector predict checkpoint=runs/quickstart/best.pt images=photos
    detector predict checkpoint=... 'images=photos/*.jpg' threshold=0.3 output=found
    detector predict checkpoint=... 'images=[a.png,b.png]' draw=false
    detector predict checkpoint=... images=photos model.box_head.detections_per_image=300
    detector predict checkpoint=... images=photos trust=my_package       a model with parts of your own

    Writes annotated pictures and predictions.json (COCO's format, with scores). In Python:

        detector.load(checkpoint).predict(image)

    Exit codes: 0 done (unreadable files are named), 1 none of the files was readable, 2 a setting cannot work.
    """
    from detector.commands.predict import predict_files

    predict_files(cfg)


@dataclass
class CompareKeys:
    """The top level of configs/compare.yaml."""

    runs: str | list[str]
    output: str
    checkpoint: Literal["last", "best"]
    evaluate: bool
    baseline: str | None
    samples: int
    seed: int
    boundary: bool
    pictures: int
    probe_images: int
    device: str
    batch_size: int
    workers: int
    trust: Trust


@entry_point("compare", CompareKeys)
def compare(cfg):
    """Compare training runs: which RoI method, or any other setting, is better, by how much, and how sure is that?

    detector compare 'runs=runs/ablation/*'
    detector compare 'runs=[runs/a,runs/b]' output=reports/a_b baseline=align
    detector compare 'runs=runs/mine/*' trust=my_package         models with parts of your own

    Runs that differ in nothing but the seed are one method. The report has AP with intervals, errors, classes, cost,
    alignment, pictures, and the runs that were left out, with the reason.
    Exit codes: 0 done, 1 failed, 2 a setting cannot work or no run can be used.
    """
    from detector.commands.compare import compare_runs

    compare_runs(cfg)


@dataclass
class ExploreKeys:
    """The top level of configs/explorer.yaml."""

    checkpoint: str
    image: str
    output: str
    head: str
    max_mb: float
    device: str
    trust: Trust


@entry_point("explorer", ExploreKeys)
def explore(cfg):
    """See what each RoI method reads in an image: write the explorer's page.

    detector explore checkpoint=runs/quickstart/best.pt image=photo.jpg
    detector explore checkpoint=... image=... output=page.html head=mask_head
    detector explore checkpoint=... image=... trust=my_package           a model with parts of your own

    Exit codes: 0 done, 2 a setting cannot work.
    """
    from detector.explorer import explore

    explore(cfg)
