"""How the contestants of a benchmark are measured: in turns, on one batch, in one process.

A slow minute of the machine then slows all of them. Memory is the bytes that autograd keeps for the
backward pass, which do not depend on the machine, and the peak of a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from experiments.resources import autocast


def training_step(
    model: nn.Module, batch: Mapping[str, Tensor], precision: str, device: str
) -> Callable[[], None]:
    """Forward, backward and AdamW on what the model trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step() -> None:
        with autocast(precision, device):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def alternate(
    steps: Mapping[str, Callable[[], None]], turns: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each step by name; in every turn each runs once, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + turns):
        for name, step in sorted(steps.items(), reverse=bool(turn % 2)):
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


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
