"""The explorer's page, in a browser: its numbers are those of detector.roi, and it can be used."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

import detector
from detector.commands.explore import explore, main
from detector.comparison.alignment import area_error
from detector.config import ConfigError, build, compose
from detector.data import read_image
from detector.explorer import write_page
from detector.explorer.page import collect, decode, encode, find_extractor, outlines, render
from detector.roi import (
    BorderAlign,
    DeformableRoIPool,
    PreciseRoIPool,
    RoIAlign,
    RoIExtractor,
    RoIPool,
    RoIWarp,
    SemanticRoIAlign,
    assign_levels,
)
from detector.roi.bag import pool_cells
from detector.roi.context import enlarged
from detector.roi.geometry import at_points, locate
from tests.untrained import SMALL

MODIFIED = ["model.box_head.roi.predictor_width=32", "model.mask_head.roi.predictor_width=8"]
STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: that of $CHROMIUM, of the system, or of `playwright install chromium`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        if not found and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("no Chromium: install one, name it in $CHROMIUM, or run `playwright install chromium`")
        sandbox = [] if hasattr(os, "geteuid") and os.geteuid() else ["--no-sandbox"]  # root has none
        yield (instance := playwright.chromium.launch(executable_path=found, args=sandbox))
        instance.close()


@pytest.fixture
def open_page(browser):
    """Opens a file, offline; an error in the page or a request to anywhere fails the test."""
    contexts, wrong = [], []

    def open_it(path, width=1400, height=900, theme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, offline=True)
        contexts.append(context)
        context.set_default_timeout(120_000)  # shared machines stall
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("request", lambda request: request.url.split(":")[0] in ("file", "data") or wrong.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def photo(shapes_tiny):
    return sorted((shapes_tiny / "val").iterdir())[0]


def make_model(shapes_tiny, *overrides, seed=0):
    """A small untrained model whose offset predictors, if any, predict something."""
    overrides = [*SMALL, *overrides, f"data.root={shapes_tiny}"]
    cfg = compose("train", overrides)
    config = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True)
    torch.manual_seed(seed)
    names = ["ellipse", "triangle", "rectangle", "star", "ring"]
    model = build(config["model"], "model", num_classes=len(names))
    for name, parameter in model.named_parameters():
        if "offset_predictor" in name:
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5)
    ids = {"category_ids": [1, 2, 4, 5, 8], "categories": names}
    return detector.load({"model": model.state_dict(), "ema": None, "config": config, **ids})


@pytest.fixture(scope="module")
def align_page(shapes_tiny, photo, tmp_path_factory):
    out = tmp_path_factory.mktemp("explorer") / "align.html"
    return write_page(make_model(shapes_tiny), read_image(photo), out, photo.name)


@pytest.fixture(scope="module")
def deformable_page(shapes_tiny, photo, tmp_path_factory):
    out = tmp_path_factory.mktemp("explorer") / "deformable.html"
    model = make_model(shapes_tiny, "roi=modulated_deformable", *MODIFIED)
    return write_page(model, read_image(photo), out, photo.name), model.model.box_head.extractor


def content_of(path):
    """The data in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"))[1])


def features_of(path):
    """The maps [1, C, H, W] in a page."""
    return [decode(entry)[None] for entry in content_of(path)["maps"]]


def random_rois(count, seed=0, extent=128):
    """[count, 4] of all sizes; some reach beyond the image, one side may be tiny."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(-20, extent, (count, 2))
    sides = np.exp(generator.uniform(-1, 5, (count, 2)))
    return np.concatenate([corners, corners + sides], 1).astype(np.float32)


AWKWARD = np.array(
    [
        [10, 10, 10, 10],  # a point
        [50.3, 60.1, 30.2, 20.7],  # reversed
        [-300.5, -200, -100, -50.2],  # beside the map
        [-50.1, -40.2, 300.3, 260.4],  # larger than the image
        [0, 0, 128, 128],
        [8, 8, 36, 36],  # on cells' edges: a whole number of cells in every bin
        [2, 2, 30, 58],  # halves, to be rounded
        [float("nan"), 10, 50, 60],
        [10, 10, float("inf"), 60],
    ],
    np.float32,
)


def pool(op, features, rois, level):
    """[R, C, h, w] of RoIs [R, 4] on one level."""
    rows = torch.cat([torch.zeros(len(rois), 1), torch.as_tensor(rois)], 1)
    return op(features, rows, torch.full((len(rows),), level), STRIDES[: len(features)])


def page_pools(page, rois, **request):
    """The page's results for RoIs [R, 4], a list of what explorer.pool returns."""
    script = "([rois, request]) => rois.map((roi) => ({...window.explorer.pool({...request, roi}), points: null}))"
    return page.evaluate(script, [np.asarray(rois, float).tolist(), request])


