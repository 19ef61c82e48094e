"""Where a run's numbers and pictures go besides log.jsonl: configs/logger/*.yaml, several by `logger=[...]`.

`factory(folder=run folder, name=, start=iteration)` makes a logger, on rank 0, when the run begins or goes on; it keeps
the promises of `Logger`. A remote run that goes on is the one whose id lies in the run's folder, in loggers.json.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from detector.checkpoint import flatten, write_json
from detector.config import ConfigError, build, literal
from detector.config.schema import find_target

log = logging.getLogger(__name__)


class Logger(Protocol):
    """What a run tells. Tags are like loss/loss_mask, bbox/AP, predictions/0; iterations grow."""

    def config(self, config: Mapping[str, Any]) -> None:
        """The run's configuration, once at its start."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None: ...

    def picture(self, tag: str, picture: np.ndarray, iteration: int) -> None:
        """[h, w, 3] uint8."""

    def histogram(self, tag: str, values: Tensor, iteration: int) -> None:
        """Values of any shape, on the CPU, at least one."""

    def results(self, metrics: Mapping[str, Mapping[str, float]], checkpoint: Path) -> None:
        """The final metrics and the best checkpoint, when a run is finished."""

    def close(self) -> None:
        """The process ends, whether the run is finished or not."""


class Silent:
    """A logger that passes over everything: subclasses take what they have a place for."""

    needs: str | None = None  # the package to import

    def config(self, config: Mapping[str, Any]) -> None:
        pass

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        pass

    def picture(self, tag: str, picture: np.ndarray, iteration: int) -> None:
        pass

    def histogram(self, tag: str, values: Tensor, iteration: int) -> None:
        pass

    def results(self, metrics: Mapping[str, Mapping[str, float]], checkpoint: Path) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard(Silent):
    """Event files in tensorboard/ in the run's folder."""

    def __init__(self, folder: Path, name: str, start: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        for tag, value in values.items():
            self.board.add_scalar(tag, value, iteration)
        self.board.flush()

    def picture(self, tag: str, picture: np.ndarray, iteration: int) -> None:
        self.board.add_image(tag, picture, iteration, dataformats="HWC")

    def histogram(self, tag: str, values: Tensor, iteration: int) -> None:
        self.board.add_histogram(tag, values, iteration)

    def close(self) -> None:
        self.board.close()


class Csv(Silent):
    """scalars.csv in the run's folder: iteration, tag, value. Lines of a killed process that come again are cut off."""

    def __init__(self, folder: Path, name: str, start: int):
        self.path = folder / "scalars.csv"
        rows: list[list[str]] = []
        if start and self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= start]
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["iteration", "tag", "value"], *rows])

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([iteration, tag, value] for tag, value in values.items())


