"""Compare training runs: which RoI method, or any other setting, is better, by how much, and how sure is that?

    python compare.py 'runs=runs/ablation/*'
    python compare.py 'runs=[runs/a,runs/b]' output=reports/a_b baseline=align

Runs that differ in nothing but the seed are one method. The report has AP with intervals, errors, classes, cost,
alignment, pictures, and the runs that were left out, with the reason.
Exit codes: 0 done, 1 failed, 2 a setting cannot work or no run can be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detector.config import entry_point


@dataclass
class Keys:
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


@entry_point("compare", Keys)
def main(cfg):
    """The work is done in detector/commands/compare.py."""
    from detector.commands.compare import compare_runs

    compare_runs(cfg)


if __name__ == "__main__":
    main()