METHODS = [
    ("pool_caffe", {}, lambda size: RoIPool(size, "caffe")),
    ("pool_floor", {}, lambda size: RoIPool(size, "floor")),
    ("pool_uniform", {}, lambda size: RoIPool(size, "uniform")),
    ("warp", {"ratio": 1}, lambda size: RoIWarp(size)),
    ("warp", {"ratio": 0, "reduction": "max"}, lambda size: RoIWarp(size, 0, "max")),
    ("align", {"ratio": 2}, lambda size: RoIAlign(size)),
    ("align", {"ratio": 0}, lambda size: RoIAlign(size, 0)),
    ("align", {"ratio": 3, "reduction": "max"}, lambda size: RoIAlign(size, 3, reduction="max")),
    ("align", {"ratio": 0, "reduction": "max"}, lambda size: RoIAlign(size, 0, reduction="max")),
    ("align", {"ratio": 2, "placement": "edge"}, lambda size: RoIAlign(size, placement="edge")),
    ("align_bicubic", {"ratio": 2}, lambda size: RoIAlign(size, kernel="bicubic")),
    (
        "align_lanczos",
        {"ratio": 3, "reduction": "max"},
        lambda size: RoIAlign(size, 3, reduction="max", kernel="lanczos"),
    ),
    ("align_legacy", {"ratio": 2}, lambda size: RoIAlign(size, aligned=False)),
    ("align_legacy", {"ratio": 0}, lambda size: RoIAlign(size, 0, aligned=False)),
    ("precise", {}, lambda size: PreciseRoIPool(size)),
    ("precise_aligned", {}, lambda size: PreciseRoIPool(size, aligned=True)),
]


