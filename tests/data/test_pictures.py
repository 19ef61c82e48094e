"""Pictures of more than 8 bits, of many pages and of many channels."""

from __future__ import annotations

import pickle

import cv2
import numpy as np
import pydicom
import pytest
import tifffile
from omegaconf import OmegaConf
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from detector.data import CocoDataset, PictureError, Pictures, read_image
from detector.data.picture_files import open_file, upright
from detector.data.pictures import split_page, stretched
from tests.data.coco_files import minimal, write


@pytest.fixture
def deep() -> np.ndarray:
    """Numbers of 12 bits [40, 60] uint16, different everywhere."""
    rows, columns = np.mgrid[:40, :60]
    return (rows * 60 + columns + 900).astype(np.uint16)


def save(path, pixels, **options):
    """Write pixels into a file of the kind that its name says."""
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, **options)
    elif path.suffix == ".pgm":
        path.write_bytes(b"P5 # grey\n%d %d 4095\n" % pixels.shape[::-1] + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path)
    return path


def expected(pixels, low, high):
    return np.rint(((pixels.astype(float) - low) / (high - low) * 255).clip(0, 255)).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.npy", "a.pgm"])
def test_a_window_makes_256_greys_of_12_bits(tmp_path, deep, name):
    image = Pictures(intensity=[900, 900 + 2399]).read(save(tmp_path / name, deep))
    assert image.dtype == np.uint8 and image.shape == (40, 60, 3) and len(np.unique(image)) == 256
    np.testing.assert_array_equal(image[..., 2], expected(deep, 900, 900 + 2399))


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.npy", "a.pgm"])
def test_more_than_8_bits_are_refused_without_a_range(tmp_path, deep, name):
    """Before, a TIFF of 12 bits was all white and a PNG had 16 greys, without a word."""
    path = save(tmp_path / name, deep)
    with pytest.raises(
        PictureError, match=rf"{name} cannot be read: its numbers are uint16.*data\.intensity="
    ) as error:
        read_image(path)
    for advice in ("type", "percentiles", [900, 3299]):  # what the message proposes works
        Pictures(intensity=advice).read(path)
    assert (
        "data.intensity=type" in str(error.value) and pickle.loads(pickle.dumps(error.value)).kind == error.value.kind
    )


def test_16_bit_colours_keep_their_order(tmp_path):
    pixels = np.zeros((8, 9, 4), np.uint16) + np.uint16([65535, 257 * 100, 257 * 7, 257 * 200])
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., [2, 1, 0, 3]])
    tifffile.imwrite(tmp_path / "a.tif", pixels[..., :3], photometric="rgb")
    for name in ("a.png", "a.tif"):
        assert Pictures(intensity="type").read(tmp_path / name)[0, 0].tolist() == [255, 100, 7]
    assert Pictures(channels=4, intensity="type").read(tmp_path / "a.png")[0, 0].tolist() == [255, 100, 7, 200]
    grey = Pictures(channels=1, intensity="type").read(tmp_path / "a.png")
    assert grey.shape == (8, 9, 1) and abs(int(grey[0, 0, 0]) - (0.299 * 255 + 0.587 * 100 + 0.114 * 7)) <= 1


def test_floats_and_signed_numbers(tmp_path):
    ramp = np.linspace(-1, 1, 2400, dtype=np.float32).reshape(40, 60)
    ramp[0, 0], ramp[0, 1], ramp[0, 2] = np.nan, np.inf, -np.inf
    path = save(tmp_path / "a.tif", ramp)
    with pytest.raises(PictureError, match=r"float32.*data\.intensity=percentiles"):
        read_image(path)
    with pytest.raises(PictureError, match=r"float32, which may be of any size; data\.intensity=\[0,1\]"):
        Pictures(intensity="type").read(path)
    image = Pictures(intensity=[-1, 1]).read(path)[..., 0]
    assert image[0, :3].tolist() == [0, 255, 0] and abs(int(image[20, 0]) - 128) <= 1 and image.max() == 255
    found = Pictures(intensity={"percentiles": [10, 90]}).read(path)[..., 0]
    assert 0.09 < (found == 0).mean() < 0.11 and 0.09 < (found == 255).mean() < 0.11
    signed = save(tmp_path / "b.tif", np.array([[-32768, 0, 32767]], np.int16))
    assert Pictures(intensity="type").read(signed)[0, :, 0].tolist() == [0, 128, 255]
    flat = save(tmp_path / "c.tif", np.full((4, 4), 7, np.uint16))
    assert not Pictures(intensity="percentiles").read(flat).any()


