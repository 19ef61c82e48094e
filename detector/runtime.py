"""Where and how a program runs: its ranks, their device and seeds, precision, and the signals that stop it.

A process that torchrun did not start is a world of size 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from detector.ops.checks import ConfigError
from detector.settings import Runtime
from detector.threads import cores, end_sharing, share_cores


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag: is it set on any rank? All ranks get the same answer."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather(self, value: Any) -> list[Any]:
        """The small picklable `value` of every rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's small picklable `value`, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Give all ranks rank 0's buffers, such as running statistics, which drift apart in training."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def start_ranks(runtime: Runtime) -> World:
    """Join the other ranks, if torchrun started several, and choose this rank's device."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device = {runtime.device!r}: no CUDA device is visible; use runtime.device=cpu")
    if name == "cuda":
        name = f"cuda:{local}"
    device = torch.device(name)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ConfigError(f"runtime.device: rank {local} of this machine has no GPU of its own, there are {count}")
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    end_sharing()
    chosen = None if runtime.threads == "auto" else runtime.threads
    if chosen or cores() < torch.get_num_threads():  # torch knows nothing of a container's quota
        torch.set_num_threads(chosen or cores())
    if device.type == "cpu":
        keep_freed_memory()
        # a number that the user has given wins, and compiled parts would be compiled anew for another
        fixed = "OMP_NUM_THREADS" in os.environ or runtime.compile or runtime.deterministic
        share_cores(by_number=runtime.threads == "auto" and not fixed)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(runtime.deterministic)
    return World(dist.get_rank() if size > 1 else 0, size, device)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors, those of up to 64 MiB and 2 GiB of it in all, for the next ones.

    It would give it back to the system and get it again page by page, which is a tenth of a step on a CPU. Where the C
    library is another one nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((-3, 1 << 26), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            libc.mallopt(parameter, value)


def data_workers(device: torch.device, wanted: int | Literal["auto"]) -> int:
    """Data-loading processes of this rank. auto: two, and none where the model computes on one or two cores: they would
    take a core from threads that wait for each other, which costs more than loading between the steps."""
    if wanted != "auto":
        return wanted
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if device.type == "cpu" and share <= 2 else 2


def free_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a GPU's memory, what torch keeps there counted as free, or of the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept, total
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def return_freed_memory() -> None:
    """Give what is kept back to the system once: after work of another kind, whose tensors fit no later ones."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def join(backend: str, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group of torchrun's ranks.

    torchrun's store outlives a restart. Under a name of its own a new attempt cannot find the addresses of killed ranks
    there. Nodes count their restarts each for itself, so this helps on one node; see docs/reliability.md for several.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch; loader and RoI sampling derive what they need from (seed, epoch, image)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of all generators of this rank, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    numpy_state = [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached]
    return {
        "python": [version, list(internal), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back where `random_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class StopRequest:
    """Set by SIGTERM, SIGINT (once; the second aborts) or SIGUSR1: the loop ends after the step at hand."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def watch(self, items: Iterable) -> Iterator:
        """The items, as long as no stop is requested; then the program exits."""
        for item in items:
            if self:
                raise SystemExit(self.exit_code)
            yield item

    @property
    def name(self) -> str:
        return "another rank was told to stop" if self.signal is None else signal.Signals(self.signal).name

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or signal.SIGTERM)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the signals of a scheduler or a user into a StopRequest while the context lasts."""
    request = StopRequest()

    def handle(number, frame):
        if number == signal.SIGINT and request.signal == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # torch.cpu.get_capabilities(): x86's two and Arm's


def chosen_precision(device: torch.device, precision: str) -> str:
    """`auto` as bf16 where the device multiplies matrices in it by instructions of its own, as fp32 elsewhere; another
    precision as it is.

    On processors without such instructions bf16 is emulated, several times slower than fp32. Before PyTorch tells what
    a processor can do (torch.cpu.get_capabilities), `auto` is fp32 there.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        able = any(known.get(unit, False) for unit in BF16_UNITS)
    return "bf16" if able else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bf16 or fp16; nothing for fp32; auto: as `chosen_precision` has it. Raises ValueError for another."""
    precision = chosen_precision(device, precision)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}, auto")
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """The model in evaluation mode; afterwards each of its modules is as it was, frozen ones included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
