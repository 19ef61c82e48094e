"""What must work wherever the model lies: run by test_paper_gpu.py, in a process of its own, on a GPU on paper."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from detector.commands import compare, evaluate, features, predict
from detector.engine.train import forward_backward
from detector.evaluation.results import detections_to_coco
from detector.inference.load import load
from detector.structures import to_device
from tests.paper_gpu import OnGPU
from tests.runs import curve
from tests.test_variants import NAMES, detections, half_empty_input, untrained

OWN_POINTS = {"pointrend_rcnn"}  # draws them for each RoI, padding too


def test_mixing_devices_fails_as_on_a_gpu():
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert isinstance(there, OnGPU) and there.is_cuda and (there + 1).sum().item() == 6
    assert (there * torch.tensor(2)).cpu().tolist() == [2, 2, 2] and there[torch.tensor([0])].is_cuda
    for wrong in (lambda: there + here, lambda: here[there.long()], lambda: there.index_put_((there.long(),), here)):
        with pytest.raises((RuntimeError, IndexError)):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)


@pytest.mark.parametrize("name", NAMES["model"])
def test_losses_and_results_are_the_cpus(name, monkeypatch):
    model = untrained("model", name, monkeypatch).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batch, targets = half_empty_input()
    found, results = {}, {}
    for device in ("cpu", "cuda"):
        model.load_state_dict(state)
        model = model.to(device).train()
        with torch.no_grad():
            losses = model(to_device(batch, device), to_device(targets, device))
        found[device] = {key: loss.item() for key, loss in losses.items()}
        results[device] = detections_to_coco(detections(model, to_device(batch, device)), batch, [1, 2, 3])
    if name not in OWN_POINTS:
        assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3, abs=1e-5)
    assert results["cuda"]
    for cpu, cuda in zip(results["cpu"], results["cuda"]):
        assert cuda["score"] == pytest.approx(cpu["score"], abs=1e-3)


@pytest.fixture
def trained(run):
    return run() / "last.pt"


def test_detections_of_every_kind(trained, shapes_tiny):
    files = sorted((shapes_tiny / "val").glob("*"))[:3]
    on_gpu, on_cpu = load(trained, device="cuda"), load(trained)
    for options in ({}, {"precision": "bf16"}, {"tiles": {"size": 64}}):
        here, there = (one.predict(files, threshold=0.0, **options) for one in (on_cpu, on_gpu))
        assert [len(result.boxes) for result in there] == pytest.approx([len(result.boxes) for result in here], rel=0.2)
        assert not any(result.boxes.is_cuda for result in there)
    boxes = [[10, 10, 60, 60]]
    here, there = (one.region_features(files[0], boxes) for one in (on_cpu, on_gpu))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


def test_programs(trained, shapes_tiny, call, tmp_path):
    given, pictures = [f"checkpoint={trained}", "device=cuda"], shapes_tiny / "val"
    annotations = shapes_tiny / "annotations" / "instances_val.json"
    for main, name, *more in (
        (predict.main, "predictions.json", f"images={pictures}", "threshold=0.01"),
        (
            predict.main,
            "predictions.json",
            f"input={pictures}",
            "track=bytetrack",
            "tracking.appearance=0.5",
        ),
        (evaluate.main, "metrics.json", "workers=0"),
        (evaluate.main, "metrics.json", "workers=0", "flip=true", "scales=[1.0,1.5]"),
        (evaluate.main, "metrics.json", "workers=0", "tiles.size=64"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        code, _, error = call(main, *given, f"output={folder}", *more)
        if "track=bytetrack" in more and find_spec("trackers") is None:
            assert "trackers is not installed" in error
            continue
        assert code == 0, error
        assert json.loads((folder / name).read_text())
    where = [f"annotations={annotations}", f"images={pictures}", f"output={tmp_path / 'features.npz'}"]
    code, _, error = call(features.main, *given, *where)
    assert code == 0, error


def test_a_comparison_probes_where_the_points_go(run, call, tmp_path):
    folder = run("roi=deformable")
    out = tmp_path / "report"
    code, _, error = call(compare.main, f"runs={folder}", "device=cuda", "boundary=false", "workers=0", f"output={out}")
    assert code == 0, error
    assert json.loads((out / "report.json").read_text())


def test_a_training_but_for_its_gradients(run, monkeypatch):
    """Which are zero here: autograd runs on a real GPU alone. Resumed from its checkpoint, with all that looks on."""

    def without_backward(model, *args, **rest):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return forward_backward(model, *args, **rest)

    monkeypatch.setattr("detector.engine.train.forward_backward", without_backward)
    monkeypatch.setattr("torch.Tensor.backward", lambda self: None)
    on_gpu = ["runtime.device=cuda", "evaluation.losses=true", "training.ema_decay=0.9", "runtime.pictures_every=2"]
    folder = run(*on_gpu, "runtime.histograms_every=2", "schedule.max_iterations=4", "evaluation.every=2")
    run(*on_gpu, "runtime.histograms_every=2", "schedule.max_iterations=6", "evaluation.every=2", f"run_dir={folder}")
    assert sorted(curve(folder)) == list(range(1, 7))
