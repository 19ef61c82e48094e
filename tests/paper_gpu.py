"""A GPU on paper, as a plugin of pytest: tensors that say they lie on one, computed by the CPU. What mixes devices
fails as it does on a GPU, in the forward pass; autograd wants a real one for the backward pass.

    python -m pytest -p tests.paper_gpu tests/paper_gpu_cases.py

It takes a process of its own, whose torch believes in the GPU from the first import of the project on.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MOVES = {"_to_copy", "to", "copy_", "lift", "lift_fresh"}


class OnGPU(torch.Tensor):
    """A tensor on cuda:0, whose values are in `inner`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, dtype=inner.dtype, device="cuda:0")
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnGPU({self.inner!r})"

    def tolist(self):
        return self.inner.tolist()

    def new_tensor(self, values, **rest):
        return torch.tensor(values, **{"dtype": self.dtype, "device": self.device, **rest})

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __reduce_ex__(self, protocol):  # in files they are ordinary ones
        return self.inner.__reduce_ex__(protocol)


class PaperGPU(TorchDispatchMode):
    """In this context tensors may be made on "cuda" and moved there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


def computed(operation, args: tuple, kwargs: dict):
    """The result of an operation: on the GPU where it is asked for there, or where its tensors are."""
    name = operation.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    if name == "_pin_memory":
        return args[0]
    if name not in MOVES:
        check(name, args, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    wanted = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
    if name == "copy_" or (name == "to" and not wanted):  # `to` another tensor, or another dtype
        like = args[1] if name == "to" and isinstance(args[1], torch.Tensor) else args[0]
        on_gpu = isinstance(like, OnGPU)
    else:
        on_gpu = wanted[0] == "cuda" if wanted else any(isinstance(leaf, OnGPU) for leaf in leaves)
    inside = tree_map_only(OnGPU, lambda t: t.inner, (args, kwargs))
    args_inside, kwargs_inside = tree_map_only(torch.device, lambda _: torch.device("cpu"), inside)
    result = operation(*args_inside, **kwargs_inside)
    if result is not None and name.endswith("_") and not name.endswith("__"):
        return args[0]
    return tree_map_only(torch.Tensor, OnGPU, result) if on_gpu else result


def check(name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise where tensors of both devices come together. The CPU's may where they are single numbers, or indices of
    what lies on the GPU."""
    if name.startswith("index") and isinstance(args[1], (list, tuple)) and isinstance(args[0], OnGPU):
        tensors = [args[0], *(value for value in args[2:] if isinstance(value, torch.Tensor))]
    if len({isinstance(t, OnGPU) for t in tensors if isinstance(t, OnGPU) or t.dim()}) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def inference_mode(mode=True):
    """Without the checks of versions, which know nothing of tensors within tensors."""
    return torch.no_grad()(mode) if callable(mode) else torch.no_grad() if mode else contextlib.nullcontext()


def tensor(*values, device=None, made=torch.tensor, **rest):
    """torch.tensor, which dispatches nothing itself."""
    return made(*values, **rest) if device is None else made(*values, **rest).to(device)


def believe() -> None:
    """Make torch think that there is a GPU of 8 GiB, without Triton."""
    torch.tensor = tensor
    torch._C._ensureCUDADeviceGuardSet()
    torch.inference_mode = inference_mode
    torch.backends.cudnn.enabled = False  # its operators exist nowhere else
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    answers = {"is_available": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0}
    answers |= {
        "mem_get_info": (8 << 30, 8 << 30),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
    }
    for name in ("_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        answers[name] = None
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    from detector.ops import kernels

    kernels.triton_available = lambda: False  # before others import it


believe()


@pytest.fixture(autouse=True)
def paper_gpu():
    with PaperGPU():
        yield
