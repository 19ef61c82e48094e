"""The jobs of a multirun (`-m`): what became of each. One that fails does not stop the others.

Started again, the same command finds finished runs, which it leaves as they are, and interrupted ones, which it
resumes. Both is the training's doing; here it is only seen from what a job finds in its run folder and leaves there.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STATES = ("finished before", "done", "resumed", "stopped", "failed")


@dataclass
class Job:
    """One job. state: one of STATES; value: what it returned, such as the metric; reason: of a failure."""

    overrides: list[str]
    folder: str | None
    state: str = "failed"
    seconds: float = 0.0
    value: float | None = None
    reason: str | None = None


class Multirun:
    """Watches jobs that run in this process, one after the other."""

    def __init__(self):
        self.jobs: list[Job] = []

    @contextmanager
    def job(self, overrides: list[str], folder: str | None, expected: tuple[type[Exception], ...]) -> Iterator[Job]:
        """Record the job in this context, which may put its result into `value`. Errors pass through.

        folder: of a training run, else None; expected: errors whose message says everything, others are printed with
        where they come from.
        """
        job, began = Job(overrides, folder), time.perf_counter()
        self.jobs.append(job)
        before = fingerprint(folder)
        interrupted = folder is not None and (Path(folder) / "last.pt").exists()
        try:
            yield job
            finished = before is not None and before == fingerprint(folder)
            job.state = "finished before" if finished else "resumed" if interrupted else "done"
        except Exception as error:
            job.reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, expected):
                print(f"error: {error}", file=sys.stderr)
            else:
                job.reason = f"{type(error).__name__}: {job.reason}"
                traceback.print_exc()
            raise
        except BaseException:  # a signal: the jobs behind it do not start
            job.state = "stopped"
            raise
        finally:
            job.seconds = round(time.perf_counter() - began, 1)

    @property
    def failed(self) -> bool:
        return any(job.state == "failed" for job in self.jobs)

    def report(self) -> None:
        """Print what became of the jobs; of training runs also into multirun.json beside their folders."""
        if not self.jobs:
            return
        counts = {state: sum(job.state == state for job in self.jobs) for state in STATES}
        print(f"\n{len(self.jobs)} jobs: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}")
        for job in self.jobs:
            note = job.reason or ("" if job.value is None else f"{job.value:.3f}")
            print(f"  {job.state:<15}  {job.folder or ' '.join(job.overrides)}  {note}".rstrip())
        folders = [Path(job.folder).absolute().parent for job in self.jobs if job.folder]
        if not folders:
            return
        file = Path(os.path.commonpath(folders)) / "multirun.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([asdict(job) for job in self.jobs], indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"{file} could not be written: {error}", file=sys.stderr)


def fingerprint(folder: str | None) -> Any:
    """Changes as soon as a finished run trains on; None for one that is not finished."""
    try:
        return folder and [(Path(folder) / name).stat().st_mtime_ns for name in ("metrics.json", "log.jsonl")]
    except OSError:
        return None
