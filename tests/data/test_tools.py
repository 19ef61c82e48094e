"""Exports of annotation tools, with the fields that the tools write, and what goes back to them."""

from __future__ import annotations

import base64
import csv
import io
import json
import zlib

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as rle_tools

from detector.data import CocoDataset, read_coco
from detector.data.convert import convert, main
from detector.data.formats import TOOLS, Notes
from detector.data.formats.writers import load_found, polygon_of, with_polygons
from tests.data.coco_files import minimal, write

CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><id>7</id><name>street</name><size>2</size><mode>annotation</mode><labels>
    <label><name>car</name><color>#c06060</color><type>any</type><attributes></attributes></label>
    <label><name>cat</name><color>#33ddff</color><type>any</type><attributes></attributes></label>
    <label><name>bird</name><color>#33ddfe</color><type>any</type><attributes></attributes></label>
  </labels></task><dumped>2025-03-02 12:00:00.000000+00:00</dumped></meta>
  <image id="0" name="sub/a.png" width="60" height="40">
    <box label="cat" source="manual" occluded="0" xtl="5.00" ytl="6.00" xbr="25.00" ybr="16.00" z_order="0">
      <attribute name="age">2</attribute>
    </box>
    <box label="car" source="manual" occluded="0" xtl="20" ytl="10" xbr="40" ybr="20" rotation="90.0" z_order="0"></box>
    <polygon label="car" source="manual" occluded="0" points="1.00,2.00;31.00,2.00;31.00,22.00" z_order="0"></polygon>
    <mask label="cat" source="manual" occluded="0" rle="1, 2, 2, 3, 4" left="50" top="6" width="4" height="3">
    </mask>
    <ellipse label="cat" source="manual" occluded="0" cx="30" cy="20" rx="10" ry="5" z_order="0"></ellipse>
    <points label="cat" source="manual" occluded="0" points="1.00,2.00" z_order="0"></points>
    <tag label="cat" source="manual"></tag>
  </image>
  <image id="1" name="b.png" width="60" height="40"></image>
</annotations>
"""


def read(kind, source, **options):
    """What a tool's reader gives, as the training reads it, and its notes."""
    notes = Notes()
    content = TOOLS[kind](source, notes=notes, **options)
    read_coco(content)
    return content, "\n".join(notes.lines())


def names(content):
    of = {category["id"]: category["name"] for category in content["categories"]}
    return [of[entry["category_id"]] for entry in content["annotations"]]


def pixels(entry, height=40, width=60):
    segmentation = entry["segmentation"]
    if isinstance(segmentation, list):
        segmentation = rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    return rle_tools.decode(segmentation).astype(bool)


def png(mask, mode="L"):
    data = io.BytesIO()
    picture = Image.fromarray((mask * 255).astype(np.uint8))
    if mode == "RGBA":
        picture = Image.merge("RGBA", [Image.new("L", picture.size, 255)] * 3 + [picture])
    picture.save(data, format="PNG")
    return data.getvalue()


# ---------------------------------------------------------------------------------------------------------------- CVAT


@pytest.fixture
def cvat(tmp_path):
    (tmp_path / "annotations.xml").write_text(CVAT)
    return tmp_path


def test_cvat(cvat):
    content, notes = read("cvat", cvat)
    assert [c["name"] for c in content["categories"]] == ["car", "cat", "bird"]
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        ("sub/a.png", 60, 40),
        ("b.png", 60, 40),
    ]
    assert names(content) == ["cat", "car", "car", "cat", "cat"]
    box, turned, polygon, mask, ellipse = content["annotations"]
    assert box["bbox"] == [5, 6, 20, 10] and "segmentation" not in box
    assert turned["bbox"] == pytest.approx([25, 5, 10, 20]) and len(turned["segmentation"][0]) == 8
    assert polygon["segmentation"] == [[1, 2, 31, 2, 31, 22]]
    assert np.argwhere(pixels(mask)).tolist() == [[6, 51], [6, 52], [7, 51], [7, 52], [7, 53]]
    assert ellipse["area"] == pytest.approx(np.pi * 50, rel=0.05)
    for text in ("1 x rotated box, kept as an outline", "1 x points left out", "1 x tag left out", "1 x ellipse, kept"):
        assert text in notes


