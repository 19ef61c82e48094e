"""VOC and YOLO as tools really write them: what each file gives, or how it is refused."""

from __future__ import annotations

import unicodedata
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detector.data import read_coco
from detector.data.convert import convert, main
from detector.data.formats import Notes

SIZE = (60, 40)


def picture(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path, **options)


# ---------------------------------------------------------------------------------------------------------------- VOC

BOX = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>"
SIZE_XML = "<size><width>60</width><height>40</height><depth>3</depth></size>"


def annotation(name="dog", filename="a.jpg", size=SIZE_XML, difficult="<difficult>0</difficult>", box=BOX) -> str:
    item = f"<object><name>{name}</name>{difficult}{box}</object>" if name is not None else ""
    return f"<annotation><filename>{filename}</filename>{size}{item}</annotation>"


def voc(tmp_path, xml: str | bytes, *pictures: str, stem: str = "a", size=SIZE, **options):
    """The content of a folder with one XML file and pictures beside it, and the notes."""
    for name in pictures or ("a.jpg",):
        picture(tmp_path / "train" / name, size, **options)
    (tmp_path / "train" / f"{stem}.xml").write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    notes = Notes()
    return convert("voc", tmp_path, ["train"], notes), notes


def header(encoding: str, **options) -> bytes:
    return f'<?xml version="1.0" encoding="{encoding}"?>\n{annotation("größe", **options)}'.encode(encoding)


READ = {
    "an entity in a class": (annotation("R&amp;D"), {"name": "R&D"}),
    "numbers for letters": (annotation("caf&#233; &lt;b&gt;"), {"name": "café <b>"}),
    "blanks around a class": (annotation("\n  dog \n"), {}),
    "latin-1": (header("iso-8859-1"), {"name": "größe"}),
    "windows-1252": (header("cp1252"), {"name": "größe"}),
    "UTF-16": (header("utf-16"), {"name": "größe"}),
    "a byte-order mark": (b"\xef\xbb\xbf" + annotation().encode(), {}),
    "GBK": ('<?xml version="1.0" encoding="GBK"?>' + annotation("狗")).encode("gbk"),
    "no difficult": (annotation(difficult=""), {}),
    "difficult 1.0": (annotation(difficult="<difficult>1.0</difficult>"), {"iscrowd": 1}),
    "difficult true": (annotation(difficult="<difficult>True</difficult>"), {"iscrowd": 1}),
    "difficult Unspecified": (annotation(difficult="<difficult>Unspecified</difficult>"), {"notes": ["<difficult>"]}),
    "difficult empty": (annotation(difficult="<difficult/>"), {"notes": ["<difficult>"]}),
    "no size": (annotation(size=""), {"notes": ["<size>"]}),
    "a size of nothing": (annotation(size=SIZE_XML.replace("60", "0")), {"notes": ["<size>"]}),
    "a wrong size": (annotation(size=SIZE_XML.replace("60", "640")), {"notes": ["<size>"]}),
    "a size that is no number": (annotation(size=SIZE_XML.replace("60", "wide")), {"notes": ["<size>"]}),
    "a path as filename": (annotation(filename="C:\\set\\a.jpg"), {}),
    "a filename without an extension": (annotation(filename="a"), {"notes": ["<filename>"]}),
    "a filename in another case": (annotation(filename="A.JPG"), {"notes": ["<filename>"]}),
    "no filename": (annotation(filename=""), {"notes": ["<filename>"]}),
    "a filename that is not there": (annotation(filename="other.jpg"), {"notes": ["<filename>"]}),
    "no object": (annotation(None), {"objects": 0}),
}
READ["GBK"] = (READ["GBK"], {"name": "狗"})


@pytest.mark.parametrize("xml, right", READ.values(), ids=READ)
def test_voc_files_that_are_read(xml, right, tmp_path):
    content, notes = voc(tmp_path, xml)
    assert content["images"] == [{"id": 1, "file_name": "train/a.jpg", "height": 40, "width": 60}]
    assert [line.split(" x ", 1)[0] for line in notes.lines()] == ["1"] * len(right.get("notes", []))
    assert all(word in line for word, line in zip(right.get("notes", []), notes.lines()))
    if right.get("objects") == 0:
        assert not content["annotations"]
        return
    assert [category["name"] for category in content["categories"]] == [right.get("name", "dog")]
    [entry] = content["annotations"]
    assert entry["bbox"] == [1, 2, 19, 28] and entry["area"] == 19 * 28 and entry["iscrowd"] == right.get("iscrowd", 0)


