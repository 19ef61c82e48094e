"""Whatever is written into an annotation file or on the command line: an error in words, or the right thing done."""

from __future__ import annotations

import json
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from detector.commands.train import train as train_command
from detector.config import ConfigError, check, compose, explain
from detector.config.suggest import leaves
from detector.data import CocoDataset, collate
from tests.data.coco_files import minimal, write
from tests.data.test_annotations import JUNK

RECORDS = [(kind, index) for kind in ("images", "annotations", "categories") for index in range(2)]


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damaged_annotations_never_change_what_is_sound(tmp_path, data):
    """One record is damaged at one key. The data set refuses the file, naming it, or every sample can be loaded and the
    objects whose own records are untouched have their label and box."""
    coco = minimal()
    write(tmp_path, coco)
    kind, index = data.draw(st.sampled_from(RECORDS))
    record = coco[kind][index]
    key = data.draw(st.sampled_from([*record, "iscrowd", "segmentation"]))
    value = data.draw(JUNK | st.sampled_from([0, 1, 2, 5, 7, 9, 10**6, -1, [], {}, "a.png", "cat", [0, 0, 1e9, 1e9]]))
    record[key] = value
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco))
    for on_error in ("raise", "skip"):
        try:
            dataset = CocoDataset(tmp_path, path, on_error=on_error, training=True)
            samples = [dataset[epoch, i] for epoch in (0, 1) for i in range(len(dataset))]
            batch, targets = collate(samples)
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
            continue
        assert len(batch.images) == len(targets.boxes) == 2 * len(dataset)
        found = dataset.annotations
        for original in minimal()["annotations"]:
            if original not in coco["annotations"] or kind == "images" or original["id"] not in found.object_ids:
                continue
            row = found.object_ids.tolist().index(original["id"])
            x, y, width, height = original["bbox"]
            names = [str(record["name"]) for record in coco["categories"] if record["id"] == original["category_id"]]
            assert [found.categories[found.labels[row] - 1]] == names
            np.testing.assert_allclose(found.boxes[row], [x, y, x + width, y + height])


KNOWN = [key for key in leaves(compose("train", ["experiment=none"])) if not key.startswith("hydra")]
GROUPS = ["model", "roi", "data", "augment", "optimizer", "schedule", "experiment", "runtime", "heads"]
TEXT = st.text(string.ascii_letters + string.digits + "._=[]{},:'\"$+~-@ /\\\n%é", max_size=12)


def damaged(key: str, at: int, letter: str) -> str:
    at %= len(key)
    return key[:at] + letter + key[at + 1 :]


NAMES = st.sampled_from([*KNOWN, *GROUPS])
OVERRIDES = st.one_of(
    TEXT,
    st.builds("{}={}".format, NAMES, TEXT),
    st.builds("{}={}".format, st.builds(damaged, NAMES, st.integers(0, 99), st.sampled_from("aex_.@ ")), TEXT),
    st.builds(
        "{}{}={}".format, st.sampled_from(["+", "++", "~"]), NAMES, st.sampled_from(["1", "null", "x", "[1]", "{a: 1}"])
    ),
    st.builds(
        "{}={}".format, NAMES, st.sampled_from(["null", "-1", "1e400", "nan", "true", "[]", "{}", "${seed}", "???"])
    ),
)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_overrides_end_in_one_line_or_in_a_checked_configuration(overrides):
    """As the programs do it: what Hydra cannot compose is explained, what it can is checked."""
    try:
        cfg = compose("train", ["experiment=none", *overrides])
    except Exception as error:
        words = explain(error, "train", overrides)
        assert words.strip() and "\n" not in words.split(" There are:")[0]
        return
    try:
        check(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), train_command)
    except ConfigError as error:
        assert str(error).strip()