def test_cvat_of_a_film_is_refused_by_name(cvat):
    film = """<annotations><version>1.1</version><track id="3" label="car" source="manual"><box frame="0" keyframe="1"
        outside="0" occluded="0" xtl="1" ytl="2" xbr="3" ybr="4" z_order="0"></box></track></annotations>"""
    (cvat / "annotations.xml").write_text(film)
    with pytest.raises(
        ValueError, match=r"annotations\.xml: <track> '3' is of a film: export the task as 'CVAT for im"
    ):
        read("cvat", cvat)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('xtl="5.00"', 'xtl="five"', r"image 'sub/a.png' box 0: \['five', .*must be 4 finite numbers"),
        ('rle="1, 2, 2, 3, 4"', 'rle="1, 2"', "mask 3: rle, left, top, width and height do not fit"),
        ('width="60"', 'width=""', "size .* is none, and .*a.png is not there to tell: give --images"),
        ("<tag ", "<blob ", "<blob> is no shape that is known here"),
        ("<annotations>", "<other>", "is not well-formed|not XML|mismatched"),
    ],
)
def test_cvat_that_is_wrong(cvat, old, new, message):
    (cvat / "annotations.xml").write_text(
        CVAT.replace(old, new).replace("</tag>", "</blob>" if "blob" in new else "</tag>")
    )
    with pytest.raises(ValueError, match=message):
        read("cvat", cvat)


def test_cvats_coco_with_a_rotated_box(caplog):
    """CVAT writes the box as it was before it was turned, and the angle into the attributes."""
    coco = minimal()
    coco["annotations"][1] |= {"bbox": [20, 10, 20, 10], "segmentation": []}
    coco["annotations"][1]["attributes"] = {"occluded": False, "rotation": 90.0}
    coco["annotations"][0]["attributes"] = {"occluded": False, "rotation": 0.0}
    found = read_coco(coco)
    np.testing.assert_allclose(sorted(found.boxes.tolist()), [[5, 6, 25, 16], [25, 5, 35, 25]], atol=1e-4)
    assert (
        "1 x box that CVAT turned (attributes.rotation), read as its outline and the upright box around it"
        in caplog.text
    )
    boxes_only = read_coco(coco, masks=False)
    np.testing.assert_allclose(boxes_only.boxes, found.boxes)


# -------------------------------------------------------------------------------------------------------- Label Studio

# from label_studio_sdk's encode_rle, of an 8 x 6 picture: rows 1 to 3, columns 2 to 5
BRUSH = [0, 0, 0, 192, 57, 27, 254, 39, 0, 191, 255, 124, 2, 255, 253, 240, 11, 255, 249, 28, 0]


def region(kind, value, label, width=60, height=40, **more):
    about = {"original_width": width, "original_height": height, "image_rotation": 0, "id": f"r{label}"}
    about |= {"from_name": "label", "to_name": "image", "type": kind, "origin": "manual"}
    return about | {"value": value | {kind: [label]}} | more


RECTANGLE = {"x": 10.0, "y": 25.0, "width": 50.0, "height": 50.0, "rotation": 0}


def task(results, number=1, **more):
    annotation = {"id": number, "completed_by": 1, "result": results, "was_cancelled": False, "ground_truth": False}
    annotation |= {"created_at": "2025-03-02T12:00:00Z", "updated_at": "2025-03-02T12:00:00Z", "lead_time": 3.2}
    about = {"id": number, "annotations": [annotation], "file_upload": f"1a2b3c4d-{number}.png", "drafts": []}
    return about | {"predictions": [], "data": {"image": f"/data/upload/7/1a2b3c4d-{number}.png"}, "meta": {}} | more