def test_tables_and_arithmetic_agree():
    pixels = np.random.default_rng(0).integers(0, 65536, (1100, 3, 2)).astype(np.uint16)
    windows = [(100, 60000), (0, 4095)]
    np.testing.assert_array_equal(stretched(pixels, windows), stretched(pixels.astype(np.float64), windows))


def test_photographs_are_read_as_before(tmp_path):
    """To the bit: what OpenCV and Pillow make of 8 bits, for every intensity that says nothing else."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    for name in ("a.jpg", "a.png", "a.tif", "a.webp"):
        Image.fromarray(pixels).save(tmp_path / name)
        theirs = cv2.cvtColor(cv2.imread(str(tmp_path / name)), cv2.COLOR_BGR2RGB)
        for intensity in (None, "type", "file"):
            np.testing.assert_array_equal(Pictures(intensity=intensity).read(tmp_path / name), theirs)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_deep_pictures(tmp_path, deep, orientation):
    tifffile.imwrite(tmp_path / "a.tif", deep, extratags=[(274, "H", 1, orientation, True)])
    Image.fromarray((deep >> 4).astype(np.uint8)).save(tmp_path / "b.tif", tiffinfo={274: orientation})
    image, other = Pictures(intensity=[0, 4095]).read(tmp_path / "a.tif"), read_image(tmp_path / "b.tif")
    assert image.shape == other.shape and np.abs(image.astype(int) - other).max() <= 1
    assert upright(deep[..., None], orientation).shape[:2] == image.shape[:2]


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (16, 32)},
        {"tile": (16, 32), "compression": "zlib", "predictor": True},
        {"rowsperstrip": 7},
        {"rowsperstrip": 7, "compression": "lzw"},
        {},
        {"byteorder": ">"},
        {"bigtiff": True, "tile": (32, 16)},
    ],
    ids=str,
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_regions_of_tiff_are_parts_of_the_whole(tmp_path, options, planar):
    pixels = np.random.default_rng(0).integers(0, 65536, (70, 90, 5)).astype(np.uint16)
    stored = np.ascontiguousarray(pixels.transpose(2, 0, 1)) if planar == "separate" else pixels
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar, **options)
    file = open_file(tmp_path / "a.tif", 5)
    np.testing.assert_array_equal(file.pixels(5), pixels)
    for rows, columns in ((slice(0, 70), slice(0, 90)), (slice(13, 37), slice(5, 66)), (slice(69, 70), slice(89, 90))):
        np.testing.assert_array_equal(file.region(rows, columns, 5), pixels[rows, columns])
    file.close()


def test_pages(tmp_path):
    stack = np.arange(3, dtype=np.uint16)[:, None, None] * 1000 + np.zeros((3, 8, 9), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    pictures = Pictures(intensity=[0, 2550])
    assert [int(pictures.read(tmp_path / "a.tif", page)[0, 0, 0]) for page in (None, 1, 2, 3)] == [0, 0, 100, 200]
    assert Pictures(intensity=[0, 2550], page=3).read(tmp_path / "a.tif")[0, 0, 0] == 200
    assert pictures.check(tmp_path / "a.tif").pages == 3
    with pytest.raises(ValueError, match=r"a\.tif \(page 4\) cannot be read: page 4 is wanted, and the file has 3"):
        pictures.read(tmp_path / "a.tif", 4)
    frames = [Image.new("RGB", (9, 8), (value, 0, 0)) for value in (10, 20)]
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=frames[1:])
    assert [int(Pictures(page=page).read(tmp_path / "b.tif")[0, 0, 0]) for page in (None, 1, 2)] == [10, 10, 20]
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((4, 40, 60, 3), np.uint8), photometric="rgb")
    Image.new("L", (9, 9)).save(tmp_path / "d.gif", save_all=True, append_images=[Image.new("L", (9, 9), 99)])
    assert [Pictures().check(tmp_path / name).pages for name in ("b.tif", "c.tif", "d.gif")] == [2, 4, 2]
    assert split_page("x/a.tif#page=2") == ("x/a.tif", 2)
    for name in ("a.tif", "#page=2", "a.tif#page=0", "a.tif#page=x", "a#b.tif"):
        assert split_page(name) == (name, None)


def test_pages_of_several_series_and_channels_in_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.full((8, 9), 1, np.uint16))
        file.write(np.full((6, 5), 2, np.uint16))
    assert Pictures(intensity="type").check(tmp_path / "a.tif").pages == 2
    assert Pictures(intensity=[0, 255]).read(tmp_path / "a.tif", 2).shape == (6, 5, 3)
    volume = np.arange(2 * 6, dtype=np.uint8).reshape(2, 6, 1, 1) * np.ones((1, 1, 8, 9), np.uint8)
    tifffile.imwrite(tmp_path / "b.tif", volume, imagej=True, metadata={"axes": "ZCYX"})
    six = Pictures(channels=6)
    assert six.check(tmp_path / "b.tif").pages == 2
    assert six.read(tmp_path / "b.tif", 2)[3, 3].tolist() == [6, 7, 8, 9, 10, 11]
    tifffile.imwrite(tmp_path / "c.tif", volume[0], photometric="minisblack")  # six pages: the channels of one picture
    assert (
        six.read(tmp_path / "c.tif")[0, 0].tolist() == [0, 1, 2, 3, 4, 5] and six.check(tmp_path / "c.tif").pages == 1
    )
    assert read_image(tmp_path / "c.tif", 100)[0, 0].tolist() == [0, 0, 0]  # but pages where three are wanted
    assert read_image(tmp_path / "c.tif", 100).shape == (8, 9, 3)


def test_reduced_pages_are_no_pictures(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.full((64, 64), 500, np.uint16), subifds=1)
        file.write(np.full((32, 32), 500, np.uint16), subfiletype=1)
    assert Pictures(intensity="type").check(tmp_path / "a.tif").pages == 1


def test_tiff_names_its_own_window_and_white(tmp_path, deep):
    tags = [(340, "H", 1, 1000, True), (341, "H", 1, 3000, True)]
    tifffile.imwrite(tmp_path / "a.tif", deep, extratags=tags)
    found = Pictures(intensity="file").read(tmp_path / "a.tif")[..., 0]
    np.testing.assert_array_equal(found, expected(deep, 1000, 3000))
    with pytest.raises(PictureError, match=r"data\.intensity=file takes the window that it names"):
        read_image(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", deep, photometric="miniswhite")
    found = Pictures(intensity=[0, 4095]).read(tmp_path / "b.tif")[..., 0]
    np.testing.assert_array_equal(found, 255 - expected(deep, 0, 4095))
    with pytest.raises(PictureError, match=r"it names no window; data\.intensity=type, percentiles or"):
        Pictures(intensity="file").read(tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("channels", "mode", "first"),
    [
        (1, "L", [77]),
        (1, "RGB", [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]),
        (1, "RGBA", [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]),
        (2, "LA", [77, 9]),
        (3, "L", [77] * 3),
        (3, "LA", [77] * 3),
        (3, "RGBA", [200, 100, 50]),
        (4, "RGBA", [200, 100, 50, 9]),
    ],
)
def test_channels_of_png(tmp_path, channels, mode, first):
    color = {"L": 77, "LA": (77, 9), "RGB": (200, 100, 50), "RGBA": (200, 100, 50, 9)}[mode]
    Image.new(mode, (9, 8), color).save(tmp_path / "a.png")
    image = Pictures(channels=channels).read(tmp_path / "a.png")
    assert image.shape == (8, 9, channels) and image.dtype == np.uint8 and image[3, 3].tolist() == first


@pytest.mark.parametrize(("channels", "mode"), [(4, "RGB"), (2, "L"), (6, "RGB"), (4, "L")])
def test_channels_that_a_picture_lacks(tmp_path, channels, mode):
    Image.new(mode, (9, 8)).save(tmp_path / "a.png")
    own = len(mode)
    with pytest.raises(PictureError, match=rf"has {own} channels?, data\.channels={channels}; data\.channels={own} "):
        Pictures(channels=channels).read(tmp_path / "a.png")
    Pictures(channels=own).read(tmp_path / "a.png")  # what the message proposes


def test_channels_of_arrays_and_multi_band_tiff(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 6)).astype(np.uint8)
    save(tmp_path / "a.npy", pixels)
    save(tmp_path / "b.npy", pixels.transpose(2, 0, 1))
    save(tmp_path / "c.tif", pixels, photometric="minisblack", planarconfig="contig")
    save(tmp_path / "d.tif", pixels.transpose(2, 0, 1).copy(), photometric="minisblack", planarconfig="separate")
    for name in ("a.npy", "b.npy", "c.tif", "d.tif"):
        np.testing.assert_array_equal(Pictures(channels=6).read(tmp_path / name), pixels)
        with pytest.raises(PictureError, match=r"data\.channels=3; data\.channels=\d reads it"):
            read_image(tmp_path / name)
    np.save(tmp_path / "e.npy", np.array([["x"]], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"e\.npy cannot be read"):
        read_image(tmp_path / "e.npy")
    np.save(tmp_path / "f.npy", np.zeros((2, 3, 4, 5), np.uint8))
    with pytest.raises(ValueError, match=r"uint8 \[2, 3, 4, 5\]: numbers \[H, W\] or \[H, W, C\]"):
        read_image(tmp_path / "f.npy")


def test_windows_of_single_channels(tmp_path):
    pixels = np.zeros((4, 4, 2), np.uint16) + np.uint16([100, 1000])
    path = save(tmp_path / "a.npy", pixels)
    assert Pictures(channels=2, intensity=[[0, 200], [0, 4000]]).read(path)[0, 0].tolist() == [128, 64]


def test_large_arrays_and_tiff_are_refused_unread(tmp_path):
    save(tmp_path / "a.npy", np.zeros((40, 60), np.uint8))
    save(tmp_path / "a.tif", np.zeros((40, 60), np.uint16))
    for name in ("a.npy", "a.tif"):
        with pytest.raises(ValueError, match="60 x 40 pixels are more than max_pixels=2399"):
            Pictures(intensity="type", max_pixels=2399).read(tmp_path / name)


def test_damaged_files_are_named(tmp_path, deep):
    for name in ("a.tif", "a.png", "a.npy"):
        path = save(tmp_path / name, deep)
        for share in (0.1, 0.9):
            whole = path.read_bytes()
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(ValueError, match=rf"{name} cannot be read"):
                Pictures(intensity="type").read(path)
            path.write_bytes(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, r"data\.channels = 0: must be from 1 to 16"),
        ({"channels": 17}, r"data\.channels = 17"),
        ({"page": 0}, r"data\.page = 0: must be at least 1"),
        ({"page": "each"}, r"data\.page = 'each': .*`predict` takes each, in data sets .* stack\.tif#page=2"),
        ({"shown": [1, 2, 4]}, r"data\.shown = \[1, 2, 4\]: must be three numbers from 1 to data\.channels=3"),
        ({"shown": [1, 2]}, r"data\.shown"),
        ({"intensity": "full"}, r"data\.intensity = 'full': must be \[low, high\], .*percentiles, type, file"),
        ({"intensity": [5, 5]}, r"data\.intensity = \[5, 5\]: must be low < high"),
        ({"intensity": [1, 2, 3]}, r"data\.intensity = \[1, 2, 3\]"),
        ({"intensity": [[0, 1], [0, 2]]}, r"data\.intensity"),
        ({"intensity": {"percentiles": [50, 101]}}, r"data\.intensity\.percentiles = \[50, 101\]: must be 0 <= low"),
        ({"intensity": {"percentile": [1, 99]}}, r"data\.intensity = \{'percentile'"),
        ({"intensity": [0, float("nan")]}, r"data\.intensity"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Pictures(**settings)


@pytest.mark.parametrize(
    ("intensity", "rule"),
    [
        ([5, 900], ("window", (5.0, 900.0))),
        ([[0, 9], [0, 8], [1, 7]], ("window", (0.0, 9.0), (0.0, 8.0), (1.0, 7.0))),
        ({"percentiles": [1, 99]}, ("percentiles", 1.0, 99.0)),
        ("type", ("type",)),
    ],
)
def test_settings_as_training_has_them(intensity, rule):
    """Lists of a configuration are none of Python's."""
    assert Pictures.of(OmegaConf.create({"intensity": intensity})).rule == rule


