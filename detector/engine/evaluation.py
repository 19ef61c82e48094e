"""The model measured and looked at while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from detector.checkpoint import write_json
from detector.config import ConfigError
from detector.config.trials import is_hopeless
from detector.data.annotations import Truth
from detector.engine.journal import Journal
from detector.engine.state import Run, State
from detector.evaluation.evaluator import evaluate, ground_truth
from detector.evaluation.froc import write_froc
from detector.evaluation.operating_point import kept_matches, main_kind, operating_point
from detector.evaluation.tables import summary_table
from detector.inference.draw import beside_truth
from detector.inference.tiles import results_by_image
from detector.ops.losses import losses_of_one_rank
from detector.runtime import StopRequest, autocast, eval_mode, return_freed_memory
from detector.settings import Evaluation
from detector.structures import Batch, Targets, to_device

log = logging.getLogger(__name__)


def measure(run: Run, state: State, batches: Callable[[], Iterable], journal: Journal, stop: StopRequest) -> bool:
    """Evaluate the weights that are kept on the validation set, which `batches()` goes through, and record it. Is it
    the best so far?

    The last evaluation of a run leaves predictions.json and metrics.json in its folder. A stop request ends it: the
    checkpoint before it is kept, and a resumed run evaluates again.
    """
    run.world.share_buffers(state.trained)
    detect = None
    if run.evaluation.tiles.size:
        detect = partial(
            results_by_image,
            dataset=run.val_set,
            tiles=run.evaluation.tiles,
            precision=run.runtime.precision,
            batch_size=run.evaluation.batch_size,
            rank=run.world.rank,
            world=run.world.size,
            stop=stop,
        )
    metrics, results = evaluate(
        state.trained,
        stop.watch(batches()),
        run.val_set,
        run.world.device,
        precision=run.runtime.precision,
        evaluator=run.evaluation.evaluator,
        sigmas=run.evaluation.sigmas,
        max_detections=run.evaluation.max_detections,
        per_class=False,
        folder=run.folder if state.iteration == run.total else None,
        progress=run.runtime.verbosity != "quiet",
        detect=detect,
    )
    if run.evaluation.froc and run.world.main and run.cfg.model.get("box_head") and state.iteration == run.total:
        limit = run.evaluation.max_detections[-1]
        text = write_froc(ground_truth(run.val_set), results, main_kind(metrics), limit, run.folder)
        log.info("\n%s\n", text)
    losses = validation_losses(run, state, batches(), stop) if run.evaluation.losses else {}
    return_freed_memory()
    state.metrics, state.evaluated = metrics, state.iteration
    journal.evaluation(state.iteration, metrics, losses)
    if state.iteration < run.total:
        log.info("iteration %d:\n%s", state.iteration, summary_table(metrics, run.evaluation.max_detections))
    value = chosen(metrics, run.evaluation.metric)
    better = not state.best or value > state.best["value"]
    if better:
        state.best = {"metric": run.evaluation.metric, "value": value, "iteration": state.iteration}
        if run.world.main and run.cfg.model.get("box_head"):
            state.operating_point = find_operating_point(ground_truth(run.val_set), results, metrics, run.evaluation)
    state.hopeless = state.iteration < run.total and any(run.world.gather(is_hopeless(value, state.iteration)))
    if state.hopeless:
        log.info("the sweep gives this trial up after iteration %d", state.iteration)
    if state.is_exhausted(run) and state.iteration < run.total and run.world.main:
        write_json(run.folder / "predictions.json", results)
        write_json(run.folder / "metrics.json", metrics, indent=1)
    return better


def find_operating_point(
    truth: Truth, results: list[dict], metrics: Mapping[str, Mapping], evaluation: Evaluation
) -> dict[str, Any]:
    """See evaluation/operating_point.py; {} where it cannot be found, which loses no run."""
    kind = main_kind(metrics)
    try:
        return operating_point(kept_matches(truth, results, kind, evaluation.max_detections[-1]), kind)
    except Exception:
        log.exception("no operating point: it could not be read off the matches")
        return {}


@torch.no_grad()
def validation_losses(run: Run, state: State, batches: Iterable, stop: StopRequest) -> dict[str, float]:
    """The terms of the training's loss, and their sum "loss", on the validation set: means over its images.

    Norms, dropout and what a loss counts are as in evaluation, proposals and sampled RoIs as in training, without
    augmentation: nothing that the training depends on changes. A batch of a rank is normalised by itself, as ranks may
    have different numbers of them.
    """
    model, device = state.trained, run.world.device
    sums, images = dict[str, float](), 0
    with eval_mode(model), losses_of_one_rank():
        for name in ("", "rpn"):  # these two alone look whether losses are wanted
            model.get_submodule(name).training = True
        for batch, targets in stop.watch(batches):
            with autocast(device, run.runtime.precision):
                terms = model(to_device(batch, device), to_device(targets, device))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(batch.images)
            images += len(batch.images)
    shares = run.world.gather((sums, images))
    count = sum(part for _, part in shares)
    names = sorted({name for part, _ in shares for name in part})
    means = {name: sum(part.get(name, 0.0) for part, _ in shares) / count for name in names}
    return {"loss": sum(means.values())} | means


def chosen(metrics: Mapping[str, Mapping[str, float]], name: str) -> float:
    """The number that `evaluation.metric` names; auto: mask AP if it was measured, else box AP."""
    kind, _, key = (main_kind(metrics), "", "AP") if name == "auto" else name.partition(".")
    if key not in metrics.get(kind, {}):
        known = [f"{kind}.{key}" for kind, numbers in metrics.items() for key in numbers]
        raise ConfigError(f"evaluation.metric = {name!r}: is not measured; choose auto, {' or '.join(known)}")
    return metrics[kind][key]


def show(run: Run, state: State, examples: tuple[Batch, Targets], journal: Journal) -> None:
    """Pictures for the loggers: what the model finds now in the same few images, beside the truth."""
    if not journal.loggers:
        return
    batch, targets = examples
    with eval_mode(state.trained), torch.inference_mode():
        detections = state.trained(to_device(batch, run.world.device))
    detections = to_device(detections, "cpu")
    for index in range(len(batch.images)):
        picture = beside_truth(
            batch, targets, detections, run.train_set.categories, index, pictures=run.train_set.pictures
        )
        for logger in journal.loggers:
            logger.picture(f"predictions/{index}", picture, state.iteration)
