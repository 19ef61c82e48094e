"""Kinds of files in other formats that two programs would read in two ways, or wrongly in silence."""

from __future__ import annotations

import codecs
import json
import os
import sys
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
MIXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)


def picture(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path, **options)


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def converted(kind, root, *splits):
    """The content, which read_coco accepts, and the lines of notes."""
    notes = Notes()
    content = convert(kind, root, splits or ["train"], notes)
    path = root / "converted.json"
    path.write_text(json.dumps(content))
    if content["annotations"]:
        read_coco(path)
    path.unlink()
    return content, notes.lines()


# ---------------------------------------------------------------------------------------------------------------- VOC

ORDER = ("xmin", "ymin", "xmax", "ymax")


def bndbox(*corners):
    return "<bndbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in zip(ORDER, corners)) + "</bndbox>"


def size_xml(width=60, height=40):
    return f"<size><width>{width}</width><height>{height}</height></size>"


def xml(filename="a.jpg", size=None, items=None, name="dog"):
    items = f"<object><name>{name}</name>{bndbox(2, 3, 20, 30)}</object>" if items is None else items
    named = "" if filename is None else f"<filename>{filename}</filename>"
    return f"<annotation>{named}{size_xml() if size is None else size}{items}</annotation>"


def item(box, name="dog"):
    return f"<object><name>{name}</name>{box}</object>"


def devkit(root, listing: str | bytes, *stems, kind="Main"):
    for stem in stems:
        write(root / "Annotations" / f"{stem}.xml", xml(f"{stem}.jpg"))
        picture(root / "JPEGImages" / f"{stem}.jpg")
    write(root / "ImageSets" / kind / "train.txt", listing)


LISTINGS = {
    "blanks in names": "my photo 1\nb\n",
    "suffixes": "my photo 1.jpg\nb.xml\n",
    "folders and two columns": "JPEGImages/my photo 1.jpg\nJPEGImages/b.jpg Annotations/b.xml\n",
    "Windows' separators": "JPEGImages\\my photo 1.jpg\r\nJPEGImages\\b.jpg\r\n",
    "a mark": codecs.BOM_UTF8 + b"my photo 1\nb\n",
    "UTF-16": "my photo 1\nb\n".encode("utf-16"),
    "a class's list": "my photo 1 -1\nb  1\n",
    "percent": "my%20photo%201\nb\n",
}


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS)
def test_voc_lists(listing, tmp_path):
    devkit(tmp_path, listing, "b", "my photo 1", "my", "other")
    content, _ = converted("voc", tmp_path)
    assert [image["file_name"] for image in content["images"]] == ["JPEGImages/b.jpg", "JPEGImages/my photo 1.jpg"]


def test_voc_lists_with_decomposed_letters(tmp_path):
    devkit(tmp_path, unicodedata.normalize("NFD", "größe") + "\n", "größe", "other")
    assert [image["file_name"] for image in converted("voc", tmp_path)[0]["images"]] == ["JPEGImages/größe.jpg"]
    devkit(tmp_path, "gone\n", "b")
    with pytest.raises(ValueError, match=r"train.txt: 1 images have no XML file in .*Annotations: \['gone'\]"):
        convert("voc", tmp_path, ["train"])


LAYOUTS = {  # folders of XML files and pictures, of a split
    "LabelImg's": ("train", "train", "train"),
    "Kaggle's": ("annotations", "images", "."),
    "VOC's without lists": ("Annotations", "JPEGImages", "."),
    "a folder for each split": ("train/Annotations", "train/images", "train"),
    "XML files of their own, pictures beside": ("train/annotations", "train", "train"),
}


@pytest.mark.parametrize("xmls, pictures, split", LAYOUTS.values(), ids=LAYOUTS)
def test_voc_layouts(xmls, pictures, split, tmp_path):
    write(tmp_path / xmls / "a.XML", xml("a.jpg"))
    write(tmp_path / xmls / "._a.xml", b"\x00\x05\x16\x07Mac OS X")  # what macOS leaves beside files
    picture(tmp_path / pictures / "a.JPG")
    write(tmp_path / pictures / "._a.JPG", b"\x00\x05\x16\x07Mac OS X")
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "voc_train.json").write_text("{}")  # of an earlier conversion
    content, _ = converted("voc", tmp_path, split)
    assert [image["file_name"] for image in content["images"]] == [os.path.normpath(f"{pictures}/a.JPG")]


