"""Images of all kinds, samples, and batches of samples."""

from __future__ import annotations

import json
import pickle

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detector.data import CocoDataset, Pictures, ResizeShortestEdge, collate, collate_images, read_image
from tests.data.coco_files import minimal, write


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth picture [40, 60, 3] that survives compression, different in every corner and channel."""
    rows, columns = np.mgrid[:40, :60]
    return np.stack([rows * 6, columns * 4, 250 - rows * 3 - columns * 2], axis=2).astype(np.uint8)


def dataset(folder, coco=None, transforms=(), **options) -> CocoDataset:
    return CocoDataset(folder, write(folder, coco or minimal()), transforms, **options)


@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "webp", "tiff", "gif"])
def test_formats(tmp_path, picture, extension):
    path = tmp_path / f"a.{extension}"
    lossless = extension in ("png", "bmp", "tiff")
    Image.fromarray(picture).save(path, **({} if lossless or extension == "gif" else {"quality": 95}))
    image = read_image(path)
    assert image.dtype == np.uint8 and image.shape == (40, 60, 3)
    assert np.abs(image.astype(int) - picture).mean() <= (0 if lossless else 8)


@pytest.mark.parametrize(
    ("extension", "mode"),
    [("png", "L"), ("png", "P"), ("png", "RGBA"), ("png", "LA"), ("png", "1"), ("jpg", "L"), ("jpg", "CMYK")],
)
def test_colour_modes(tmp_path, picture, extension, mode):
    original = Image.fromarray(picture).convert(mode)
    original.save(tmp_path / f"a.{extension}")
    image = read_image(tmp_path / f"a.{extension}")
    assert image.dtype == np.uint8 and image.shape == (40, 60, 3)
    difference = np.abs(image.astype(int) - np.asarray(original.convert("RGB")))
    assert difference.mean() <= (4 if extension == "jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = {1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1],
               5: picture.transpose(1, 0, 2), 6: np.rot90(picture, -1), 7: np.rot90(picture, 2).transpose(1, 0, 2),
               8: np.rot90(picture)}[orientation]  # fmt: skip
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.99])
def test_cut_short_files_are_refused(tmp_path, extension, share):
    path = tmp_path / f"a.{extension}"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=path.name):
        read_image(path)


def test_bytes_after_the_end_are_no_fault(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(b"appended by a camera")
    assert read_image(tmp_path / "a.jpg").shape == picture.shape


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="60 x 40 pixels are more than max_pixels=2399"):
        read_image(tmp_path / "a.png", max_pixels=2399)


def test_max_pixels_is_the_limit_of_the_decoders_too(tmp_path, monkeypatch):
    """Pillow's own limit gives way, and what OpenCV refuses is read by Pillow."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of Pillow: twice that is refused
    Image.fromarray(np.full((100, 100, 3), 7, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read: .*max_pixels=1500"):
        read_image(tmp_path / "a.png", max_pixels=1500)
    assert read_image(tmp_path / "a.png", max_pixels=10_000).shape == (100, 100, 3)
    Image.fromarray(np.full((1, 2**20 + 1), 7, np.uint8)).save(tmp_path / "long.png")
    image = read_image(tmp_path / "long.png")
    assert image.shape == (1, 2**20 + 1, 3) and (image == 7).all()


def test_a_data_set_of_larger_pictures(tmp_path, monkeypatch):
    path = write(tmp_path, minimal())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert CocoDataset(tmp_path, path, pictures=Pictures(max_pixels=2400))[0].image.shape == (40, 60, 3)
    with pytest.raises(ValueError, match=r"image over data\.max_pixels=2399: image 7 60 x 40"):
        CocoDataset(tmp_path, path, pictures=Pictures(max_pixels=2399))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path.symlink_to("nowhere.png"), "image file that is a link to nothing: image 7 file_name="),
        (lambda path: path.symlink_to(path.name), "image file that is a link to nothing: image 7 file_name="),
        (lambda path: path.mkdir(), "folder in place of an image file: image 7 file_name="),
    ],
    ids=["dangling", "itself", "folder"],
)
def test_what_is_no_file_is_named_when_the_data_set_is_opened(tmp_path, caplog, spoil, named, training):
    path = write(tmp_path, minimal())
    (tmp_path / "a.png").unlink()
    spoil(tmp_path / "a.png")
    with pytest.raises(ValueError, match=named):
        CocoDataset(tmp_path, path, training=training)
    left = CocoDataset(tmp_path, path, training=training, on_error="skip")
    assert named in caplog.text and left.image_ids.tolist() == [9]  # and no black picture


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\x.png", "/etc/passwd"])
def test_names_that_lead_out_of_the_folder(tmp_path, caplog, name):
    coco = minimal()
    path = write(tmp_path, coco)
    coco["images"][1]["file_name"] = name
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=r"image 9 .* leads out of the image folder") as error:
        CocoDataset(tmp_path, path)
    assert repr(name) in str(error.value)
    assert CocoDataset(tmp_path, path, on_error="skip").image_ids.tolist() == [7]