def test_settings_of_a_configuration():
    assert Pictures.of(None) == Pictures.of({"root": "x"}) == Pictures()
    found = Pictures.of({"channels": 6, "intensity": [0, 1], "shown": [6, 5, 4], "max_pixels": 5, "page": 2})
    assert found == Pictures(6, [0, 1], 2, 5, [6, 5, 4])
    image = np.arange(6, dtype=np.uint8)[None, None]
    assert found.rgb(image).tolist() == [[[5, 4, 3]]] and Pictures(6).rgb(image).tolist() == [[[0, 1, 2]]]
    assert Pictures(1).rgb(image[..., :1]).tolist() == [[[0, 0, 0]]]
    assert Pictures(2).rgb(image[..., :2]).tolist() == [[[0, 1, 1]]]


# --------------------------------------------------------------------------------------------------------------- DICOM


def dicom(name: str) -> str:
    return get_testdata_file(name, download=False)


def theirs(path: str, index: int | None = None) -> np.ndarray:
    """Numbers after the modality's slope and intercept, as pydicom makes them."""
    header = pydicom.dcmread(path)
    pixels = header.pixel_array if index is None else header.pixel_array[index]
    return apply_modality_lut(pixels, header)


def test_dicom_after_slope_and_intercept():
    path = dicom("CT_small.dcm")
    with pytest.raises(PictureError, match=r"CT_small\.dcm cannot be read.*data\.intensity=type"):
        read_image(path)
    found = Pictures(intensity=[-160, 240]).read(path)
    np.testing.assert_array_equal(found[..., 0], expected(theirs(path), -160, 240))
    assert found.shape == (128, 128, 3) and len(np.unique(found)) > 200
    with pytest.raises(PictureError, match="it names no window"):
        Pictures(intensity="file").read(path)


