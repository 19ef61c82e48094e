"""What leaves the framework finds what the model in it finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import detector
from detector.config import ConfigError, build, compose
from detector.engine import checkpoint as checkpoints
from detector.roi import DeformableRoIPool, RoIPool
from detector.weights.__main__ import main
from detector.weights.export import Exportable, export, export_program, save_onnx
from tests.evaluation.conftest import SMALL
from tests.tiny import random_batch, tiny_model

SIZE = (96, 128)
CASES = [(0, (90, 120)), (1, (96, 128)), (2, (40, 50))]  # (seed of the image, its content)


def small_model(**settings):
    rpn = {"pre_nms_top_n": (200, 100), "post_nms_top_n": (100, 50)}
    return tiny_model(rpn=rpn, box_head={"score_threshold": 0.3, "detections_per_image": 20} | settings).eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def program(model):
    return export_program(model, SIZE)


@torch.no_grad()
def same_detections(model, run, seed, size):
    """Run `run(images, image_size)` and compare; returns how many detections there are."""
    batch, _ = random_batch(images=1, size=SIZE, seed=seed)
    size = torch.tensor([size])
    expected = model(batch._replace(image_sizes=size))
    boxes, scores, labels, masks = (torch.as_tensor(t) for t in run(batch.images, size[0]))
    count = int(expected.valid.sum())
    assert (labels > 0).tolist() == expected.valid[0].tolist()
    assert labels[:count].tolist() == expected.labels[0, :count].tolist()
    torch.testing.assert_close(boxes, expected.boxes[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, expected.scores[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(masks[:count], expected.masks[0, :count], atol=1e-4, rtol=0)
    return count


def test_the_exportable_path_is_the_models(model):
    counts = [same_detections(model, Exportable(model), *case) for case in CASES]
    assert max(counts) > 1
    nothing = small_model(score_threshold=0.999)
    assert same_detections(nothing, Exportable(nothing), *CASES[0]) == 0
    agnostic = small_model(nms_agnostic=True, class_agnostic=True, score_threshold=0.1)
    assert same_detections(agnostic, Exportable(agnostic), *CASES[0]) > 0


def test_program_of_torch_export(model, program, tmp_path):
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    assert sum(same_detections(model, again, *case) for case in CASES) > 1


@pytest.mark.slow
def test_onnx_runtime_finds_the_same(model, program, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"the extra 'export' is not installed: no {name}")
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed: no onnxruntime")
    save_onnx(program, tmp_path / "model.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_outputs()] == ["boxes", "scores", "labels", "masks"]

    def run(images, image_size):
        return session.run(None, {"images": images.numpy(), "image_size": image_size.numpy()})

    assert sum(same_detections(model, run, *case) for case in CASES) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roi": DeformableRoIPool}, "box_head.roi is DeformableRoIPool"),
        ({"roi": RoIPool}, "mask_head.roi is RoIPool"),
        ({"box_head": {"nms": "linear"}}, "box_head.nms is 'linear'"),
        ({"size_divisibility": 32}, "size_divisibility is 32"),
    ],
)
def test_what_cannot_be_exported_is_named(settings, message):
    with pytest.raises(ValueError, match=f"cannot be exported: .*{message}"):
        Exportable(tiny_model(**settings))


def test_canvas_and_name_are_checked(model, tmp_path):
    with pytest.raises(ValueError, match="multiples of 32"):
        export_program(model, (100, 128))
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt2 or \.onnx"):
        export("a.pt", tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"give the size \(height, width\)"):
        export("a.pt", tmp_path / "a.onnx")


# ------------------------------------------------------------------------------------------------------- safetensors


@pytest.fixture(scope="module")
def state():
    """A checkpoint as training writes it."""
    cfg = compose("train", [*(s for s in SMALL if not s.startswith("model/backbone")), "data.root=none"])
    config = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True)
    torch.manual_seed(0)
    model = build(config["model"], "model", num_classes=2)
    names = {"categories": ["cat", "dog"], "category_ids": [3, 9]}
    return {"model": model.state_dict(), "ema": None, "config": config, "iteration": 1, **names}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (90, 128, 3), np.uint8)


def test_safetensors_hold_all_that_inference_needs(state, image, tmp_path, capsys):
    averaged = {k: v * 1.1 if v.is_floating_point() else v for k, v in state["model"].items()}
    checkpoints.save(state | {"ema": averaged}, tmp_path / "run.pt")
    assert main(["export", str(tmp_path / "run.pt"), str(tmp_path / "out.safetensors")]) == 0
    before, after = detector.load(tmp_path / "run.pt"), detector.load(tmp_path / "out.safetensors")
    assert after.categories == ["cat", "dog"] and after.category_ids == [3, 9] and after.config == before.config
    expected, found = before.predict(image), after.predict(image)
    assert len(expected.boxes) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found) if a is not None)
    assert main(["export", str(tmp_path / "missing.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "there is no such checkpoint" in capsys.readouterr().err


def test_other_safetensors_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="without the config of a detector"):
        detector.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-4])
    with pytest.raises(ConfigError, match="cut short or of another format"):
        detector.load(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match="no such file"):
        detector.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_nearly_the_same(state, image, precision):
    model = detector.load(state)
    expected, found = model.predict(image), model.predict(image, precision=precision)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert not torch.equal(expected.scores, found.scores)  # it did run in half precision
    torch.testing.assert_close(found.scores, expected.scores, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        model.predict(image, precision="int8")
