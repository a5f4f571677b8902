"""Device, number format and memory of a training."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltacontrol.theory.errors import InputError, unknown

Precision = Literal["auto", "fp32", "bf16"]
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


def choose_device(name: str) -> str:
    """The device type for "auto", "cpu" or "cuda"; raises `InputError` where it is not there."""
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no GPU; try device auto or cpu")
    return name


def choose_precision(name: str, device: str) -> Literal["fp32", "bf16"]:
    """The number format: "auto" is bf16 where the hardware computes in it, else fp32."""
    if name not in PRECISIONS:
        raise unknown("precision", name, PRECISIONS)
    if name != "auto":
        return name  # type: ignore[return-value]
    fast = torch.cuda.is_bf16_supported(False) if device == "cuda" else cpu_computes_bf16()
    return "bf16" if fast else "fp32"


def cpu_computes_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def autocast(precision: str, device: str) -> AbstractContextManager:
    """The context in which a model computes at `precision` (fp32 or bf16)."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def cast_once(model: nn.Module, precision: str) -> Iterator[None]:
    """Keep the frozen weights of linear maps in bfloat16 beside their own values, inside.

    Autocast converts a frozen weight anew in every call, because it remembers those alone that get
    a gradient; converted once, the products are the same, bit for bit, and the weights of the model
    stay what they are. A backward pass keeps the converted weights anyway.

    Args:
        model: maps that are trained, replaced or of another class are left alone.
        precision: nothing is done for fp32.
    """
    changed = []
    for module in model.modules() if precision == "bf16" else ():
        weight = module._parameters.get("weight")
        if type(module) is not nn.Linear or weight is None or "forward" in module.__dict__:
            continue
        if weight.requires_grad or weight.dtype != torch.float32:
            continue
        module.__dict__["forward"] = _converted(module, weight)
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _converted(module: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    narrow, plain = weight.detach().bfloat16(), type(module).forward

    def forward(x: Tensor) -> Tensor:
        if module._parameters["weight"] is weight and torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, narrow, module._parameters["bias"])
        return plain(module, x)

    return forward


def attention(inputs: Mapping[str, Any], precision: str, device: str) -> AbstractContextManager:
    """The context of a training pass that computes attention by the faster kernel.

    On the CPU the backward pass of torch's fused kernel is slow for short sequences: in bf16 it
    took 5.9 times as long as elementary operations at 64 x 16 tokens, 1.5 times at 16 x 128, and
    half as long at 8 x 256; in fp32 2.5 times at 64 x 16, about as long from 32 tokens on (torch
    2.13, EPYC of the fourth generation, 12 heads of 32, forward and backward).
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    lengths = [value.shape[1] for value in tensors if value.dim() == 2]
    # Of images and sounds the inputs do not tell the length.
    longest = math.inf if any(value.dim() > 2 for value in tensors) else max(lengths, default=0)
    if device == "cpu" and longest <= (128 if precision == "bf16" else 16):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@dataclass
class PeakMemory:
    """Peak memory in bytes since the object was made.

    On CUDA: memory that torch allocated on the current device. On the CPU: resident set of the
    process, that is the interpreter, its libraries, the pages of the model that were touched, and
    all that the training allocates. `peak() - baseline` is what the training added.

    An allocator keeps freed memory and fills it again, so that the resident set of a process which
    trained before would hardly grow. On Linux with glibc the freed memory goes back to the system
    at the start (malloc_trim), and the peak is reset (VmHWM); what the training adds then hardly
    depends on what the process did before. Where one of the two cannot be had, `method` says so:
    without a reset the peak is that of the whole life of the process.

    Attributes:
        device: "cuda" or "cpu".
        baseline: Bytes in use at the start.
        method: How the peak is measured.
    """

    device: str
    baseline: int = 0
    method: str = ""

    def __post_init__(self) -> None:
        """Reset the peak."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.baseline = torch.cuda.memory_allocated()
            self.method = "torch.cuda.max_memory_allocated"
            return
        trimmed = _return_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.baseline = _status("VmRSS")
            self.method = "resident set during training (VmHWM)"
            if trimmed:
                self.method += ", freed memory returned before"
            _status("VmHWM")
        except (OSError, KeyError):
            self.baseline = _process_peak()
            self.method = "resident set over the life of the process (ru_maxrss)"

    def peak(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") if "VmHWM" in self.method else _process_peak()


def _return_freed_memory() -> bool:
    """Give freed memory back to the system; False where the C library has no call for it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _process_peak() -> int:
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