def test_dicom_has_its_own_window(tmp_path):
    path = dicom("MR_small.dcm")
    header = pydicom.dcmread(path)
    shown = apply_voi_lut(theirs(path), header)  # over what the type can hold
    low, high = -(2 ** (header.BitsStored - 1)), 2 ** (header.BitsStored - 1) - 1
    found = Pictures(intensity="file").read(path)[..., 0].astype(int)
    assert np.abs(found - expected(shown, low, high)).max() <= 1 and len(np.unique(found)) > 100
    header.PhotometricInterpretation = "MONOCHROME1"
    header.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(Pictures(intensity="file").read(tmp_path / "a.dcm")[..., 0], 255 - found)
    header.VOILUTFunction = "SIGMOID"
    header.PhotometricInterpretation = "MONOCHROME2"
    header.save_as(tmp_path / "b.dcm")
    bent = expected(apply_voi_lut(theirs(path), header), low, high)
    assert np.abs(Pictures(intensity="file").read(tmp_path / "b.dcm")[..., 0].astype(int) - bent).max() <= 1


def test_dicom_frames_and_colours(tmp_path):
    path = dicom("rtdose.dcm")
    frames = pydicom.dcmread(path).pixel_array
    pictures = Pictures(intensity=[0, int(frames.max())])
    assert pictures.check(path).pages == len(frames) == 15
    np.testing.assert_array_equal(pictures.read(path, 8)[..., 0], expected(frames[7], 0, frames.max()))
    rgb = dicom("examples_rgb_color.dcm")
    np.testing.assert_array_equal(read_image(rgb), pydicom.dcmread(rgb).pixel_array)
    palette = Pictures(intensity="type").read(dicom("examples_palette.dcm"))
    assert palette.shape[2] == 3 and (palette[..., 0] != palette[..., 2]).any()


