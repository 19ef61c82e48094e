"""Names from runs and from data are text in compare.py's report, whatever is in them."""

from __future__ import annotations

import json
import shutil

import yaml

from detector.commands.compare import compare_runs
from tests.comparison.test_compare import Balanced, make_run, roi, settings

__all__ = ["make_run"]  # a fixture
EVIL = "<script>alert('x')</script><img src=x onerror=\"alert(1)\">&lt;"


def test_texts_from_runs_and_data_are_escaped(make_run, tmp_path, shapes_tiny):
    truth = json.loads((shapes_tiny / "annotations" / "instances_val.json").read_text())
    for category in truth["categories"]:
        category["name"] += EVIL
    for number, image in enumerate(truth["images"]):  # pictures that lead out are left out
        outside = tmp_path / f"outside_{number}.jpg"
        shutil.copy(shapes_tiny / "val" / image["file_name"], outside)
        image["file_name"] = str(outside) if number % 2 else f"{EVIL}.png"
    (tmp_path / "evil.json").write_text(json.dumps(truth))
    for name in ("align", "pool"):
        folder = make_run(f"{name}_run", roi(name), noise=0.1)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["optimizer"]["lr"] = f"{name}{EVIL}"
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        about = json.loads((folder / "eval_last" / "about.json").read_text())
        (folder / "eval_last" / "about.json").write_text(
            json.dumps(about | {"annotations": str(tmp_path / "evil.json")})
        )
    compare_runs(**settings(tmp_path))
    page = (tmp_path / "report" / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and parser.fetched == []
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert" in page and "&amp;lt;" in page
    assert "data:image/jpeg" not in page
