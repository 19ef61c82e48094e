"""Any backbone of timm that gives a map per stage: ConvNeXt, Swin, ... (pip install 'two-stage-detector[timm]').

Dimensions: N images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class TimmBackbone(nn.Module):
    """Feature maps of a timm model.

    Args:
        name: timm's name of the model, for instance 'convnext_tiny.fb_in1k' or 'swin_tiny_patch4_window7_224'.
        weights: 'pretrained' for those that timm has for that name, or None.
        strides: of the maps that are returned, finest first.
        image_size: what models with a fixed input size (Swin) are built for; they take other sizes too.
        frozen: train none of its parameters.
        drop_path_rate: stochastic depth.

    Attributes: out_channels, strides.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        strides: Sequence[int] = (4, 8, 16, 32),
        image_size: int | None = None,
        frozen: bool = False,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ValueError("the timm backbones need timm: pip install 'two-stage-detector[timm]'") from error
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5])
            raise ValueError(f"timm has no model {name!r}" + (f"; it has {close}" if close else ""))
        if weights not in (None, "pretrained"):
            raise ValueError(f"weights={weights!r}: expected 'pretrained' or None")
        settings = {"pretrained": weights is not None, "features_only": True}
        if drop_path_rate:
            settings["drop_path_rate"] = drop_path_rate
        if "swin" in name:
            settings |= {"strict_img_size": False, **({"img_size": image_size} if image_size else {})}
        reductions = timm.create_model(name, features_only=True).feature_info.reduction()
        if missing := [stride for stride in strides if stride not in reductions]:
            raise ValueError(f"strides={list(strides)}: {name} has maps at strides {reductions}, not {missing}")
        self.model = timm.create_model(name, out_indices=[reductions.index(s) for s in strides], **settings)
        self.out_channels, self.strides = self.model.feature_info.channels(), list(strides)
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        if frozen:
            self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [N, C, H / stride, W / stride] of images [N, 3, H, W]."""
        maps = self.model(images)
        return [m if m.shape[1] == c else m.permute(0, 3, 1, 2) for m, c in zip(maps, self.out_channels)]