def test_windows_of_frames(tmp_path):
    header = pydicom.dcmread(dicom("CT_small.dcm"))
    del header.RescaleSlope, header.RescaleIntercept
    pixels = header.pixel_array
    header.NumberOfFrames, header.PixelData = 2, pixels.tobytes() * 2
    header.PerFrameFunctionalGroupsSequence = frames = [pydicom.Dataset(), pydicom.Dataset()]
    for frame, (centre, slope) in zip(frames, ((100, 1), (300, 2))):
        frame.FrameVOILUTSequence, frame.PixelValueTransformationSequence = [pydicom.Dataset()], [pydicom.Dataset()]
        frame.FrameVOILUTSequence[0].WindowCenter, frame.FrameVOILUTSequence[0].WindowWidth = centre, 1000
        transform = frame.PixelValueTransformationSequence[0]
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = slope, -1024, "HU"
    header.save_as(tmp_path / "a.dcm")
    for page, (centre, slope) in enumerate(((100, 1), (300, 2)), 1):
        found = Pictures(intensity="file").read(tmp_path / "a.dcm", page)[..., 0]
        low = centre - 0.5 - 999 / 2
        np.testing.assert_array_equal(found, expected(pixels.astype(float) * slope - 1024, low, low + 999))


def test_dicom_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"rtplan\.dcm cannot be read: DICOM without a picture"):
        read_image(dicom("rtplan.dcm"))
    with pytest.raises(ValueError, match=r"MR_truncated\.dcm cannot be read"):
        Pictures(intensity="type").read(dicom("MR_truncated.dcm"))
    (tmp_path / "a.dcm").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.dcm cannot be read"):
        read_image(tmp_path / "a.dcm")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"DICOM needs pydicom: pip install 'two-stage-detector\[pictures\]'"):
        read_image(dicom_path := tmp_path / "a.dcm")
    assert dicom_path