class WandB(Silent):
    """Weights & Biases.

    Args:
        project: where the run goes.
        mode: online, offline (`wandb sync` sends what lies in the run's folder, under wandb/), or disabled.
        entity: of the project; null: the user's own.
        checkpoint: send best.pt as an artefact.
    """

    needs = "wandb"

    def __init__(
        self,
        folder: Path,
        name: str,
        start: int,
        project: str = "two-stage-detector",
        mode: Literal["online", "offline", "disabled"] = "online",
        entity: str | None = None,
        checkpoint: bool = True,
    ):
        import wandb

        self.wandb, self.checkpoint = wandb, checkpoint
        known = remembered(folder, "wandb") if start else None
        self.run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            id=known or uuid.uuid4().hex[:8],
            resume="allow",
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        remember(folder, "wandb", self.run.id)

    def config(self, config: Mapping[str, Any]) -> None:
        self.run.config.update(dict(config), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self.run.log(dict(values), step=iteration)

    def picture(self, tag: str, picture: np.ndarray, iteration: int) -> None:
        self.run.log({tag: self.wandb.Image(picture)}, step=iteration)

    def histogram(self, tag: str, values: Tensor, iteration: int) -> None:
        self.run.log({tag: self.wandb.Histogram(values.flatten().tolist())}, step=iteration)

    def results(self, metrics: Mapping[str, Mapping[str, float]], checkpoint: Path) -> None:
        self.run.summary.update({f"final/{key.replace('.', '/')}": value for key, value in flatten(metrics).items()})
        if self.checkpoint:
            artefact = self.wandb.Artifact(f"checkpoint-{self.run.id}", type="model")
            artefact.add_file(str(checkpoint))
            self.run.log_artifact(artefact)

    def close(self) -> None:
        self.run.finish()


class MLflow(Silent):
    """MLflow: scalars, pictures, config.yaml, final metrics as final/..., best.pt as an artefact. It has no histograms.

    Args:
        tracking_uri: of the server or store; null: MLFLOW_TRACKING_URI, else the folder mlruns.
        experiment: where the run goes.
        checkpoint: store best.pt too.
    """

    needs = "mlflow"

    def __init__(
        self,
        folder: Path,
        name: str,
        start: int,
        tracking_uri: str | None = None,
        experiment: str = "two-stage-detector",
        checkpoint: bool = True,
    ):
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.metric, self.checkpoint, self.lost = Metric, checkpoint, False
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").absolute().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which needs no database; MLflow advises against it
        self.client = MlflowClient(uri)
        self.id = remembered(folder, "mlflow") if start else None
        if self.id is None:
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment)
            self.id = self.client.create_run(number, run_name=name).info.run_id
            remember(folder, "mlflow", self.id)
        else:
            self.client.update_run(self.id, status="RUNNING")

    def config(self, config: Mapping[str, Any]) -> None:
        self.send(self.client.log_text, OmegaConf.to_yaml(OmegaConf.create(literal(dict(config)))), "config.yaml")
        for key, value in flatten(config).items():
            if key in TOLD:
                self.send(self.client.set_tag, key, str(value))

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        now = int(1000 * time.time())
        metrics = [self.metric(tag, float(value), now, iteration) for tag, value in values.items()]
        self.send(self.client.log_batch, metrics)

    def picture(self, tag: str, picture: np.ndarray, iteration: int) -> None:
        self.send(self.client.log_image, picture, f"{tag}_{iteration:07d}.png")

    def results(self, metrics: Mapping[str, Mapping[str, float]], checkpoint: Path) -> None:
        for key, value in flatten(metrics).items():
            self.send(self.client.log_metric, f"final/{key.replace('.', '/')}", value)
        if self.checkpoint:
            self.send(self.client.log_artifact, str(checkpoint))

    def close(self) -> None:
        self.send(self.client.set_terminated)

    def send(self, method: Callable[..., Any], *values: Any) -> None:
        """Call a method of the client; a server that cannot be reached ends no run, and is asked no more."""
        from mlflow.exceptions import MlflowException

        if self.lost:
            return
        try:
            method(self.id, *values)
        except MlflowException as error:
            self.lost = True
            log.warning("mlflow gets nothing more of this run: %s", str(error).partition("\n")[0])


TOLD = ("optimizer.lr", "training.batch_size", "seed", "data.root")  # what MLflow shows as tags, to choose runs by


def remembered(folder: Path, kind: str) -> str | None:
    """The id of the remote run that this folder's run is."""
    try:
        return json.loads((folder / "loggers.json").read_text(encoding="utf-8")).get(kind)
    except (OSError, ValueError):
        return None


def remember(folder: Path, kind: str, name: str) -> None:
    path = folder / "loggers.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | {kind: name}, indent=1)


def chosen_loggers(cfg: DictConfig) -> dict[str, DictConfig]:
    """The nodes of the loggers that a run has, by name. `runtime.tensorboard=false` leaves TensorBoard's out.

    Raises ConfigError for one whose package is missing.
    """
    nodes = {name: node for name, node in (cfg.get("logger") or {}).items() if node is not None}
    if not cfg.runtime.get("tensorboard", True):
        nodes.pop("tensorboard", None)
    for name, node in nodes.items():
        needs = getattr(find_target(node._target_, f"logger.{name}"), "needs", None)
        if needs and importlib.util.find_spec(needs) is None:
            raise ConfigError(f"logger.{name}: {needs} is not installed: pip install 'two-stage-detector[{needs}]'")
    return nodes


def start_loggers(cfg: DictConfig, folder: Path, start: int) -> list[Logger]:
    """The loggers of a run that stands at iteration `start`."""
    factories = [build(node, f"logger.{name}") for name, node in chosen_loggers(cfg).items()]
    return [factory(folder=folder, name=cfg.name, start=start) for factory in factories]
