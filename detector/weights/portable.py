"""A trained detector as one safetensors file: its tensors, and in the header what is needed to build it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from detector.config import ConfigError
from detector.engine.checkpoint import atomically

FORMAT = "detector safetensors 1"
FIELDS = ("config", "categories", "category_ids")


def save_safetensors(state: Mapping[str, Any], path: str | Path) -> None:
    """Write the weights of a checkpoint (the averaged ones if there are some) with its config and categories.

    state: what engine.checkpoint.load returns. The optimizer and all else that only training needs stays behind.
    """
    header = {"format": FORMAT} | {field: json.dumps(state[field]) for field in FIELDS}
    tensors = {name: tensor.contiguous().clone() for name, tensor in (state["ema"] or state["model"]).items()}
    content = save(tensors, header)
    atomically(Path(path), lambda file: file.write(content))


def load_safetensors(path: str | Path) -> dict[str, Any]:
    """What detector.load needs of a file that `save_safetensors` wrote: {"model", "ema", "config", "categories", ...}.

    Raises ConfigError for a file that is missing, damaged, or holds other tensors.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ConfigError(
                    f"{path}: safetensors without the config of a detector of this project; give the weights of other "
                    "programs as model.weights or model.backbone.weights"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not readable as safetensors: cut short or of another format ({error})") from error
    return {"model": tensors, "ema": None} | {field: json.loads(header[field]) for field in FIELDS}
