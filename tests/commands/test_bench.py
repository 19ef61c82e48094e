"""detector bench and detector quantize."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import detector
from detector.commands import bench as program
from detector.commands import quantize as quantizing
from detector.commands.bench import PARTS, Stopwatch, agreement, bench, recommended
from detector.config import ConfigError
from detector.data import Pipeline
from detector.export.programs import Program, installed, quantize
from detector.inference.predict import as_batch
from tests.tiny import tiny_model


def test_parts_are_timed_without_those_inside():
    now = [0.0]
    watch = Stopwatch(clock=lambda: now[0])
    inner = watch.timed("inner", lambda: now.__setitem__(0, now[0] + 2))
    with watch.part("outer"):
        now[0] += 1
        inner()
        inner()
        now[0] += 3
    assert watch.seconds == {"inner": 4.0, "outer": 4.0}


def test_a_model_is_as_it_was_after_it_was_timed(checkpoint, shapes_tiny):
    model = detector.load(checkpoint)
    image = sorted((shapes_tiny / "val").iterdir())[0]
    before, watch = model.predict(image, threshold=0.0), Stopwatch()
    with watch.of(model.model):
        inside = model.predict(image, threshold=0.0)
    held = dict(watch.seconds)
    assert {"backbone", "RPN", "RoI", "heads", "NMS"} == set(held) and all(value > 0 for value in held.values())
    after = model.predict(image, threshold=0.0)
    assert watch.seconds == held and torch.equal(before.boxes, inside.boxes) and torch.equal(before.boxes, after.boxes)


def test_the_bench(checkpoint, shapes_tiny, tmp_path, call):
    code, out, error = call(
        program.main,
        *(f"checkpoint={checkpoint}", f"images={shapes_tiny / 'val'}", "batch=[1,2]", "ways=[fp32,bf16]"),
        *("repeats=1", "threads=1", "device=cpu", "size=64", f"output={tmp_path / 'bench.json'}"),
    )
    assert code == 0, error
    numbers = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["way"], row["batch"]) for row in numbers["ways"]] == [(w, n) for w in ("fp32", "bf16") for n in (1, 2)]
    for row in numbers["ways"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["p50_ms"], rel=0.01)
    assert set(numbers["parts_ms"]["fp32"]) == set(PARTS) and numbers["network_sees"] == [64, 64]
    assert "frames/s" in out.splitlines()[-1] and numbers["ways"][0]["finds"] == 1


def test_the_fastest_way_that_finds_the_same_is_recommended():
    rows = [
        {"way": way, "batch": batch, "p50_ms": ms, "images_per_s": 1000 * batch / ms, "finds": finds}
        for way, batch, ms, finds in [
            ("fp32", 1, 20, 1.0),
            ("bf16", 1, 12.5, 0.97),
            ("int8", 1, 5, 0.2),
            ("fp32", 4, 25, 1),
        ]
    ]
    assert recommended(rows) == "12.5 ms at bf16: 80 frames/s; 160 frames/s at fp32, 4 at once"


def test_agreement_counts_what_is_found_again(checkpoint, shapes_tiny):
    found = detector.load(checkpoint).predict(sorted((shapes_tiny / "val").iterdir())[0], threshold=0.0)
    half = found._replace(boxes=found.boxes[:1], scores=found.scores[:1], labels=found.labels[:1])
    assert agreement([found], [found]) == 1 and 0 < agreement([found], [half]) < 1
    other = found._replace(labels=found.labels % 5 + 1, boxes=found.boxes + 1000)
    assert agreement([found], [other]) == 0


def test_what_cannot_be_timed_is_refused(checkpoint):
    for wrong in ({"ways": ["int4"]}, {"repeats": 0}, {"batch": []}, {"size": 3}):
        with pytest.raises(ConfigError):
            bench(str(checkpoint), device="cpu", **wrong)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a model, a program with a model's inputs and outputs that is one convolution, its weights [4, 3, 3, 3])"""
    onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed: no onnx")
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed: no onnxruntime")
    weights = np.random.default_rng(0).uniform(0.01, 0.03, (4, 3, 3, 3)).astype(np.float32)
    node, number = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [
        node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Conv", ["floats", "weights"], ["maps"], name="conv"),
        node("GlobalAveragePool", ["maps"], ["means"]),
        node("Flatten", ["means"], ["boxes"]),
        node("Cast", ["image_size"], ["sides"], to=onnx.TensorProto.FLOAT),
        node("ReduceMin", ["sides"], ["least"], keepdims=1),
        node("Div", ["least", "hundred"], ["scores"]),
        node("Identity", ["one"], ["labels"]),
    ]
    constants = [number(weights, "weights"), number(np.float32([100]), "hundred"), number(np.int64([1]), "one")]
    value, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [value("images", kinds.UINT8, [1, 3, "h", "w"]), value("image_size", kinds.INT64, [2])]
    outputs = [
        value("boxes", kinds.FLOAT, [1, 4]),
        value("scores", kinds.FLOAT, [1]),
        value("labels", kinds.INT64, [1]),
    ]
    graph = onnx.helper.make_graph(nodes, "program", inputs, outputs, constants)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.save(made, file)
    return tiny_model(mask=False).eval(), file, torch.from_numpy(weights)


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (64 + 20 * i, 96, 3), np.uint8) for i in range(3)]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_program_in_the_place_of_a_model(exported, runtime):
    """Each image by itself, cut to its own canvas, as the model has it."""
    if not installed(runtime):
        pytest.skip(f"{runtime} is not installed")
    model, file, weights = exported
    batch = as_batch(model, pictures(), Pipeline([]))
    found = Program(file, model, runtime, threads=1)(batch)
    assert found.boxes.shape == (3, 1, 4) and found.labels.tolist() == [[1]] * 3 and found.valid.all()
    for n, (height, width) in enumerate(batch.image_sizes.tolist()):
        height, width = (-(-side // 32) * 32 for side in (height, width))
        image = batch.images[n : n + 1, :, :height, :width].float()
        expected = torch.nn.functional.conv2d(image, weights).mean((2, 3))
        torch.testing.assert_close(found.boxes[n], expected, atol=1e-2, rtol=1e-3)
        assert found.scores[n].item() == pytest.approx(min(batch.image_sizes[n].tolist()) / 100)
    assert found.masks is None and found.keypoints is None


def test_eight_bits(exported, tmp_path):
    model, file, _ = exported
    assert quantize(file, tmp_path / "int8.onnx", model, Pipeline([]), pictures()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]
    kinds = {node.op_type for node in onnx_nodes(tmp_path / "int8.onnx")}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    batch = as_batch(model, pictures(), Pipeline([]))
    plain, small = (Program(path, model, threads=1)(batch) for path in (file, tmp_path / "int8.onnx"))
    assert not torch.equal(plain.boxes, small.boxes)
    torch.testing.assert_close(plain.boxes, small.boxes, atol=0, rtol=0.1)  # of one layer
    quantize(file, tmp_path / "kept.onnx", model, Pipeline([]), pictures(), keep=["conv"])
    assert "QuantizeLinear" not in {node.op_type for node in onnx_nodes(tmp_path / "kept.onnx")}
    with pytest.raises(ValueError, match="8 bits need images"):
        quantize(file, tmp_path / "int8.onnx", model, Pipeline([]), [])


def onnx_nodes(file):
    import onnx

    return onnx.load(file).graph.node


def test_eight_bits_that_cost_too_much_are_refused(checkpoint, tmp_path, monkeypatch, call):
    monkeypatch.setattr(quantizing, "quantize", lambda file, small, *_: small.write_bytes(b"8") or 3)
    monkeypatch.setattr(quantizing, "Program", lambda path, *_, **__: str(path))
    monkeypatch.setattr(
        quantizing, "evaluate", lambda path, *_, **__: ({"bbox": {"AP": 0.5 - 0.1 * ("int8" in path)}}, [])
    )
    (tmp_path / "model.onnx").write_bytes(b"32")
    arguments = [f"checkpoint={checkpoint}", f"onnx={tmp_path / 'model.onnx'}", f"output={tmp_path / 'small.onnx'}"]
    code, _, error = call(quantizing.main, *arguments)
    assert code == 1 and "8 bits cost 10.00 box AP, more than most_lost=0.01" in error
    assert not (tmp_path / "small.onnx").exists()
    code, out, _ = call(quantizing.main, *arguments, error.rpartition("; ")[2].split()[0])
    assert code == 0 and (tmp_path / "small.onnx").read_bytes() == b"8" and "10.00 box AP lost" in out


def test_a_runtime_that_is_missing_says_how_it_is_had(exported, monkeypatch):
    model, file, _ = exported
    monkeypatch.setattr("detector.export.programs.installed", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match=r"openvino is not installed: .* 'two-stage-detector\[openvino\]'"):
        Program(file, model, "openvino")