def test_label_studio(tmp_path):
    turned = RECTANGLE | {"rotation": 90.0}
    polygon = {"points": [[10, 10], [50, 10], [50, 90]], "closed": True}
    ellipse = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 0}
    plain = {"id": "p", "type": "rectangle", "value": RECTANGLE, "original_width": 60, "original_height": 40}
    labels = {"id": "p", "type": "labels", "value": RECTANGLE | {"labels": ["cat"]}} | plain | {"type": "labels"}
    labels["value"] = RECTANGLE | {"labels": ["cat"]}
    choice = {"id": "c", "type": "choices", "value": {"choices": ["sharp"]}, "from_name": "q", "to_name": "image"}
    shapes = [("rectanglelabels", RECTANGLE), ("rectanglelabels", turned), ("polygonlabels", polygon)]
    results = [region(kind, value, "car") for kind, value in [*shapes, ("ellipselabels", ellipse)]]
    tasks = [task([*results, plain, labels, choice]), task([], 2, data={"image": "http://host/a/2.png"}), task([], 3)]
    tasks[2]["annotations"] = []
    tasks.append(task([region("brushlabels", {"format": "rle", "rle": BRUSH}, "cat", 8, 6)], 4))
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    (tmp_path / "images").mkdir()
    for name, size in (("1.png", (60, 40)), ("2.png", (50, 30)), ("1a2b3c4d-4.png", (8, 6))):
        Image.new("RGB", size).save(tmp_path / "images" / name)
    with pytest.raises(ValueError, match=r"size .* is none, and .* is not there to tell"):
        read("label_studio", tmp_path)  # a task without regions does not tell the size
    tasks[1]["data"]["image"] = "2.png"
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    content, notes = read("label_studio", tmp_path)
    assert [image["file_name"] for image in content["images"]] == ["1.png", "2.png", "1a2b3c4d-4.png"]
    assert names(content) == ["car"] * 4 + ["cat"] * 2
    box, turned, polygon, ellipse, again, brush = content["annotations"]
    assert box["bbox"] == again["bbox"] == pytest.approx([6, 10, 30, 20])
    assert turned["bbox"][0] == 0 and turned["bbox"][1:] == pytest.approx([10, 6, 30])  # cut; about its corner
    assert polygon["segmentation"] == [pytest.approx([6, 4, 30, 4, 30, 36])]
    assert ellipse["area"] == pytest.approx(np.pi * 6 * 8, rel=0.05)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(pixels(brush, 6, 8), expected)
    assert "1 x task without an annotation" in notes and "1 x choices left out" in notes
    assert len(CocoDataset(tmp_path / "images", write_json(tmp_path / "ls.json", content))) == 3


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_label_studios_short_form_and_several_annotators(tmp_path):
    value = RECTANGLE | {"rectanglelabels": ["cat"], "original_width": 60, "original_height": 40}
    short = [{"id": 1, "image": "/data/upload/1a2b3c4d-a.png", "label": [value], "annotator": 1, "annotation_id": 1}]
    file = write_json(tmp_path / "min.json", short)
    content, _ = read("label_studio", file)
    assert content["annotations"][0]["bbox"] == pytest.approx([6, 10, 30, 20]) and names(content) == ["cat"]
    full = task([region("rectanglelabels", RECTANGLE, "cat")])
    newer = task([region("rectanglelabels", RECTANGLE, "dog")])["annotations"][0] | {
        "updated_at": "2025-04-01T12:00:00Z"
    }
    full["annotations"] += [newer, newer | {"updated_at": "2025-05-01", "was_cancelled": True}]
    content, notes = read("label_studio", write_json(tmp_path / "full.json", [full]))
    assert names(content) == ["dog"] and "1 x task with several annotations" in notes
    full["annotations"][0]["ground_truth"] = True
    assert names(read("label_studio", write_json(tmp_path / "full.json", [full]))[0]) == ["cat"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_rotation": 90}, "task 1 region rcat: image_rotation=90: turn the picture itself"),
        (
            {"value": {"x": "left", "y": 2, "width": 3, "height": 4, "rectanglelabels": ["cat"]}},
            "must be 2 finite numbers",
        ),
        ({"value": {"rle": [1, 2, 3], "brushlabels": ["cat"]}}, "rle is cut short"),
        ({"value": {"rle": BRUSH, "brushlabels": ["cat"]}}, "rle has 192 values, the picture of 60 x 40 has 9600"),
    ],
)
def test_label_studio_that_is_wrong(tmp_path, change, message):
    file = write_json(tmp_path / "a.json", [task([region("rectanglelabels", RECTANGLE, "cat") | change])])
    with pytest.raises(ValueError, match=message):
        read("label_studio", file)
    with pytest.raises(ValueError, match="must be a list of tasks"):
        read("label_studio", write_json(tmp_path / "a.json", {"images": []}))


