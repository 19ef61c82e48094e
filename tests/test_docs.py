"""The documentation's site: it builds, every link leads somewhere, and its reference has every key."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from detector.config import CONFIGS
from detector.config.suggest import compose, leaves

ROOT = Path(__file__).resolve().parents[1]


YOURS = ("gaussian", "mine", "shifted_shapes", "NAME")  # options that a reader is to write


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as strictly as mkdocs can."""
    mkdocs_config = pytest.importorskip("mkdocs.config", reason="pip install '.[docs]'")
    from mkdocs.commands.build import build

    folder = tmp_path_factory.mktemp("site")
    build(mkdocs_config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_every_key_and_option_has_a_place_in_the_reference(site):
    page = (site / "reference" / "configuration" / "index.html").read_text(encoding="utf-8")
    assert sys.getsizeof(page) > 100_000
    config = compose("train", ["experiment=none"])
    missing = {key for key in leaves(config) if key.startswith(("model.rpn.", "model.box_head.")) and ".roi" not in key}
    missing = {key for key in missing if key.rpartition(".")[2] not in ("_target_", "_partial_") and key not in page}
    assert not missing
    for file in CONFIGS.glob("*/*.yaml"):
        if file.parent.name not in ("hydra", "fit"):
            assert f"{file.parent.name}={file.stem}" in page


def test_the_python_interface_has_its_docstrings(site):
    page = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("load", "evaluation.coco_metrics", "weights.load_foreign", "roi.RoIAlign", "structures.Detections"):
        assert f'id="detector.{name}"' in page
    assert "Parameters:" in page and "Raises" in page


def test_pages_name_commands_that_there_are():
    """Every `detector ...` line of the site and the README begins with a command, and its groups have those options."""
    from detector.commands.main import COMMANDS

    options = {f"{file.parent.name}={file.stem}" for file in CONFIGS.glob("*/*.yaml")}
    groups = {file.parent.name for file in CONFIGS.glob("*/*.yaml")}
    for page in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "data" / "README.md"]:
        for line in page.read_text(encoding="utf-8").splitlines():
            words = line.strip().removeprefix("`").split("`")[0].split()
            if words[:1] == ["detector"] and len(words) > 1 and words[1].isalpha():
                assert words[1] in COMMANDS, f"{page.name}: {line}"
            for word in words:
                group, _, option = word.strip("'`").partition("=")
                if group in groups and words[0] in ("detector", "python") and option.replace("_", "").isalnum():
                    assert f"{group}={option}" in options or option in YOURS, f"{page.name}: {line}"


def test_pages_of_the_site_are_all_in_its_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = {page for entry in menu for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    assert pages == listed - {"reference/configuration.md", "reference/licences.md"}


def test_nothing_that_is_installed_with_it_forbids_a_use(site):
    page = (site / "reference" / "licences" / "index.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", page)
    found = {name: licence for name, _, licence in rows}
    assert {"torch", "torchvision", "hydra-core", "albumentations", "hotcoco"} <= set(found)
    permissive = r"Apache|MIT|BSD|PSF|Python Software|MPL|ISC|Zlib" + "|NVIDIA"  # the last are PyTorch's
    assert not {name: licence for name, licence in found.items() if re.search(r"\bA?GPL", licence)}
    unknown = {name for name, licence in found.items() if not re.search(permissive, licence)}
    assert unknown <= {"cuda-toolkit"}  # says nothing, and holds nothing but the names of the others
