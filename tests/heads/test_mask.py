"""The mask predictor against the plain transposed convolution and 1 x 1 logits of all classes."""

import pytest
import torch

from detector.heads.mask import MaskPredictor
from detector.ops.boxes import of_label


@pytest.mark.parametrize("num_masks", [1, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_predictor_equals_convolutions(num_masks, memory_format):
    torch.manual_seed(0)
    predictor = MaskPredictor(6, 4, num_masks).double()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(7, 6, 3, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    labels = torch.tensor([1, 5, 2, 3, 4, 5, 1])

    every = predictor.mask_logits(predictor.upsample(hidden).relu())
    expected, found = of_label(every, labels), predictor(hidden, labels)
    assert found.shape == (7, 6, 10)
    weight = torch.randn_like(expected)
    inputs = [hidden, *predictor.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    torch.testing.assert_close([found, *gradients], [expected, *wanted])


def test_no_rois():
    assert MaskPredictor(6, 4, 3)(torch.empty(0, 6, 14, 14), torch.empty(0, dtype=torch.long)).shape == (0, 28, 28)
