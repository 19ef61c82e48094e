"""Any backbone of timm that gives a map per stage: ConvNeXt, Swin, ... (pip install 'two-stage-detector[timm]').

Dimensions: N images, C channels.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detector.ops.layers import BATCH_NORM, count_once


def known_model(name: str) -> None:
    """Raise ValueError for a name that timm does not have, and where timm is missing."""
    try:
        import timm
    except ImportError as error:
        raise ValueError("the timm backbones need timm: pip install 'two-stage-detector[timm]'") from error
    if not timm.is_model(name):
        family = timm.list_models(f"{name.split('.')[0].split('_')[0]}*")
        close = ", ".join(difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5) or family[:5])
        raise ValueError(f"timm has no model {name!r}" + (f"; it has {close}" if close else ""))
    model, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{model}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ValueError(f"timm publishes no weights {tag!r} of {model}: it has {', '.join(tags) or 'none'}")


def created(name: str, **settings: Any) -> Any:
    """timm's model of that name."""
    import timm

    return timm.create_model(name, **settings)


def knows(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of `state` have the names of timm's model, most of them. Raises ValueError if many have not:
    they are of another size of the model."""
    with torch.device("meta"):
        wanted = created(name).state_dict()
    others = [key for key in state if key not in wanted]
    if 2 * len(others) > len(state):
        return False
    if 10 * len(others) > len(state):
        raise ValueError(f"of another model than {name}, which has no {others[0]} and {len(others) - 1} more")
    return True


def pixels(name: str) -> dict[str, list[float]]:
    """pixel_mean and pixel_std, of values from 0 to 255, that the weights timm publishes were trained with."""
    from timm.models import get_pretrained_cfg

    published = get_pretrained_cfg(name)
    if published is None:
        return {}
    return {f"pixel_{key}": [round(255 * value, 3) for value in getattr(published, key)] for key in ("mean", "std")}


def filled(create: Callable[..., nn.Module], state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of the model that `create` makes, filled with what timm publishes, or with `state`, tensors of a
    file under timm's names, which timm fits to the model. What `state` does not fill is left out. Nothing is drawn.

    Raises ValueError for tensors of other shapes.
    """
    with torch.random.fork_rng(devices=[]):
        if state is None:
            return create(pretrained=True).state_dict()

        def made(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return create(pretrained=True, pretrained_cfg_overlay={"state_dict": dict(tensors)}).state_dict()

        marks = {key: value * torch.nan if value.is_floating_point() else value for key, value in state.items()}
        with quiet(logging.getLogger("timm")):  # the classifier's own layers are in no body
            try:
                found, marked = made(state), made(marks)  # timm leaves what it does not find as it was drawn
            except RuntimeError as error:
                raise ValueError(f"timm's model does not take these weights: {error}") from error
    counters = {key for key, value in found.items() if not value.is_floating_point()}
    return {key: value for key, value in found.items() if key in counters or marked[key].isnan().all()}


@contextlib.contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    """Errors alone."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class TimmBackbone(nn.Module):
    """Feature maps of a timm model.

    Args:
        name: timm's name of the model, for instance 'convnext_tiny.fb_in1k' or 'swin_tiny_patch4_window7_224'.
        strides: of the maps that are returned, finest first.
        image_size: what models with a fixed input size (Swin) are built for; they take other sizes too.
        frozen: train none of its parameters.
        fixed_statistics: batch norms normalise by their running statistics in training too, and leave them as they are.
        drop_path_rate: stochastic depth.
        in_channels: of the images.
        checkpointing: keep only what goes into each block (in some models: each stage) for the backward pass, which
            computes the rest again.

    Attributes: in_channels, out_channels, strides.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (4, 8, 16, 32),
        image_size: int | None = None,
        frozen: bool = False,
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
        checkpointing: bool = False,
        fixed_statistics: bool = False,
    ):
        super().__init__()
        known_model(name)
        self.fixed_statistics = fixed_statistics
        settings: dict[str, Any] = {"features_only": True}
        if in_channels != 3:
            settings["in_chans"] = in_channels
        if drop_path_rate:
            settings["drop_path_rate"] = drop_path_rate
        if "swin" in name:
            settings |= {"strict_img_size": False, **({"img_size": image_size} if image_size else {})}
        reductions = created(name, features_only=True).feature_info.reduction()
        if missing := [stride for stride in strides if stride not in reductions]:
            one = len(set(reductions)) == 1
            hint = "; if it is a plain ViT: backbone@model.backbone=vit neck@model.neck=simple_pyramid" if one else ""
            raise ValueError(f"strides={list(strides)}: {name} has maps at strides {reductions}, not {missing}{hint}")
        settings["out_indices"] = [reductions.index(s) for s in strides]
        self.name, self.in_channels, self.create = name, in_channels, partial(created, name, **settings)
        self.model = self.create()
        self.out_channels, self.strides = self.model.feature_info.channels(), list(strides)
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        if frozen:
            self.requires_grad_(False)
        if checkpointing:
            parts = [part for part in self.model.modules() if hasattr(part, "grad_checkpointing")]
            for part in parts[1:] or parts:  # the first one is the whole, and takes its stages
                part.grad_checkpointing = True
            count_once(self)

    pixels = staticmethod(pixels)

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self.modules() if self.fixed_statistics else ():
            if isinstance(module, BATCH_NORM):
                module.eval()
        return self

    def published(self, name: str) -> dict[str, Tensor]:
        """The weights that timm publishes for this model ('pretrained'), downloaded once. Raises ValueError for another
        name."""
        if name != "pretrained":
            raise ValueError(f"{name!r}: expected 'pretrained', which takes timm's, or the path of a file")
        return {f"model.{key}": value for key, value in filled(partial(self.create, in_chans=3)).items()}

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of a file of timm's model under our keys; None where they are not named as timm names them."""
        if not knows(self.name, state):
            return None
        return {f"model.{key}": value for key, value in filled(partial(self.create, in_chans=3), state).items()}

    def layers(self) -> dict[str, int]:
        """The layer of each parameter, as timm groups them: the stem 0, then block by block."""
        from timm.models import create_model, group_parameters

        with torch.device("meta"):  # the model whose maps these are: timm renames its parts, some of them
            whole = create_model(self.name)
        found = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        known = {key.replace(".", "_"): layer for key, layer in found.items()}
        keys = [key for key, _ in self.named_parameters()]
        return {key: known[re.sub(r"^(model\.)+", "", key).replace(".", "_")] for key in keys}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [N, C, H / stride, W / stride] of images [N, C, H, W]."""
        maps = self.model(images)
        return [m if m.shape[1] == c else m.permute(0, 3, 1, 2) for m, c in zip(maps, self.out_channels)]