def test_voc_two_places_are_an_error_that_names_both(tmp_path):
    for folder in ("JPEGImages", "images"):
        picture(tmp_path / "pictures" / folder / "a.jpg")
    write(tmp_path / "pictures" / "a.xml", xml())
    with pytest.raises(ValueError, match=r"a\.xml: the picture .* may be .*JPEGImages/a\.jpg or .*images/a\.jpg"):
        convert("voc", tmp_path, ["pictures"])
    devkit(tmp_path, "b\n", "b")
    write(tmp_path / "train" / "a.xml", xml())
    with pytest.raises(ValueError, match=r"split 'train' may be .*Main/train\.txt or .*train: keep one"):
        convert("voc", tmp_path, ["train"])
    write(tmp_path / "two" / "a.xml", xml())
    write(tmp_path / "two" / "Annotations" / "a.xml", xml())
    with pytest.raises(ValueError, match=r"XML files of .*two may be .*two or .*Annotations"):
        convert("voc", tmp_path, ["two"])


def test_voc_one_picture_of_two_files_is_an_error_that_names_both(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train" / "a.xml", xml())
    write(tmp_path / "train" / "b.xml", xml())
    with pytest.raises(ValueError, match=r"a\.xml and .*b\.xml both mean .*a\.jpg"):
        convert("voc", tmp_path, ["train"])


def test_voc_names_the_splits_that_are_there(tmp_path):
    devkit(tmp_path, "b\n", "b")
    write(tmp_path / "valid" / "a.xml", xml())
    with pytest.raises(FileNotFoundError, match=r"split 'VOC2007/trainval'.*there are: train, valid"):
        convert("voc", tmp_path, ["VOC2007/trainval"])


def test_voc_a_missing_picture_is_not_guessed(tmp_path):
    write(tmp_path / "train" / "a.xml", xml("a"))
    with pytest.raises(ValueError, match=r"a\.xml: there is no picture .*'a'"):
        convert("voc", tmp_path, ["train"])


ENCODED = {
    "UTF-8 that says UTF-16, as .NET writes it": ("utf-16", "utf-8", b""),
    "a mark against the declaration": ("iso-8859-1", "utf-8", codecs.BOM_UTF8),
    "UTF-16 that says UTF-8": ("utf-8", "utf-16-le", codecs.BOM_UTF16_LE),
    "UTF-16 without a mark": ("utf-16", "utf-16-be", b""),
    "UTF-32": ("utf-32", "utf-32-be", codecs.BOM_UTF32_BE),
    "Shift JIS": ("shift_jis", "shift_jis", b""),
}


@pytest.mark.parametrize("declared, encoding, mark", ENCODED.values(), ids=ENCODED)
def test_voc_encodings(declared, encoding, mark, tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    name = "犬" if encoding != "utf-8" else "größe"
    content = f'<?xml version="1.0" encoding="{declared}"?>\n{xml(name=name)}'
    write(tmp_path / "train" / "a.xml", mark + content.encode(encoding))
    assert converted("voc", tmp_path)[0]["categories"] == [{"id": 1, "name": name}]


@pytest.mark.parametrize("declared", ["klingon", "idna", "undefined", "rot13"])
def test_voc_encodings_that_are_none(declared, tmp_path):
    write(tmp_path / "train" / "a.xml", f'<?xml version="1.0" encoding="{declared}"?>{xml(name="größe")}')
    with pytest.raises(ValueError, match=r"a\.xml"):
        convert("voc", tmp_path, ["train"])


def test_voc_one_class_in_two_forms_of_unicode_is_one(tmp_path):
    for stem, form in (("a", "NFC"), ("b", "NFD")):
        picture(tmp_path / "train" / f"{stem}.jpg")
        write(tmp_path / "train" / f"{stem}.xml", xml(f"{stem}.jpg", name=unicodedata.normalize(form, "größe")))
    assert converted("voc", tmp_path)[0]["categories"] == [{"id": 1, "name": "größe"}]


VOC_SIZES = {  # size and box of the XML file beside a picture of 60 x 40: what is refused, or None
    "off by a pixel": (size_xml(59, 39), (2, 3, 20, 30), None),
    "sides that change places": (size_xml(40, 60), (2, 3, 20, 30), None),
    "another picture's": (size_xml(640, 480), (2, 3, 20, 30), None),
    "that before a resize": (size_xml(600, 400), (2, 3, 20, 30), "<size> is 600 x 400.*the same shape.*60 x 40"),
    "that after a resize": (size_xml(30, 20), (2, 3, 20, 18), "<size> is 30 x 20.*the same shape"),
    "a box of another picture": (size_xml(640, 480), (2, 3, 500, 300), "does not fit the picture, 60 x 40"),
    "no size and a box that does not fit": ("<size/>", (2, 3, 500, 300), "does not fit the picture, 60 x 40"),
}


@pytest.mark.parametrize("size, box, message", VOC_SIZES.values(), ids=VOC_SIZES)
def test_voc_sizes_unlike_the_picture(size, box, message, tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train" / "a.xml", xml(size=size, items=item(bndbox(*box))))
    if message:
        with pytest.raises(ValueError, match=rf"a\.xml.*{message}"):
            convert("voc", tmp_path, ["train"])
        if "<size>" in message:  # as it advises
            write(tmp_path / "train" / "a.xml", xml(size="", items=item(bndbox(*box))))
        else:
            picture(tmp_path / "train" / "a.jpg", (640, 480))
        converted("voc", tmp_path)
        return
    content, notes = converted("voc", tmp_path)
    assert content["annotations"][0]["bbox"] == [1, 2, 19, 28] and "1 x <size>" in notes[0]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == SIZE


VOC_BOXES = {  # corners, the box in COCO's form, what the note says
    "a whole picture": ((1, 1, 60, 40), [0, 0, 60, 40], None),
    "one pixel": ((5, 6, 5, 6), [4, 5, 1, 1], None),
    "parts of pixels": ((1.5, 2.25, 30, 20), [0.5, 1.25, 29.5, 18.75], None),
    "counted from 0": ((0, 0, 30, 20), [0, 0, 30, 20], "begins at 0"),
    "beyond the border": ((-5, 3, 90, 20), [0, 2, 60, 18], "reaches out"),
    "outside": ((70, 3, 90, 20), [69, 2, 21, 18], "outside"),
}


@pytest.mark.parametrize("corners, box, note", VOC_BOXES.values(), ids=VOC_BOXES)
def test_voc_boxes(corners, box, note, tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train" / "a.xml", xml(items=item(bndbox(*corners)) + item(bndbox(2, 3, 20, 30))))
    content, notes = converted("voc", tmp_path)
    assert content["annotations"][0]["bbox"] == box and content["annotations"][0]["area"] == box[2] * box[3]
    assert [note in line for line in notes] == [True] * (note is not None)


def test_voc_corners_in_another_order_are_not_sizes(tmp_path):
    """50 20 10 15 may be corners, or a width and a height: only boxes that cannot be the latter settle it."""
    picture(tmp_path / "train" / "a.jpg")
    turned = item(bndbox(45, 20, 10, 15))
    write(tmp_path / "train" / "a.xml", xml(items=turned))
    with pytest.raises(ValueError, match=r"a\.xml: object 1.*45.*10.*may be a width and a height"):
        convert("voc", tmp_path, ["train"])
    write(tmp_path / "train" / "a.xml", xml(items=turned + item(bndbox(20, 3, 59, 30))))
    content, notes = converted("voc", tmp_path)
    assert content["annotations"][0]["bbox"] == [9, 14, 36, 6] and "1 x corners that change places" in notes[0]


VOC_OBJECTS = {
    "roLabelImg's": (item("<robndbox><cx>9</cx><cy>9</cy><w>4</w><h>2</h><angle>0.3</angle></robndbox>"), "robndbox"),
    "a polygon alone": (item("<polygon><x1>1</x1><y1>1</y1></polygon>"), "polygon"),
    "two boxes": (item(bndbox(1, 2, 3, 4) + bndbox(5, 6, 7, 8)), "2 <bndbox>"),
    "two names": (f"<object><name>a</name><name>b</name>{bndbox(1, 2, 3, 4)}</object>", "2 <name>"),
}


@pytest.mark.parametrize("items, message", VOC_OBJECTS.values(), ids=VOC_OBJECTS)
def test_voc_objects_that_are_refused(items, message, tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train" / "a.xml", xml(items=items))
    with pytest.raises(ValueError, match=rf"a\.xml.*{message}"):
        convert("voc", tmp_path, ["train"])


def test_voc_outlines_beside_boxes_are_counted(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    outline = "<polygon><x1>1</x1><y1>1</y1><x2>5</x2><y2>5</y2></polygon>"
    write(tmp_path / "train" / "a.xml", xml(items=item(bndbox(2, 3, 20, 30) + outline)))
    assert "1 x outline beside the box, not read" in converted("voc", tmp_path)[1][0]


def test_voc_masks_in_another_case_and_broken_ones(tmp_path):
    devkit(tmp_path, "a\n", "a", kind="Segmentation")
    pixels = np.zeros((40, 60), np.uint8)
    pixels[2:30, 1:20] = 1
    (tmp_path / "SegmentationObject").mkdir()
    path = tmp_path / "SegmentationObject" / "a.PNG"
    Image.fromarray(pixels).save(path)
    assert converted("voc", tmp_path, "Segmentation/train")[0]["annotations"][0]["area"] == 28 * 19
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.PNG cannot be read"):
        convert("voc", tmp_path, ["Segmentation/train"])
    path.unlink()
    assert "1 x image without a picture of its objects" in converted("voc", tmp_path, "Segmentation/train")[1][0]


@given(
    name=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), min_size=1, max_size=6),
    stem=st.text("aäöÉ &+%1._-", min_size=1, max_size=6).filter(lambda s: s.strip() == s and s.strip(".") == s),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "iso-8859-1", "cp1252"]),
    form=st.sampled_from(["NFC", "NFD"]),
    suffix=st.sampled_from([".jpg", ".JPG", ""]),
    folder=st.sampled_from(["", "C:\\pictures\\", "/home/me/"]),
)
@MIXED
def test_voc_variations_together_give_what_the_plain_file_gives(
    name, stem, encoding, form, suffix, folder, tmp_path_factory
):
    root, name = tmp_path_factory.mktemp("voc"), " ".join(name.split()) or "x"
    picture(root / "train" / f"{stem}.jpg")
    write(root / "train" / f"{stem}.xml", xml(escape(f"{stem}.jpg"), name=escape(name)))
    plain, _ = converted("voc", root)
    filename = escape(folder + unicodedata.normalize(form, stem) + suffix)
    declared = encoding.removesuffix("-sig")
    content = f'<?xml version="1.0" encoding="{declared}"?>\r\n{xml(filename, name=escape(name))}'
    write(root / "train" / f"{stem}.xml", content.encode(encoding, "xmlcharrefreplace"))
    assert converted("voc", root)[0] == plain


# --------------------------------------------------------------------------------------------------------------- YOLO

ABOUT = "train: train/images\nval: train/images\nnames: [cat, dog]\n"
LINE = "1 0.5 0.5 0.2 0.4"


def yolo(root, labels: str | bytes | None = LINE, about: str | bytes = ABOUT):
    picture(root / "train" / "images" / "a.jpg")
    write(root / "data.yaml", about)
    if labels is not None:
        write(root / "train" / "labels" / "a.txt", labels)
    return root


def test_yolo_a_folder_that_is_not_there_is_not_another_one(tmp_path):
    picture(tmp_path / "images" / "other.jpg")
    yolo(tmp_path, about=ABOUT.replace("val: train", "val: ../valid"))
    with pytest.raises(FileNotFoundError, match=r"val: '../valid/images' is no folder"):
        convert("yolo", tmp_path, ["val"])
    picture(tmp_path / "set" / "images" / "b.jpg")
    yolo(tmp_path, about=ABOUT.replace("train: train", "train: /data/set"))
    with pytest.raises(ValueError, match=r"may be .*images or .*set/images"):
        convert("yolo", tmp_path, ["train"])


def test_yolo_a_folder_beside_the_root_is_not_passed_over(tmp_path):
    picture(tmp_path / "train" / "images" / "b.jpg")
    yolo(tmp_path / "set", about=ABOUT.replace("train/images", "../train/images"))
    with pytest.raises(ValueError, match=r"'../train/images' of data.yaml may be .*train/images or .*train/images"):
        convert("yolo", tmp_path / "set", ["train"])
    yolo(tmp_path / "set", about=ABOUT.replace("train/images", "./train/images"))  # as it advises
    assert converted("yolo", tmp_path / "set")[0]["images"][0]["file_name"] == "train/images/a.jpg"
    picture(tmp_path / "pictures" / "b.jpg")
    yolo(tmp_path / "set", about=ABOUT.replace("train/images", "../pictures"))
    with pytest.raises(ValueError, match=r"'../pictures' is .*pictures, which is not below .*set"):
        convert("yolo", tmp_path / "set", ["train"])


def test_yolo_folders_that_are_links(tmp_path):
    yolo(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere" / "train")
    write(tmp_path / "set" / "data.yaml", ABOUT)
    content, _ = converted("yolo", tmp_path / "set")
    assert content["images"][0]["file_name"] == "train/images/a.jpg" and len(content["annotations"]) == 1


def test_yolo_lists_name_images_from_their_own_folder(tmp_path):
    yolo(tmp_path, about="path: /datasets/set\ntrain: train/list.txt\nnames: [cat, dog]\n")
    write(tmp_path / "train" / "list.txt", codecs.BOM_UTF8 + b"./images/a.jpg\r\nimages\\a.jpg\r\n")
    assert len(converted("yolo", tmp_path)[0]["images"]) == 1
    picture(tmp_path / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"list\.txt:1: './images/a\.jpg' may be .*images/a\.jpg or .*images/a\.jpg"):
        convert("yolo", tmp_path, ["train"])


def test_yolo_other_words_for_validation(tmp_path):
    yolo(tmp_path, about=ABOUT.replace("val:", "valid:"))
    assert len(converted("yolo", tmp_path, "val")[0]["images"]) == 1
    yolo(tmp_path, about=ABOUT + "valid: other\n")
    with pytest.raises(ValueError, match=r"data\.yaml: both 'val' and 'valid'"):
        convert("yolo", tmp_path, ["val"])


YAMLS_REFUSED = {
    "one number twice": ("{0: cat, 0: dog}", r"data\.yaml:3: '0' is there twice"),
    "an empty name": ("['', dog]", "class 0 has no name"),
    "one name in two forms of Unicode": (
        f"[größe, {unicodedata.normalize('NFD', 'größe')}]",
        "classes 0 and 1 are both named 'größe'",
    ),
    "nc": ("[cat, dog]\nnc: 3", "nc is 3, but there are 2 names"),
    "nc that is no number": ("[cat, dog]\nnc: many", "nc is 'many'"),
    "names and numbers exchanged": ("{cat: 0, dog: 1}", "'names' must be a list"),
}


@pytest.mark.parametrize("names, message", YAMLS_REFUSED.values(), ids=YAMLS_REFUSED)
def test_yolo_yaml_files_that_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert("yolo", yolo(tmp_path, about=ABOUT.replace("[cat, dog]", names)), ["train"])


def test_yolo_gaps_in_names(tmp_path):
    about = ABOUT.replace("[cat, dog]", "{0: cat, 1: dog, 7: bird}\nnc: 8")
    content, _ = converted("yolo", yolo(tmp_path, about=about))
    assert content["categories"] == [{"id": i, "name": n} for i, n in ((1, "cat"), (2, "dog"), (8, "bird"))]
    with pytest.raises(ValueError, match=r"a\.txt:1: class 5 is not among the 3 names of data.yaml, 0, 1, 7"):
        convert("yolo", yolo(tmp_path, "5 0.5 0.5 0.2 0.4", about), ["train"])


LINES_REFUSED = {
    "commas for points": ("1 0,1 0,1 0,1 0,1", "commas"),
    "commas for points between semicolons": ("1;0,1;0,1;0,1;0,1", "commas"),
    "a value left out": ("1,0.5,,0.2,0.4,0.1", "must be a class number and numbers"),
    "an angle in radians": (f"{LINE}\n{LINE} -0.7853", r"a\.txt:2: -0\.7853 .*oriented boxes"),
    "an angle in degrees": (f"{LINE} 45", r"a\.txt:1: 45 .*oriented boxes"),
    "UTF-16 without a mark": (LINE.encode("utf-16-le"), r"a\.txt .*UTF-8"),
    "latin-1": ("1 0.5 0.5 0.2 0.4\n# größe".encode("latin-1"), r"a\.txt is not UTF-8"),
}


@pytest.mark.parametrize("labels, message", LINES_REFUSED.values(), ids=LINES_REFUSED)
def test_yolo_lines_that_are_refused(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert("yolo", yolo(tmp_path, labels), ["train"])


POSE = ABOUT + "kpt_shape: [3, 2]\n"


def test_yolo_keypoints_are_no_polygon(tmp_path):
    """A box and three points of two numbers would pass for a polygon of five points."""
    content, notes = converted("yolo", yolo(tmp_path, f"{LINE} 0.1 0.2 0.3 0.4 0.5 0.6\n{LINE}\n", POSE))
    assert [entry["bbox"] for entry in content["annotations"]] == [pytest.approx([24, 12, 12, 16])] * 2
    assert not any("segmentation" in entry for entry in content["annotations"])
    assert "1 x keypoints, not read" in notes[0]
    with pytest.raises(ValueError, match=r"a\.txt:1: 8 numbers after the class; kpt_shape .*4 or 10"):
        convert("yolo", yolo(tmp_path, f"{LINE} 0.1 0.2 0.3 0.4", POSE), ["train"])
    with pytest.raises(ValueError, match=r"kpt_shape is 'many'"):
        convert("yolo", yolo(tmp_path, LINE, ABOUT + "kpt_shape: many\n"), ["train"])


YOLO_BOXES = {
    "a whole picture": ("1 0.5 0.5 1 1", [0, 0, 60, 40], None),
    "beyond the border": ("1 0.1 0.5 0.4 0.5", [0, 10, 18, 20], "reaches out"),
    "of no size": ("1 0.5 0.5 0 0.5", [30, 10, 0, 20], "no size"),
    "a polygon of no size": ("1 0.5 0.1 0.5 0.5 0.5 0.6", [30, 4, 0, 20], "no size"),
}


@pytest.mark.parametrize("line, box, note", YOLO_BOXES.values(), ids=YOLO_BOXES)
def test_yolo_boxes(line, box, note, tmp_path):
    content, notes = converted("yolo", yolo(tmp_path, f"{line}\n{LINE}\n"))
    np.testing.assert_allclose(content["annotations"][0]["bbox"], box, atol=1e-9)
    assert [note in text for text in notes] == [True] * (note is not None)


LABELS = {  # names of a picture and of its labels
    "another case": ("a.JPG", "a.TXT"),
    "decomposed": ("größe.jpg", unicodedata.normalize("NFD", "größe.txt")),
    "percent": ("a b.jpg", "a%20b.txt"),
    "points": ("a_jpg.rf.1a2b.jpg", "a_jpg.rf.1a2b.txt"),
}


@pytest.mark.parametrize("image, labels", LABELS.values(), ids=LABELS)
def test_yolo_names_of_label_files(image, labels, tmp_path):
    picture(tmp_path / "train" / "images" / image)
    write(tmp_path / "train" / "labels" / labels, LINE)
    write(tmp_path / "data.yaml", ABOUT)
    write(tmp_path / "train" / "images" / "._a.jpg", b"\x00\x05\x16\x07Mac OS X")
    content, notes = converted("yolo", tmp_path)
    assert len(content["images"]) == len(content["annotations"]) == 1 and not notes


def test_yolo_labels_beside_pictures_and_in_two_places(tmp_path):
    yolo(tmp_path, None)
    write(tmp_path / "train" / "images" / "a.txt", LINE)
    assert len(converted("yolo", tmp_path)[0]["annotations"]) == 1
    yolo(tmp_path)
    with pytest.raises(ValueError, match=r"labels of .*a\.jpg may be .*labels/a\.txt or .*images/a\.txt"):
        convert("yolo", tmp_path, ["train"])


def test_yolo_one_label_file_of_two_pictures_names_both(tmp_path):
    picture(tmp_path / "train" / "images" / "a.png")
    with pytest.raises(ValueError, match=r"a\.txt .* both .*a\.jpg and .*a\.png"):
        convert("yolo", yolo(tmp_path), ["train"])


def test_yolo_label_files_without_a_picture_are_counted(tmp_path):
    yolo(tmp_path)
    for name in ("classes.txt", "gone.txt"):
        write(tmp_path / "train" / "labels" / name, "cat\n")
    assert [line.split(":")[0] for line in converted("yolo", tmp_path)[1]] == ["1 x label file without a picture"]


@given(
    separator=st.sampled_from([" ", "\t", ",", ", ", "  ", ";"]),
    end=st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    entry=st.sampled_from(
        ["train/images", "../train/images", "/data/set/train/images", "train\\images", "./train.txt"]
    ),
    names=st.sampled_from(["[cat, dog]", "{0: cat, 1: dog}", "{'1': dog, '0': cat}", "\n- cat\n- 'dog'"]),
    form=st.sampled_from(["NFC", "NFD"]),
    suffix=st.sampled_from([".txt", ".TXT"]),
    confidence=st.booleans(),
)
@MIXED
def test_yolo_variations_together_give_what_the_plain_files_give(
    separator, end, encoding, entry, names, form, suffix, confidence, tmp_path_factory
):
    root = tmp_path_factory.mktemp("yolo")
    rows = [["1", "0.5", "0.5", "0.2", "0.4"], ["0", "0.1", "0.1", "0.5", "0.1", "0.5", "0.6"]]
    picture(root / "train" / "images" / "größe.jpg")
    write(root / "train" / "labels" / "größe.txt", "\n".join(map(" ".join, rows)))
    write(root / "data.yaml", ABOUT)
    plain, _ = converted("yolo", root)
    (root / "train" / "labels" / "größe.txt").unlink()
    rows[0] += ["0.75"] if confidence else []
    path = root / "train" / "labels" / f"{unicodedata.normalize(form, 'größe')}{suffix}"
    write(path, "".join(separator.join(row) + end for row in rows).encode(encoding))
    write(root / "train.txt", f"./train/images/größe.jpg{end}".encode(encoding))
    write(root / "data.yaml", f"train: {entry}{end.strip(' ')}names: {names}{end.strip(' ')}".encode(encoding))
    assert converted("yolo", root)[0] == plain


# -------------------------------------------------------------------------------------- LVIS, Cityscapes, all of them


def lvis(**image):
    image = {"id": 1, "width": 60, "height": 40, "neg_category_ids": [], "not_exhaustive_category_ids": []} | image
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 9], "area": 81, "segmentation": []}
    return {"images": [image], "annotations": [entry], "categories": [{"id": 1, "name": "a", "frequency": "f"}]}


URLS = {
    "plain": {"coco_url": "http://images.cocodataset.org/train2017/a b.jpg"},
    "percent and a question": {"coco_url": "http://images.cocodataset.org/train2017/a%20b.jpg?size=full"},
    "Windows' separators": {"file_name": "train2017\\a b.jpg"},
}


@pytest.mark.parametrize("image", URLS.values(), ids=URLS)
def test_lvis_file_names(image, tmp_path):
    write(tmp_path / "lvis_v1_val.json", json.dumps(lvis(**image)).encode("utf-16"))
    assert convert("lvis", tmp_path, ["val"])["images"][0]["file_name"] == "train2017/a b.jpg"


LVIS_REFUSED = {
    "images that are none": ({"images": [3], "annotations": [], "categories": []}, r"images\[0\] is 3"),
    "no name at all": (lvis(), "image 1 has neither file_name nor coco_url"),
    "lists that are none": (
        lvis(coco_url="http://x/train2017/a.jpg", neg_category_ids=3),
        "image 1: neg_category_ids is 3",
    ),
}


@pytest.mark.parametrize("content, message", LVIS_REFUSED.values(), ids=LVIS_REFUSED)
def test_lvis_files_that_are_refused(content, message, tmp_path):
    write(tmp_path / "lvis_v1_val.json", json.dumps(content))
    with pytest.raises(ValueError, match=rf"lvis_v1_val\.json: {message}"):
        convert("lvis", tmp_path, ["val"])


def test_lvis_in_two_places(tmp_path):
    for path in (tmp_path / "lvis_v1_val.json", tmp_path / "annotations" / "lvis_v1_val.json"):
        write(path, json.dumps(lvis(coco_url="http://x/train2017/a.jpg")))
    with pytest.raises(ValueError, match=r"may be .*lvis_v1_val.json or .*annotations/lvis_v1_val.json"):
        convert("lvis", tmp_path, ["val"])


def cityscapes(root, values, dtype=np.uint16, size=SIZE, name="ulm_000000_000019_gtFine_instanceIds.png"):
    ids = np.zeros((40, 60), dtype)
    for column, value in enumerate(values):
        ids[5:20, 10 * column : 10 * column + 8] = value
    path = root / "gtFine" / "train" / "ulm" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)
    if size:
        picture(root / "leftImg8bit" / "train" / "ulm" / "ulm_000000_000019_leftImg8bit.png", size)


def test_cityscapes_pictures_that_do_not_belong(tmp_path):
    cityscapes(tmp_path / "gone", [26001], size=None)
    with pytest.raises(ValueError, match=r"_leftImg8bit\.png is missing"):
        convert("cityscapes", tmp_path / "gone", ["train"])
    cityscapes(tmp_path / "size", [26001], size=(30, 20))
    with pytest.raises(ValueError, match=r"_instanceIds\.png is 60 x 40, .*_leftImg8bit\.png 30 x 20"):
        convert("cityscapes", tmp_path / "size", ["train"])
    cityscapes(tmp_path / "bits", [26, 24], np.uint8)
    with pytest.raises(ValueError, match=r"_instanceIds\.png has 8 bits a pixel"):
        convert("cityscapes", tmp_path / "bits", ["train"])
    cityscapes(tmp_path / "case", [26001], name="ulm_000000_000019_gtFine_instanceIds.PNG")
    assert len(convert("cityscapes", tmp_path / "case", ["train"])["annotations"]) == 1


def test_pictures_too_large_to_decode_are_named(tmp_path, monkeypatch):
    yolo(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read"):
        convert("yolo", tmp_path, ["train"])


def test_a_set_without_objects_is_not_written(tmp_path, capsys):
    yolo(tmp_path, "")
    assert main(["yolo", str(tmp_path)]) == 2
    assert "train: none of the 1 images has an object" in capsys.readouterr().err
    assert not (tmp_path / "annotations").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_names_that_are_no_text(tmp_path):
    yolo(tmp_path)
    picture(tmp_path / "train" / "images" / os.fsdecode(b"gr\xf6sse.jpg"))
    with pytest.raises(ValueError, match=r"gr\\udcf6sse\.jpg.*UTF-8"):
        convert("yolo", tmp_path, ["train"])
