"""How the contestants of a benchmark are measured: in turns, on one batch, in one process.

A slow minute of the machine then slows all of them. Memory is the bytes that autograd keeps for the
backward pass and the peak of what torch allocates; neither depends on the machine's load.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deltacontrol.experiments.training.compiling import CompiledPass
from deltacontrol.experiments.training.devices import attention, autocast

Name = TypeVar("Name", str, int)
LEAST_TURNS = 4


def training_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    precision: str,
    device: str,
    *,
    as_trained: bool = False,
) -> Callable[[], None]:
    """Forward, backward and AdamW on what the model trains.

    Attention is computed by torch's default kernel, or by that of
    `deltacontrol.experiments.training.loop`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step() -> None:
        kernel = attention(batch, precision, device) if as_trained else nullcontext()
        with autocast(precision, device), kernel:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def compiled_step(base: nn.Module, step: Callable[[], None]) -> tuple[Callable[[], None], float]:
    """A training step with the pass of its base model compiled, and the seconds that it took.

    Args:
        base: the model inside of the deltas, ours or those of peft.
        step: of `training_step`.
    """
    step()  # the first pass is watched, which is no part of the code
    made = CompiledPass(base)
    start = time.perf_counter()
    with made.acting(first=True):
        step()
    seconds = time.perf_counter() - start

    def compiled() -> None:
        with made.acting():
            step()

    return compiled, seconds


def alternate(
    steps: Mapping[Name, Callable[[], object]],
    turns: int,
    warmup: int,
    now: Callable[[], float] = time.perf_counter,
    limit: float = math.inf,
) -> dict[Name, list[float]]:
    """Seconds of each step by name; in every turn each runs once, in changing order.

    There are fewer turns, but at least `LEAST_TURNS`, where they would take more than ``limit``
    seconds together.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + turns):
        if turn - warmup >= LEAST_TURNS and sum(map(sum, seconds.values())) > limit:
            break
        for name in sorted(steps, reverse=bool(turn % 2)):
            start = now()
            steps[name]()
            elapsed = now() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def peak_allocated(step: Callable[[], None], device: str) -> int:
    """Bytes that torch's allocator gave out at most at one time of a step, above what it had.

    It counts allocations, not pages, so that it is the same number in every run.
    """
    step()  # which makes the optimiser's moments
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler prints when it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes, key=lambda c: c[0])]).max())


def saved_bytes(
    model: nn.Module, batch: Mapping[str, Tensor], precision: str, device: str
) -> dict[str, int]:
    """Bytes that autograd keeps of one forward pass, by the module that ran when it did.

    Parameters are left out, each storage is counted once, for the module that kept it first. A
    module's name is its path, numbers of blocks as ``*``.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    counted: set[int] = set()
    kept: dict[str, int] = {}
    running: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | counted:
            counted.add(storage.data_ptr())
            path = running[-1] if running else ""
            kept[path] = kept.get(path, 0) + storage.nbytes()
        return tensor

    # Enter before, leave after all hooks: what a delta computes belongs to its site.
    handles = []
    for path, module in model.named_modules():
        name = ".".join("*" if part.isdigit() else part for part in path.split("."))
        handles += [
            module.register_forward_pre_hook(
                lambda *_, name=name: running.append(name), prepend=True
            ),
            module.register_forward_hook(lambda *_: void(running.pop())),
        ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with autocast(precision, device):
                loss = model(**batch).loss
        del loss
    finally:
        for handle in handles:
            handle.remove()
    return kept


def void(_value: object) -> None:
    """Nothing: a forward hook that returned something would replace the output."""


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, first and third quartile."""
    low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high)}
