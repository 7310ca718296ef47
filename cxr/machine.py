"""Device, precision, seeds and determinism: what the machine can do and what was chosen."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cxr.config import TrainConfig
from cxr.errors import UserError

if TYPE_CHECKING:
    import torch


def processes() -> int:
    """How many processes torchrun started to train together; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def resolve_device(name: str) -> torch.device:
    """`auto|cpu|cuda|mps` -> a device that exists here; under torchrun, a GPU for each process.

    Raises `UserError` when it does not exist.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name]:
        raise UserError(f"--device {name}: PyTorch finds none on this machine; use --device auto or cpu")
    if name == "cuda" and processes() > 1:
        there = torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > there:  # which each process says, the first among them
            raise UserError(f"torchrun: more processes than the {there} GPU(s) here; use --nproc-per-node {there}")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto|fp32|bf16|fp16` -> the arithmetic to train in on this device.

    `auto` is bf16 where a GPU has it, fp16 (with loss scaling) on other GPUs, fp32 on the CPU, so that
    the same seed gives the same CPU numbers whether or not the processor has bf16 units.
    """
    import torch

    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: not for the CPU; use fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp16" if device.type == "mps" else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the processor has bf16 arithmetic units; without them bf16 is several times slower.

    Read from /proc/cpuinfo, because `torch.ops.mkldnn._is_mkldnn_bf16_supported` also says yes to
    processors that only emulate it. Elsewhere than on Linux the answer is no.
    """
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed every generator and ask for deterministic kernels: same seed, same machine, same result."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False  # what is called fp32 is fp32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else every new tensor is filled before it is used: 534 fills instead of 10 in a step of ResNet18.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def eval_batch_size(device: torch.device, batch_size: int) -> int:
    """Images at a time where nothing is learned from them: a GPU takes more at once, a CPU's caches do not."""
    return max(batch_size, min(256, 8 * batch_size)) if device.type == "cuda" else batch_size


def hold_memory() -> None:
    """Let this process keep the memory that it frees, where its C library is glibc.

    By default each step's large tensors are given back to the kernel and asked for again, page by page, which costs a
    training step on a CPU a twentieth of its time (`mallopt(3)`: M_MMAP_MAX, M_TRIM_THRESHOLD).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure anew. On Linux the process's own peak is reset; elsewhere it is that since its start."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory in use since the last reset, MB: the GPU's, or this process's resident memory."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    here = next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:")), None)
    return here if here is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Turn running out of memory, the GPU's or the machine's, into one line."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError("out of memory; lower --batch-size, --image-size or --reuse-gb") from error


def describe(device: torch.device) -> str:
    """The device in words, for a tag: `cpu (2 threads)`, `cuda (NVIDIA H100 80GB HBM3)`."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps"
    return f"cpu ({torch.get_num_threads()} threads)"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how to compute."""

    device: torch.device
    precision: str


def ready_machine(config: TrainConfig) -> Machine:
    """Device and precision by `config`, all generators seeded."""
    device = resolve_device(config.device)
    if config.compile == "graphs" and device.type != "cuda":
        raise UserError("--compile graphs: records what a GPU is told to do; without one, use inductor or none")
    if config.compile != "none" and processes() > 1:
        raise UserError(f"--compile {config.compile}: for one process alone; leave it out under torchrun")
    if device.type == "cpu":
        hold_memory()
    machine = Machine(device, resolve_precision(config.precision, device))
    seed_everything(config.seed, device)
    return machine