def test_names_as_tools_write_them(tmp_path, caplog):
    coco = minimal()
    path = write(tmp_path, coco)
    coco["images"][1]["file_name"] = "C:\\set\\B.PNG"
    path.write_text(json.dumps(coco))
    data = CocoDataset(tmp_path, path)
    assert data.image_path(1) == tmp_path / "b.png" and data[1].image.shape == (60, 40, 3)
    assert "1 x file_name that is written in another way" in caplog.text and "is 'b.png'" in caplog.text


def test_links_to_files_are_files(tmp_path):
    path = write(tmp_path, minimal())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert len(CocoDataset(tmp_path, path)) == 2


def test_missing_image():
    with pytest.raises(FileNotFoundError):
        read_image("nowhere.png")


def test_sample(tmp_path):
    sample = dataset(tmp_path, mask_size=32)[0]
    assert sample.image.shape == (40, 60, 3) and sample.image_id == 7 and sample.original_size == (40, 60)
    np.testing.assert_array_equal(sample.boxes, [[5, 6, 25, 16], [30, 20, 40, 30]])
    assert sample.labels.tolist() == [2, 1] and sample.has_mask.tolist() == [True, False]
    np.testing.assert_array_equal(sample.mask_windows, [[5, 6, 37, 38], [30, 20, 62, 52]])
    expected = np.zeros((2, 32, 32), np.uint8)
    expected[0, :10, :20] = 1
    np.testing.assert_array_equal(sample.masks, expected)


def test_large_masks_are_squeezed_per_axis(tmp_path):
    sample = dataset(tmp_path, mask_size=10)[0]
    np.testing.assert_array_equal(sample.mask_windows[0], [5, 6, 25, 16])
    assert sample.masks[0].all()


def test_masks_end_at_the_border_of_the_image(tmp_path):
    coco = minimal()
    coco["annotations"][0]["segmentation"] = [[5, 6, 90, 6, 90, 60, 5, 60]]
    sample = dataset(tmp_path, coco, mask_size=80)[0]
    np.testing.assert_array_equal(sample.boxes[0], [5, 6, 60, 40])
    assert sample.masks[0].sum() == 55 * 34 and sample.masks[0, :34, :55].all()


def test_image_without_objects(tmp_path):
    sample = dataset(tmp_path)[1]
    assert sample.boxes.shape == (0, 4) and sample.masks.shape == (0, 16, 16) and sample.labels.shape == (0,)
    assert len(dataset(tmp_path, keep_empty=False)) == 1


def test_without_masks(tmp_path):
    sample = dataset(tmp_path, masks=False)[0]
    assert sample.masks is None and sample.mask_windows is None and sample.has_mask is None and len(sample.boxes) == 2


def test_samples_are_a_function_of_seed_epoch_and_index(tmp_path):
    transforms = [A.RandomCrop(20, 20), A.ColorJitter(p=1)]
    one, same, other = (dataset(tmp_path, transforms=transforms, seed=seed) for seed in (3, 3, 4))
    one[1]  # what was read before plays no part
    np.testing.assert_array_equal(one[5, 0].image, same[5, 0].image)
    assert one[5, 0].key == same[5, 0].key
    for different in (one[6, 0], one[0], other[5, 0], one[5, 1]):
        assert different.key != one[5, 0].key and different.image.tobytes() != one[5, 0].image.tobytes()
    assert 0 <= one[5, 0].key < 2**63


