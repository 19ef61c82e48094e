"""Heads of a user's own: the guide's, to the letter, from its training to everything that uses its checkpoint."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import detector
from detector.commands.explore import main as explore
from detector.commands.predict import predict_files
from detector.config import ConfigError
from detector.engine.train import train
from detector.export.export import export
from detector.inference.tiles import find
from detector.inference.tta import Augmented
from detector.settings import Tiles
from tests.runs import TINY, checked
from tests.tiny import random_batch, tiny_model

GUIDE = Path(__file__).parents[2] / "docs" / "extend.md"


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A folder with the guide's module, which can be imported, and its yaml."""
    folder, text = tmp_path_factory.mktemp("guide"), GUIDE.read_text(encoding="utf-8")
    (folder / "my_heads.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    (folder / "experiment").mkdir()
    yaml = re.search(r"```yaml\n(# @package.*?)```", text, re.DOTALL)[1]
    (folder / "experiment" / "fill.yaml").write_text(yaml, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def trained(guide, shapes_tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("fill") / "run"
    options = [text.lstrip("+") for text in TINY if text != "experiment=none"] + ["experiment=fill"]
    options += [f"hydra.searchpath=[file://{guide}]", "schedule.max_iterations=2", "schedule.warmup=0"]
    train(checked(*options, "model.extra_heads.fill.output_size=5", f"data.root={shapes_tiny}", f"run_dir={run}"))
    return run


def test_what_it_learns_and_says_is_kept(trained, shapes_tiny, tmp_path):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert all(line["loss_fill"] > 0 for line in lines if "loss" in line)
    entries = json.loads((trained / "predictions.json").read_text())
    assert all(0 < entry["fill"] < 1 for entry in entries)
    with pytest.raises(ConfigError, match=r"my_heads is yours.*trust=my_heads"):
        detector.load(trained / "last.pt")
    model = detector.load(trained / "last.pt", trust="my_heads")
    image = shapes_tiny / "val" / "000000.jpg"
    found = model.predict(image, threshold=0.0)
    assert found.extra["fill"].shape == (len(found.scores),)
    assert found.to_coco()[0]["fill"] == pytest.approx(found.extra["fill"][0].item(), rel=1e-5)
    predict_files(
        str(trained / "last.pt"), str(image), threshold=0.0, output=str(tmp_path), trust="my_heads", device="cpu"
    )
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert content["annotations"][0]["fill"] == found.to_coco()[0]["fill"]


def test_other_ways_to_look_keep_its_fields(trained, shapes_tiny):
    model = detector.load(trained / "last.pt", trust="my_heads")
    image = shapes_tiny / "val" / "000000.jpg"
    tiles = model.predict(image, threshold=0.0, tiles={"size": 64})
    assert tiles.extra["fill"].shape == (len(tiles.scores),) and (tiles.extra["fill"] > 0).all()
    with model.pictures.parts(image) as picture:
        entries = find(model.model, picture, Tiles(64), model.preprocess).results(3, model.category_ids)
    assert entries[0]["fill"] == pytest.approx(tiles.extra["fill"][0].item(), rel=1e-5)
    batch = model.as_batch([model.pictures.read(image)])
    with torch.inference_mode():
        plain, twice = model.model(batch), Augmented(model.model, flip=False)(batch)
    torch.testing.assert_close(twice.extra["fill"], plain.extra["fill"])


def test_explorer_and_export_know_it_by_name(trained, shapes_tiny, tmp_path, call):
    page, image = tmp_path / "page.html", shapes_tiny / "val" / "000000.jpg"
    options = [f"checkpoint={trained / 'last.pt'}", f"image={image}", f"output={page}", "device=cpu", "trust=my_heads"]
    assert call(explore, *options, "head=extra_heads.fill")[0] == 0 and page.is_file()
    with pytest.raises(ValueError, match=r"extra_heads\.fill has no form in a program.*\.safetensors"):
        export(trained / "last.pt", tmp_path / "model.pt2", trust="my_heads")
    export(trained / "last.pt", tmp_path / "model.safetensors", trust="my_heads")
    weights = detector.load(tmp_path / "model.safetensors", trust="my_heads").model.state_dict()
    assert "extra_heads.fill.predictor.weight" in weights


class MapHead(torch.nn.Module):
    """The mean of the finest map of the image, as a loss and a field; no RoIs."""

    negatives = True

    def __init__(self, in_channels, strides, num_classes, loss="loss_mean", field="mean", more=0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.loss, self.field, self.more, self.seen = loss, field, more, None

    def forward(self, features, rois):
        self.seen = rois

        class Found:
            mean, roi_features = features[0].mean(dim=(1, 2, 3)) * self.scale, None

        return Found

    def losses(self, prediction, sampled, targets):
        assert len(sampled.rois) == len(self.seen) and (sampled.labels == 0).any()
        return {self.loss: prediction.mean.square().mean()}

    def detect(self, features, detections):
        mean = self(features, detections.boxes.flatten(0, 1)).mean
        return {self.field: mean[:, None].expand(-1, detections.valid.shape[1] + self.more)}


def test_a_head_may_work_on_the_maps_and_see_the_background():
    model = tiny_model(extra_heads={"mean": MapHead})
    batch, targets = random_batch()
    losses, stats = model(batch, targets, stats=True)
    sum(losses.values()).backward()
    assert model.extra_heads["mean"].scale.grad != 0 and not any("mean" in name for name in stats)
    with torch.inference_mode():
        found = model.eval()(batch)
    assert found.extra["mean"].shape == found.scores.shape
    plain = tiny_model()
    assert set(losses) - set(plain(batch, targets)) == {"loss_mean"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "loss_mask"}, r"extra_heads\.mean: loss_mask: another part"),
        ({"field": "score"}, r"extra_heads\.mean: score: another part"),
        ({"more": 1}, r"extra_heads\.mean: mean is \[2, 101\], expected \[2, 100\]"),
    ],
)
def test_a_head_that_takes_anothers_place_is_named(settings, message):
    model = tiny_model(extra_heads={"mean": partial(MapHead, **settings)})
    with pytest.raises(ValueError, match=message):
        model(*random_batch())
        model.eval().detect(model.features(random_batch()[0]), random_batch()[0])


@pytest.mark.parametrize("name", ["keys", "a.b", "training"])
def test_names_that_a_module_cannot_have(name):
    with pytest.raises(ValueError, match=rf"extra_heads\.{re.escape(name)}: cannot be a name"):
        tiny_model(extra_heads={name: MapHead})
