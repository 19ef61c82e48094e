"""Slices with their neighbours as channels: pages of a TIFF, and a series of DICOM files."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from detector.data import Pictures
from detector.data.pictures import PictureError
from detector.data.slices import around

THREE = {"channels": 3, "neighbours": 1}


@pytest.fixture
def stack(tmp_path):
    """Five pages, 10 * page bright."""
    path = tmp_path / "stack.tif"
    tifffile.imwrite(
        path, np.stack([np.full((8, 9), 10 * page, np.uint8) for page in range(1, 6)]), photometric="minisblack"
    )
    return path


def test_pages_before_and_behind_are_channels(stack):
    assert Pictures(**THREE).read(stack, 3)[0, 0].tolist() == [20, 30, 40]
    assert Pictures(**THREE).read(stack, 1)[0, 0].tolist() == [10, 10, 20]  # at an end the last one again
    assert Pictures(**THREE, page=5).read(stack)[0, 0].tolist() == [40, 50, 50]
    assert Pictures(channels=5, neighbours=2).read(stack, 2).shape == (8, 9, 5)
    assert Pictures(**THREE).check(stack, 2).pages == 5
    with Pictures(**THREE).parts(stack, 2) as picture:
        assert picture.region(slice(0, 2), slice(0, 3))[0, 0].tolist() == [10, 20, 30]


def test_a_range_holds_for_all_slices(tmp_path):
    path = tmp_path / "deep.tif"
    tifffile.imwrite(path, np.stack([np.full((4, 4), v, np.uint16) for v in (0, 1000, 2000)]), photometric="minisblack")
    assert Pictures(**THREE, intensity=[0, 2000]).read(path, 2)[0, 0].tolist() == [0, 128, 255]


def test_a_dicom_series_is_in_the_order_of_its_places(tmp_path):
    pytest.importorskip("pydicom", reason="the extra 'pictures' is not installed: no pydicom")
    folder = tmp_path / "scan"
    folder.mkdir()
    for name, place, series in [("c", 1.0, "1"), ("a", 2.0, "1"), ("b", 3.0, "1"), ("z", 2.5, "2")]:
        series_slice(folder / f"{name}.dcm", int(place * 10), place, series)
    assert [file.name for file, _ in around(folder / "a.dcm", None, 1, 1)] == ["c.dcm", "a.dcm", "b.dcm"]
    assert Pictures(**THREE).read(folder / "a.dcm")[0, 0].tolist() == [10, 20, 30]
    assert Pictures(**THREE).read(folder / "b.dcm")[0, 0].tolist() == [20, 30, 30]
    assert Pictures(**THREE).read(folder / "z.dcm")[0, 0].tolist() == [25, 25, 25]  # alone in its series


def series_slice(path, value: int, place: float, series: str) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{value}"
    file = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows = file.Columns = 4
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 8, 8, 7
    file.PixelData = np.full((4, 4), value, np.uint8).tobytes()
    file.SeriesInstanceUID, file.ImageOrientationPatient = f"1.2.{series}", [1, 0, 0, 0, 1, 0]
    file.ImagePositionPatient, file.InstanceNumber = [0, 0, place], 99 - int(place)
    file.save_as(path)


def test_what_has_no_neighbours_and_settings_that_cannot_be(tmp_path, stack):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "one.png")
    for look in (Pictures(**THREE).read, Pictures(**THREE).check):
        with pytest.raises(ValueError, match=r"one.png cannot be read: it has one page and is no DICOM file"):
            look(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"data.channels = 3: must be 5 with data.neighbours=2"):
        Pictures(channels=3, neighbours=2)
    with pytest.raises(ValueError, match=r"data.neighbours = 9"):
        Pictures(channels=19 - 4, neighbours=9)
    with pytest.raises(ValueError, match=r"one .low, high. with data.neighbours"):
        Pictures(**THREE, intensity=[[0, 1], [0, 2], [0, 3]])
    with pytest.raises((ValueError, PictureError), match="page 9 is wanted"):
        Pictures(**THREE).read(stack, 9)
    tifffile.imwrite(tmp_path / "mixed.tif", np.zeros((4, 4), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "mixed.tif", np.zeros((5, 4), np.uint8), photometric="minisblack", append=True)
    with pytest.raises(ValueError, match="its neighbours are of other sizes"):
        Pictures(**THREE).read(tmp_path / "mixed.tif", 1)
