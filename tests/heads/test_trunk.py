"""What lies between RoI features and predictions."""

import pytest
import torch
import torch.nn.functional as F

from detector.heads.trunk import FCTrunk, RoILinear


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_roi_linear_is_a_linear_layer_on_flattened_features(layout, capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if capability != "AVX512":  # a convolution as large as the map takes ten times as long there
        monkeypatch.setattr(torch.nn.Conv2d, "forward", None)
    torch.manual_seed(0)
    layer = RoILinear(3, (2, 5), 7).to(memory_format=layout)
    features = torch.randn(4, 3, 2, 5).contiguous(memory_format=layout)
    expected = F.linear(features.flatten(1), layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(layer(features), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(features), expected)
        if layout == torch.contiguous_format:
            assert torch.equal(layer(features), expected)
        assert layer(features[:0]).shape == (0, 7)
    assert layer(features[:0]).shape == (0, 7)


def test_roi_linear_takes_flattened_weights():
    layer, other = RoILinear(3, (2, 5), 7), RoILinear(3, (2, 5), 7)
    state = layer.state_dict()
    flat = state | {"weight": state["weight"].flatten(1)}
    other.load_state_dict(flat)
    assert torch.equal(other.weight, layer.weight) and flat["weight"].dim() == 2
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict(state | {"weight": torch.zeros(7, 31)})


def test_trunk_without_layers_flattens():
    trunk = FCTrunk(3, (2, 2), fc_channels=())
    features = torch.randn(4, 3, 2, 2)
    assert trunk.out_channels == 12
    assert torch.equal(trunk(features), features.flatten(1))