def test_missing_files_are_found_at_once(tmp_path, caplog):
    coco = minimal()
    path = write(tmp_path, coco)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"missing image file: image 9 file_name=.*b\.png"):
        CocoDataset(tmp_path, path)
    assert len(CocoDataset(tmp_path, path, on_error="skip")) == 1
    assert "b.png" in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="no images are left"):
        CocoDataset(tmp_path, path, on_error="skip")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoDataset(tmp_path / "nowhere", path)


def test_files_in_folders(tmp_path):
    coco = minimal()
    for image, folder in zip(coco["images"], ("x", "x/y")):
        (tmp_path / folder).mkdir()
        image["file_name"] = f"{folder}/{image['file_name']}"
    assert dataset(tmp_path, coco)[1].image.shape == (60, 40, 3)


def test_unreadable_image(tmp_path, caplog):
    path = write(tmp_path, minimal())
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png"):
        CocoDataset(tmp_path, path)[0]
    training = CocoDataset(tmp_path, path, on_error="skip", training=True)[0]
    assert training.image_id == 9 and len(training.boxes) == 0 and "a.png" in caplog.text
    evaluation = CocoDataset(tmp_path, path, on_error="skip")[0]
    assert evaluation.image_id == 7 and not evaluation.image.any()
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 images"):
        CocoDataset(tmp_path, path, on_error="skip", training=True)[0]


