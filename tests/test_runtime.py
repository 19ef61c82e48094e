"""Which precision a run computes in where it is left to the machine."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from detector import checkpoint
from detector.config import CONFIGS, compose
from detector.runtime import autocast, chosen_precision, data_workers
from tests.tiny import random_batch, tiny_model

CPU = torch.device("cpu")


def on(monkeypatch, **capabilities: bool) -> None:
    """A processor that can do this."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_auto_is_bf16_where_the_processor_multiplies_in_it(monkeypatch, unit):
    on(monkeypatch, avx2=True, **{unit: True})
    assert chosen_precision(CPU, "auto") == "bf16"
    assert chosen_precision(CPU, "fp32") == "fp32"  # whoever names one gets it
    assert chosen_precision(torch.device("mps"), "auto") == "fp32"
    with autocast(CPU, "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_auto_is_fp32_elsewhere(monkeypatch):
    on(monkeypatch, avx2=True, avx512_f=True, avx512_bf16=False)
    assert chosen_precision(CPU, "auto") == "fp32"
    assert chosen_precision(CPU, "bf16") == "bf16"
    with autocast(CPU, "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before PyTorch told
    assert chosen_precision(CPU, "auto") == "fp32"


@pytest.mark.parametrize("able", [False, True])
def test_auto_asks_the_gpu(monkeypatch, able):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or able)
    assert chosen_precision(torch.device("cuda:0"), "auto") == ("bf16" if able else "fp32")
    assert asked == [{"including_emulation": False}]


def test_recipes_of_papers_and_comparisons_stay_in_float32():
    files = [(path.stem, OmegaConf.load(path)) for path in (CONFIGS / "experiment").glob("*.yaml")]
    named = {name: OmegaConf.select(cfg, "runtime.precision") for name, cfg in files}
    assert {name for name, wanted in named.items() if wanted == "auto"} == {"small", "finetune", "finetune_small"}
    small = {"small", "quickstart", "mask_rcnn_nuclei"}  # what the comparisons build on
    over = {name for name, cfg in files if "ablation" in name and small & {*cfg.defaults}}
    assert over and {named[name] for name in over} == {"fp32"}
    assert compose("train", []).runtime.precision == "auto"  # the quickstart
    assert compose("train", ["experiment=mask_rcnn_r50_fpn_1x"]).runtime.precision == "fp32"


def test_a_run_in_bf16_keeps_weights_and_optimiser_in_float32(monkeypatch, run):
    on(monkeypatch, avx512_bf16=True)
    folder = run("runtime.precision=auto", "schedule.max_iterations=2", "schedule.warmup=0")
    assert "cpu, bf16 (runtime.precision=auto), 1 threads" in (folder / "train.log").read_text(encoding="utf-8")
    saved = checkpoint.load(folder / "last.pt")
    tensors = [*saved["model"].values()]
    for state in saved["optimizer"]["state"].values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


def test_losses_and_boxes_stay_in_float32():
    model, (batch, targets) = tiny_model(), random_batch()
    with autocast(CPU, "bf16"):
        assert {loss.dtype for loss in model.train()(batch, targets).values()} == {torch.float32}
        found = model.eval()(batch)
    assert found.boxes.dtype == found.scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "expected"),
    [("cpu", 2, 1, 0), ("cpu", 4, 1, 2), ("cpu", 4, 2, 0), ("cpu", 1, 2, 0), ("cuda", 2, 1, 2), ("cuda", 16, 8, 2)],
)
def test_data_workers_take_no_core_from_the_few_that_compute(monkeypatch, device, cores, ranks, expected):
    monkeypatch.setattr("detector.runtime.cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert data_workers(torch.device(device), "auto") == expected
    assert data_workers(torch.device(device), 3) == 3
