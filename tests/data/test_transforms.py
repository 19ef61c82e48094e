"""Boxes, labels and outlines follow the pixels through any pipeline."""

from __future__ import annotations

import albumentations as A
import cv2
import hydra
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from detector.config import CONFIGS, ConfigError
from detector.data import Pipeline, ResizeShortestEdge, ScaleJitter
from detector.data.outlines import cover, visible_bounds
from detector.engine.run_folder import compare_configs
from detector.inference.load import validation_transforms
from tests.data.coco_files import outlines_of

HEIGHT, WIDTH = 120, 160


def polygon(rng: np.random.Generator, margin: float = 10) -> np.ndarray:
    corners = rng.integers(4, 9)
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    centre = rng.uniform([50, 45], [WIDTH - 50, HEIGHT - 45])
    return centre + rng.uniform(15, 45 - margin, (corners, 1)) * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def drawn(outlines, height: int, width: int, fine: int = 1) -> np.ndarray:
    """[G, H, W] shares of the pixels."""
    boxes = np.tile([[0, 0, width * fine, height * fine]], (len(outlines.even_odd), 1))
    masks = cover(outlines._replace(points=outlines.points * fine), boxes, max(height, width) * fine)
    masks = masks[:, : height * fine, : width * fine].astype(np.float32)
    return np.stack([cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA) for mask in masks])


def centre_of_mass(image: np.ndarray) -> np.ndarray:
    image = image.astype(np.float64)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(image * columns).sum(), (image * rows).sum()]) / image.sum()


LINEAR = {
    "flip": A.HorizontalFlip(p=1),
    "vertical flip": A.VerticalFlip(p=1),
    "transpose": A.Transpose(p=1),
    "d4": A.D4(p=1),
    "quarter turn": A.RandomRotate90(p=1),
    "rotate": A.Rotate(30, p=1),
    "affine": A.Affine(scale=(0.5, 1.5), rotate=(-30, 30), shear=(-5, 5), p=1),
    "perspective": A.Perspective(p=1),
    "resize": A.Resize(300, 500),
    "longest side": A.LongestMaxSize(480),
    "shortest side": A.SmallestMaxSize(360),
    "shortest edge": ResizeShortestEdge(250, None),
    "scale jitter": ScaleJitter(250, (0.8, 2.0)),
    "scale": A.RandomScale((1, 2), p=1),
    "crop": A.RandomCrop(100, 100),
    "crop and resize": A.RandomSizedCrop((90, 110), (300, 400)),
    "resized crop": A.RandomResizedCrop((300, 400), scale=(0.6, 1)),
    "box-safe crop": A.BBoxSafeRandomCrop(p=1),
    "box-safe resized crop": A.RandomSizedBBoxSafeCrop(300, 400, p=1),
    "crop or pad": A.CropAndPad(px=20, p=1),
    "crop, keep size": A.CropAndPad(percent=-0.1, p=1),
    "pad": A.PadIfNeeded(300, 300),
    "in sequence": A.Sequential([A.Resize(300, 500), A.HorizontalFlip(p=1), A.RandomCrop(250, 300)]),
    "one of": A.OneOf([A.Resize(300, 500), A.Resize(60, 80)], p=1),
}


@pytest.mark.parametrize("name", LINEAR)
def test_outline_and_box_stay_on_the_pixels(name):
    """Draw a shape, transform the picture, and compare with the transformed outline, to parts of a pixel."""
    pipeline = Pipeline([LINEAR[name]])
    for seed in range(6):
        outlines = outlines_of([[polygon(np.random.default_rng(seed))]])
        picture = np.repeat(drawn(outlines, HEIGHT, WIDTH, fine=8)[0][..., None] * 255, 3, axis=2).astype(np.uint8)
        out = pipeline(picture, visible_bounds(outlines, HEIGHT, WIDTH), outlines, seed)
        height, width = out.image.shape[:2]
        seen = out.image[..., 0]
        ours = drawn(out.outlines, height, width)[0]
        assert np.abs(centre_of_mass(ours) - centre_of_mass(seen)).max() < 0.5
        rows, columns = np.nonzero(seen > 127)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # a sharp corner fades before it ends, the more the larger the picture becomes
        tolerance = 1.5 * max(1, np.sqrt(seen.size / (HEIGHT * WIDTH))) + 0.5
        np.testing.assert_allclose(out.boxes[0], box, atol=tolerance)


PIPELINES = st.lists(
    st.sampled_from(
        [
            A.HorizontalFlip(),
            A.VerticalFlip(),
            A.D4(p=1),
            A.RandomCrop(60, 70),
            A.RandomCrop(100, 90, pad_if_needed=True),
            A.CropAndPad(px=(-30, 30), p=1),
            A.RandomResizedCrop((90, 120), scale=(0.1, 1)),
            A.Affine(scale=(0.5, 2), rotate=(-45, 45), translate_percent=0.3, p=1),
            ResizeShortestEdge([64, 100, 150], 200),
            A.RandomBrightnessContrast(),
            A.OneOf([A.Rotate(p=1), A.NoOp(p=1)]),
        ]
    ),
    max_size=4,
)


