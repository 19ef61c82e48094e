"""The Muon optimiser, for convolutions too: torch.optim.Muon takes matrices alone, and another optimiser beside it.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; weight decay and the length of steps are
those of Liu et al. 2025, "Muon is Scalable for LLM Training".
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from detector.ops.checks import require

# A step of Newton and Schulz takes each singular value s to A s + B s^3 + C s^5: five take what lies in [0.002, 1] to
# about 0.7 to 1.2 (Jordan et al.). More would come nearer to 1, which does not learn better.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
LENGTH = 0.2  # of a step, root mean square of its elements in learning rates: what AdamW's come to (Liu et al.)


class Muon(AdamW):
    """Orthogonalised momentum for the weights of layers, AdamW for biases, norms and other vectors.

    A weight [rows, ...] is a matrix W of so many rows. With its gradient G and momentum M,

        M <- mu M + (1 - mu) G,   mu M + (1 - mu) G = U S V^T,
        W <- (1 - lr weight_decay) W - 0.2 lr sqrt(max(rows, columns)) U V^T:

    all directions in which a gradient points are learnt at one pace, not the strongest before the others. Elements move
    about as far as AdamW's, so that its learning rate is the one to try first.

    Args:
        params: parameters or groups of them, as of any optimiser.
        momentum: mu, of the weights.
        betas, eps, fused: AdamW's, of the vectors.

    Raises ValueError for what is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        *,
        fused: bool | None = None,
    ):
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)
        self.defaults["momentum"] = momentum
        for group in self.param_groups:
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns what `closure` does, which computes loss and gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.ndim > 1}
        for weight in gradients:
            weight.grad = None  # AdamW passes over it
        super().step()
        for weight, gradient in gradients.items():
            weight.grad = gradient
        for group in self.param_groups:
            here = {p: gradients[p] for p in group["params"] if gradients.get(p) is not None}
            if here:
                self._step_weights(list(here), list(here.values()), group)
        return loss

    def _step_weights(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for weight in weights:
            if not self.state[weight]:  # AdamW, which reads all states back, looks for a step in each
                self.state[weight].update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(weight))
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        turned = orthogonal([channels_last(update).flatten(1) for update in updates])
        for weight, step in zip(weights, turned, strict=True):
            last = channels_last(weight)
            last.add_(step.view(last.shape), alpha=-LENGTH * lr * max(step.shape) ** 0.5)


def channels_last(weight: Tensor) -> Tensor:
    """A view [rows, ..., in] of [rows, in, ...]: rows of kernels in channels_last layout lie in one piece. The order of
    columns has no part in what follows."""
    return weight.movedim(1, -1)


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """About U V^T of each matrix U S V^T [m, n]: singular values become 0.7 to 1.2, zeros stay.

    Steps of Newton and Schulz multiply a matrix X by polynomials of X X^T, m x m with m <= n. Here their product is
    computed from X X^T, of all matrices of one m side by side, so that only the first and the last product take n
    columns; in full float32, for rounding grows twelvefold with each step.
    """
    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in matrices]
    wide = [x / torch.linalg.vector_norm(x).clamp_min(1e-7) for x in wide]
    sides: dict[int, list[int]] = defaultdict(list)
    for index, x in enumerate(wide):
        sides[x.shape[0]].append(index)
    turned = list(wide)
    with exact_products():
        for indices in sides.values():
            factors = polynomial(torch.stack([wide[i] @ wide[i].mT for i in indices]))
            for i, factor in zip(indices, factors, strict=True):
                turned[i] = factor @ wide[i]
    return [x if x.shape == y.shape else x.mT for x, y in zip(turned, matrices, strict=True)]


def polynomial(gram: Tensor) -> Tensor:
    """P of X X^T [k, m, m] such that P X is X after all steps."""

    def factor_of(gram: Tensor) -> Tensor:
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        return factor

    product = factor = factor_of(gram)
    for _ in range(STEPS - 1):
        gram = factor @ gram @ factor  # polynomials of one matrix commute
        factor = factor_of(gram)
        product = factor @ product
    return product


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """float32 products without tf32 or bf16, whatever the program has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
