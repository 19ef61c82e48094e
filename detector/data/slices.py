"""Slices of a volume: what lies before and behind one, in a file of several pages or in a series of DICOM files."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from detector.data.picture_files import DICOM, NEED
from detector.data.places import Entry

SERIES = 64  # folders whose order is remembered


def around(
    path: str | os.PathLike | Entry, page: int | None, pages: int, count: int
) -> list[tuple[Path | Entry, int | None]]:
    """The `count` slices before a slice, itself and `count` behind it, (file, page); at an end the last one again.

    pages: how many the file has. A DICOM file of one page lies among the others of its series in its folder.

    Raises ValueError for a file that has no neighbours.
    """
    path = path if isinstance(path, Entry) else Path(path)
    if pages > 1:
        here = page or 1
        return [(path, min(max(number, 1), pages)) for number in range(here - count, here + count + 1)]
    if path.suffix.lower() not in DICOM:
        raise ValueError(
            "it has one page and is no DICOM file: data.neighbours needs slices, files of several pages or DICOM series"
        )
    if isinstance(path, Entry):
        raise ValueError("DICOM series are read from folders: data.neighbours needs files of several pages elsewhere")
    folder = path.parent
    order = _ordered(str(folder), os.stat(folder).st_mtime_ns)
    series = next((files for files in order if path.name in files), (path.name,))
    here = series.index(path.name)
    numbers = (min(max(number, 0), len(series) - 1) for number in range(here - count, here + count + 1))
    return [(folder / series[number], page) for number in numbers]


@lru_cache(SERIES)
def _ordered(folder: str, changed: int) -> tuple[tuple[str, ...], ...]:
    """The names of the DICOM files of each series in a folder: along the normal of their planes, where they say where
    they lie, else by their numbers. changed: when the folder was, so that a new file is seen."""
    try:
        import pydicom
    except ImportError:
        raise ValueError(f"DICOM needs pydicom: {NEED}") from None
    wanted = ["SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber"]
    series: dict[str, list[tuple[float, float, str]]] = {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix.lower() not in DICOM:
            continue
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted, force=True)
        except Exception:  # pydicom raises what it meets; reading the file itself says what is wrong
            continue
        place, turned = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
        along = 0.0
        if place is not None and turned is not None:
            axes = np.array(turned, float).reshape(2, 3)
            along = float(np.cross(*axes) @ np.array(place, float))
        number = float(header.get("InstanceNumber") or 0)
        series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((round(along, 3), number, file.name))
    return tuple(tuple(name for *_, name in sorted(files)) for files in series.values())