class TestNumbers:
    @pytest.mark.slow
    def test_every_method_equals_the_projects_op(self, open_page, align_page):
        page, features = open_page(align_page), features_of(align_page)
        rois = np.concatenate([AWKWARD, random_rois(25)])
        for method, settings, factory in METHODS:
            for level, size, channel in ((0, (7, 7), 3), (1, (2, 5), 0), (3, (3, 3), 15)):
                expected = pool(factory(size), features, rois, level).features[:, channel]
                request = {"reduction": "avg", "placement": "centre", **settings, "method": method}
                found = page_pools(page, rois, level=level, size=list(size), channel=channel, **request)
                output = torch.tensor([one["output"] for one in found])
                message = f"{method} {settings} level {level}"
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, msg=lambda m, t=message: f"{t}: {m}")

    def test_area_error_is_that_of_the_report(self, open_page, shapes_tiny, align_page):
        page, rois = open_page(align_page), random_rois(40, seed=1) + 20
        model = make_model(shapes_tiny)
        for method, op in (("pool_caffe", RoIPool(7)), ("pool_floor", RoIPool(7, "floor")), ("warp", RoIWarp(7))):
            model.model.box_head.extractor.op = op
            expected = area_error(model.model, torch.from_numpy(rois))
            found = [one["areaError"] for one in page_pools(page, rois, method=method, level="auto")]
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert [one["areaError"] for one in page_pools(page, rois, method="align")] == [0] * 40

    def test_methods_that_are_not_aligned_read_half_a_cell_off(self, open_page, align_page):
        roi = [[40, 24, 72, 80]]
        for method in ("align_legacy", "precise"):
            (found,) = page_pools(open_page(align_page), roi, method=method, level=1)
            assert found["real"] == [5, 3, 9, 10] and found["read"] == [5.5, 3.5, 9.5, 10.5]

    @pytest.mark.parametrize("rule", ["detectron2", "torchvision", "mmdetection"])
    def test_levels(self, open_page, shapes_tiny, photo, tmp_path, rule):
        model = make_model(shapes_tiny)
        content = collect(model, read_image(photo), "box_head", 8) | {"name": "x", "checkpoint": "y"}
        content["levels"] |= {"rule": rule, "canonical_size": 112}
        (tmp_path / "page.html").write_text(render(content))
        rois = np.concatenate(
            [random_rois(200, seed=2), [[0, 0, 56, 56], [0, 0, 112, 112], [3, 5, 3, 5], [9, 9, 2, 40]]]
        )
        expected = assign_levels(torch.from_numpy(rois).float(), STRIDES, 4, 112, rule)
        found = page_pools(open_page(tmp_path / "page.html"), rois, method="pool_floor", level="auto", size=[1, 1])
        assert [one["level"] for one in found] == expected.tolist()

    @pytest.mark.parametrize(
        "overrides",
        [
            ["roi=modulated_deformable"],
            ["roi=deformable_mmdet", "+model.box_head.canonical_size=28"],  # a predictor per level, adaptive sampling
            ["roi=modulated_deformable", "model.box_head.roi.offset_granularity=point"],
            ["roi=deformable", "+model.box_head.roi.base={_target_: detector.roi.RoIPool, _partial_: true}"],
        ],
        ids=["modulated", "per-level", "per-point", "pool-before"],
    )
    def test_deformable(self, open_page, shapes_tiny, photo, tmp_path, overrides):
        model = make_model(shapes_tiny, *overrides, *MODIFIED)
        extractor = model.model.box_head.extractor
        path = write_page(model, read_image(photo), tmp_path / "page.html")
        page, features = open_page(path), features_of(path)
        rois = random_rois(12, seed=3)
        method = content_of(path)["own"]["method"]
        rows = torch.cat([torch.zeros(len(rois), 1), torch.from_numpy(rois)], 1)
        with torch.inference_mode():
            expected = extractor(features, rows)
        found = page_pools(page, rois, method=method, level="auto", channel=5)
        offsets = torch.tensor([one["offsets"] for one in found]).view_as(expected.offsets)
        assert expected.offsets.abs().mean() > 0.1
        torch.testing.assert_close(offsets, expected.offsets, rtol=1e-3, atol=1e-3)
        output = torch.tensor([one["output"] for one in found])
        torch.testing.assert_close(output, expected.features[:, 5], rtol=1e-3, atol=2e-3)
        if expected.modulation is None:
            assert found[0]["modulation"] is None
            reason = page.locator('[data-method="modulated_deformable"] span').text_content()
            assert "predicts no modulation" in reason
        else:
            modulation = torch.tensor([one["modulation"] for one in found]).view_as(expected.modulation)
            torch.testing.assert_close(modulation, expected.modulation, rtol=1e-3, atol=1e-3)
            plain = page_pools(page, rois, method="deformable", level="auto", channel=5)
            levels = torch.tensor([one["level"] for one in found])
            with torch.inference_mode():
                without = extractor.op.pool(features, rows, levels, extractor.strides, expected.offsets)
            torch.testing.assert_close(
                torch.tensor([one["output"] for one in plain]), without[:, 5], rtol=1e-3, atol=2e-3
            )

    def test_what_methods_with_layers_read(self, open_page, align_page):
        """Context, border and semantic: what is pooled before their layers."""
        page, features, rois = open_page(align_page), features_of(align_page), random_rois(20, seed=4)
        rows = torch.cat([torch.zeros(len(rois), 1), torch.from_numpy(rois)], 1)
        found = page_pools(page, rois, method="context", level=1, size=[3, 2], channel=4, scale=1.5)
        expected = pool(RoIAlign((3, 2)), features, enlarged(rows, 1.5)[:, 1:], 1).features[:, 4]
        torch.testing.assert_close(torch.tensor([one["output"] for one in found]), expected, rtol=1e-4, atol=1e-4)

        op = BorderAlign(7, 16, points=5)
        regions = locate(features, rows, torch.ones(len(rows), dtype=torch.int64), STRIDES)
        expected = op.borders([f.repeat_interleave(4, 1) for f in features], regions)[:, 4, :, None]
        found = page_pools(page, rois, method="border", level=1, channel=4, sides=5)
        torch.testing.assert_close(torch.tensor([one["output"] for one in found]), expected, rtol=1e-4, atol=1e-4)

        cells, there = SemanticRoIAlign(7, 16, samples=20).grid(regions)
        found = page_pools(page, rois, method="semantic", level=1, samples=20)
        assert [len(one["output"]) * len(one["output"][0]) for one in found] == there.sum(1).tolist()
        assert [[len(one["output"]), len(one["output"][0])] for one in found] == [
            [round(1 / float(c[0, 3])), round(1 / float(c[0, 2]))] for c in cells
        ]

    def learned_page(self, open_page, shapes_tiny, photo, tmp_path, roi, names):
        model = make_model(shapes_tiny, f"roi={roi}")
        op = model.model.box_head.extractor.op
        for name in names:
            layer = getattr(op, name)
            torch.nn.init.normal_(layer.weight, std=0.3 * layer.in_features**-0.5)
        path = write_page(model, read_image(photo), tmp_path / "page.html")
        rois = random_rois(8, seed=5)
        rows = torch.cat([torch.zeros(len(rois), 1), torch.from_numpy(rois)], 1)
        return open_page(path), model.model.box_head.extractor, features_of(path), rois, rows

    def test_rotated(self, open_page, shapes_tiny, photo, tmp_path):
        page, extractor, features, rois, rows = self.learned_page(
            open_page, shapes_tiny, photo, tmp_path, "rotated", ["learner"]
        )
        with torch.inference_mode():
            expected = extractor(features, rows).features[:, 5]
        found = page_pools(page, rois, method="rotated", level="auto", channel=5)
        torch.testing.assert_close(torch.tensor([one["output"] for one in found]), expected, rtol=1e-3, atol=1e-3)
        assert max(abs(one["rotation"][4]) for one in found) > 1e-3
        assert page.evaluate("explorer.counts().largest") > 0

    def test_attention(self, open_page, shapes_tiny, photo, tmp_path):
        page, extractor, features, rois, rows = self.learned_page(
            open_page, shapes_tiny, photo, tmp_path, "attention", ["offsets", "weights"]
        )
        op, level = extractor.op, 1
        levels = assign_levels(rows[:, 1:], STRIDES)
        with torch.inference_mode():
            queries = op.op(features, rows, levels, STRIDES).features.flatten(2).mT
            offsets = op.offsets(queries).unflatten(2, (*op.shape, 2))[:, :, :, level]
            weights = op.weights(queries).unflatten(2, (op.shape[0], -1)).softmax(3)
            weights = weights.unflatten(3, op.shape[1:])[:, :, :, level] / op.shape[0]
            regions = locate(features[1:2], rows, torch.zeros_like(levels), STRIDES[1:2])
            points = [t.flatten(2)[:, :, None] for t in (*op.locations(regions, offsets), weights)]
            expected = pool_cells(features[1:2], regions, *at_points(*points[:2], regions, points[2]))[:, 5]
        found = page_pools(page, rois, method="attention", level=level, channel=5)
        output = torch.tensor([one["output"] for one in found]).flatten(1)
        torch.testing.assert_close(output, expected.flatten(1), rtol=1e-3, atol=1e-3)

    def test_rounded_numbers_stay_within_what_the_page_states(self, open_page, shapes_tiny, photo, tmp_path):
        model = make_model(shapes_tiny, "roi=deformable", *MODIFIED)
        extractor = model.model.box_head.extractor
        path = write_page(model, read_image(photo), tmp_path / "page.html", max_mb=0.15)
        content = content_of(path)
        types = {layer["type"] for p in content["learned"]["predictors"] for layer in p["offsets"]}
        assert "int8" in types and content["maps"][0]["type"] == "float16"
        page = open_page(path)
        boxes = np.array([one["box"] for one in content["boxes"]])
        assert "within" in page.locator("#small-print").text_content()
        found = page_pools(page, boxes, method="deformable", level="auto")
        with torch.inference_mode():
            image = model.as_batch([read_image(photo)], content["picture"]["width"] / 128)
            features = model.model.features(image)[:4]
            assert features[0].shape[2:] == (content["maps"][0]["shape"][1:][0], content["maps"][0]["shape"][2])
            expected = extractor(features, torch.cat([torch.zeros(len(boxes), 1), torch.from_numpy(boxes).float()], 1))
        sides = torch.from_numpy(boxes[:, 2:] - boxes[:, :2]).float()[:, :, None, None]
        offsets = torch.tensor([one["offsets"] for one in found]).view_as(expected.offsets)
        error = (extractor.op.gamma * (offsets - expected.offsets).abs() * sides).max()
        assert 0 < error <= content["learned"]["error_px"] + 1e-4


