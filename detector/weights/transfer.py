"""From a state dict under our names to a model: what is kept, what starts anew, what is left, and what is refused.

A part is what a key begins with: backbone, neck, rpn, box_head, mask_head, keypoint_head, extra_heads. Predictors keep
the rows of the classes that both have, by name:
    class_logits [K + 1, ...], the background first;  box_deltas [4 K, ...];  mask_logits, mask_iou [K, ...]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detector.ops.text import few
from detector.weights.categories import UNUSED
from detector.weights.presets import has

# of batch norms, frozen ones have none and nothing depends on it; and of a run's own RoIs by class, in losses.Seesaw
COUNTER = ("num_batches_tracked", "class_loss.seen")
BODY = ("backbone.", "box_head.trunk.layer4.")  # what a classifier's weights fill: the latter in C4 models
OFFSETS = ".conv2.offset."  # of deformable convolutions: no classifier has them
# what depends on classes and keypoints
PREDICTOR = (
    r"(?:(?:box|mask|keypoint)_head\.(?:stages\.\d+\.)?predictor\.|mask_head\.scorer\.(?=mask_iou\.)"
    r"|mask_head\.coarse\.(?=mask_logits\.)|mask_head\.points\.)"
)
# rows of a class; before the first
PER_CLASS = {"class_logits": (1, 1), "box_deltas": (4, 0), "mask_logits": (1, 0), "mask_iou": (1, 0)}
PARTS = ("backbone", "neck", "rpn", "box_head", "mask_head", "keypoint_head", "extra_heads")
HEADS = PARTS[3:]  # a model may have them or not
KINDS = ("missing", "not of this model", "of another shape")


class WrongShape(NamedTuple):
    key: str
    given: tuple[int, ...]
    expected: tuple[int, ...]  # the model's

    def __str__(self) -> str:
        return f"{self.key}: {self.given}, expected {self.expected}"


class Misfit(NamedTuple):
    """How a state dict differs from a model's."""

    missing: list[str]
    extra: list[str]
    shapes: list[WrongShape]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        return "; ".join(f"{len(keys)} {kind}: {', '.join(map(str, keys))}" for kind, keys in zip(KINDS, self) if keys)

    def where(self, wanted) -> Misfit:
        """Only the keys of which `wanted(key)` is true."""
        keys = ([key for key in keys if wanted(key)] for keys in (self.missing, self.extra))
        return Misfit(*keys, [wrong for wrong in self.shapes if wanted(wrong.key)])


class Classes(NamedTuple):
    """Names of the classes 1..K of the weights and of the model; rows are copied from one to the other by name."""

    theirs: Sequence[str]
    ours: Sequence[str]

    @property
    def kept(self) -> list[str]:
        return [name for name in self.ours if name in self.theirs]

    @property
    def new(self) -> list[str]:
        return [name for name in self.ours if name not in self.theirs]

    @property
    def left(self) -> list[str]:
        return [name for name in self.theirs if name not in self.ours and not re.fullmatch(UNUSED, name)]

    def layout(self, key: str, given: Tensor, own: Tensor) -> tuple[int, int] | None:
        """Rows of a class, and rows before the first, of a predictor's tensor; None where rows are not of classes."""
        found = re.fullmatch(rf"{PREDICTOR}({'|'.join(PER_CLASS)})\.\w+", key)
        if found is None or given.shape[1:] != own.shape[1:]:
            return None
        each, first = PER_CLASS[found[1]]
        sizes = tuple(first + each * len(names) for names in self)
        return (each, first) if (len(given), len(own)) == sizes else None

    def rows(self, given: Tensor, own: Tensor, each: int, first: int) -> Tensor:
        """`own` with the rows of the classes that both have from `given`, and what stands before the first."""
        places = [(self.theirs.index(name), self.ours.index(name)) for name in self.kept]
        source, target = (
            torch.tensor([*range(first), *(first + each * i + row for i in side for row in range(each))])
            for side in zip(*places)
        )
        return own.index_copy(0, target, given[source].to(own))


