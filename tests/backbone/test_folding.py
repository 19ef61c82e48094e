"""A frozen batch norm folded into its convolution: the same maps and gradients as torchvision's blocks."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from detector.backbone.resnet import ResNet
from detector.ops.layers import FrozenBatchNorm, conv_norm, norm_layer


@pytest.mark.parametrize("norm", ["frozen_batch_norm", "batch_norm"])
def test_resnet_equals_torchvision(norm):
    torch.manual_seed(0)
    theirs = resnet50(norm_layer=norm_layer(norm)).double()
    for name, buffer in theirs.named_buffers():
        if name.endswith(("weight", "running_var")):
            buffer.uniform_(0.2, 0.6)
        elif name.endswith(("bias", "running_mean")):
            buffer.normal_(std=0.1)
    ours = ResNet(50, norm=norm, frozen_stages=0).double()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    expected = []
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        x = layer(x)
        expected.append(x)
    found = ours(images.contiguous(memory_format=torch.channels_last))
    weights = [torch.randn_like(map_) for map_ in expected]
    for maps in (found, expected):
        sum((map_ * weight).sum() for map_, weight in zip(maps, weights)).backward()
    for mine, wanted in zip(found, expected):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-7, atol=1e-9, msg=name)


def test_unfolded_it_is_a_batch_norm_to_the_bit():
    conv, norm, plain = nn.Conv2d(4, 6, 3, bias=False), norm_layer("plain_frozen_batch_norm")(6), nn.BatchNorm2d(6)
    for value in norm.state_dict().values():
        value.uniform_(0.5, 2)
    plain.load_state_dict(norm.state_dict(), strict=False)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(conv_norm(x, conv, norm), plain.eval()(conv(x)))


def test_grouped_dilated_convolution():
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4, bias=False).double()
    norm = FrozenBatchNorm(8).double()
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(conv_norm(x, conv, norm), norm(conv(x)))


def test_keeps_no_folded_weights():
    """For the backward pass the maps and the layer's own weight are kept, not their product with the norm's scale."""
    conv, norm = nn.Conv2d(4, 6, 3, bias=False), FrozenBatchNorm(6)
    norm.weight.uniform_(0.5, 2)
    x, kept = torch.randn(1, 4, 5, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv_norm(x, conv, norm)
    weights = [t for t in kept if t.shape == conv.weight.shape]
    assert len(weights) == 1 and weights[0].data_ptr() == conv.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """Computed in half precision, as convolutions are there, with float32 gradients near the exact ones."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 6, 3, bias=False), FrozenBatchNorm(6)
    norm.weight.uniform_(0.5, 2)
    x, weight = torch.randn(2, 8, 7, 7, requires_grad=True), torch.randn(2, 6, 5, 5)
    grads = []
    for half in (True, False):
        with torch.autocast("cpu", dtype, enabled=half):
            out = conv_norm(x, conv, norm)
        assert out.dtype == (dtype if half else torch.float32)
        grads.append(torch.autograd.grad((out * weight).sum(), (x, conv.weight)))
    for found, exact in zip(*grads):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 3 * torch.finfo(dtype).eps * exact.norm()