# ----------------------------------------------------------------------------------------------------------- data sets


def test_a_data_set_of_deep_pictures(tmp_path, deep, caplog):
    """Found when the data set is opened, by a look at the headers: before the first step."""
    coco = minimal()
    coco["images"][0]["file_name"] = "a.tif"
    path = write(tmp_path, coco)
    save(tmp_path / "a.tif", deep)
    with pytest.raises(ValueError, match=r"1 x picture whose numbers are not of 8 bits.*image 7: .*a\.tif.*intensity="):
        CocoDataset(tmp_path, path)
    left = CocoDataset(tmp_path, path, on_error="skip")
    assert left.image_ids.tolist() == [9] and "a.tif" in caplog.text
    data = CocoDataset(tmp_path, path, pictures=Pictures(intensity=[900, 3299]))
    np.testing.assert_array_equal(data[0].image[..., 0], expected(deep, 900, 3299))
    np.testing.assert_array_equal(data[0].image, data.pictures.read(tmp_path / "a.tif"))


def test_a_page_of_a_file_is_an_image(tmp_path, deep):
    coco = minimal()
    coco["images"] = [coco["images"][0] | {"id": i, "file_name": f"a.tif#page={i}"} for i in (1, 2, 3)]
    for annotation in coco["annotations"]:
        annotation["image_id"] = 2
    path = write(tmp_path, coco)
    tifffile.imwrite(tmp_path / "a.tif", np.stack([deep, deep + 100, deep + 200]), photometric="minisblack")
    data = CocoDataset(tmp_path, path, pictures=Pictures(intensity=[0, 4095]))
    assert len(data) == 3 and data.image_path(1) == tmp_path / "a.tif" and data.page(1) == 2
    for index in range(3):
        np.testing.assert_array_equal(data[index].image[..., 0], expected(deep + 100 * index, 0, 4095))


def test_a_data_set_of_other_channels(tmp_path):
    path = write(tmp_path, minimal())
    with pytest.raises(ValueError, match=r"2 x picture of other channels than data\.channels: image 7"):
        CocoDataset(tmp_path, path, pictures=Pictures(channels=6))
    assert CocoDataset(tmp_path, path, pictures=Pictures(channels=1))[0].image.shape == (40, 60, 1)
