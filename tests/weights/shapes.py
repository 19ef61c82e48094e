"""Layouts of published detectors in small, by the frameworks' own keys, and weights for them that all matter."""

from __future__ import annotations

import torch

LIVELY = ("cls_score.weight", "fc_cls.weight", "mask_head.predictor.weight", "conv_logits.weight")


class Shapes(dict[str, list[int]]):
    """The shape of each tensor of a checkpoint."""

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = [*shape]
        if bias:
            self[f"{name}.bias"] = [shape[0]]

    def batch_norm(self, name: str, channels: int) -> None:
        self.layer(name, channels)
        self |= {f"{name}.running_mean": [channels], f"{name}.running_var": [channels]}

    def unit(self, name: str, *shape: int, norm: str = "") -> None:
        """A convolution with a bias, or with a norm: 'layer' or 'batch'."""
        self.layer(name, *shape, bias=not norm)
        if norm:
            (self.batch_norm if norm == "batch" else self.layer)(f"{name}.norm", shape[0])


def detectron2_fpn(keys: Shapes, channels: list[int], wide: int, norm: str = "") -> None:
    for level, entering in enumerate(channels, 2):
        keys.unit(f"backbone.fpn_lateral{level}", wide, entering, 1, 1, norm=norm)
        keys.unit(f"backbone.fpn_output{level}", wide, wide, 3, 3, norm=norm)


def detectron2_heads(keys: Shapes, wide: int, norm: str, cascade: bool = False) -> None:
    """Two RPN convolutions, 4conv1fc box heads, and a mask head, as in its lazy configs since 2021."""
    for i in range(2):
        keys.layer(f"proposal_generator.rpn_head.conv.conv{i}", wide, wide, 3, 3)
    keys.layer("proposal_generator.rpn_head.objectness_logits", 3, wide, 1, 1)
    keys.layer("proposal_generator.rpn_head.anchor_deltas", 12, wide, 1, 1)
    for stage in [f".{k}" for k in range(3)] if cascade else [""]:
        for i in range(4):
            keys.unit(f"roi_heads.box_head{stage}.conv{i + 1}", wide, wide, 3, 3, norm=norm)
        keys.layer(f"roi_heads.box_head{stage}.fc1", 4 * wide, wide * 49)
        keys.layer(f"roi_heads.box_predictor{stage}.cls_score", 81, 4 * wide)
        keys.layer(f"roi_heads.box_predictor{stage}.bbox_pred", 4 if cascade else 320, 4 * wide)
    for i in range(4):
        keys.unit(f"roi_heads.mask_head.mask_fcn{i + 1}", wide, wide, 3, 3, norm=norm)
    keys |= {"roi_heads.mask_head.deconv.weight": [wide, wide, 2, 2], "roi_heads.mask_head.deconv.bias": [wide]}
    keys.layer("roi_heads.mask_head.predictor", 80, wide, 1, 1)


def mmdet_heads(keys: Shapes, channels: list[int], wide: int, cascade: bool = False) -> None:
    """FPN, RPN, two linear layers for boxes and, but for a cascade, a mask head, as in mmdetection's base configs."""
    for i, entering in enumerate(channels):
        keys.layer(f"neck.lateral_convs.{i}.conv", wide, entering, 1, 1)
        keys.layer(f"neck.fpn_convs.{i}.conv", wide, wide, 3, 3)
    keys.layer("rpn_head.rpn_conv", wide, wide, 3, 3)
    keys.layer("rpn_head.rpn_cls", 3, wide, 1, 1)
    keys.layer("rpn_head.rpn_reg", 12, wide, 1, 1)
    for stage in [f".{k}" for k in range(3)] if cascade else [""]:
        head = f"roi_head.bbox_head{stage}"
        keys.layer(f"{head}.shared_fcs.0", 4 * wide, wide * 49)
        keys.layer(f"{head}.shared_fcs.1", 4 * wide, 4 * wide)
        keys.layer(f"{head}.fc_cls", 81, 4 * wide)
        keys.layer(f"{head}.fc_reg", 4 if cascade else 320, 4 * wide)
    if not cascade:
        for i in range(4):
            keys.layer(f"roi_head.mask_head.convs.{i}.conv", wide, wide, 3, 3)
        mask = "roi_head.mask_head."
        keys |= {f"{mask}upsample.weight": [wide, wide, 2, 2], f"{mask}upsample.bias": [wide]}
        keys.layer(f"{mask}conv_logits", 80, wide, 1, 1)


def weights(shapes: dict[str, list[int]], gain: float = 1.5) -> dict[str, torch.Tensor]:
    """Random tensors of these shapes. gain: how much larger than what goes in the results of a layer are."""
    generator, found = torch.Generator().manual_seed(0), {}
    for key, shape in shapes.items():
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        value = torch.randn(shape, generator=generator)
        if "rel_pos" in key or "pos_embed" in key or "position_bias" in key:
            found[key] = 0.3 * value
        elif key.endswith("running_var"):
            found[key] = 1 + 0.1 * value.abs()
        else:
            found[key] = value * (gain / fan**0.5) * (3 if key.endswith(LIVELY) else 1)
            found[key] += len(shape) == 1 and key.endswith(".weight")  # of norms
    return found