class TestWorkedExamples:
    def open(self, page, letter):
        index = next(i for i, n in enumerate(page.evaluate("explorer.scenes")) if n.startswith(f"Example {letter}"))
        page.select_option("#scene", str(index))

    def test_a(self, open_page, align_page):
        page = open_page(align_page)
        self.open(page, "A")
        found = page.evaluate("explorer.pool()")
        assert found["output"] == [[19, 22], [48, 57]]
        assert found["read"] == [1, 0, 4, 3]
        assert found["areaError"] == pytest.approx(0.018, abs=5e-4)
        words = page.locator("#area").text_content()
        assert "+1.8 %" in words and "4 of 9 cells" in words
        page.locator("#numbers summary").click()
        page.locator("#output td").nth(3).wait_for()
        assert page.locator("#output td").all_text_contents() == ["19.0000", "22.0000", "48.0000", "57.0000"]

    def test_b(self, open_page, align_page):
        page = open_page(align_page)
        self.open(page, "B")
        found = page.evaluate("explorer.pool()")
        columns, rows = [0, 3, 7], [3, 5, 8]
        for k, points in enumerate(found["points"]):
            i, j = divmod(k, 2)
            cells = [(u, v) for u in range(columns[j], columns[j + 1]) for v in range(rows[i], rows[i + 1])]
            assert sorted((p["x"], p["y"]) for p in points) == cells
        assert found["output"] == [[109, 103], [79, 101]]

    def test_c(self, open_page, align_page):
        page = open_page(align_page)
        self.open(page, "C")
        found = page.evaluate("explorer.pool()")
        assert found["output"][0][0] == pytest.approx(60.5, abs=1e-4)
        ((point,),) = found["points"]
        assert (point["x"], point["y"]) == pytest.approx((2.3, 1.7))
        cells = {(c["u"], c["v"]): c["weight"] for c in point["cells"]}
        expected = {(2, 1): 0.21, (3, 1): 0.09, (2, 2): 0.49, (3, 2): 0.21}
        assert cells == pytest.approx(expected, abs=1e-5)
        rows = [row.locator("td").all_text_contents() for row in page.locator("#neighbours tr").all()[1:]]
        assert rows[0] == ["(2, 1)", "0.2100", "65.0000", "13.6500"] and rows[-1][-1] == "60.5000"


