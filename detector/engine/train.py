"""The training loop: `train` prepares, `repeat` takes the steps, forward, backward and update, with evaluation,
checkpoints and the record in between.

Every rank runs the same lines on its share of each batch. DDP averages the gradients and the model normalises its
losses over all ranks, so that the number of ranks does not change the curve. What is random is a function of (seed,
epoch, image), so that an interruption does not change it either.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detector.config import build, overridden
from detector.data.loader import readable
from detector.engine import faults, run_folder, setup
from detector.engine.evaluation import chosen, measure, show
from detector.engine.journal import Journal, start_log
from detector.engine.memory import choose_batch
from detector.engine.optimizer import Schedule
from detector.engine.state import Run, State
from detector.runtime import StopRequest, autocast, random_state, seed_everything, start_ranks, stop_on_signal
from detector.settings import Evaluation, Runtime, Training
from detector.structures import Batch, Targets, to_device
from detector.threads import follow
from detector.weights import Start

log = logging.getLogger(__name__)


def train(cfg: DictConfig, at_end: Callable[[Run, State], None] | None = None) -> float | None:
    """Run, or continue, the training that `cfg` describes. at_end: called on rank 0 when it has just ended.

    Returns the last value of the metric that the best checkpoint is chosen by, for hyperparameter sweeps.
    Exits with 128 + signal after SIGTERM, SIGINT or SIGUSR1, the state saved.
    """
    runtime: Runtime = build(cfg.runtime, "runtime")
    batch = choose_batch(cfg, runtime)
    training: Training = build(cfg.training, "training")
    evaluation: Evaluation = build(cfg.evaluation, "evaluation")
    schedule: Schedule = build(cfg.schedule, "schedule")
    start: Start = build(cfg.weights, "weights")
    setup.preflight(cfg, training)
    world = start_ranks(runtime)
    folder = Path(cfg.run_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(faults.explain_errors(folder, world, training))
        faults.on_main(world, lambda: stack.enter_context(run_folder.locked(folder)))
        stack.enter_context(run_folder.unless_begun(folder, world))
        stop = stack.enter_context(stop_on_signal())
        start_log(folder, world, runtime.verbosity)
        if batch:
            log.info("%s", batch)
        seed_everything(cfg.seed)

        weights = start.read(cfg, overridden())
        train_set, val_set = setup.datasets(cfg)
        setup.fit(cfg, train_set, val_set, evaluation)
        run = Run(cfg, runtime, training, evaluation, schedule, world, folder, train_set, val_set)
        checkpoint = setup.find_checkpoint(run)
        contents: dict = {}  # of both data sets, on rank 0, which writes the checkpoints
        faults.on_main(world, lambda: contents.update(setup.contents_of(run, checkpoint)))
        state = State.create(run, None if checkpoint else partial(start.load, weights=weights))
        if checkpoint:
            setup.resume(run, state, checkpoint)
        state.set_mode(run)
        if not checkpoint:
            setup.warn_of_random_layers(run, state)
        if setup.is_finished(run, state):
            return chosen(state.metrics, evaluation.metric)
        setup.introduce(run, state, checkpoint, weights)
        journal = Journal(run, state.iteration, state.evaluated)
        stack.callback(journal.close)
        if checkpoint:
            journal.load_state_dict(checkpoint["meters"])
        checkpoint = None  # its memory, and that of the weights
        del weights
        repeat(run, state, journal, contents, stop)
        if world.main:
            journal.results(state.metrics, folder / "best.pt")
            setup.finish(run, state)
            if at_end:
                at_end(run, state)
        return chosen(state.metrics, evaluation.metric)


def repeat(run: Run, state: State, journal: Journal, contents: dict, stop: StopRequest) -> None:
    """Take the steps that are left. contents: of the data sets, for the checkpoints."""
    world, runtime, training = run.world, run.runtime, run.training
    model, folder, total = state.model, run.folder, run.total
    if runtime.compile:  # what has the same shapes in every batch
        for part in ("backbone", "neck", "rpn.head"):
            model.get_submodule(part).compile()
    if world.size > 1:
        model = distributed(model)
    train_loader, val_loader, examples = setup.loaders(run, state.iteration)
    with contextlib.closing(train_loader), contextlib.closing(val_loader):

        def save(best: bool = False) -> None:
            saved = {**setup.about(run, contents), **state.state_dict(), "meters": journal.state_dict()}
            saved["sampler"] = {"position": state.iteration * training.batch_size}
            saved["rng"] = world.gather(random_state())
            numbered = is_due(state.iteration, run.save_every)
            faults.on_main(world, lambda: run_folder.publish(saved, folder, numbered, best, runtime.keep))

        alone = world.size == 1  # else this rank would wait for others that wait for it
        batches = readable(train_loader, folder / "last.pt", save if alone else None)
        val_batches = partial(readable, val_loader, folder / "last.pt")
        while True:
            if state.evaluated < state.iteration and (
                state.iteration == total or is_due(state.iteration, run.evaluate_every)
            ):
                with journal.evaluating():
                    save(best=measure(run, state, val_batches, journal, stop))
                if state.iteration == total or state.is_exhausted(run):
                    break

            if state.frozen.held and state.iteration >= run.thaw_at:
                log.info("iteration %d: %s thaw", state.iteration, ", ".join(state.frozen.names))
                state.set_mode(run)
                if world.size > 1:
                    model = distributed(state.model)
            waiting = time.perf_counter()
            micro_batches = [next(batches) for _ in range(training.accumulate)]
            waited = time.perf_counter() - waiting
            micro_batches = [(to_device(b, world.device), to_device(t, world.device)) for b, t in micro_batches]
            follow()
            wanted = journal.is_due(state.iteration + 1)
            losses, stats = forward_backward(model, micro_batches, state.scaler, run, stats=wanted)
            state.scaler.unscale_(state.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None])
            # the host waits for the device here; all ranks agree on what follows
            failed, stopping = world.any(not is_finite(losses, norm, state), bool(stop))
            if failed:
                faults.nonfinite(run, state, losses, norm, micro_batches, save)
            else:
                update(state, norm, training)
                journal.add(losses, norm, waited)
            state.scaler.update()
            state.optimizer.zero_grad()
            lr = max(group["lr"] for group in state.optimizer.param_groups)
            state.scheduler.step()
            state.iteration += 1

            journal.step(state.iteration, state.iteration / run.per_epoch, lr, stats)
            last = state.iteration == total and runtime.pictures_every is not None  # of short runs the only ones
            if last or is_due(state.iteration, runtime.pictures_every):
                with journal.paused():
                    show(run, state, examples, journal)
            due = is_due(state.iteration, run.save_every) or is_due(state.iteration, run.evaluate_every)
            if stopping or due or state.iteration == total:
                save()  # before an evaluation too, which may take long
            if stopping:
                log.warning("%s: saved after iteration %d; start again to go on", stop.name, state.iteration)
                raise SystemExit(stop.exit_code)


def distributed(model: nn.Module) -> DistributedDataParallel:
    """The model, the ranks' gradients averaged: those of the parameters that want one now."""
    # of 1 x 1 kernels, whose two layouts are the same
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def forward_backward(
    model: nn.Module,
    micro_batches: list[tuple[Batch, Targets]],
    scaler: torch.amp.GradScaler,
    run: Run,
    stats: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Add the gradient of the micro-batches' mean loss; returns the mean losses, and statistics of the last one."""
    mean, statistics = dict[str, Tensor](), dict[str, Tensor]()
    for index, (batch, targets) in enumerate(micro_batches, 1):
        # the ranks exchange gradients once, with the last micro-batch
        last = index == len(micro_batches)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            with autocast(run.world.device, run.runtime.precision):
                losses, statistics = model(batch, targets, stats=True) if stats else (model(batch, targets), {})
            scaler.scale(sum(losses.values()) / len(micro_batches)).backward()
        for name, loss in losses.items():
            mean[name] = mean.get(name, 0) + loss.detach().float() / len(micro_batches)
    return mean, statistics


def is_finite(losses: dict[str, Tensor], norm: Tensor, state: State) -> bool:
    """Whether the losses and the gradient are; in fp16 the scaler itself skips steps of infinite gradient."""
    values = list(losses.values()) if state.scaler.is_enabled() else [*losses.values(), norm]
    return bool(torch.stack(values).isfinite().all())


def update(state: State, norm: Tensor, training: Training) -> None:
    """Clip the gradient and take the optimiser's step."""
    if training.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(state.parameters, training.clip_norm, norm)
    if training.clip_value:
        torch.nn.utils.clip_grad_value_(state.parameters, training.clip_value)
    state.scaler.step(state.optimizer)
    if state.ema:
        state.ema.update(state.model, state.iteration)


def is_due(iteration: int, every: int | None) -> bool:
    return every is not None and every > 0 and iteration % every == 0