@dataclass
class Kept:
    """What `load_into` did: keys of tensors. `str` is a table by part, with the names of classes."""

    kept: list[str] = field(default_factory=list)  # as they are
    rows: list[str] = field(default_factory=list)  # the rows of shared classes, those of new ones starting anew
    anew: list[str] = field(default_factory=list)  # the model's, as initialised
    left: list[str] = field(default_factory=list)  # the weights', which the model has no place for
    classes: Classes | None = None  # None: the weights or the model name none, or have no predictor of them

    def after(self, before: Kept) -> Kept:
        """The same where `before` had filled the model already: what it kept does not start anew."""
        filled = {*before.kept, *before.rows}
        return Kept(
            self.kept + [key for key in self.anew if key in filled],
            self.rows,
            [key for key in self.anew if key not in filled],
            self.left,
            self.classes,
        )

    def __bool__(self) -> bool:
        """Whether all was kept and nothing left."""
        return not (self.rows or self.anew or self.left)

    def __str__(self) -> str:
        columns = {"kept": self.kept, "by class": self.rows, "anew": self.anew, "left": self.left}
        found = {part_of(key) for keys in columns.values() for key in keys}
        lines = [f"{'':14}" + "".join(f"{name:>10}" for name in columns) + "   tensors"]
        for part in [*(p for p in PARTS if p in found), *sorted(found - {*PARTS})]:
            here = {name: [key for key in keys if part_of(key) == part] for name, keys in columns.items()}
            counts = "".join(f"{len(keys) or '-':>10}" for keys in here.values())
            lines.append(f"{part:14}{counts}   {'; '.join(remarks(here))}".rstrip())
        if self.classes is not None:
            groups = (self.classes.kept, "kept", 20), (self.classes.new, "new", 20), (self.classes.left, "left", 3)
            told = "; ".join(f"{len(names)} {what}: {few(names, most)}" for names, what, most in groups if names)
            lines.append(f"{'classes':14}{told}")
        return "\n".join(lines)


def remarks(here: Mapping[str, list[str]]) -> Iterator[str]:
    """Which layers of a part start anew or are left, unless all or none of it."""
    for what in ("anew", "left"):
        others = any(keys for name, keys in here.items() if name != what)
        if here[what] and others:
            layers = dict.fromkeys(key.partition(".")[2].rpartition(".")[0] for key in here[what])
            yield f"{what}: {few(list(layers), 4)}"


def part_of(key: str) -> str:
    return key.partition(".")[0]


def misfit(model: nn.Module, state: Mapping[str, Tensor]) -> Misfit:
    """Compare names and shapes with the model's; batch norm's counters count for nothing."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith(COUNTER)]
    extra = [key for key in state if key not in wanted and not key.endswith(COUNTER)]
    shapes = [
        WrongShape(key, tuple(state[key].shape), tuple(wanted[key].shape))
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape and not is_flat(state[key], wanted[key])
    ]
    return Misfit(missing, extra, shapes)


def is_flat(value: Tensor, wanted: Tensor) -> bool:
    """Whether `value` [out, C h w] is the weight of a fully connected layer on RoIs, wanted as [out, C, h, w]."""
    return value.dim() == 2 and wanted.dim() == 4 and value.shape == wanted.flatten(1).shape


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    strict: bool = True,
    reset_heads: bool = False,
    theirs: Sequence[str] | None = None,
    ours: Sequence[str] | None = None,
) -> Kept:
    """Load weights under our names into a model.

    Args:
        strict: a part that both have must fit: each of its tensors must be in the weights with the model's shape, the
            weights must have no other, and each class of the model must be among theirs, in whatever order and beside
            whatever others. A box, mask or keypoint head that only one of them has is no misfit: it starts anew, or is
            left. False keeps what fits, tensor by tensor and class by class, between a single head and a cascade too.
        reset_heads: predictors need not fit: they keep the rows of the classes that both have, and all else in them
            starts anew. The rest is as strict as ever.
        theirs, ours: names of the classes of the weights and of the model. None where they are not known: rows are then
            taken as they stand, if there are as many.

    Weights of keys `backbone.` alone, a classifier's, fill the backbone and leave the rest as it is. Stage 5 of a
    ResNet goes to where the model has it: the backbone, or the box head of a C4 model.
    Returns what was kept and what not. Raises ValueError listing the keys and classes that do not fit, and the ways
    out.
    """
    wanted = model.state_dict()
    state = placed({key: value for key, value in state.items() if not key.endswith(COUNTER[1])}, wanted, strict)
    found, classes = misfit(model, state), shared(state, wanted, theirs, ours)
    if is_body(state):
        missing = [key for key in found.missing if key.startswith(BODY) and OFFSETS not in key]
        found = found._replace(missing=missing)
    unfit = {wrong.key for wrong in found.shapes}
    done, values = Kept(left=found.extra, classes=classes), {}
    for key, own in wanted.items():
        layout = classes.layout(key, state[key], own) if classes and key in state else None
        if classes and layout and classes.kept:  # else not even the background's row is worth anything
            values[key] = classes.rows(state[key], own, *layout)
            (done.rows if classes.new else done.kept).append(key)
        elif key in state and key not in unfit and not layout:
            values[key] = state[key]
            done.kept.append(key)
        elif not key.endswith(COUNTER):
            done.anew.append(key)
    if strict:
        refuse(found, done, wanted, state, reset_heads)
    model.load_state_dict(values, strict=False)
    return done


def is_body(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights are a classifier's: a body alone."""
    return all(key.startswith(BODY) for key in state)