@given(PIPELINES, st.integers(0, 2**63 - 1))
def test_boxes_labels_and_masks_stay_in_step(transforms, seed):
    """Each object has its own shade, so what is left can be told by the pixels."""
    rng = np.random.default_rng(seed)
    rings = [rng.uniform(0, 1, 2) * [WIDTH - 40, HEIGHT - 40] + rng.uniform(0, 40, (4, 2)) for _ in range(4)]
    outlines = outlines_of([[ring] for ring in rings[:3]] + [[]])
    boxes = visible_bounds(outlines, HEIGHT, WIDTH)
    boxes[3] = [20, 30, 50, 70]  # an object without an outline
    image = rng.integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    pipeline = Pipeline(transforms)
    try:
        out = pipeline(image, boxes, outlines, seed)
    except A.augmentations.crops.transforms.CropSizeError:
        return  # an earlier transform has left less than the crop's size
    height, width = out.image.shape[:2]

    assert len(out.boxes) == len(out.kept) == len(out.outlines.even_odd)
    assert (np.diff(out.kept) > 0).all() and set(out.kept) <= {0, 1, 2, 3}
    assert (out.boxes[:, 2:] - out.boxes[:, :2] >= 1 - 1e-4).all()
    assert (out.boxes >= 0).all() and (out.boxes <= [width, height, width, height]).all()
    np.testing.assert_array_equal(out.outlines.has_rings(), out.kept < 3)
    if not len(out.boxes):
        return
    for mask, box, index in zip(drawn(out.outlines, height, width), out.boxes, out.kept):
        rows, columns = np.nonzero(mask)
        if index < 3 and len(rows):  # a sliver may miss all centres
            found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found[:2] >= box[:2] - 1).all() and (found[2:] <= box[2:] + 1).all()
            corners = len(out.outlines.points)
            if corners and mask.sum() > 50:  # no sharp points to miss
                assert mask.sum() <= np.prod(np.ceil(box[2:]) - np.floor(box[:2]))

    again = pipeline(image, boxes, outlines, seed)
    np.testing.assert_array_equal(out.image, again.image)
    np.testing.assert_array_equal(out.boxes, again.boxes)


def test_a_box_is_found_around_what_a_crop_leaves():
    outlines = outlines_of([[[[10, 10], [50, 10], [50, 50]]], [[[60, 60], [90, 60], [90, 90]]]])
    out = Pipeline([A.Crop(0, 0, 30, 40, p=1)])(
        np.zeros((100, 100, 3), np.uint8), np.zeros((2, 4)) + [0, 0, 9, 9], outlines
    )
    assert out.kept.tolist() == [0]
    np.testing.assert_allclose(out.boxes, [[10, 10, 30, 30]], atol=1e-4)  # the triangle's edge leaves at (30, 30)


def test_small_rests_are_dropped():
    outlines = outlines_of([[[[10, 10], [50, 10], [50, 50], [10, 50]]]])
    boxes, image = np.array([[10, 10, 50, 50.0]]), np.zeros((100, 100, 3), np.uint8)
    crop = A.Crop(0, 0, 14, 100, p=1)
    assert len(Pipeline([crop], min_size=4)(image, boxes, outlines).boxes) == 1
    assert len(Pipeline([crop], min_size=4.1)(image, boxes, outlines).boxes) == 0


def test_different_seeds_give_different_results():
    pipeline, image = Pipeline([A.RandomCrop(50, 50)]), np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)
    results = {pipeline(image, seed=seed).image.tobytes() for seed in range(10)}
    assert len(results) == 10


def test_global_random_state_plays_no_part():
    pipeline, image = Pipeline([A.RandomCrop(50, 50)]), np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)
    np.random.seed(1)  # noqa: NPY002
    first = pipeline(image, seed=3).image
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(first, pipeline(image, seed=3).image)


@pytest.mark.parametrize(
    ("height", "width", "size", "max_size", "rounding", "expected"),
    [
        (480, 640, 800, 1333, "nearest", (800, 1067)),
        (480, 640, 800, 1333, "floor", (800, 1066)),
        (427, 640, 800, 1333, "nearest", (800, 1199)),
        (240, 640, 800, 1333, "nearest", (500, 1333)),
        (640, 480, 800, None, "nearest", (1067, 800)),
        (3, 7, 800, None, "floor", (800, 1866)),
        (1000, 10, 5, 100, "nearest", (100, 1)),
    ],
)
def test_shortest_edge(height, width, size, max_size, rounding, expected):
    pipeline = Pipeline([ResizeShortestEdge(size, max_size, rounding)])
    out = pipeline(np.zeros((height, width, 3), np.uint8), np.array([[0, 0, width, height]]))
    assert out.image.shape[:2] == expected
    np.testing.assert_allclose(out.boxes, [[0, 0, expected[1], expected[0]]], rtol=1e-6)


