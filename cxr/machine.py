"""Choice of device and precision, seeding, determinism, memory use."""

from __future__ import annotations

import contextlib
import ctypes
import functools
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


def cores() -> int:
    """The number of CPU cores that this process may use: those of its affinity, and of the quota of a container."""
    from joblib import cpu_count

    return int(cpu_count())


def processes() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def resolve_device(name: str) -> torch.device:
    """`auto|cpu|cuda|mps` -> an available device; under torchrun, one GPU per process.

    Raises `UserError` if it is not available.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available[name]:
        raise UserError(f"--device {name}: not available on this machine; use --device auto or cpu")
    if name == "cuda" and processes() > 1:
        gpus = torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:  # raised by every process, so also by process 0
            raise UserError(f"torchrun: more processes than GPUs on this machine ({gpus}); use --nproc-per-node {gpus}")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto|fp32|bf16|fp16` -> the training precision on this device.

    `auto` is bf16 on GPUs that support it, fp16 (with loss scaling) on other GPUs, fp32 on the CPU, so that
    the same seed gives the same results on CPUs with and without bf16 units.
    """
    import torch

    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: not supported on the CPU; use fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp16" if device.type == "mps" else "fp32"


def resolve_compile(name: str, device: torch.device) -> str:
    """`auto|none|inductor|graphs` -> what makes training steps faster on this device."""
    if name == "auto":
        return "graphs" if device.type == "cuda" and processes() == 1 else "none"
    if name == "graphs" and device.type != "cuda":
        raise UserError("--compile graphs: CUDA graphs require a GPU; use auto, inductor or none")
    if name != "none" and processes() > 1:
        raise UserError(f"--compile {name}: not supported under torchrun; leave it out")
    return name


def cpu_has_bf16() -> bool:
    """Whether the processor has bf16 arithmetic units; without them bf16 is several times slower.

    Read from /proc/cpuinfo, because `torch.ops.mkldnn._is_mkldnn_bf16_supported` is also true for
    processors that only emulate it. Always false outside Linux.
    """
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed every generator and enable deterministic kernels: same seed and machine, same result."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Otherwise every new tensor is filled before use: 534 fills instead of 10 in a ResNet18 step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def eval_batch_size(device: torch.device, batch_size: int) -> int:
    """The batch size for inference: larger than in training on a GPU, the same on a CPU because of its caches."""
    return max(batch_size, min(256, 8 * batch_size)) if device.type == "cuda" else batch_size


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory instead of returning it to the kernel; no effect with other C libraries.

    By default the large tensors of each step are returned to the kernel and requested again, page by page, which takes
    a twentieth of a training step on a CPU (`mallopt(3)`: M_MMAP_MAX, M_TRIM_THRESHOLD).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory. Outside Linux the peak of the process cannot be reset and counts from its start."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Peak memory since the last reset, in MB: allocated on the GPU, or resident memory of this process."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:")), None)
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Translate out-of-memory errors, of the GPU or the CPU, into a `UserError`."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError("out of memory; lower --batch-size, --image-size or --reuse-gb") from error


def describe(device: torch.device) -> str:
    """A description of the device, for a tag: `cpu (2 threads)`, `cuda (NVIDIA H100 80GB HBM3)`."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps"
    return f"cpu ({torch.get_num_threads()} threads)"


@dataclass(frozen=True, slots=True)
class Machine:
    """The device of a run, its precision, and what makes its steps faster (`graphs`, `inductor` or `none`)."""

    device: torch.device
    precision: str
    compile: str = "none"


@functools.cache
def _default_threads() -> int:
    """The number of threads that torch was started with."""
    import torch

    return torch.get_num_threads()


def ready_machine(config: TrainConfig) -> Machine:
    """Select device and precision as configured, and seed all generators."""
    import torch

    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    default = _default_threads()  # asked for before it is changed
    torch.set_num_threads(config.threads or default)
    machine = Machine(device, resolve_precision(config.precision, device), resolve_compile(config.compile, device))
    seed_everything(config.seed, device)
    return machine
