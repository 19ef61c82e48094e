"""What a run tells: a progress bar or plain lines, log.jsonl, train.log, loggers. Only rank 0 writes.

Losses are summed on the device; the host waits for them only when a line is due.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from detector.engine.loggers import Logger, start_loggers
from detector.engine.state import Run
from detector.runtime import World

log = logging.getLogger("detector")
EARLY = (1, 2, 5, 10, 20)  # steps that are reported whatever runtime.log_every says: is it learning, how fast?
LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "debug": logging.DEBUG}


class Screen(logging.StreamHandler):
    """Writes messages to the standard error output, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # as every handler: a message that cannot be written ends no run
            self.handleError(record)


def start_log(folder: Path, world: World, verbosity: str = "normal") -> None:
    """Messages go to the screen, as many as runtime.verbosity says, and to train.log on rank 0; the other ranks only
    warn."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(min(logging.INFO, LEVELS[verbosity]) if world.main else logging.WARNING)
    screen = Screen()
    screen.setLevel(LEVELS[verbosity])
    screen.setFormatter(logging.Formatter("%(message)s" if world.main else f"rank {world.rank}: %(message)s"))
    log.addHandler(screen)
    if world.main:
        file = logging.FileHandler(folder / "train.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


class Journal:
    """The record of a run that stands at iteration `start`, last evaluated at `evaluated`.

    Later lines of a log.jsonl left by a killed process are cut off, so that the file is one curve.
    """

    def __init__(self, run: Run, start: int = 0, evaluated: int = 0):
        self.run, self.world, self.total = run, run.world, run.total
        self.path = run.folder / "log.jsonl"
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.waited = 0.0
        self.clock = self.began = self.opened = time.perf_counter()
        self.before = 0.0  # seconds that earlier parts of the run took
        self.evaluation_took = 0.0  # seconds of the last one
        self.first = self.clocked = start
        self.bar = None
        self.loggers: list[Logger] = []
        forget_peak(self.world.device)
        if not self.world.main:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        ends = {True: evaluated, False: start}
        kept = [line for line in lines if (entry := parsed(line)) and entry["iteration"] <= ends["metrics" in entry]]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        silent = not sys.stderr.isatty() or run.runtime.verbosity == "quiet"
        self.bar = tqdm(total=self.total, initial=start, disable=silent, dynamic_ncols=True, unit="it")
        self.loggers = start_loggers(run.cfg, run.folder, start)
        for logger in self.loggers:
            logger.config(run.config)

    def is_due(self, iteration: int) -> bool:
        """Whether a line is written after this step."""
        every = 1 if self.run.runtime.verbosity == "debug" else self.run.runtime.log_every
        return iteration % every == 0 or (iteration < every and iteration in EARLY) or iteration == self.total

    def add(self, losses: Mapping[str, Tensor], gradient_norm: Tensor, waited: float) -> None:
        """Take in one step: its losses, the norm of its gradient, the seconds it waited for data."""
        values = {**losses, "loss": functools.reduce(torch.add, losses.values()), "grad_norm": gradient_norm}
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.count += 1
        self.waited += waited

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last line, so that a resumed run's next line is that of the undisturbed one."""
        sums = {key: self.world.mean(value).cpu() for key, value in self.sums.items()}
        took = {"elapsed": self.elapsed(), "evaluation_took": self.evaluation_took}
        return {"sums": sums, "count": self.count, **took}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {key: value.to(self.world.device) for key, value in state["sums"].items()}
        self.count, self.before = state["count"], state.get("elapsed", 0.0)
        self.evaluation_took = state.get("evaluation_took", 0.0)

    def elapsed(self) -> float:
        """Seconds that the run has taken, evaluations and earlier parts of it included, the time in between not."""
        return self.before + time.perf_counter() - self.opened

    def step(self, iteration: int, epoch: float, lr: float, stats: Mapping[str, Tensor]) -> None:
        """One step is done; write a line if it is time. All ranks must call it: they average their losses here."""
        if self.bar is not None:
            self.bar.update()
        if not (self.count and self.is_due(iteration)):
            return
        keys = sorted(self.sums)
        means = self.world.mean(torch.stack([self.sums[key] for key in keys])) / self.count
        now = time.perf_counter()
        took, steps = now - self.clock, iteration - self.clocked
        line: dict[str, Any] = {"iteration": iteration, "epoch": round(epoch, 4), "elapsed": round(self.elapsed(), 1)}
        # JSON has no infinity, which is what fp16 gradients are until the scaler's scale fits
        line |= {key: value if math.isfinite(value) else None for key, value in zip(keys, means.tolist(), strict=True)}
        line |= {
            "lr": lr,
            "images_per_second": round(steps * self.run.training.batch_size / took, 3),
            "data_time": round(self.waited / took, 4),  # share of the time that the step waited for data
            "memory_mb": round(memory_mb(self.world.device)),
        }
        for key, value in stats.items():
            if key.endswith("offsets") and value.numel():
                line[f"{key}_mean_abs"], line[f"{key}_max_abs"] = value.abs().mean().item(), value.abs().max().item()
                line[f"{key}_mean_norm"] = value.norm(dim=1).mean().item()  # of the vectors (dx, dy)
            elif value.dim() == 0:
                line[key] = value.item()
        self.sums, self.count, self.waited, self.clock, self.clocked = {}, 0, 0.0, now, iteration
        if self.world.main:
            self.write(line)
            self.say(line, now)
        every = self.run.runtime.histograms_every
        if self.loggers and iteration // every > (iteration - steps) // every:
            for key, value in stats.items():
                if value.dim() and value.numel():
                    values = value.detach().float().cpu()
                    for logger in self.loggers:
                        logger.histogram(key, values, iteration)

    def write(self, line: Mapping[str, Any]) -> None:
        """One line into log.jsonl, its numbers to the loggers."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        values = {}
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "iteration":
                part = "loss" if key.startswith("loss") else "offsets" if "offsets" in key else "run"
                values[f"{part}/{key}"] = value
        self.scalars(values, line["iteration"])

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        for logger in self.loggers if values else ():
            logger.scalars(values, iteration)

    def say(self, line: Mapping[str, Any], now: float) -> None:
        """The line in short: on the bar, or as text where there is no terminal."""
        losses = {key.removeprefix("loss_"): value for key, value in line.items() if key.startswith("loss")}
        text = " ".join(f"{key} {value:.3f}" for key, value in losses.items())
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(f"{text} lr {line['lr']:.2g}", refresh=False)
            return
        iteration = line["iteration"]
        left = self.left(iteration, now, line["images_per_second"])
        log.info(
            "%d/%d  %s  lr %.3g  %.1f images/s  data %d%%  %d:%02d left",
            *(iteration, self.total, text, line["lr"], line["images_per_second"]),
            *(100 * line["data_time"], left // 60, left % 60),
        )

    def left(self, iteration: int, now: float, images_per_second: float) -> float:
        """Seconds until the end, evaluations included: before the first, as if an image took it as long as a step's."""
        every = self.run.evaluate_every
        evaluations = -(-self.total // every) - iteration // every
        each = self.evaluation_took or len(self.run.val_set) / images_per_second
        return (now - self.began) / max(1, iteration - self.first) * (self.total - iteration) + evaluations * each

    def evaluation(
        self, iteration: int, metrics: Mapping[str, Mapping[str, float]], losses: Mapping[str, float]
    ) -> None:
        """Record an evaluation; losses: on the validation set, if they were measured."""
        if not self.world.main:
            return
        self.write({"iteration": iteration, "metrics": metrics} | ({"losses": losses} if losses else {}))
        if losses:
            text = " ".join(f"{key.removeprefix('loss_')} {value:.3f}" for key, value in losses.items())
            log.info("validation  %s", text)
        values = {f"{kind}/{key}": value for kind, numbers in metrics.items() for key, value in numbers.items()}
        measured = {tag: value for tag, value in values.items() if value != -1}  # COCO's -1: there is nothing of it
        self.scalars(measured | {f"validation/{key}": value for key, value in losses.items()}, iteration)

    def results(self, metrics: Mapping[str, Mapping[str, float]], checkpoint: Path) -> None:
        """The run is finished."""
        measured = {
            kind: {key: value for key, value in numbers.items() if value != -1} for kind, numbers in metrics.items()
        }
        for logger in self.loggers:
            logger.results(measured, checkpoint)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training, in throughput and ETA."""
        begin = time.perf_counter()
        yield
        lost = time.perf_counter() - begin
        self.clock += lost
        self.began += lost

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """As `paused`; how long it took counts in the time left, once for each evaluation to come."""
        begin = time.perf_counter()
        with self.paused():
            yield
        self.evaluation_took = time.perf_counter() - begin

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for logger in self.loggers:
            logger.close()


def parsed(line: str) -> dict[str, Any]:
    """A line of log.jsonl; {} for one that was cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def forget_peak(device: torch.device) -> None:
    """Let `memory_mb` begin anew: of several runs in one process, each has its own peak. On the CPU on Linux alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory_mb(device: torch.device) -> float:
    """The peak of the memory in use: on the GPU torch's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")):
            return int(peak[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
