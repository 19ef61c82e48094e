"""Other formats give the data set that their files describe, through the same interface."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

from detector.config import compose
from detector.data import build_dataset
from detector.data.convert import convert, main
from detector.evaluation.coco import coco_metrics

SIZE = (60, 40)  # width, height


def picture(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path, **options)


def opened(name, root, split="train"):
    """The data set as train.py opens it."""
    cfg = compose("train", ["experiment=none", f"data={name}", f"data.root={root}", "data.cache=null"])
    return build_dataset(cfg.data, split)


# -------------------------------------------------------------------------------------------------------- Pascal VOC


def voc_object(name, box, difficult=0):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox>{part}</object>"


def voc_xml(folder, stem, *objects):
    folder.mkdir(parents=True, exist_ok=True)
    size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
    content = f"<annotation><filename>{stem}.jpg</filename>{size}{''.join(objects)}</annotation>"
    (folder / f"{stem}.xml").write_text(content)


@pytest.fixture
def voc(tmp_path):
    for year, stems in ({"VOC2007": ("01", "02", "03"), "VOC2012": ("2012_1",)}).items():
        for stem in stems:
            voc_xml(tmp_path / year / "Annotations", stem, voc_object("dog", (1, 1, 20, 10)))
            picture(tmp_path / year / "JPEGImages" / f"{stem}.jpg")
        (tmp_path / year / "ImageSets" / "Main").mkdir(parents=True)
    voc_xml(
        tmp_path / "VOC2007" / "Annotations",
        "02",
        voc_object("cat", (5, 6, 60, 40)),
        voc_object("dog", (3, 3, 9, 9), 1),
    )
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("01\n02\n")
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text("03\n")
    (tmp_path / "VOC2012" / "ImageSets" / "Main" / "trainval.txt").write_text("2012_1\n")
    return tmp_path


def test_voc_counts_pixels_from_one_and_ignores_difficult_objects(voc):
    assert main(["voc", str(voc)]) == 0
    train, val = opened("voc", voc), opened("voc", voc, "val")
    assert train.categories == ["cat", "dog"] and len(train) == 3 and len(val) == 1
    assert [train.image_path(i).name for i in range(3)] == ["01.jpg", "02.jpg", "2012_1.jpg"]
    np.testing.assert_array_equal(train[0].boxes, [[0, 0, 20, 10]])
    np.testing.assert_array_equal(train[1].boxes, [[4, 5, 60, 40], [2, 2, 9, 9]])
    assert train[1].labels.tolist() == [1, 2] and train[1].crowd.tolist() == [False, True]
    assert train[2].labels.tolist() == [2] and train[0].image.shape == (40, 60, 3)


def test_voc_masks(voc):
    """From SegmentationObject, by the number of the object; read, and measured as COCO masks."""
    folder = voc / "VOC2007"
    pixels = np.zeros((40, 60), np.uint8)
    pixels[6:30, 5:50], pixels[29:31, 5:50], pixels[3:8, 3:8] = 1, 255, 2
    (folder / "SegmentationObject").mkdir()
    picture = Image.fromarray(pixels, "P")
    picture.putpalette(list(range(256)) * 3)
    picture.save(folder / "SegmentationObject" / "02.png")
    (folder / "ImageSets" / "Segmentation").mkdir()
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("02\n")
    content = convert("voc", voc, ["VOC2007/Segmentation/val"])
    assert len(content["images"]) == 1
    masks = [rle_tools.decode(entry["segmentation"]) for entry in content["annotations"]]
    np.testing.assert_array_equal(masks, [pixels == 1, pixels == 2])
    assert [entry["area"] for entry in content["annotations"]] == [(pixels == 1).sum(), 25]
    keys = ("image_id", "category_id", "segmentation")
    found = [{key: entry[key] for key in keys} | {"score": 0.9} for entry in content["annotations"]]
    assert coco_metrics(content, found, "segm")["AP"] == pytest.approx(1)
    Image.new("L", (50, 40)).save(folder / "SegmentationObject" / "02.png")
    with pytest.raises(ValueError, match=r"02.png: expected one number for each of 40 x 60 pixels, got \[40, 50\]"):
        convert("voc", voc, ["VOC2007/trainval"])


def test_voc_folders_with_pictures_and_xml_side_by_side(tmp_path):
    for split in ("train", "test"):
        voc_xml(tmp_path / split, "a", voc_object("dog", (1, 1, 20, 10)))
        picture(tmp_path / split / "a.jpg")
    assert main(["voc", str(tmp_path), "--train", "train", "--val", "test"]) == 0
    assert opened("voc", tmp_path, "val").image_path(0) == tmp_path / "test" / "a.jpg"


def test_voc_says_what_is_wrong(voc, capsys):
    with pytest.raises(FileNotFoundError, match=r"split 'VOC2007/nothing'.*nothing.txt nor a folder"):
        convert("voc", voc, ["VOC2007/nothing"])
    (voc / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text("03\n04\n")
    with pytest.raises(ValueError, match=r"test.txt: 1 images have no XML file in .*Annotations: \['04'\]"):
        convert("voc", voc, ["VOC2007/test"])
    (voc / "VOC2012" / "Annotations" / "2012_1.xml").write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"VOC2012.*2012_1.xml"):
        convert("voc", voc, ["VOC2012/trainval"])
    assert main(["voc", str(voc), "--train", "nowhere"]) == 2
    assert "error: split 'nowhere'" in capsys.readouterr().err


def test_voc_names_the_splits_that_there_are(voc, capsys):
    (voc / "VOC2007" / "ImageSets" / "Main" / "test.txt").unlink()
    assert main(["voc", str(voc)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("name others as --train and --val; there are: VOC2007/trainval, VOC2012/trainval")
    assert main(["voc", str(voc), "--train", "VOC2007/trainval", "--val", "VOC2012/trainval"]) == 0


# -------------------------------------------------------------------------------------------------------- Cityscapes


def test_cityscapes_reads_instances_and_groups(tmp_path):
    ids = np.zeros((40, 60), np.uint16)
    ids[:10] = 23  # sky: no instances
    ids[12:30, 5:25] = 26000  # a car
    ids[20:30, 15:18] = 24003  # a person before it
    ids[35:40, 40:60] = 33  # a group of bicycles
    ids[0:2, 0:2] = 29001  # a caravan, which the benchmark does not measure
    for split in ("train", "val"):
        path = tmp_path / "gtFine" / split / "ulm" / "ulm_000000_000019_gtFine_instanceIds.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(ids).save(path)
        picture(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    assert main(["cityscapes", str(tmp_path)]) == 0
    data = opened("cityscapes", tmp_path)
    names = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    sample = data[0]
    assert data.categories == names and [names[i - 1] for i in sample.labels] == ["bicycle", "person", "car"]
    np.testing.assert_array_equal(sample.boxes, [[40, 35, 60, 40], [15, 20, 18, 30], [5, 12, 25, 30]])
    assert sample.crowd.tolist() == [True, False, False]
    car = sample.masks[2, :18, :20]  # one cell of the grid for each pixel
    np.testing.assert_array_equal(car, ids[12:30, 5:25] == 26000)
    truth = convert("cityscapes", tmp_path, ["val"])
    found = [{**entry, "score": 0.5} for entry in truth["annotations"] if not entry["iscrowd"]]
    assert coco_metrics(truth, found, "segm")["AP"] == pytest.approx(1)
    assert coco_metrics(truth, found[:1], "segm")["AP"] == pytest.approx(0.5)  # of person and car
    with pytest.raises(FileNotFoundError, match=r"instanceIds.png: no such files"):
        convert("cityscapes", tmp_path, ["test"])


# --------------------------------------------------------------------------------------------------------------- LVIS


def test_lvis_images_get_their_file_names(tmp_path):
    content = {
        "images": [
            {"id": 9, "width": 60, "height": 40, "coco_url": "http://images.cocodataset.org/train2017/000000000009.jpg",
             "neg_category_ids": [2], "not_exhaustive_category_ids": []}
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 1, "bbox": [5, 6, 20, 10], "area": 200,
             "segmentation": [[5, 6, 25, 6, 25, 16, 5, 16]]}
        ],
        "categories": [{"id": 1, "name": "a", "frequency": "r"}, {"id": 2, "name": "b", "frequency": "f"}],
    }  # fmt: skip
    for split in ("train", "val"):
        (tmp_path / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    picture(tmp_path / "train2017" / "000000000009.jpg")
    assert main(["lvis", str(tmp_path)]) == 0
    data = opened("lvis", tmp_path, "val")
    assert data[0].boxes.tolist() == [[5, 6, 25, 16]] and data[0].has_mask.all()
    written = json.loads(data.annotation_files[0].read_text())
    assert written["images"][0]["neg_category_ids"] == [2] and written["categories"] == content["categories"]
    del content["images"][0]["neg_category_ids"]
    (tmp_path / "lvis_v1_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image 9 lacks LVIS's lists"):
        convert("lvis", tmp_path, ["val"])


# --------------------------------------------------------------------------------------------------------------- YOLO


@pytest.fixture
def yolo(tmp_path):
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../train/images\nnames: {0: cat, 1: dog}\n")
    picture(tmp_path / "train" / "images" / "a.png")
    picture(tmp_path / "train" / "images" / "sub" / "b.png")  # without labels
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "train" / "images" / "turned.jpg", (40, 60), exif=exif)
    labels = tmp_path / "train" / "labels"
    labels.mkdir()
    (labels / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.5 0.1 0.5 0.6\n")
    (labels / "turned.txt").write_text("0 0.25 0.5 0.5 1\n")
    return tmp_path


def test_yolo_boxes_polygons_and_empty_images(yolo):
    assert main(["yolo", str(yolo)]) == 0
    data = opened("yolo", yolo)
    assert data.categories == ["cat", "dog"]
    assert [data.annotations.file_name(i) for i in range(3)] == [
        "train/images/a.png",
        "train/images/sub/b.png",
        "train/images/turned.jpg",
    ]
    np.testing.assert_allclose(data[0].boxes, [[24, 12, 36, 28], [6, 4, 30, 24]], atol=1e-5)
    assert data[0].labels.tolist() == [2, 1] and data[0].has_mask.tolist() == [False, True]
    assert len(data[1].boxes) == 0
    np.testing.assert_allclose(data[2].boxes, [[0, 0, 30, 40]])  # 60 x 40 once it is upright
    triangle = convert("yolo", yolo, ["train"])["annotations"][1]
    assert triangle["area"] == pytest.approx(24 * 20 / 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.2 0.4", "class 2 is not among the 2 names"),
        ("0 0.5 0.5 0.2", "3 numbers after the class"),
        ("cat 0.5 0.5 0.2 0.4", "must be a class number and numbers"),
    ],
)
def test_yolo_names_file_and_line(yolo, line, message):
    (yolo / "train" / "labels" / "a.txt").write_text(f"0 0.5 0.5 0.2 0.4\n{line}\n")
    with pytest.raises(ValueError, match=rf"a.txt:2: .*{message}"):
        convert("yolo", yolo, ["train"])


def test_yolo_needs_names_and_folders(yolo):
    (yolo / "data.yaml").write_text("train: nowhere/images\nnames: [cat, dog]\n")
    with pytest.raises(FileNotFoundError, match="train: 'nowhere/images' is no folder"):
        convert("yolo", yolo, ["train"])
    (yolo / "data.yaml").write_text("names: 3\n")
    with pytest.raises(ValueError, match="'names' must be a list"):
        convert("yolo", yolo, ["train"])


def test_splits_are_joined_by_name(voc):
    voc_xml(
        voc / "VOC2012" / "Annotations", "2012_1", voc_object("bird", (1, 1, 20, 10)), voc_object("dog", (1, 1, 5, 5))
    )
    joined = convert("voc", voc, ["VOC2007/trainval", "VOC2012/trainval"])
    names = {category["id"]: category["name"] for category in joined["categories"]}
    assert [names[entry["category_id"]] for entry in joined["annotations"]] == ["dog", "cat", "dog", "bird", "dog"]
    assert [entry["image_id"] for entry in joined["annotations"]] == [1, 2, 2, 3, 3]
    own = [{**entry, "score": 1.0} for entry in joined["annotations"] if not entry["iscrowd"]]
    assert coco_metrics(joined, own)["AP"] == 1
    with pytest.raises(ValueError, match="format 'darknet' is unknown"):
        convert("darknet", voc, ["train"])
