"""Plain vision transformers (Dosovitskiy et al. 2021) of timm, as ViTDet has them (Li et al. 2022, "Exploring Plain
Vision Transformer Backbones for Object Detection"): one map at the stride of the patches, for `necks.SimplePyramid`.

    x = patches + position embedding, resized to the image (bicubic)
    x = x + drop_path(attend(norm1(x)))          x = x + drop_path(mlp(norm2(x)))          in each block

Most blocks may attend within windows of patches only, each window by itself; the map is padded with zeros to whole
windows after norm1, and what is padded takes part as keys, as in detectron2. Class and register tokens stand in every
window; what the windows make of them is averaged.

Dimensions: N images, H x W patches, T class and register tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.backbone.timm import created, filled, known_model, knows, pixels
from detector.ops.layers import checkpointed

PATCHES = (8, 16, 32)  # sides that divide the canvas of a batch


class ViT(nn.Module):
    """The map of a plain ViT of timm.

    Args:
        name: timm's name of the model, for instance 'vit_base_patch16_224.mae', 'vit_small_patch14_reg4_dinov2.lvd142m'
            or 'vit_small_patch16_dinov3.lvd1689m'.
        patch_size: px, the stride of the map: 8, 16 or 32. The patch embedding of published weights is resized to it.
        image_size: px, a multiple of patch_size: side of the square grid that the position embedding is kept for; None
            keeps the model's own grid. Images of all sizes are taken.
        depth: only the first so many blocks; None: all.
        window: side of the windows in patches (ViTDet's 14); None: all blocks attend globally.
        global_blocks: those that attend globally in spite of it; None: the last one of each quarter, as in ViTDet.
        relative_positions: px, what the tables of decomposed relative positions (Li et al. 2021, MViTv2) of global
            blocks are made for, those of other images being interpolated; None: no such tables. They start at zero.
        tokens: keep class and register tokens; ViTDet does not.
        final_norm: the model's own norm after the last block; ViTDet has none.
        drop_path_rate: stochastic depth, rising from 0 to this rate at the last block.
        in_channels: of the images.
        checkpointing: keep only what goes into each block for the backward pass, which computes the rest again.

    Attributes: in_channels, out_channels and strides, of one map.
    """

    def __init__(
        self,
        name: str,
        patch_size: int = 16,
        image_size: int | None = None,
        depth: int | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
        relative_positions: int | None = None,
        tokens: bool = True,
        final_norm: bool = False,
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__()
        known_model(name)
        if patch_size not in PATCHES:
            raise ValueError(f"patch_size={patch_size}: expected one of {', '.join(map(str, PATCHES))}")
        for key, size in (("image_size", image_size), ("relative_positions", relative_positions)):
            if size is not None and (size < patch_size or size % patch_size):
                raise ValueError(f"{key}={size}: expected a multiple of patch_size={patch_size}")
        with torch.device("meta"):
            own = plain(created(name), name)
        side = image_size // patch_size if image_size else own.patch_embed.grid_size[0]
        blocks = len(own.blocks)
        if depth is not None and not 1 <= depth <= blocks:
            raise ValueError(f"depth={depth}: {name} has {blocks} blocks")
        self.settings = {"patch_size": patch_size, "img_size": side * patch_size, "num_classes": 0}
        depths = {} if depth is None else {"depth": depth}
        kept = {"drop_path_rate": drop_path_rate, "in_chans": in_channels, "dynamic_img_size": True, **depths}
        model = created(name, **self.settings, **kept)
        if not final_norm:
            model.norm = nn.Identity()
        elif isinstance(model.norm, nn.Identity):  # of a classifier that averages first
            model.norm = model.fc_norm
        model.head = model.fc_norm = model.attn_pool = None
        self.name, self.in_channels, self.model = name, in_channels, model
        self.out_channels, self.strides = [model.embed_dim], [patch_size]
        if not tokens:
            self.drop_tokens()
        self.global_blocks = global_ones(len(model.blocks), window, global_blocks)
        self.window, self.checkpointing = window, checkpointing
        if relative_positions is not None:
            self.add_tables(relative_positions // patch_size)

    @property
    def tokens(self) -> int:
        """T, how many class and register tokens there are."""
        return self.model.num_prefix_tokens

    @property
    def leading(self) -> int:
        """Rows of the position embedding that are the tokens'."""
        return 0 if self.model.no_embed_class else self.tokens

    def drop_tokens(self) -> None:
        """Go without class and register tokens, and their rows of the position embedding."""
        if self.model.pos_embed is not None:
            self.model.pos_embed = nn.Parameter(self.model.pos_embed.detach()[:, self.leading :].clone())
        self.model.cls_token = self.model.reg_token = None
        self.model.num_prefix_tokens = 0
        for block in self.model.blocks:
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens = 0

    def add_tables(self, side: int) -> None:
        """Give all blocks relative positions; side: of the map that global ones are made for."""
        if self.tokens:
            raise ValueError("relative_positions: class and register tokens have no place in a map: set tokens=false")
        for i, block in enumerate(self.model.blocks):
            block.attn = RelativeAttention(block.attn, side if i in self.global_blocks else self.window or side)

    pixels = staticmethod(pixels)

    def published(self, name: str) -> dict[str, Tensor]:
        """The weights that timm publishes for this model ('pretrained'), downloaded once, its patch and position
        embeddings resized to this one's. Raises ValueError for another name."""
        if name != "pretrained":
            raise ValueError(f"{name!r}: expected 'pretrained', which takes timm's, or the path of a file")
        return self.fitted(filled(partial(created, self.name, **self.settings)))

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Likewise the tensors of a file of timm's model; None where they are not named as timm names them."""
        if not knows(self.name, state):
            return None
        return self.fitted(filled(partial(created, self.name, **self.settings), state))

    def fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this model takes of those of timm's, under its own keys."""
        wanted = self.model.state_dict()
        if "norm.weight" not in state:
            state |= {key.removeprefix("fc_"): value for key, value in state.items() if key.startswith("fc_norm.")}
        if "pos_embed" in wanted and "pos_embed" in state:  # the last rows are the grid's
            state["pos_embed"] = state["pos_embed"][:, -wanted["pos_embed"].shape[1] :]
        return {f"model.{key}": value for key, value in state.items() if key in wanted}

    def layers(self) -> dict[str, int]:
        """The layer of each parameter, as timm groups them: the embeddings 0, then block by block."""
        from timm.models import group_parameters

        found = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        return {f"model.{key}": layer for key, layer in found.items()}

    def forward(self, images: Tensor) -> list[Tensor]:
        """The map [N, C, H, W] of images [N, in_channels, H patch_size, W patch_size], as a list of one."""
        x, rope = self.embed(self.model.patch_embed(images))
        grid = images.shape[2] // self.strides[0], images.shape[3] // self.strides[0]
        for i, block in enumerate(self.model.blocks):
            window = None if i in self.global_blocks else self.window
            mix = partial(attend, block.attn, grid=grid, rope=rope, window=window, tokens=self.tokens)
            x = checkpointed(transformed, block, x, mix) if self.checkpointing else transformed(block, x, mix)
        x = self.model.norm(x)[:, self.tokens :]
        return [x.unflatten(1, grid).permute(0, 3, 1, 2)]

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens and patches [N, T + H W, C] of patches [N, H, W, C], and the angles of rotary positions [H W, D]."""
        grid, position = x.shape[1:3], self.model.pos_embed
        x = x.flatten(1, 2)
        if position is not None:
            x = x + resized(position[:, self.leading :], grid)
        tokens = [token for token in (self.model.cls_token, self.model.reg_token) if token is not None]
        if tokens:
            first = torch.cat(tokens, dim=1)
            if position is not None and self.leading:
                first = first + position[:, : self.leading]
            x = torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)
        rope = getattr(self.model, "rope", None)
        return self.model.norm_pre(x), None if rope is None else rope.get_embed(shape=list(grid))


def plain(model: nn.Module, name: str) -> Any:
    """The model, if this file knows its parts; else ValueError."""
    from timm.models.eva import Eva, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    kinds = {type(block).__name__ for block in getattr(model, "blocks", [])}
    known = type(model) in (VisionTransformer, Eva) and kinds <= {Block.__name__, EvaBlock.__name__}
    if known and not getattr(model, "rope_mixed", False) and hasattr(model.patch_embed, "grid_size"):
        return model
    raise ValueError(
        f"{name} is no plain ViT that can be taken apart here, but a {type(model).__name__}: take one of timm's vit_*, "
        "deit_* or eva02_*; models with maps at several strides are backbone@model.backbone=timm"
    )


def global_ones(blocks: int, window: int | None, chosen: Sequence[int] | None) -> list[int]:
    """Which of so many blocks attend globally."""
    if window is None:
        if chosen is not None:
            raise ValueError(f"global_blocks={list(chosen)}: without a window all are global")
        return list(range(blocks))
    if window < 2:
        raise ValueError(f"window={window}: expected at least 2 patches")
    if chosen is None:
        return sorted({-(-blocks * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
    if wrong := [i for i in chosen if not 0 <= i < blocks]:
        raise ValueError(f"global_blocks={list(chosen)}: {wrong[0]} is none of the {blocks} blocks 0 to {blocks - 1}")
    return sorted(set(chosen))


def transformed(block: Any, x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """A block of timm's with other attention: [N, L, C] of x [N, L, C]."""
    x = x + block.drop_path1(scaled(block, 1, mix(block.norm1(x))))
    return x + block.drop_path2(scaled(block, 2, block.mlp(block.norm2(x))))


def scaled(block: Any, branch: int, x: Tensor) -> Tensor:
    """Layer scale, where the block has it: a module in ViTs, a vector in EVAs."""
    if hasattr(block, "ls1"):
        return getattr(block, f"ls{branch}")(x)
    gamma = getattr(block, f"gamma_{branch}")
    return x if gamma is None else gamma * x


def attend(
    attention: nn.Module,
    x: Tensor,
    grid: tuple[int, int],
    rope: Tensor | None,
    window: int | None,
    tokens: int,
) -> Tensor:
    """Attention among the T tokens and the patches of the grid, x [N, T + H W, C], or within windows of patches."""
    if window is None:
        return attended(attention, x, grid, rope)
    images = x.shape[0]
    patches = to_windows(to_whole(x[:, tokens:].unflatten(1, grid), window), window)
    count = patches.shape[0] // images
    if tokens:
        patches = torch.cat([x[:, :tokens].repeat_interleave(count, dim=0), patches], dim=1)
    if rope is not None:
        rope = to_windows(to_whole(rope.view(1, *grid, -1), window), window).repeat(images, 1, 1)[:, None]
    found = attended(attention, patches, (window, window), rope)
    x = from_windows(found[:, tokens:], window, grid, images).flatten(1, 2)
    if tokens:
        x = torch.cat([found[:, :tokens].unflatten(0, (images, count)).mean(dim=1), x], dim=1)
    return x


def attended(attention: nn.Module, x: Tensor, grid: tuple[int, int], rope: Tensor | None) -> Tensor:
    if isinstance(attention, RelativeAttention):
        return attention(x, grid)
    return attention(x) if rope is None else attention(x, rope=rope)


def to_whole(x: Tensor, side: int) -> Tensor:
    """A map [N, H, W, C] padded with zeros below and to the right to whole windows."""
    rows, columns = ((length + side - 1) // side * side - length for length in x.shape[1:3])
    if torch.compiler.is_exporting() or rows or columns:  # a program does not know whether there is something to pad
        x = F.pad(x, (0, 0, 0, columns, 0, rows))
    return x


def to_windows(x: Tensor, side: int) -> Tensor:
    """[N windows, side side, C], row by row, of a map [N, H, W, C] of whole windows."""
    x = x.unflatten(2, (x.shape[2] // side, side)).unflatten(1, (x.shape[1] // side, side))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, side: int, grid: tuple[int, int], images: int) -> Tensor:
    """The map [N, H, W, C] whose `to_windows` is x."""
    rows, columns = ((length + side - 1) // side for length in grid)  # ONNX divides negative numbers in another way
    x = x.unflatten(1, (side, side)).unflatten(0, (images, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]


def resized(position: Tensor, grid: Sequence[int]) -> Tensor:
    """A position embedding [1, S S, C] of a square, for another grid: [1, H W, C]."""
    side = round(position.shape[1] ** 0.5)
    if not torch.compiler.is_exporting() and (side, side) == tuple(grid):
        return position
    square = position.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


class RelativeAttention(nn.Module):
    """Attention whose logits get, for a query q at (i, j) and a key at (k, l), the terms q . h_{i-k} + q . w_{j-l}.

    Args:
        attention: timm's, whose layers it takes over.
        side: of the square map that the tables h and w [2 side - 1, C / heads] are for; others interpolate them.
    """

    def __init__(self, attention: Any, side: int):
        super().__init__()
        if type(attention).__name__ != "Attention" or not isinstance(attention.q_norm, nn.Identity):
            raise ValueError(f"relative_positions: not with the attention of this model, {type(attention).__name__}")
        self.qkv, self.proj, self.heads = attention.qkv, attention.proj, attention.num_heads
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, attention.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, attention.head_dim))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, H W, C] of x [N, H W, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, H W, C / heads]
        on_grid = q.unflatten(2, grid)
        down = torch.einsum("nhijc,ikc->nhijk", on_grid, table(self.rel_pos_h, grid[0]))
        right = torch.einsum("nhijc,jlc->nhijl", on_grid, table(self.rel_pos_w, grid[1]))
        bias = (down[..., :, None] + right[..., None, :]).flatten(4).flatten(2, 3)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))


def table(relative: Tensor, length: int) -> Tensor:
    """[length, length, C]: row (query, key) of a table [2 S - 1, C], interpolated to 2 length - 1 rows."""
    if torch.compiler.is_exporting() or len(relative) != 2 * length - 1:
        relative = F.interpolate(relative.T[None], size=2 * length - 1, mode="linear")[0].T
    place = torch.arange(length, device=relative.device)
    return relative[place[:, None] - place + length - 1]
