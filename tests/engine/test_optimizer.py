"""Parameter groups, learning-rate scaling and the moving average."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import nn

from detector.backbone import TimmBackbone, ViT
from detector.config import ConfigError
from detector.engine.optimizer import EMA, build_optimizer, parameter_groups
from detector.roi import DeformableRoIPool
from detector.settings import Training
from tests.tiny import tiny_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.head = nn.ModuleDict({"offset_predictor": nn.Linear(4, 2), "linear": nn.Linear(4, 2)})
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_groups():
    net = Net()
    training = Training(lr_multipliers={"backbone": 0.5, "offset_predictor": 0.1})
    found = by_name(net, parameter_groups(net, 1.0, 0.01, training))
    assert found == {
        "backbone.0.weight": (0.5, 0.01),
        "backbone.0.bias": (0.5, 0.0),
        **{f"backbone.{i}.{name}": (0.5, 0.0) for i in (1, 2) for name in ("weight", "bias")},
        "head.offset_predictor.weight": (0.1, 0.01),
        "head.offset_predictor.bias": (0.1, 0.0),
        "head.linear.weight": (1.0, 0.01),
        "head.linear.bias": (1.0, 0.0),
    }


@pytest.mark.parametrize(("norms", "biases"), [(True, False), (False, True), (True, True)])
def test_decay_of_norms_and_biases_by_choice(norms, biases):
    net = Net()
    found = by_name(net, parameter_groups(net, 1.0, 0.01, Training(decay_norms=norms, decay_biases=biases)))
    assert found["backbone.1.weight"][1] == found["backbone.2.bias"][1] == (0.01 if norms else 0.0)
    assert found["head.linear.bias"][1] == (0.01 if biases else 0.0)


def test_offset_predictors_of_the_real_model():
    roi = partial(DeformableRoIPool, predictor_width=8)
    model = tiny_model(roi=roi)
    training = Training(lr_multipliers={"offset_predictor": 0.1, "backbone": 1.0})
    found = by_name(model, parameter_groups(model, 1.0, 0.01, training))
    slow = {name for name, (lr, _) in found.items() if lr == 0.1}
    assert slow == {name for name in found if ".offset_predictor." in name}
    assert slow
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_multiplier_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"training\.lr_multipliers\.bakbone"):
        parameter_groups(Net(), 1.0, 0.0, Training(lr_multipliers={"bakbone": 0.1}))
    parameter_groups(nn.Linear(1, 1), 1.0, 0.0, Training(lr_multipliers={"offset_predictor": 0.1}))


@pytest.mark.parametrize(("reference", "expected"), [(16, 0.02 * 4 / 16), (None, 0.02)])
def test_learning_rate_scales_with_the_batch(reference, expected):
    factory = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-4)
    optimizer = build_optimizer(factory, Net(), Training(batch_size=4, reference_batch=reference))
    assert {group["lr"] for group in optimizer.param_groups} == {expected}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 1e-4}


def test_impossible_optimisers():
    with pytest.raises(ConfigError, match="optimizer: Invalid learning rate: -"):
        build_optimizer(partial(torch.optim.SGD, lr=-1.0), Net(), Training())
    with pytest.raises(ConfigError, match="no trainable parameters"):
        build_optimizer(partial(torch.optim.SGD, lr=1.0), Net().requires_grad_(False), Training())


def test_ema_follows_its_formula():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.9)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for t in range(200):
        for value in model.state_dict().values():
            value.copy_(torch.rand_like(value) if value.is_floating_point() else value + 1)
        ema.update(model, t)
        decay = min(0.9, (1 + t) / (10 + t))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value.clone()
    for key, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize(
    ("name", "strides"),
    [("test_vit", [16]), ("swin_tiny_patch4_window7_224", [4, 8, 16, 32]), ("convnext_atto", [4, 8, 16, 32])],
)
def test_layer_decay_is_timms(name, strides):
    """Each layer of the backbone learns at timm's own scale, whatever timm calls its parts in maps of features."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": TimmBackbone(name, strides), "neck": nn.Linear(4, 4)})
        whole = timm.create_model(name)
    theirs = {}
    for group in importlib.import_module("timm.optim").param_groups_layer_decay(whole, layer_decay=0.7):
        theirs |= {id(p): group["lr_scale"] for p in group["params"]}
    expected = {key.replace(".", "_"): theirs[id(p)] for key, p in whole.named_parameters()}
    found = by_name(model, parameter_groups(model, 1.0, 0.05, Training(layer_decay=0.7)))
    scales = {  # of timm's, as far as the backbone goes: the last layer that it has learns at 0.7
        key: expected[key.removeprefix("backbone.model.").removeprefix("model.").replace(".", "_")]
        for key in found
        if key.startswith("backbone.")
    }
    last = max(scales.values())
    for key, (lr, _) in found.items():
        assert lr == pytest.approx(0.7 * scales[key] / last if key in scales else 1.0), key
    assert len({round(lr, 6) for lr, _ in found.values()}) >= 3
    slower = by_name(
        model, parameter_groups(model, 1.0, 0.05, Training(layer_decay=0.7, lr_multipliers={"backbone": 0.1}))
    )
    assert all(slower[key][0] == pytest.approx(lr * (0.1 if key[0] == "b" else 1)) for key, (lr, _) in found.items())


@pytest.mark.parametrize(("depth", "decay"), [(3, 0.7), (6, 0.9)])
def test_layer_decay_is_vitdets(depth, decay):
    """Their rule: decay ^ (blocks + 1 - layer), where the embeddings are layer 0, block i layer i + 1, the rest last.
    Position embeddings have no weight decay."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        body = ViT("test_vit", depth=depth, tokens=False, relative_positions=96)
        model = nn.ModuleDict({"backbone": body, "neck": nn.Linear(4, 4)})
    found = by_name(model, parameter_groups(model, 1.0, 0.1, Training(layer_decay=decay, decay_biases=True)))
    for name, (lr, weight_decay) in found.items():
        layer = depth + 1
        if name.startswith("backbone"):
            layer = int(name.split(".")[3]) + 1 if ".blocks." in name else 0
        assert lr == pytest.approx(decay ** (depth + 1 - layer)), name
        assert weight_decay == (0.0 if ".norm" in name or "pos_embed" in name else 0.1), name
    assert f"backbone.model.blocks.{depth - 1}.attn.rel_pos_h" in found and len(found) > 10 * depth
