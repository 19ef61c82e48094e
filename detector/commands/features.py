"""Features of the boxes in a COCO file: what the RoI method and the box head make of each, as arrays in a .npz.

detector features checkpoint=runs/quickstart/best.pt annotations=instances.json images=photos
detector features checkpoint=... annotations=... images=... output=val.npz maps=false dtype=float16
detector features checkpoint=... annotations=... images=... trust=my_package         a model with parts of your own

The file holds annotation_ids, image_ids, category_ids [R], boxes [R, 4] (x1, y1, x2, y2) clipped to their images,
vectors [R, D], which the head's predictor reads, and features [R, C, h, w], which the RoI method gives the head. In
Python:

    detector.load(checkpoint).region_features(image, boxes)

Exit codes: 0 done, 1 none of the images was readable, 2 a setting, the checkpoint or the data cannot work.
"""

from __future__ import annotations

import logging
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from detector.config import ConfigError, RunError, as_program, config_errors, make_folder
from detector.data import CocoDataset
from detector.inference.load import load
from detector.runtime import start_ranks
from detector.settings import Runtime

log = logging.getLogger(__name__)


def write_features(
    checkpoint: str,
    annotations: str,
    images: str,
    *,
    output: str = "features.npz",
    maps: bool = True,
    dtype: Literal["float32", "float16"] = "float32",
    stage: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32",
    trust: str | list[str] | None = None,
) -> Path:
    """Write the .npz, which is whole or not there; returns its path. configs/features.yaml explains the arguments."""
    target = Path(output)
    if target.suffix != ".npz":
        raise ConfigError(f"output = {output}: the name must end in .npz")
    with config_errors("device"):
        world = start_ranks(Runtime(device=device))
    detector = load(checkpoint, world.device, trust=trust)
    with config_errors("images"):
        data = CocoDataset(
            *(images, annotations),
            masks=False,
            truth=False,
            keep_empty=False,
            on_error=on_error,
            pictures=detector.pictures,
        )
    ids = np.array([-1 if number is None else number for number in data.category_ids], np.int64)
    counts = np.diff(data.annotations.object_starts)[data.rows]
    make_folder(target.parent, "output")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}.") as folder:
        arrays: dict[str, np.ndarray] = {}  # on disk: those of a whole data set do not fit into memory
        place = 0
        for position, count in enumerate(tqdm(counts.tolist(), unit="image", leave=False, disable=None)):
            try:
                image = data.read(position)
            except (ValueError, OSError) as error:
                if on_error == "raise":
                    raise ConfigError(f"{error}; on_error=skip leaves it out") from None
                log.warning("left out: %s", error)
                continue
            index = int(data.rows[position])
            objects, first = data.annotations.objects(index), int(data.annotations.object_starts[index])
            found = detector.region_features(image, objects.boxes, stage, precision)
            rows = {
                "annotation_ids": data.annotations.object_ids[first : first + count],
                "image_ids": np.full(count, data.annotations.image_ids[index]),
                "category_ids": ids[objects.labels - 1],
                "boxes": objects.boxes,
                "vectors": found.vectors.numpy().astype(dtype),
            }
            if maps:
                rows["features"] = found.features.numpy().astype(dtype)
            for name, values in rows.items():
                if name not in arrays:
                    shape = (int(counts.sum()), *values.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", values.dtype, shape)
                arrays[name][place : place + count] = values
            place += count
        if not arrays:
            raise RunError(f"none of the {len(data)} images could be read")
        with zipfile.ZipFile(f"{folder}/all.npz", "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array[:place])
        os.replace(f"{folder}/all.npz", target)
    kinds = ", ".join(f"{name} {[place, *array.shape[1:]]}" for name, array in arrays.items())
    print(f"{target}: {place} boxes; {kinds}")
    return target


main = as_program("features", write_features, __doc__)
