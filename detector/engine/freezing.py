"""Parts of a model that do not learn: `training.freeze`, until `training.thaw_at` or to the end of the run.

Their parameters stand among the optimiser's from the first step on, without a gradient, so that it skips them: a
checkpoint has the same layout before and after the thaw. Their norms keep the statistics that they came with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from detector.config import ConfigError
from detector.config.schema import near


@dataclass
class Frozen:
    """What `frozen_parts` returns."""

    names: list[str]
    modules: list[nn.Module]
    parameters: list[Tensor]  # those that learn after the thaw
    held: bool = field(default=False, init=False)

    def set_mode(self, held: bool) -> None:
        """Hold what is frozen, or let it learn; the model is in training mode."""
        self.held = held and bool(self.names)
        for parameter in self.parameters:
            parameter.requires_grad_(not self.held)
        if self.held:  # the parts themselves go on training: an RPN in eval mode gives other proposals
            for leaf in [m for part in self.modules for m in part.modules() if not any(True for _ in m.children())]:
                leaf.eval()  # norms, dropout, drop path


def frozen_parts(model: nn.Module, names: Sequence[str], trained: Sequence[Tensor]) -> Frozen:
    """The modules of these dotted names, and which of the optimiser's parameters, `trained`, are theirs.

    Raises ConfigError for a name that the model has not, and where nothing is left that could learn.
    """
    known = {name: module for name, module in model.named_modules() if name}
    for name in names:
        if name not in known:
            depth = name.count(".")
            parts = [other for other in known if other.count(".") <= depth and [*known[other].parameters()]]
            top = ", ".join(other for other in parts if "." not in other)
            raise ConfigError(
                f"training.freeze: the model has no part {name!r}{near(name, parts)} It has {top}, and what is inside "
                "of them, such as backbone.layer1"
            )
    inside = {id(p) for name in names for p in known[name].parameters()}
    frozen = [p for p in trained if id(p) in inside]
    if names and len(frozen) == len(trained):
        raise ConfigError(f"training.freeze = [{', '.join(names)}]: nothing is left that learns")
    return Frozen(list(names), [known[name] for name in names], frozen)
