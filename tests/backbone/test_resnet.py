"""ResNet bodies stage by stage, as torchvision builds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from detector.backbone import ResNet

KINDS = [
    (18, resnet.BasicBlock, (2, 2, 2, 2), {}),
    (50, resnet.Bottleneck, (3, 4, 6, 3), {}),
    (50, resnet.Bottleneck, (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    (50, resnet.Bottleneck, (3, 4, 6, 3), {"dilate_last": True}),
]


@pytest.mark.parametrize(("depth", "block", "repeats", "settings"), KINDS)
def test_layers_are_torchvision_s(depth, block, repeats, settings):
    dilate = settings.pop("dilate_last", False)
    theirs = resnet.ResNet(block, repeats, replace_stride_with_dilation=[False, False, dilate], **settings)
    ours = ResNet(depth, norm="batch_norm", frozen_stages=0, dilate_last=dilate, **settings)
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert list(ours.state_dict()) == list(state)
    for (name, mine), (_, wanted) in zip(ours.named_modules(), theirs.named_modules()):
        assert type(mine).__name__ == type(wanted).__name__
        if isinstance(mine, nn.Conv2d) and name != "layer4.0.conv2":  # which torchvision does not dilate
            for key in ("stride", "padding", "dilation", "groups"):
                assert getattr(mine, key) == getattr(wanted, key), (name, key)
    if dilate:
        assert ours.layer4[0].conv2.dilation == ours.layer4[0].conv2.padding == (2, 2)


@pytest.mark.parametrize(("depth", "least"), [(10, 8), (50, 2)])
def test_widths_that_would_overwrite_memory_are_refused(depth, least):
    with pytest.raises(ValueError, match=rf"width={least - 1}: a ResNet-{depth} needs at least {least}\."):
        ResNet(depth, width=least - 1)
    model = ResNet(depth, width=least, norm="batch_norm", frozen_stages=0, stages=[2, 3])
    sum(level.sum() for level in model(torch.rand(2, 3, 64, 64))).backward()
    assert model.conv1.weight.grad.isfinite().all()