@pytest.mark.parametrize("size", [60, 300])
def test_shortest_edge_by_pillow(size):
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((size * 4 // 3, size), Image.Resampling.BILINEAR)
    found = Pipeline([ResizeShortestEdge(size, None, interpolation="pillow")])(image).image
    np.testing.assert_array_equal(found, np.asarray(expected))
    plain = Pipeline([ResizeShortestEdge(size, None)])(image).image.astype(int)
    assert (np.abs(found - plain).max() <= 1) == (size > 120)  # the same where images grow


@pytest.mark.parametrize("transform", [ResizeShortestEdge, ScaleJitter])
def test_area_averages_where_images_shrink_and_is_bilinear_where_they_grow(transform):
    """A pattern of single bright pixels keeps its mean; four pixels alone miss most of them or see them twice."""
    image = np.zeros((120, 120, 3), np.uint8)
    image[::4, ::4] = 240
    for size in (30, 300):
        settings = {"size": size} | ({"scale": (1.0, 1.0)} if transform is ScaleJitter else {"max_size": None})
        area, plain = (
            Pipeline([transform(**settings, **more)])(image).image for more in ({"interpolation": "area"}, {})
        )
        assert area.shape == plain.shape == (size, size, 3)
        if size == 30:
            assert (area == 15).all() and (plain == 0).all()
        else:
            np.testing.assert_array_equal(area, plain)


def test_shipped_pipelines_average_in_training_as_in_inference():
    for option in ("default", "multiscale", "photometric", "lsj"):
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            augment = OmegaConf.to_container(
                hydra.compose("train", [f"augment={option}", "experiment=none"]), resolve=True
            )
        steps = [step for split in ("train", "val") for step in augment["augment"][split]]
        assert {step["interpolation"] for step in steps if "detector.data" in step["_target_"]} == {"area"}, option


def test_checkpoints_that_do_not_say_it_shrink_as_they_were_trained():
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    step = {"_target_": "detector.data.ResizeShortestEdge", "size": 60, "max_size": 100}
    old = validation_transforms({"augment": {"val": [step]}})(image).image
    np.testing.assert_array_equal(old, cv2.resize(image, (80, 60), interpolation=cv2.INTER_LINEAR))
    new = validation_transforms({"augment": {"val": [step | {"interpolation": "area"}]}})(image).image
    np.testing.assert_array_equal(new, cv2.resize(image, (80, 60), interpolation=cv2.INTER_AREA))


def test_a_run_from_before_the_key_goes_on_as_it_was():
    step = {"_target_": "detector.data.ResizeShortestEdge", "size": 60}
    stored = {"augment": {"train": [step], "val": [step], "short_edge": 60}}
    said = {
        "augment": {"interpolation": 1, "short_edge": 60} | {k: [step | {"interpolation": 1}] for k in ("train", "val")}
    }
    compare_configs(stored, said, {"augment.interpolation"})
    said["augment"]["interpolation"] = "area"
    with pytest.raises(ConfigError, match=r"augment\.interpolation: 1 -> area"):
        compare_configs(stored, said)


def test_shortest_edge_draws_from_several_sizes():
    pipeline = Pipeline([ResizeShortestEdge([32, 48, 64], None)])
    image = np.zeros((20, 30, 3), np.uint8)
    assert {pipeline(image, seed=seed).image.shape[0] for seed in range(30)} == {32, 48, 64}


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"size": []}, {"max_size": 0}, {"rounding": "up"}, {"interpolation": "pil"}]
)
def test_shortest_edge_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ResizeShortestEdge(**settings)


@pytest.mark.parametrize("transform", [A.Normalize(), A.ToFloat(), A.ToGray(num_output_channels=1, p=1)])
def test_results_that_are_no_uint8_pictures_are_refused(transform):
    with pytest.raises(ValueError, match="uint8"):
        Pipeline([transform])(np.zeros((20, 20, 3), np.uint8))


def test_transforms_that_lose_the_outlines_are_refused():
    with pytest.raises(ValueError, match="ThinPlateSpline"):
        Pipeline([A.OneOf([A.ThinPlateSpline()])])
    reflecting = Pipeline([A.PadIfNeeded(200, 200, border_mode=cv2.BORDER_REFLECT_101)])
    outlines = outlines_of([[[[10, 10], [50, 10], [50, 50]]]])
    with pytest.raises(ValueError, match="outline points"):
        reflecting(np.zeros((100, 100, 3), np.uint8), np.array([[10, 10, 50, 50]]), outlines)


def test_scale_jitter_draws_from_the_whole_range():
    jitter, image = Pipeline([ScaleJitter(100, (0.1, 2.0))]), np.zeros((30, 60, 3), np.uint8)
    sides = np.array([jitter(image, seed=seed).image.shape[:2] for seed in range(200)])
    assert 10 <= sides[:, 1].min() < 30 and 170 < sides[:, 1].max() <= 200
    assert (abs(sides[:, 1] - 2 * sides[:, 0]) <= 1).all()


@pytest.mark.parametrize("settings", [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}])
def test_scale_jitter_refuses(settings):
    with pytest.raises(ValueError):
        ScaleJitter(**settings)