def shared(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], theirs: Sequence[str] | None, ours: Sequence[str] | None
) -> Classes | None:
    """The names, where both are known and both the weights and the model have predictors of classes."""
    predict = all(any(re.match(rf"{PREDICTOR}class_logits\.", key) for key in keys) for keys in (state, wanted))
    return Classes(list(theirs), list(ours)) if theirs is not None and ours is not None and predict else None


def refuse(
    found: Misfit, done: Kept, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], reset_heads: bool
) -> None:
    """Raise ValueError if a part that both have does not fit, see `load_into`."""
    by_name = {*done.kept}  # rows that were found by name fit, whatever the shape
    both = {part for part in HEADS if has(wanted, f"{part}.") and has(state, f"{part}.")}
    serious = found.where(
        lambda key: (
            key not in by_name
            and (part_of(key) in both or part_of(key) not in HEADS)
            and not (reset_heads and re.match(PREDICTOR, key))
        )
    )
    theirs, new = (done.classes.theirs, done.classes.new) if done.classes and not reset_heads else ([], [])
    if not serious and not new:
        return
    reasons = [str(serious)] if serious else []
    if new:
        reasons.append(f"{len(new)} classes that they lack: {few(new, 10)}; they have {few(theirs, 10)}")
    ways = ["weights.strict=false keeps what fits and starts the rest anew"]
    if not serious.where(lambda key: not re.match(PREDICTOR, key)):
        ways.insert(0, "weights.reset_heads=true keeps the rows of the classes that both have and starts others anew")
    raise ValueError(
        f"weights do not fit the model: is it the one that they are of? {', '.join(ways)}. {'; '.join(reasons)}"
    )


def placed(state: dict[str, Tensor], wanted: Mapping[str, Tensor], strict: bool = True) -> dict[str, Tensor]:
    """The weights by the keys at which the model has them.

    Stage 5 of a ResNet is in the box head's trunk in a C4 model, else in the backbone; of a classifier, stages that the
    model lacks are left out. Unless `strict`, each stage of a cascade takes a single head, and a single head the first.
    """
    here = next((prefix for prefix in BODY if has(wanted, stage_5(prefix))), None)
    there = next((prefix for prefix in BODY if has(state, stage_5(prefix))), None)
    if here and there and here != there:
        prefixes = stage_5(there), stage_5(here)
        state = {prefixes[1] + k.removeprefix(prefixes[0]) if k.startswith(prefixes[0]) else k: state[k] for k in state}
    if is_body(state):
        stages = {key.split(".")[1] for key in wanted if key.startswith("backbone.layer")}
        state = {k: v for k, v in state.items() if not k.startswith("backbone.layer") or k.split(".")[1] in stages}
    for head in () if strict else HEADS:
        numbers = sorted({key.split(".")[2] for key in wanted if key.startswith(f"{head}.stages.")})
        cascade, single = f"{head}.stages.", has(wanted, f"{head}.") and not numbers
        if single and has(state, cascade):
            state = {k.replace(f"{cascade}0.", f"{head}.", 1): v for k, v in state.items()}
        elif numbers and has(state, f"{head}.") and not has(state, cascade):
            theirs = {k.removeprefix(f"{head}."): state.pop(k) for k in list(state) if k.startswith(f"{head}.")}
            state |= {f"{cascade}{i}.{rest}": value for i in numbers for rest, value in theirs.items()}
    return state


def stage_5(prefix: str) -> str:
    return f"{prefix}layer4." if prefix == BODY[0] else prefix


def fills_body(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether these weights have all that a classifier's would fill."""
    missing, _, shapes = misfit(model, placed(state, model.state_dict()))
    lacking = [*missing, *(wrong.key for wrong in shapes)]
    return not any(key.startswith(BODY) and OFFSETS not in key for key in lacking)
