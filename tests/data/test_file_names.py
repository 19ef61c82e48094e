"""Names as tools write them, and the files that they mean."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.data.file_names import find_files


def folder_with(tmp_path: Path, *files: str) -> Path:
    for file in files:
        path = tmp_path / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "images"


VARIANTS = {
    "as it stands": ("a/b.jpg", "a/b.jpg"),
    "Windows' separators": ("a\\b.jpg", "a/b.jpg"),
    "doubled separators": ("a//b.jpg", "a/b.jpg"),
    "a dot": ("./b.jpg", "b.jpg"),
    "another case of the extension": ("b.JPG", "b.jpg"),
    "another case of the name": ("IMG_1.jpg", "img_1.JPG"),
    "percent-encoded": ("my%20photo.jpg", "my photo.jpg"),
    "percent-encoded accents": (quote("größe.jpg"), "größe.jpg"),
    "a decomposed name of a composed file": (unicodedata.normalize("NFD", "café.jpg"), "café.jpg"),
    "a composed name of a decomposed file": ("café.jpg", unicodedata.normalize("NFD", "café.jpg")),
    "Label Studio's upload": ("/data/upload/3/1a2b3c4d-photo.jpg", "photo.jpg"),
    "Label Studio's local files": ("/data/local-files/?d=photos/photo.jpg", "photo.jpg"),
    "an absolute path": ("/home/someone/set/train/photo.jpg", "train/photo.jpg"),
    "a path of Windows": ("C:\\Users\\me\\set\\photo.jpg", "photo.jpg"),
    "a URL of a file": ("file:///home/me/photo.jpg", "photo.jpg"),
    "the image folder's own name before it": ("images/photo.jpg", "photo.jpg"),
    "steps up": ("../images/photo.jpg", "photo.jpg"),
    "all at once": ("C:\\set\\1A2b%20%C3%A9.JPEG", "1a2B é.jpeg"),
}


@pytest.mark.parametrize("name, file", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_a_name_are_read(name, file, tmp_path):
    paths, variants, problems = find_files(folder_with(tmp_path, file, "other/else.png"), [name])
    assert paths == [file] and not problems
    assert bool(variants) == (name != file)


def test_two_files_that_fit_are_an_error_that_names_both(tmp_path):
    folder = folder_with(tmp_path, "A.jpg", "a.JPG")
    paths, _, problems = find_files(folder, ["a.jpg"])
    assert paths == [None] and "'A.jpg' or 'a.JPG'" in problems[0]
    paths, _, problems = find_files(folder_with(tmp_path, "x%201.png", "x 1.PNG"), ["X%201.png"])
    assert paths == [None] and "'x 1.PNG' or 'x%201.png'" in problems[0]


def test_the_exact_name_wins_and_the_longest_end_of_a_path(tmp_path):
    folder = folder_with(tmp_path, "a.jpg", "A.jpg", "train/1.jpg", "1.jpg")
    assert find_files(folder, ["A.jpg", "a.jpg"])[0] == ["A.jpg", "a.jpg"]
    assert find_files(folder, ["/set/train/1.jpg", "1.jpg"])[0] == ["train/1.jpg", "1.jpg"]


def test_one_file_is_not_given_to_two_images(tmp_path):
    paths, _, problems = find_files(folder_with(tmp_path, "a.jpg"), ["a.jpg", "A.jpg"])
    assert paths == ["a.jpg", None] and "which another image has" in problems[1]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..\\secret.jpg", "a\0b.jpg"])
def test_nothing_outside_the_folder_is_found(name, tmp_path):
    folder = folder_with(tmp_path, "photo.jpg")
    (tmp_path / "secret.jpg").write_bytes(b"")
    paths, _, problems = find_files(folder, [name])
    assert paths == [None] and "leads out of the image folder" in problems[0]


def test_folders_are_no_files(tmp_path):
    folder = folder_with(tmp_path, "a.jpg/inside.txt", "b.jpg")
    assert find_files(folder, ["a.jpg", "b.jpg"])[0] == [None, "b.jpg"]
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    assert find_files(folder, ["dangling.jpg"])[0] == [None]


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\\0%?&", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8
)


@given(word=WORDS.filter(lambda w: w.strip(". ") == w), data=st.data())
def test_any_mixture_of_variants_finds_the_file(word, data, tmp_path_factory):
    """Case, encoding, form, separators and leading folders, all drawn: the one file is found."""
    file = f"set/{word}.jpg"
    folder = folder_with(tmp_path_factory.mktemp("names"), file)
    name = data.draw(
        st.sampled_from([file, f"/home/me/{file}", f"./{file}", file.replace("/", "\\"), file.replace("/", "//")])
    )
    for change in data.draw(st.lists(st.sampled_from([quote, lambda t: unicodedata.normalize("NFD", t)]), max_size=1)):
        name = change(name)
    assert find_files(folder, [name])[0] == [file]
