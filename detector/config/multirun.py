"""The jobs of a multirun (`-m`): what became of each. One that fails does not stop the others.

Started again, the same command finds finished runs, which it leaves as they are, and interrupted ones, which it
resumes. Both is the training's doing; here it is only seen from what a job finds in its run folder and leaves there.
Jobs may be processes of their own, on other hosts even: each writes its record into a folder that all of them see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from detector.config.trials import TRIALS

STATES = ("finished before", "done", "resumed", "stopped", "failed", "lost")


@dataclass
class Job:
    """One job. state: one of STATES; value: what it returned, a fraction of 1; reason: of a failure."""

    overrides: list[str]
    folder: str | None
    state: str = "lost"  # until it ends, one way or the other
    seconds: float = 0.0
    value: float | None = None
    metric: str | None = None  # what `value` is, such as segm.AP
    reason: str | None = "it never said that it ended: killed, or still running"


class Multirun(Callback):
    """Watches jobs. Launchers pickle it together with the program: a job's copy knows the folder of the records.

    Hydra tells it when a multirun begins, however that was asked for. When its jobs begin and end the program says:
    Hydra's on_job_end is not called for one that a signal stops.
    """

    records: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.open(config.hydra.sweep.dir)

    def open(self, folder: str | Path) -> None:
        """Begin, with the records in a new folder below `folder`; `report` removes it."""
        TRIALS.clear()
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.records = Path(tempfile.mkdtemp(prefix="jobs-", dir=folder)).absolute()

    @contextmanager
    def job(
        self, number: int, overrides: list[str], folder: str | None, expected: tuple[type[Exception], ...]
    ) -> Iterator[Job]:
        """Record job `number` in this context, which may put its result into `value`. Errors pass through.

        folder: of a training run, else None; expected: errors whose message says everything, others are printed with
        where they come from.
        """
        job, began = Job(overrides, folder), time.perf_counter()
        self.write(number, job)
        before = fingerprint(folder)
        interrupted = folder is not None and (Path(folder) / "last.pt").exists()
        try:
            yield job
            finished = before is not None and before == fingerprint(folder)
            job.state, job.reason = "finished before" if finished else "resumed" if interrupted else "done", None
        except Exception as error:
            job.state, job.reason = "failed", " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, expected):
                print(f"error: {error}", file=sys.stderr)
            else:
                job.reason = f"{type(error).__name__}: {job.reason}"
                traceback.print_exc()
            raise
        except BaseException:  # a signal: the jobs behind it do not start
            job.state, job.reason = "stopped", None
            raise
        finally:
            job.seconds = round(time.perf_counter() - began, 1)
            self.write(number, job)

    def write(self, number: int, job: Job) -> None:
        """Put the job's record where the others are."""
        temporary = self.records / f"{number:06d}.tmp"
        temporary.write_text(json.dumps(asdict(job)), encoding="utf-8")
        temporary.replace(temporary.with_suffix(".json"))

    @property
    def jobs(self) -> list[Job]:
        """The jobs that have started, in their order."""
        files = sorted(self.records.glob("*.json")) if self.records else []
        return [Job(**json.loads(file.read_text(encoding="utf-8"))) for file in files]

    @property
    def failed(self) -> bool:
        return any(job.state in ("failed", "lost") for job in self.jobs)

    def report(self) -> None:
        """Print what became of the jobs, of training runs also into multirun.json, or NAME-multirun.json, beside them.

        The records are gone then.
        """
        jobs = self.jobs
        if self.records:
            shutil.rmtree(self.records, ignore_errors=True)
            self.records = None
        if not jobs:
            return
        counts = {state: sum(job.state == state for job in jobs) for state in STATES}
        print(f"\n{len(jobs)} jobs: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}")
        for job in jobs:
            number = "" if job.value is None else f"{metric_name(job)} {100 * job.value:.1f} %".strip()
            note = job.reason or number
            print(f"  {job.state:<15}  {job.folder or ' '.join(job.overrides)}  {note}".rstrip())
        folders = [Path(job.folder).absolute().parent for job in jobs if job.folder]
        if folders:
            # 'ablation_roi-' of 'ablation_roi-roi=pool,seed=0', if all have it
            beginnings = {re.match(r"[^=]*-|", Path(job.folder).name)[0] for job in jobs if job.folder}
            shared = beginnings.pop() if len(beginnings) == 1 else ""
            file = Path(os.path.commonpath(folders)) / f"{shared}multirun.json"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps([asdict(job) for job in jobs], indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                print(f"{file} could not be written: {error}", file=sys.stderr)


WATCHER = Multirun()


def watcher() -> Multirun:
    """The one of this process, for the programs and for Hydra, whose `callbacks` in configs/*.yaml name this."""
    return WATCHER


def metric_name(job: Job) -> str:
    """What a job's value is, as people say it: auto is the mask AP where masks were measured."""
    if job.metric is None:
        return ""
    kind, _, number = job.metric.partition(".")
    if job.metric == "auto":
        try:
            measured = json.loads((Path(job.folder) / "metrics.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            measured = {}
        kind, number = "segm" if "segm" in measured else "bbox", "AP"
    return f"{ {'segm': 'mask', 'bbox': 'box', 'keypoints': 'keypoint'}.get(kind, kind) } {number}"


def fingerprint(folder: str | None) -> Any:
    """Changes as soon as a finished run trains on; None for one that is not finished."""
    try:
        return folder and [(Path(folder) / name).stat().st_mtime_ns for name in ("metrics.json", "log.jsonl")]
    except OSError:
        return None