# ------------------------------------------------------------------------------------------------- LabelMe, Supervisely


def labelme_shape(kind, points, label="cat", **more):
    about = {"label": label, "points": points, "group_id": None, "description": "", "shape_type": kind, "flags": {}}
    return about | {"mask": None} | more


def test_labelme(tmp_path):
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    data = base64.b64encode(png(mask)).decode()
    shapes = [
        labelme_shape("rectangle", [[25, 16], [5, 6]]),
        labelme_shape("polygon", [[1, 1], [9, 1], [9, 9]], "dog", group_id=1),
        labelme_shape("polygon", [[20, 1], [29, 1], [29, 9]], "dog", group_id=1),
        labelme_shape("circle", [[30, 20], [40, 20]], "dog"),
        labelme_shape("oriented_rectangle", [[10, 10], [20, 20], [15, 25], [5, 15]], "dog"),
        labelme_shape("mask", [[40, 10], [44, 13]], mask=data),
        labelme_shape("point", [[1, 1]]),
        labelme_shape("linestrip", [[1, 1], [2, 2]]),
    ]
    about = {"version": "5.8.1", "flags": {}, "shapes": shapes, "imagePath": "..\\pictures\\a.png", "imageData": None}
    (tmp_path / "labels").mkdir()
    file = write_json(tmp_path / "labels" / "a.json", about | {"imageHeight": 40, "imageWidth": 60})
    content, notes = read("labelme", tmp_path)
    assert content["images"][0]["file_name"] == "pictures/a.png"
    box, circle, turned, masked, two = content["annotations"]
    assert names(content) == ["cat", "dog", "dog", "cat", "dog"] and box["bbox"] == [5, 6, 20, 10]
    assert circle["area"] == pytest.approx(np.pi * 100, rel=0.03) and turned["bbox"] == [5, 10, 15, 15]
    assert masked["bbox"] == [41, 11, 3, 2] and masked["area"] == 6
    assert len(two["segmentation"]) == 2 and two["bbox"] == [1, 1, 28, 8]
    assert "1 x point left out" in notes and "1 x linestrip left out" in notes
    for shape, message in (
        (labelme_shape("rectangle", [[1, 2]]), "shape 0: a rectangle has 2 points, not 1"),
        (labelme_shape("mask", [[1, 2], [3, 4]], mask="AAAA"), "mask is no picture in base64"),
        (labelme_shape("rectangle", [[1, 2], [3, 4]], ""), "label '' is no name"),
    ):
        write_json(file, about | {"imageHeight": 40, "imageWidth": 60, "shapes": [shape]})
        with pytest.raises(ValueError, match=message):
            read("labelme", tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no JSON file of LabelMe"):
        read("labelme", tmp_path)


def supervisely_object(kind, title, **more):
    about = {"id": 9, "classId": 3, "description": "", "geometryType": kind, "labelerLogin": "me", "tags": []}
    return about | {"createdAt": "2025-03-02T12:00:00.000Z", "classTitle": title} | more


def test_supervisely(tmp_path):
    bitmap = np.zeros((4, 5), bool)
    bitmap[1:3, 1:4] = True
    packed = base64.b64encode(zlib.compress(png(bitmap, "RGBA"))).decode()
    square, hole = [[10, 10], [30, 10], [30, 30], [10, 30]], [[15, 15], [20, 15], [20, 20], [15, 20]]
    objects = [
        supervisely_object("rectangle", "cat", points={"exterior": [[5, 6], [25, 16]], "interior": []}),
        supervisely_object("polygon", "dog", points={"exterior": square, "interior": []}),
        supervisely_object("polygon", "dog", points={"exterior": square, "interior": [hole]}),
        supervisely_object("bitmap", "cat", bitmap={"data": packed, "origin": [40, 10]}),
        supervisely_object("line", "cat", points={"exterior": [[1, 1], [2, 2]], "interior": []}),
    ]
    size = {"height": 40, "width": 60}
    classes = [{"title": t, "shape": "any", "color": "#F1D81A", "geometry_config": {}} for t in ("dog", "cat", "bird")]
    write_json(tmp_path / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    for folder in ("ann", "img"):
        (tmp_path / "ds0" / folder).mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(tmp_path / "ds0" / "img" / "a.png")
    file = tmp_path / "ds0" / "ann" / "a.png.json"
    write_json(file, {"description": "", "tags": [], "size": size, "objects": objects})
    content, notes = read("supervisely", tmp_path)
    assert content["images"][0]["file_name"] == "ds0/img/a.png" and names(content) == ["cat", "dog", "dog", "cat"]
    assert [c["name"] for c in content["categories"]] == ["dog", "cat", "bird"]
    box, whole, pierced, masked = content["annotations"]
    assert box["bbox"] == [5, 6, 20, 10] and whole["area"] == 400
    assert pixels(whole).sum() - pixels(pierced).sum() == 25 and not pixels(pierced)[17, 17]
    assert masked["bbox"] == [41, 11, 3, 2] and "1 x line left out" in notes
    broken = supervisely_object("bitmap", "cat", bitmap={"data": "AAAA", "origin": [1, 1]})
    write_json(file, {"size": size, "objects": [broken]})
    with pytest.raises(ValueError, match="object 9: bitmap cannot be read"):
        read("supervisely", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"meta\.json does not exist"):
        read("supervisely", tmp_path / "ds0")


def test_roboflow_as_it_comes(tmp_path, caplog):
    """train/, valid/ with _annotations.coco.json among the pictures, and a super-category 0 that no object has."""
    from detector.config import compose
    from detector.data import build_dataset

    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        coco = minimal()
        coco["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}] + [
            {"id": id_, "name": name, "supercategory": "pets"} for id_, name in ((1, "cat"), (2, "dog"))
        ]
        for entry in coco["annotations"]:
            entry |= {"category_id": 1, "segmentation": []}
        write(tmp_path / split, coco, "_annotations.coco.json")
    cfg = compose("train", ["data=roboflow", f"data.root={tmp_path}", "data.masks=false"])
    for split in ("train", "val"):
        assert build_dataset(cfg.data, split).categories == ["cat", "dog"]
    assert (
        "1 x category 0 is the group of the others and no object uses it, left out: category 0 name='pets'"
        in caplog.text
    )
    changed = minimal()
    changed["categories"] = coco["categories"]
    assert (
        read_coco(changed | {"annotations": [a | {"category_id": 0} for a in coco["annotations"]]}).categories[0]
        == "pets"
    )


# ------------------------------------------------------------------------------------------------------------- and back


def ring_and_parts():
    """A mask with a hole, one of two parts, and a plain box."""
    ring = np.zeros((40, 60), np.uint8)
    cv2.circle(ring, (20, 20), 14, 1, -1)
    cv2.circle(ring, (20, 20), 6, 0, -1)
    rle = rle_tools.encode(np.asfortranarray(ring))
    coco = minimal()
    coco["annotations"] = [
        {"id": 1, "image_id": 7, "category_id": 5, "iscrowd": 0, "bbox": rle_tools.toBbox(rle).tolist(), "score": 0.9,
         "area": int(ring.sum()), "segmentation": {"size": [40, 60], "counts": rle["counts"].decode()}},
        {"id": 2, "image_id": 7, "category_id": 2, "iscrowd": 0, "bbox": [1, 1, 28, 8], "area": 72, "score": 0.4,
         "segmentation": [[1, 1, 9, 1, 9, 9], [20, 1, 29, 1, 29, 9, 20, 9]]},
        {"id": 3, "image_id": 9, "category_id": 2, "iscrowd": 0, "bbox": [3, 4, 10, 20], "area": 200, "score": 0.6},
    ]  # fmt: skip
    return coco


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def filled(polygon, height=40, width=60, scale=8):
    """The even-odd inside of a polygon, as OpenCV draws it, in parts of pixels."""
    canvas = np.zeros((height * scale, width * scale), np.uint8)
    cv2.fillPoly(canvas, [np.round(polygon * scale - 0.5).astype(np.int32)], 1)
    return canvas.astype(bool)


def test_one_polygon_for_rings_and_parts():
    coco = ring_and_parts()
    ring, parts, box = coco["annotations"]
    image = coco["images"][0]
    exact = filled(polygon_of(ring, image, tolerance=0))
    smooth = filled(polygon_of(ring, image))
    whole = np.kron(pixels(ring), np.ones((8, 8), bool))
    assert iou(exact, whole) > 0.97 and iou(smooth, whole) > 0.97  # OpenCV draws the edges, too
    assert len(polygon_of(ring, image)) < len(polygon_of(ring, image, tolerance=0)) / 1.5
    assert not smooth[160, 160] and polygon_of(box, coco["images"][1]) is None
    assert filled(polygon_of(parts, image)).sum() / 64 == pytest.approx(32 + 72, rel=0.06)
    again = with_polygons(coco)  # as COCO draws them
    assert iou(pixels(again["annotations"][0]), pixels(ring)) == 1 and "segmentation" not in again["annotations"][2]
    overlapping = parts | {"segmentation": [[1, 1, 21, 1, 21, 21, 1, 21], [11, 11, 31, 11, 31, 31, 11, 31]]}
    assert filled(polygon_of(overlapping, image)).sum() / 64 == pytest.approx(700, rel=0.05)
    with pytest.raises(ValueError, match="annotation 1 of image 7: segmentation"):
        polygon_of(ring | {"segmentation": {"size": [3, 3], "counts": "1"}}, image)


@pytest.fixture
def found(tmp_path):
    """predictions.json, as `detector predict` writes it, in a folder with the pictures."""
    write(tmp_path, minimal())
    coco = ring_and_parts()
    for image in coco["images"]:
        image["file_name"] = str(tmp_path / image["file_name"])
    return write_json(tmp_path / "predictions.json", coco)


def test_to_coco_and_csv(found, tmp_path, capsys):
    assert main(["to_coco", str(found), str(tmp_path / "polygons.json"), "--score", "0.5"]) == 0
    content = json.loads((tmp_path / "polygons.json").read_text())
    assert [entry["id"] for entry in content["annotations"]] == [1, 3] and read_coco(content).boxes.shape == (2, 4)
    assert isinstance(content["annotations"][0]["segmentation"][0], list)
    assert main(["to_csv", str(found), str(tmp_path / "out" / "found.csv"), "--images", str(tmp_path)]) == 0
    with open(tmp_path / "out" / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[2] == {"file_name": "b.png", "width": "40", "height": "60", "category": "dog", "score": "0.6000",
                       "x": "3.00", "y": "4.00", "w": "10.00", "h": "20.00"}  # fmt: skip
    assert "3 rows" in capsys.readouterr().out


def test_results_of_an_evaluation_need_their_annotations(found, tmp_path, capsys):
    coco = minimal()
    truth = write_json(tmp_path / "truth.json", coco)
    results = write_json(
        tmp_path / "results.json", [{k: v for k, v in a.items() if k != "id"} for a in ring_and_parts()["annotations"]]
    )
    assert main(["to_csv", str(results), str(tmp_path / "a.csv")]) == 2
    assert "is a list of results: give --annotations" in capsys.readouterr().err
    assert main(["to_csv", str(results), str(tmp_path / "a.csv"), "--annotations", str(truth)]) == 0
    broken = write_json(tmp_path / "results.json", [{"image_id": 1, "category_id": 2}])
    with pytest.raises(ValueError, match=r"annotations\[0\]: image_id=1 is unknown"):
        load_found(broken, truth)


def test_to_cvat_and_back(found, tmp_path, capsys):
    assert main(["to_cvat", str(found), str(tmp_path / "cvat.xml"), "--images", str(tmp_path), "--score", "0.5"]) == 0
    shown = capsys.readouterr()
    assert "1 boxes and 1 polygons" in shown.out and "2 x" not in shown.out and "score left out" in shown.err
    content, _ = read("cvat", tmp_path / "cvat.xml")
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png"] and names(content) == [
        "cat",
        "dog",
    ]
    ring, box = content["annotations"]
    assert iou(pixels(ring), pixels(ring_and_parts()["annotations"][0])) == 1 and box["bbox"] == [3, 4, 10, 20]


def test_to_label_studio_and_back(found, tmp_path, capsys):
    target = tmp_path / "tasks.json"
    options = ["--prefix", "s3://bucket/", "--from-name", "tag", "--to-name", "picture", "--images", str(tmp_path)]
    assert main(["to_label_studio", str(found), str(target), *options]) == 0
    tasks = json.loads(target.read_text())
    assert tasks[0]["data"] == {"picture": "s3://bucket/a.png"}
    first = tasks[0]["predictions"][0]
    assert first["score"] == pytest.approx(0.65) and first["result"][0]["score"] == 0.9
    assert first["result"][0]["type"] == "polygonlabels" and first["result"][0]["from_name"] == "tag"
    value = dict(tasks[1]["predictions"][0]["result"][0]["value"])
    assert value.pop("rectanglelabels") == ["dog"]
    assert value == pytest.approx({"x": 7.5, "y": 400 / 60, "width": 25, "height": 2000 / 60, "rotation": 0})
    for one in tasks:  # what an annotator submits as it is
        one["annotations"] = [one["predictions"][0] | {"was_cancelled": False}]
        one["data"] = {"image": one["data"]["picture"].removeprefix("s3://bucket/")}
    content, _ = read("label_studio", write_json(tmp_path / "back.json", tasks))
    assert names(content) == ["cat", "dog", "dog"] and content["annotations"][2]["bbox"] == pytest.approx(
        [3, 4, 10, 20]
    )
    coco = minimal()
    main(["to_label_studio", str(write_json(tmp_path / "own.json", coco)), str(target)])
    assert "annotations" in json.loads(target.read_text())[0]


def test_to_yolo_and_back(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    coco = minimal()
    coco["annotations"].append(coco["annotations"][1] | {"id": 3, "iscrowd": 1})
    source = write(tmp_path / "pictures", coco)
    out = tmp_path / "yolo"
    for split in ("train", "val"):
        assert main(["to_yolo", str(source), str(out), "--images", str(source.parent), "--split", split]) == 0
    assert (
        "1 x object without an outline among others" in (shown := capsys.readouterr().err)
        and "1 x crowd region" in shown
    )
    assert yaml.safe_load((out / "data.yaml").read_text())["names"] == ["dog", "cat"]
    back = convert("yolo", out, ["val"])
    assert [entry["bbox"] for entry in back["annotations"]] == [
        pytest.approx([5, 6, 20, 10], abs=1e-3), pytest.approx([30, 20, 10, 10], abs=1e-3)]  # fmt: skip
    assert back["annotations"][0]["segmentation"] == [pytest.approx([5, 6, 25, 6, 25, 16, 5, 16], abs=1e-3)]
    assert main(["to_yolo", str(source), str(tmp_path / "boxes"), "--images", str(source.parent), "--boxes"]) == 0
    assert (tmp_path / "boxes" / "labels" / "train" / "a.txt").read_text().splitlines()[0].count(" ") == 4
    coco["categories"][0]["name"] = "lion"
    source.write_text(json.dumps(coco))
    assert main(["to_yolo", str(source), str(out), "--images", str(source.parent), "--split", "test"]) == 2
    assert "has other names than ['dog', 'lion']" in capsys.readouterr().err
    assert main(["to_yolo", str(source), str(tmp_path / "new")]) == 2 and "give --images" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_writes_one_file_for_an_export(cvat, capsys):
    assert main(["cvat", str(cvat)]) == 0
    shown = capsys.readouterr()
    assert f"{cvat / 'annotations' / 'cvat.json'}: 2 images, 5 objects of 3 categories" in shown.out
    assert f"2 x picture that is not in {cvat}: 'sub/a.png'; 'b.png'" in shown.err
    assert main(["cvat", str(cvat / "gone")]) == 2 and "gone does not exist" in capsys.readouterr().err