def test_image_of_another_size(tmp_path):
    path = write(tmp_path, minimal())
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((60, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png is 40 x 60 .* width=60 height=40 for image id 7"):
        CocoDataset(tmp_path, path)[0]


def test_masks_wanted_but_none_there(tmp_path, caplog):
    coco = minimal()
    del coco["annotations"][0]["segmentation"]
    assert not dataset(tmp_path, coco)[0].has_mask.any()
    assert "no object has a segmentation" in caplog.text


def test_collate(tmp_path):
    samples = [dataset(tmp_path, mask_size=16)[i] for i in (0, 1)]
    batch, targets = collate(samples)
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
    for i, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        np.testing.assert_array_equal(batch.images[i, :, :height, :width].permute(1, 2, 0), sample.image)
        assert batch.images[i].sum() == sample.image.sum()  # zeros elsewhere
    assert batch.image_sizes.tolist() == batch.original_sizes.tolist() == [[40, 60], [60, 40]]
    assert batch.image_ids.tolist() == [7, 9] and batch.sample_keys.tolist() == [sample.key for sample in samples]
    assert targets.valid.tolist() == [[True, True], [False, False]]
    assert targets.labels.tolist() == [[2, 1], [0, 0]] and targets.labels.dtype == torch.int64
    assert targets.boxes.shape == (2, 2, 4) and targets.boxes.dtype == torch.float32
    assert targets.masks.shape == (2, 2, 16, 16) and targets.masks.dtype == torch.float16
    assert targets.mask_windows.dtype == torch.float32
    assert targets.has_mask.tolist() == [[True, False], [False, False]] and not targets.crowd.any()


def test_collate_without_any_object_pads_to_one(tmp_path):
    _, targets = collate([dataset(tmp_path)[1]])
    assert targets.boxes.shape == (1, 1, 4) and not targets.valid.any()


def test_collate_to_a_fixed_size(tmp_path):
    samples = [dataset(tmp_path)[i] for i in (0, 1)]
    alone = collate_images(*zip(*((s.image, s.original_size, s.image_id, s.key) for s in samples)))
    assert all(torch.equal(a, b) for a, b in zip(alone, collate(samples)[0]))  # what needs no targets builds none
    assert collate(samples, size=(70, 90))[0].images.shape == (2, 3, 70, 90)
    with pytest.raises(ValueError, match=r"60 x 60 does not fit data.pad_to=\[50, 90\]"):
        collate(samples, size=(50, 90))


def test_masks_of_real_objects_agree_with_pycocotools(shared):
    from pycocotools.coco import COCO

    for name in ("coco_cc_sample", "nuclei_dsb2018"):
        root = shared / "data" / name
        path = root / "annotations" / "instances_val.json"
        data, coco = CocoDataset(root / "images", path, mask_size=700), COCO(path)
        for i in range(4):
            sample = data[i]
            theirs = [coco.annToMask(a) for a in coco.imgToAnns[sample.image_id] if not a["iscrowd"]]
            height, width = sample.image.shape[:2]
            for mask, window, full in zip(sample.masks[~sample.crowd], sample.mask_windows.astype(int), theirs):
                x, y = window[:2]
                ours = np.zeros((height, width), np.uint8)
                part = mask[: height - y, : width - x]
                ours[y : y + part.shape[0], x : x + part.shape[1]] = part
                np.testing.assert_array_equal(ours, full)


def test_resizing_enlarges_objects_with_the_image(shared):
    root = shared / "data" / "coco_cc_sample"
    path = root / "annotations" / "instances_val.json"
    plain, large = (CocoDataset(root / "images", path, steps) for steps in ([], [ResizeShortestEdge(800, 1333)]))
    for i in range(10):
        before, after = plain[i], large[i]
        scale = np.array(after.image.shape[1::-1]) / np.array(before.image.shape[1::-1])
        np.testing.assert_allclose(after.boxes, before.boxes * np.tile(scale, 2), atol=0.01)
        assert after.original_size == before.image.shape[:2]


def people() -> dict:
    """Two people with a nose, a left and a right hand; the second lacks the hands."""
    coco = minimal()
    coco["categories"][0]["keypoints"] = ["nose", "left_hand", "right_hand"]
    coco["annotations"][0]["keypoints"] = [15, 8, 2, 6, 12, 2, 22, 12, 1]
    coco["annotations"][1].update(keypoints=[35, 22, 2, 0, 0, 0, 0, 0, 0], category_id=5)
    return coco


def test_keypoints(tmp_path):
    sample = dataset(tmp_path, people(), keypoints=True)[0]
    expected = [[[15.5, 8.5, 2], [6.5, 12.5, 2], [22.5, 12.5, 1]], [[35.5, 22.5, 2], [0, 0, 0], [0, 0, 0]]]
    np.testing.assert_allclose(sample.keypoints, expected)
    _, targets = collate([sample, dataset(tmp_path, people(), keypoints=True)[1]])
    np.testing.assert_allclose(targets.keypoints[0], expected)
    assert targets.keypoints.shape == (2, 2, 3, 3) and not targets.keypoints[1].any()
    assert dataset(tmp_path, people())[0].keypoints is None


def test_mirrored_keypoints_change_sides(tmp_path):
    flipped = dataset(tmp_path, people(), [A.HorizontalFlip(p=1)], keypoints=True)[0].keypoints
    np.testing.assert_allclose(flipped[0], [[44.5, 8.5, 2], [37.5, 12.5, 1], [53.5, 12.5, 2]], atol=1e-4)
    turned = dataset(tmp_path, people(), [A.HorizontalFlip(p=1), A.VerticalFlip(p=1)], keypoints=True)[0].keypoints
    np.testing.assert_allclose(turned[0], [[44.5, 31.5, 2], [53.5, 27.5, 2], [37.5, 27.5, 1]], atol=1e-4)


def test_keypoints_that_leave_the_image_are_unlabelled(tmp_path):
    sample = dataset(tmp_path, people(), [A.Crop(10, 0, 50, 40, p=1), A.Resize(80, 80)], keypoints=True)[0]
    np.testing.assert_allclose(sample.keypoints[0], [[11, 17, 2], [0, 0, 0], [25, 25, 1]], atol=1e-4)


@pytest.mark.parametrize("keypoints", [[1, 2, 2], [1, 2, 3] * 3, [1, float("nan"), 1] * 3, "none"])
def test_wrong_keypoints(tmp_path, keypoints):
    coco = people()
    coco["annotations"][0]["keypoints"] = keypoints
    with pytest.raises(ValueError, match="annotation 1 keypoints="):
        dataset(tmp_path, coco, keypoints=True)
    assert len(dataset(tmp_path, coco)[0].boxes) == 2  # nobody asked for them


def test_data_without_keypoints(tmp_path):
    with pytest.raises(ValueError, match="'keypoints' must be one list of names"):
        dataset(tmp_path, keypoints=True)


def test_data_sets_can_be_sent_to_other_processes(tmp_path):
    data = dataset(tmp_path, transforms=[A.Resize(80, 90), A.HorizontalFlip(p=1)])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data))[0].boxes, data[0].boxes)
