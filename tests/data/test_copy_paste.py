"""Simple copy-paste: pixels, masks and boxes agree, and everything is a function of (seed, epoch, index)."""

from __future__ import annotations

import albumentations as A
import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from detector.data import CocoDataset, ScaleJitter
from detector.data.copy_paste import paste
from detector.data.outlines import cover, visible_bounds
from detector.data.transforms import Transformed
from tests.data.coco_files import minimal, outlines_of, write
from tests.data.test_transforms import polygon

SIDE = 160


def scene(rng: np.random.Generator, objects: int, value: int, size: tuple[int, int]) -> Transformed:
    """A picture of one colour with polygons that may overlap and lie partly outside."""
    outlines = outlines_of([[polygon(rng)] for _ in range(objects)])
    boxes = visible_bounds(outlines, *size)
    return Transformed(np.full((*size, 3), value, np.uint8), boxes, outlines, np.arange(objects), None)


def masks_of(scene: Transformed) -> np.ndarray:
    """[G, SIDE, SIDE] bool: the outlines inside the pixels that their boxes touch."""
    masks = cover(scene.outlines, np.tile([[0, 0, SIDE, SIDE]], (len(scene.boxes), 1)), SIDE) > 0.5
    pixels = np.arange(SIDE)
    inside = (pixels + 1 > scene.boxes[:, :2, None]) & (pixels < scene.boxes[:, 2:, None])
    return masks & inside[:, 1, :, None] & inside[:, 0, None, :]


@given(st.integers(0, 10_000), st.sampled_from([(120, 160), (90, 110), (100, 70)]))
@example(1691, (100, 70))  # a pixel whose centre lies 0.01 above its object's box
def test_what_is_covered_is_taken_away(seed, above_size):
    rng = np.random.default_rng(seed)
    below, above = scene(rng, 4, 10, (110, 130)), scene(rng, 3, 200, above_size)
    chosen = rng.random(3) < 0.7
    # Of an object that the border has cut to less than a pixel, whether its one row of cells counts is arbitrary.
    chosen &= (above.boxes[:, 2:] - above.boxes[:, :2] >= 1).all(axis=1)
    result = paste(below, above, chosen, shift=4)

    limits = np.zeros((SIDE, SIDE), bool)
    limits[: min(110, above_size[0]), : min(130, above_size[1])] = True
    covered = (masks_of(above) & limits)[chosen].any(axis=0)
    assert np.array_equal(result.image[..., 0] == 200, covered[:110, :130])
    assert (below.image == 10).all()
    found = dict(zip(result.kept.tolist(), masks_of(result)))
    for index, mask in enumerate(masks_of(below)):
        left = mask & ~covered
        if index in found:
            assert np.array_equal(found[index], left)
        else:
            rows, columns = np.nonzero(left)
            assert not len(rows) or min(np.ptp(rows), np.ptp(columns)) <= 1
    for index in np.flatnonzero(chosen):
        if 4 + index in found:
            assert np.array_equal(found[4 + index], masks_of(above)[index] & limits)
    assert set(found) <= {0, 1, 2, 3, *(4 + np.flatnonzero(chosen))}
    assert (result.boxes[:, :2] >= 0).all() and (result.boxes[:, 2:] <= [130, 110]).all()


def test_boxes_without_outlines():
    rng = np.random.default_rng(0)
    below, above = scene(rng, 2, 10, (120, 160)), scene(rng, 1, 200, (120, 160))
    inner = above.boxes[0].copy()
    middle = (inner[:2] + inner[2:]) / 2
    below = below._replace(
        outlines=outlines_of([[], []]), boxes=np.stack([inner, np.concatenate([middle - 2, middle + 2])])
    )
    result = paste(below, above, np.array([True]), shift=2)
    assert result.kept.tolist() == [0, 2]  # the second was covered altogether
    assert np.array_equal(result.boxes[0], inner.astype(np.float32))


