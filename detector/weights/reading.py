"""Read checkpoint files of any framework without running what is in them.

A pickle may name any function of any installed package to be called while it is read. Here only the few that rebuild
arrays and tensors are: for `.pth` that is torch's weights_only mode, for detectron2's `.pkl` an unpickler of our own.
Classes that a checkpoint merely carries along (configs, log histories) become inert shells.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from detector.checkpoint import SAFETENSORS, load_safetensors

ARRAYS = {  # what numpy's pickles are made of; its core package moved in numpy 2
    **{
        (f"numpy.{core}.multiarray", name): getattr(np._core.multiarray, name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
}
MODELS = (
    "ema",
    "model",
    "state_dict",
    "model_state",
    "blobs",
)  # where files keep the weights: ours and detectron2's, mmdet's, ...


class ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and numpy arrays; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 2's byte strings arrive
            return lambda text, encoding: text.encode("latin1")
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a numpy array")
        return ARRAYS[module, name]


class Shell:
    """Stands for an object of a class that is not read: it keeps nothing and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_file(path: str | Path) -> dict:
    """The contents of a checkpoint: `.safetensors`, `.pkl` (pickled numpy arrays) or anything that torch.save wrote.

    Raises FileNotFoundError, and ValueError for a file that is damaged or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                ours = (file.metadata() or {}).get("format") == SAFETENSORS
            return load_safetensors(path) if ours else safetensors.torch.load_file(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return ArrayUnpickler(file, encoding="latin1").load()
        return read_torch(path)
    except Exception as error:
        raise ValueError(f"weights file {path} cannot be read: {error}") from error


def read_torch(path: Path) -> dict:
    """A file of torch.save in weights_only mode, classes that torch does not know replaced by shells."""
    shells = []
    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        shells = [(type("Shell", (Shell,), {}), name) for name in names]
    with torch.serialization.safe_globals(shells):
        return torch.load(path, map_location="cpu", weights_only=True)


def state_dict_of(contents: dict) -> dict[str, Tensor]:
    """The tensors by name in what `read_file` returned, arrays made tensors, DDP's 'module.' prefix removed.

    Raises ValueError where there are none.
    """
    if not isinstance(contents, dict):
        raise ValueError(f"expected a dict of weights, found a {type(contents).__name__}")
    weights = next((contents[key] for key in MODELS if isinstance(contents.get(key), dict)), contents)
    found = {}
    for key, value in weights.items():
        if isinstance(value, np.ndarray | np.generic) and not str(key).endswith("_momentum"):
            value = torch.from_numpy(np.array(value))  # a copy: pickled arrays may be read-only
        if isinstance(value, Tensor):
            found[str(key)] = value
    if not found:
        raise ValueError(f"found no tensors: the top-level keys are {', '.join(map(str, list(weights)[:10]))}")
    if all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return found