REFUSED = {
    "no class": (annotation(""), r"a\.xml: an <object> has no <name>"),
    "a corner that is no number": (
        annotation(box=BOX.replace("20", "nan")),
        r"a\.xml: object 1: <bndbox>.*'xmax': 'nan'",
    ),
    "no box": (annotation(box=""), r"a\.xml: object 1: <bndbox> must have four numbers"),
    "difficult perhaps": (
        annotation(difficult="<difficult>perhaps</difficult>"),
        r"<difficult> is 'perhaps': must be 0 or 1",
    ),
    "not XML": ("<annotation><object>", r"a\.xml is not XML"),
    "another encoding than it says": (header("iso-8859-1").replace(b"iso-8859-1", b"utf-8"), r"a\.xml is not XML"),
    "another format": ("<html></html>", r"the outermost element is <html>"),
}


@pytest.mark.parametrize("xml, message", REFUSED.values(), ids=REFUSED)
def test_voc_files_that_are_refused(xml, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        voc(tmp_path, xml)


def test_voc_pictures_by_either_name(tmp_path):
    content, _ = voc(tmp_path / "one", annotation(filename="b.png"), "b.png")
    assert content["images"][0]["file_name"] == "train/b.png"
    content, _ = voc(tmp_path / "two", annotation(filename="a.jpg"), "a.jpg", "a.png")
    assert content["images"][0]["file_name"] == "train/a.jpg"
    with pytest.raises(ValueError, match=r"may be .*b\.png or .*a\.jpg"):
        voc(tmp_path / "three", annotation(filename="b.png"), "a.jpg", "b.png")


def test_voc_size_needs_xml_or_picture_and_an_upright_one(tmp_path):
    with pytest.raises(ValueError, match=r"there is no size .* and no picture"):
        voc(tmp_path / "none", annotation(size="", filename="z.jpg"), "unlike.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(ValueError, match=r"EXIF data turn it .* save a\.jpg upright"):
        voc(tmp_path / "turned", annotation(), exif=exif)
    content, _ = voc(tmp_path / "upright", annotation(), size=(40, 60), exif=exif)
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (60, 40)


@given(
    name=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), min_size=1, max_size=8),
    encoding=st.sampled_from(["utf-8", "utf-16", "iso-8859-1", "cp1252"]),
    form=st.sampled_from(["entities", "numbers"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_voc_names_arrive_whatever_way_they_are_written(name, encoding, form, tmp_path_factory):
    name = " ".join(name.split()) or "x"
    written = "".join(f"&#{ord(c)};" for c in name) if form == "numbers" else escape(name)
    xml = f'<?xml version="1.0" encoding="{encoding}"?>{annotation(written)}'.encode(encoding, "xmlcharrefreplace")
    content, _ = voc(tmp_path_factory.mktemp("voc"), xml)
    assert [category["name"] for category in content["categories"]] == [name]


# --------------------------------------------------------------------------------------------------------------- YOLO


def yolo(tmp_path, about: str | bytes, labels: str | bytes | None, image="train/images/a.jpg", folder="train/labels"):
    picture(tmp_path / image)
    (tmp_path / "data.yaml").write_bytes(about if isinstance(about, bytes) else about.encode())
    if labels is not None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        path = tmp_path / folder / f"{image.rpartition('/')[2].rpartition('.')[0]}.txt"
        path.write_bytes(labels if isinstance(labels, bytes) else labels.encode())
    notes = Notes()
    return convert("yolo", tmp_path, ["train"], notes), notes


ABOUT = "train: train/images\nval: train/images\nnames: [cat, dog]\n"
LINE = "1 0.5 0.5 0.2 0.4"
YAMLS = {
    "Roboflow's ../": (ABOUT.replace("train/images", "../train/images"), ["cat", "dog"]),
    "a path": (f"path: .\n{ABOUT}", ["cat", "dog"]),
    "an absolute path of another machine": (f"path: /datasets/set\n{ABOUT}", ["cat", "dog"]),
    "an absolute folder of another machine": (
        ABOUT.replace("train/images", "/home/me/set/train/images"),
        ["cat", "dog"],
    ),
    "Windows' separators": (ABOUT.replace("train/images", "C:\\set\\train\\images"), ["cat", "dog"]),
    "a list of folders": (
        ABOUT.replace("train: train/images", "train: [train/images, ./train/images]"),
        ["cat", "dog"],
    ),
    "a byte-order mark": ("﻿" + ABOUT, ["cat", "dog"]),
    "Windows' lines": (ABOUT.replace("\n", "\r\n"), ["cat", "dog"]),
    "names that YAML takes for truth and numbers": (
        ABOUT.replace("[cat, dog]", "[yes, no, 007, null]"),
        ["yes", "no", "007", "null"],
    ),
    "a dict with gaps": (ABOUT.replace("[cat, dog]", "{0: cat, 1: dog, 7: bird}"), ["cat", "dog", "bird"]),
    "keys as text": (ABOUT.replace("[cat, dog]", "{'0': cat, '1': dog}"), ["cat", "dog"]),
}


@pytest.mark.parametrize("about, names", YAMLS.values(), ids=YAMLS)
def test_yolo_yaml_files_that_are_read(about, names, tmp_path):
    content, _ = yolo(tmp_path, about, LINE)
    assert [category["name"] for category in content["categories"]] == names
    assert content["images"][0]["file_name"] == "train/images/a.jpg" and len(content["images"]) == 1
    np.testing.assert_allclose(content["annotations"][0]["bbox"], [24, 12, 12, 16])
    assert content["annotations"][0]["category_id"] == 2


def test_yolo_lists_of_images(tmp_path):
    (tmp_path / "train.txt").write_text("./train/images/a.jpg\n/home/me/set/train/images/a.jpg\n\n")
    content, _ = yolo(tmp_path, "train: train.txt\nnames: [cat, dog]\n", LINE)
    assert len(content["images"]) == len(content["annotations"]) == 1
    (tmp_path / "train.txt").write_text("./train/images/b.jpg\n")
    with pytest.raises(ValueError, match=r"train\.txt:1: 1 of its images are not below"):
        convert("yolo", tmp_path, ["train"])


YAMLS_REFUSED = {
    "repeated names": (ABOUT.replace("dog", "cat"), "classes 0 and 1 are both named 'cat'"),
    "no names": ("train: train/images\n", "'names' must be a list"),
    "names that are no words": (ABOUT.replace("[cat, dog]", "{a: cat}"), "'names' must be a list"),
    "not YAML": ("names: [cat", "is not YAML"),
    "latin-1": ("names: [größe]".encode("latin-1"), r"data\.yaml is not UTF-8 .* save it as UTF-8"),
}


@pytest.mark.parametrize("about, message", YAMLS_REFUSED.values(), ids=YAMLS_REFUSED)
def test_yolo_yaml_files_that_are_refused(about, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        yolo(tmp_path, about, LINE)


def test_yolo_two_places_are_an_error_that_names_both(tmp_path):
    picture(tmp_path / "set" / "train" / "images" / "b.jpg")
    with pytest.raises(ValueError, match=r"'train/images' of data.yaml may be .*set/train/images or .*train/images"):
        yolo(tmp_path, f"path: set\n{ABOUT}", LINE)


LINES = {
    "commas": ("1,0.5,0.5,0.2,0.4", []),
    "tabs and blanks": ("\t1  0.5 0.5\t0.2 0.4  ", []),
    "Windows' lines": (f"{LINE}\r\n\r\n", []),
    "a byte-order mark": ("﻿" + LINE, []),
    "UTF-16": (LINE.encode("utf-16"), []),
    "a class as a float": ("1.0 0.5 0.5 0.2 0.4", []),
    "a confidence": (f"{LINE} 0.93", ["confidence"]),
    "an oriented box": ("1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7", ["four points"]),
    "a closed polygon": ("1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7 0.4 0.3", []),
}


@pytest.mark.parametrize("line, notes", LINES.values(), ids=LINES)
def test_yolo_lines_that_are_read(line, notes, tmp_path):
    content, found = yolo(tmp_path, ABOUT, line)
    [entry] = content["annotations"]
    assert entry["category_id"] == 2
    np.testing.assert_allclose(entry["bbox"], [24, 12, 12, 16], atol=1e-6)
    assert entry["area"] == pytest.approx(12 * 16)
    assert len(found.lines()) == len(notes) and all(word in line for word, line in zip(notes, found.lines()))


LINES_REFUSED = {
    "pixels": ("1 30 20 12 16", r"a\.txt:1: 30 is no part of a side.*divide lengths in pixels"),
    "a polygon in pixels": ("1 24 12 36 12 36 28", "36 is no part of a side"),
    "NaN": ("1 nan 0.5 0.2 0.4", "nan is no number"),
    "infinity": ("1 0.5 0.5 inf 0.4", "inf is no number"),
    "a negative side": ("1 0.5 0.5 -0.2 0.4", "-0.2 is negative"),
    "a negative place": ("1 -0.5 0.5 0.2 0.4", "-0.5 is negative"),
    "a class that is not there": ("2 0.5 0.5 0.2 0.4", "class 2 is not among the 2 names of data.yaml, 0 to 1"),
    "half a class": ("0.5 0.5 0.5 0.2 0.4", "class 0.5 is not among"),
    "a class in a gap": ("-1 0.5 0.5 0.2 0.4", "class -1 is not among"),
    "an odd polygon": ("1 0.4 0.3 0.6 0.3 0.6 0.7 0.4", "7 numbers after the class"),
}


@pytest.mark.parametrize("line, message", LINES_REFUSED.values(), ids=LINES_REFUSED)
def test_yolo_lines_that_are_refused(line, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        yolo(tmp_path, ABOUT, line)


def test_yolo_images_without_labels(tmp_path):
    picture(tmp_path / "train" / "images" / "b.PNG")
    content, notes = yolo(tmp_path, ABOUT, LINE)
    assert [image["file_name"] for image in content["images"]] == ["train/images/a.jpg", "train/images/b.PNG"]
    assert "1 x image without a label file" in notes.lines()[0]
    (tmp_path / "train" / "labels" / "a.txt").write_text("")
    assert not convert("yolo", tmp_path, ["train"])["annotations"]  # empty: no objects, and nothing to say
    (tmp_path / "train" / "labels" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 images has a label file; .*a\.txt"):
        convert("yolo", tmp_path, ["train"])


def test_yolo_label_folders(tmp_path):
    """The last `images` of a path counts; without one the labels lie beside the pictures."""
    content, _ = yolo(
        tmp_path / "a", "train: images/images/x\nnames: [a, b]\n", LINE, "images/images/x/a.jpg", "images/labels/x"
    )
    assert len(content["annotations"]) == 1
    content, _ = yolo(tmp_path / "b", "train: train\nnames: [a, b]\n", LINE, "train/a.JPG", "train")
    assert len(content["annotations"]) == 1


def test_nothing_is_written_before_all_is_read(tmp_path, capsys):
    yolo(tmp_path, ABOUT.replace("val: train/images", "val: nowhere"), LINE)
    assert main(["yolo", str(tmp_path)]) == 2
    assert "val: 'nowhere' is no folder" in capsys.readouterr().err and not (tmp_path / "annotations").exists()


def test_what_was_read_in_another_way_is_told(tmp_path, capsys):
    yolo(tmp_path, ABOUT, f"{LINE} 0.9\n{LINE} 0.8\n")
    assert main(["yolo", str(tmp_path)]) == 0
    assert "2 x train: confidence behind a box, left away" in capsys.readouterr().err
    opened = read_coco(tmp_path / "annotations" / "yolo_train.json")
    np.testing.assert_allclose(opened.boxes, [[24, 12, 36, 28]] * 2)


def test_decomposed_and_encoded_names_of_voc(tmp_path):
    composed = "größe 1.jpg"
    for filename in (unicodedata.normalize("NFD", composed), "gr%C3%B6%C3%9Fe%201.jpg"):
        content, _ = voc(tmp_path / filename[:5], annotation(filename=filename), composed, stem="x")
        assert content["images"][0]["file_name"] == f"train/{composed}"


def test_lvis_files_that_are_refused(tmp_path):
    (tmp_path / "lvis_v1_val.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"lvis_v1_val\.json is not JSON"):
        convert("lvis", tmp_path, ["val"])
    (tmp_path / "lvis_v1_val.json").write_text("[]")
    with pytest.raises(ValueError, match="must be lists: not LVIS"):
        convert("lvis", tmp_path, ["val"])