def box(page):
    return page.evaluate("[...explorer.state.box]")


def on_screen(page, panel, x, y):
    """Where a pixel of the image is in a panel."""
    place = page.locator(f"{panel} svg").bounding_box()
    left, top, width, height = map(float, page.locator(f"{panel} svg").get_attribute("viewBox").split())
    return place["x"] + (x - left) / width * place["width"], place["y"] + (y - top) / height * place["height"]


def drag(page, panel, start, end):
    page.mouse.move(*on_screen(page, panel, *start))
    page.mouse.down()
    target = on_screen(page, panel, *end)
    page.mouse.move(*target, steps=4)
    page.mouse.up()

    def test_d(self, open_page, align_page):
        page = open_page(align_page)
        self.open(page, "D")
        found = page.evaluate("explorer.pool()")
        first = [(p["x"] + 0.5, 16 - (p["y"] + 0.5)) for p in found["points"][0]]
        assert first[0] == pytest.approx((9.94, 9.50), abs=0.01) and first[1] == pytest.approx((10.63, 9.50), abs=0.01)
        assert first[4] == pytest.approx((10.63, 8.99), abs=0.01)
        assert page.evaluate("explorer.state.chosen") == {"bin": 0, "point": 0}
        assert page.locator("#neighbours tr").last.locator("td").last.text_content() == "0.1469"
        value = 0.56 * 0.1 + 0.44 * 0.2
        assert value == pytest.approx(0.144) and "= 0.144" in page.locator("#about").text_content()
        maxima = page.evaluate(
            "explorer.pool().points.map((bin) => Math.max(...bin.map((p) => p.cells.reduce("
            "(sum, c) => sum + c.weight * MAP_16[c.v][c.u], 0))))"
        )
        assert [v for row in found["output"] for v in row] == pytest.approx(maxima, abs=1e-6)

    def test_e(self, open_page, align_page):
        """The offsets are those of the layer, and move points into the outline."""
        page = open_page(align_page)
        self.open(page, "E")
        found, counts = page.evaluate("explorer.pool()"), page.evaluate("explorer.counts()")
        assert counts["points"] == 36 and counts["parameters"] == 2 * 9 * 9 + 18
        assert counts["inside"] > counts["regularInside"] + 0.05
        offsets = torch.tensor(found["offsets"]).view(1, 2, 3, 3)
        feature = torch.tensor(page.evaluate("[...SCENES[5].maps[0].data]")).view(1, 1, 24, 24)
        roi = torch.tensor([[0, 2.5, 2.5, 20.5, 21.5]])
        level = torch.zeros(1, dtype=torch.int64)
        pooled = RoIAlign(3)([feature], roi, level, [1]).features.flatten()
        weight = torch.tensor(page.evaluate("[...SCENES[5].learned.predictors[0].offsets[0].weight]")).view(18, 9)
        torch.testing.assert_close(offsets.flatten(), weight @ pooled, rtol=1e-4, atol=1e-4)
        moved = DeformableRoIPool(3, 1).pool([feature], roi, level, [1], offsets)[0, 0]
        torch.testing.assert_close(torch.tensor(found["output"]), moved, rtol=1e-4, atol=1e-4)
        longest = (0.1 * offsets[0] * torch.tensor([18.0, 19.0])[:, None, None]).norm(dim=0).max()
        assert counts["largest"] == pytest.approx(float(longest), abs=1e-3)
        assert "36 points, the largest offset is" in page.locator("#counts").text_content()
        page.evaluate("explorer.set({box: [0, 0, 6, 6]})")
        assert page.evaluate("explorer.pool()")["offsets"] != found["offsets"]