@pytest.fixture
def painted(tmp_path):
    """Pictures whose objects of category k have the colour 50 k, on black."""
    coco = minimal()
    coco["annotations"][1]["segmentation"] = [[30, 20, 40, 20, 40, 30, 30, 30]]
    coco["annotations"] += [
        {"id": 3, "image_id": 9, "category_id": 2, "bbox": [4, 2, 30, 30], "iscrowd": 0, "area": 900,
         "segmentation": [[4, 2, 34, 2, 34, 32, 4, 32]]},
        {"id": 4, "image_id": 9, "category_id": 5, "bbox": [10, 40, 5, 5], "iscrowd": 1, "area": 25,
         "segmentation": [[10, 40, 15, 40, 15, 45, 10, 45]]},
    ]  # fmt: skip
    for image in coco["images"]:
        picture = np.zeros((image["height"], image["width"], 3), np.uint8)
        for item in coco["annotations"]:
            if item["image_id"] == image["id"]:
                x, y, w, h = item["bbox"]
                picture[y : y + h, x : x + w] = 50 * item["category_id"]
        cv2.imwrite(str(tmp_path / image["file_name"]), picture)

    def dataset(copy_paste: float = 1.0, **settings) -> CocoDataset:
        transforms = settings.pop("transforms", [A.HorizontalFlip(), A.VerticalFlip()])
        return CocoDataset(tmp_path, write(tmp_path, coco), transforms, copy_paste=copy_paste, **settings)

    return dataset


def test_samples_show_what_they_say(painted):
    dataset = painted()
    colours = [50 * identity for identity in dataset.category_ids]
    counts = set()
    for epoch in range(30):
        sample = dataset[epoch, epoch % 2]
        counts.add((epoch % 2, len(sample.boxes)))
        seen = np.zeros(sample.image.shape[:2], bool)
        for label, mask, window in zip(sample.labels, sample.masks, sample.mask_windows.astype(int)):
            height, width = sample.image.shape[:2]
            own = mask[: height - window[1], : width - window[0]].astype(bool)
            place = slice(window[1], window[1] + own.shape[0]), slice(window[0], window[0] + own.shape[1])
            assert (sample.image[place][own] == colours[label - 1]).all()
            seen[place] |= own
        for x1, y1, x2, y2 in sample.boxes[sample.crowd].round().astype(int):  # crowds have no outline
            seen[y1:y2, x1:x2] = True
        assert np.array_equal(seen, sample.image.any(axis=2))
        if epoch % 2 == 0:
            assert not sample.crowd.any()  # crowds are not pasted
    assert len(counts) > 3  # sometimes something is pasted, sometimes covered, sometimes neither


def test_a_function_of_seed_epoch_and_index(painted):
    first, second = painted(), painted()
    for epoch in range(5):
        a, b = first[epoch, 0], second[epoch, 0]
        for x, y in zip(a, b):
            assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
    assert len({first[epoch, 0].image.tobytes() for epoch in range(8)}) > 3


def test_the_share_is_kept(painted):
    plain, some = painted(0.0), painted(0.5)
    same = [np.array_equal(plain[epoch, 0].image, some[epoch, 0].image) for epoch in range(40)]
    assert 10 < sum(same) < 38


def test_with_large_scale_jitter(painted):
    crop = A.RandomCrop(64, 64, pad_if_needed=True, pad_position="top_left")
    dataset = painted(transforms=[ScaleJitter(64, (0.1, 2.0)), crop, A.HorizontalFlip()])
    for epoch in range(10):
        sample = dataset[epoch, 0]
        assert sample.image.shape == (64, 64, 3)
        assert (sample.boxes[:, 2:] <= 64).all() and sample.masks.any(axis=(1, 2))[~sample.crowd].mean() > 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"copy_paste": 1.5}, "augment.copy_paste=1.5"),
        ({"copy_paste": 0.5, "masks": False}, "data.masks=False"),
        ({"copy_paste": 0.5, "keypoints": True}, "data.keypoints=True"),
    ],
)
def test_what_cannot_be(painted, settings, message):
    with pytest.raises(ValueError, match=message):
        painted(**settings)
