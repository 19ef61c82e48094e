"""Trials of `hydra/sweeper=optuna_pruning`: what training tells of one while it runs, and whether it is worth going on.

Hydra's plugin gives a trial to `custom_search_space` before its job starts, and has no other way to it. Jobs in this
process find theirs by their number; those of a cluster's launcher have none, and run to their end.
"""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

TRIALS: list[Any] = []  # of this sweep, in the order of the jobs


def watch(config: DictConfig, trial: Any) -> None:
    """Keep a trial for its job."""
    TRIALS.append(trial)


def is_hopeless(value: float, iteration: int) -> bool:
    """Tell the sweep what a job's metric is at an iteration. Whether the sweep's pruner gives the job up."""
    if not (TRIALS and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
        return False
    trial = TRIALS[HydraConfig.get().job.num]
    trial.report(value, iteration)
    return trial.should_prune()