class TestUse:
    START = (30.0, 40.0, 80.0, 90.0)

    @pytest.fixture
    def page(self, open_page, deformable_page):
        page = open_page(deformable_page[0])
        page.evaluate("(box) => explorer.set({box, method: 'align', level: 0, channel: 2})", list(self.START))
        return page

    @pytest.mark.parametrize("panel", ["#image-panel", "#closeup-panel", "#map-panel"])
    def test_drag(self, page, panel):
        page.locator(panel).scroll_into_view_if_needed()
        before = page.evaluate("explorer.pool().output")
        drag(page, panel, (55.9, 66.1), (65.9, 60.1))
        assert box(page) == pytest.approx([40, 34, 90, 84], abs=1)
        assert page.evaluate("explorer.pool().output") != before
        assert float(page.input_value("#roi-x")) == pytest.approx(40, abs=1)

    def test_drag_of_a_small_roi(self, page):
        """Its handles leave the middle free, and are large enough around it."""
        page.evaluate("explorer.set({box: [30, 30, 36, 36]})")
        drag(page, "#image-panel", (33, 33), (53, 43))
        assert box(page) == pytest.approx([50, 40, 56, 46], abs=0.6)
        corner = [v + 6 / 400 * 128 for v in (56, 46)]  # some pixels of the screen beyond the corner
        drag(page, "#image-panel", corner, [v + 10 for v in corner])
        assert box(page) == pytest.approx([50, 40, 66, 56], abs=0.6)

    def test_resize(self, page):
        drag(page, "#image-panel", (80, 90), (100, 70))  # the corner at the bottom right
        assert box(page) == pytest.approx([30, 40, 100, 70], abs=0.6)
        drag(page, "#closeup-panel", (30, 55), (20, 65))  # the left side: the height stays
        assert box(page) == pytest.approx([20, 40, 100, 70], abs=0.6)
        drag(page, "#image-panel", (60, 40), (60, 85))  # the top side cannot pass the bottom
        assert box(page)[1] == box(page)[3]
        assert all(np.isfinite(page.evaluate("explorer.pool().output")).flat)

    def test_keyboard(self, page):
        frame = page.locator("#image-panel .frame")
        page.locator("#opacity").focus()
        page.keyboard.press("Tab")
        assert frame.evaluate("(frame) => frame === document.activeElement")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
            page.keyboard.press(key)
        assert box(page) == [31, 39, 81, 89]
        for key in ("Shift+ArrowRight", "Shift+ArrowDown", "Shift+ArrowUp", "Shift+ArrowUp"):
            page.keyboard.press(key)
        assert box(page) == [31, 39, 82, 88]
        name = frame.get_attribute("aria-label")
        assert "x 31" in name and "width 51" in name
        assert page.locator("#said").text_content() in name  # read out by screen readers
        page.fill("#step", "0.1")
        page.locator("#closeup-panel .frame").focus()
        page.keyboard.press("ArrowRight")
        assert box(page) == pytest.approx([31.1, 39, 82.1, 88])

    def test_typed_numbers(self, page):
        page.fill("#roi-width", "12.5")
        page.keyboard.press("Enter")
        page.fill("#roi-x", "-3")
        page.keyboard.press("Tab")
        assert box(page) == [-3, 40, 9.5, 90]
        page.fill("#roi-height", "-4")
        page.keyboard.press("Tab")
        assert box(page) == [-3, 40, 9.5, 90] and page.input_value("#roi-height") == "50"

    def test_switch(self, page):
        page.locator('[data-method="pool_caffe"] b').click()
        assert page.input_value("#method") == "pool_caffe"
        assert page.locator('[data-method="pool_caffe"]').get_attribute("aria-pressed") == "true"
        assert page.locator("#closeup-panel .read[stroke-dasharray]").count() == 1
        facts = page.locator("#facts tr").all_text_contents()
        assert facts[0] == "in cellsthe RoIquantised" and facts[3] == "width12.5013"
        page.select_option("#method", "modulated_deformable")
        assert page.locator("#closeup-panel .moved").count() == 49  # an arrow for each bin
        assert "the offsets move bins" in page.locator("#area").text_content()
        page.select_option("#method", "align")
        assert page.locator("#closeup-panel .moved").count() == 0
        assert page.locator("#closeup-panel .dot").count() == 49 * 4
        page.select_option("#ratio", "3")
        page.fill("#size", "2")
        page.keyboard.press("Enter")
        assert page.locator("#closeup-panel .dot").count() == 4 * 9
        page.select_option("#level", "2")
        assert "stride 16" in page.locator("#map-note").text_content()
        page.locator("#channel").focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("explorer.state.channel") == 3 and "channel 3" in page.locator("#map-note").text_content()
        page.select_option("#object", "1")
        assert box(page) == page.evaluate("JSON.parse(document.getElementById('data').textContent).boxes[1].box")

    def test_click_on_a_point_shows_its_neighbours(self, page):
        place = page.evaluate("explorer.whereIs(24, 3)")
        page.mouse.click(place["x"], place["y"])
        assert page.evaluate("explorer.state.chosen") == {"bin": 24, "point": 3}
        assert page.locator("#closeup-panel .neighbour").count() == 4
        point = page.evaluate("explorer.pool().points[24][3]")
        rows = [row.locator("td").all_text_contents() for row in page.locator("#neighbours tr").all()[1:]]
        assert [row[0] for row in rows[:4]] == [f"({c['u']}, {c['v']})" for c in point["cells"]]
        number = lambda text: float(text.replace("−", "-"))  # noqa: E731
        assert [number(row[1]) for row in rows[:4]] == pytest.approx([c["weight"] for c in point["cells"]], abs=1e-4)
        assert sum(c["weight"] for c in point["cells"]) == pytest.approx(1)
        assert sum(number(row[3]) for row in rows[:4]) == pytest.approx(number(rows[4][3]), abs=3e-4)
        assert box(page) == list(self.START)  # a click is no drag
        page.locator("#next").click()
        assert page.evaluate("explorer.state.chosen") == {"bin": 25, "point": 0}

    def test_click_on_an_output(self, page):
        page.locator('[data-method="precise_aligned"] canvas').click(position={"x": 5, "y": 5})
        assert page.evaluate("explorer.state.chosen") == {"bin": 0, "point": 0}
        assert "the mean of the interpolated map" in page.locator("#point-note").text_content()
        page.locator('[data-method="pool_uniform"] canvas').click(position={"x": 5, "y": 5})
        assert "the largest of its 1 cells" in page.locator("#point-note").text_content()

    def test_the_sheet_chooses_a_channel(self, page):
        place = page.locator("#channels").bounding_box()
        columns = int(page.locator("#channels").get_attribute("data-columns"))
        rows = -(-16 // columns)
        page.locator("#channels").click(
            position={"x": place["width"] * 1.5 / columns, "y": place["height"] * 0.5 / rows}
        )
        assert page.evaluate("explorer.state.channel") == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_narrow_and_wide_windows(open_page, deformable_page, width, theme):
    page = open_page(deformable_page[0], width, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for panel in ("#image-panel", "#closeup-panel", "#map-panel"):
        place = page.locator(panel).bounding_box()
        assert place["width"] > 220 and place["height"] > 220 and place["x"] + place["width"] <= width
    ink, paper = page.evaluate("['color', 'backgroundColor'].map((key) => getComputedStyle(document.body)[key])")
    lightness = [sum(map(int, re.findall(r"\d+", text))) for text in (ink, paper)]
    assert (lightness[0] < lightness[1]) == (theme == "light") and abs(lightness[0] - lightness[1]) > 500
    page.evaluate("explorer.open(1)")  # an example has a map and no picture
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_names_are_text(open_page, shapes_tiny, photo, tmp_path):
    model = make_model(shapes_tiny)
    evil = "<img src=x onerror=window.hacked=1>"
    model.categories = [f"{evil}{k}" for k in range(4)] + ["</script><script>window.hacked=1</script>"]
    name = f"{evil}&amp;.png".replace("/", "")
    path = write_page(model, read_image(photo), tmp_path / "page.html", f"folder/{name}", f"runs/{evil}/best.pt")
    page = open_page(path)
    assert page.title() == f"{name} · RoI explorer"
    about = page.locator("#about").text_content()
    assert name in about and f"runs/{evil}/best.pt" in about
    assert any(evil in text for text in page.locator("#object option").all_text_contents())
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0


def test_no_foreign_code_runs(browser, align_page, tmp_path):
    """Were a name to get past the escaping, the page's policy would still stop it."""
    text = align_page.read_text(encoding="utf-8")
    foreign = (
        '<main onclick="window.hacked = 1"><script>window.hacked = 1</script><img src="https://example.org/a.png">'
    )
    (tmp_path / "page.html").write_text(text.replace("<main>", foreign), encoding="utf-8")
    page, messages = browser.new_page(), []
    page.on("console", lambda message: messages.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    page.locator("h2").first.click()
    assert page.evaluate("window.hacked") is None
    assert sum("Content Security Policy" in text for text in messages) == 3
    page.close()


def test_self_contained(align_page):
    text = align_page.read_text(encoding="utf-8")
    links = set(re.findall(r"\w+://[^\s\"'`<]+", text))
    assert links == {"http://www.w3.org/2000/svg"}  # a name, nothing that is fetched
    assert not re.search(r"<link|<img|\bimport\b *[({'\"]|fetch\(", text)


def test_large_models_fit(shapes_tiny, photo, caplog):
    """A smaller image instead of fewer channels, and it is said."""
    model = make_model(shapes_tiny)
    image = read_image(photo)
    plain, small = collect(model, image, "box_head", 8), collect(model, image, "box_head", 0.05)
    assert plain["maps"][0]["type"] == "float32" and small["maps"][0]["type"] == "float16"
    assert plain["picture"]["width"] == 128 > small["picture"]["width"]
    assert small["usual_size"] == [128, 128] and small["maps"][0]["shape"][0] == plain["maps"][0]["shape"][0]
    assert sum(len(m["data"]) for m in small["maps"]) <= 0.05e6
    (record,) = caplog.records
    assert "instead of 128 x 128 pixels; max_mb=1 would keep its size" in record.getMessage()


def test_encode():
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    assert torch.equal(decode(encode(values, 800, "int8")), values)
    assert encode(values, 400, "int8")["type"] == "float16"
    rounded = encode(values, 0, "int8")
    assert rounded["type"] == "int8"
    assert ((decode(rounded) - values).abs() <= values.abs().amax(1, keepdim=True) / 250).all()
    assert encode(values * 1e4, 0)["type"] == "float32"  # more than float16 can hold


def test_heads_and_settings(shapes_tiny, photo, tmp_path):
    model = make_model(shapes_tiny, "roi@model.box_head.roi=sum_levels")
    image = read_image(photo)
    content = collect(model, image, "mask_head", 8)
    assert content["own"]["method"] == "align" and content["own"]["size"] == [14, 14]
    own = collect(model, image, "box_head", 8)["own"]
    assert own["method"] == "align" and own["note"] == "The checkpoint's SumLevels reads these points on every level."
    with pytest.raises(ConfigError, match="head = 'tail': the model's heads with a RoI method are box_head, mask_head"):
        write_page(model, image, tmp_path / "page.html", head="tail")
    with pytest.raises(ConfigError, match="max_mb = 0"):
        write_page(model, image, tmp_path / "page.html", max_mb=0)


def test_outlines_of_detections(open_page, deformable_page):
    """Within their boxes, and shown with the share of points inside while the RoI is about the object."""
    path, _ = deformable_page
    boxes = content_of(path)["boxes"]
    page = open_page(path)
    shown = next(one for one in boxes if one["outlines"])
    for one in boxes:
        for polygon in one["outlines"]:
            corners = np.array(polygon).reshape(-1, 2)
            assert (corners >= np.array(one["box"][:2]) - 0.1).all() and (
                corners <= np.array(one["box"][2:]) + 0.1
            ).all()
    page.evaluate("(box) => explorer.set({box, method: 'modulated_deformable'})", shown["box"])
    counts = page.evaluate("explorer.counts()")
    assert 0 <= counts["inside"] <= 1 and counts["regularInside"] is not None and counts["parameters"] > 1000
    assert "inside the object's outline" in page.locator("#counts").text_content()
    assert page.locator("#closeup-panel path.outline").get_attribute("d").startswith("M")
    page.evaluate("explorer.set({box: [500, 500, 501, 501]})")
    assert page.evaluate("explorer.counts().inside") is None


def test_outline_of_a_square():
    mask = np.zeros((8, 8), np.float32)
    mask[2:6, 2:6] = 1
    (polygon,) = outlines(mask, [10, 20, 18, 28])
    corners = np.array(polygon).reshape(-1, 2)
    assert corners.min(0).tolist() == pytest.approx([12, 22], abs=0.3)
    assert corners.max(0).tolist() == pytest.approx([16, 26], abs=0.3)


def test_head_of_a_cascade():
    stages = nn.ModuleList(nn.ModuleDict({"extractor": RoIExtractor(RoIAlign(7), STRIDES)}) for _ in range(2))
    model = nn.ModuleDict({"box_head": nn.ModuleDict({"stages": stages})})
    assert find_extractor(model, "box_head") is stages[0]["extractor"]
    assert find_extractor(model, "box_head.stages.1") is stages[1]["extractor"]
    with pytest.raises(ConfigError, match=r"are none"):
        find_extractor(nn.ModuleDict(), "box_head")


def test_command(call, checkpoint, photo, tmp_path):
    image, out = tmp_path / f"<img src=x onerror=alert(1)>{photo.suffix}", tmp_path / "pages" / "page=1.html"
    shutil.copy(photo, image)
    code, shown, errors = call(main, f"checkpoint={checkpoint}", "device=cpu", f"image={image}", f"output={out}")
    assert code == 0, errors
    assert content_of(out)["name"] == image.name and str(out) in shown
    assert "<img" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("image, message", [("none.png", "none.png"), ("text.png", "cannot be read")])
def test_images_that_cannot_be_read(checkpoint, tmp_path, image, message):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ConfigError, match=message):
        explore(str(checkpoint), str(tmp_path / image), device="cpu")


def test_image_in_grey_with_another_shape(checkpoint, tmp_path, open_page):
    """Padding at the right, more levels than the image has size for."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (41, 97), np.uint8)).save(tmp_path / "grey.png")
    path = write_page(detector.load(checkpoint), read_image(tmp_path / "grey.png"), tmp_path / "page.html", "grey.png")
    page = open_page(path, 390)
    content = content_of(path)
    assert content["picture"]["width"] <= content["width"] and content["width"] % 32 == 0
    assert page.locator("#image-panel").bounding_box()["height"] < page.locator("#image-panel").bounding_box()["width"]
