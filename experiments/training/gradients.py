"""Batches, and the gradient of one, shared out among processes and slices.

On a GPU the next batch is made and pinned while it computes the present one. On the CPU there is
nothing to win: who would make the next batch is busy with this one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deltacontrol.deltas.dynamics.frozen_states import FrozenStates
from deltacontrol.experiments.training.devices import attention
from deltacontrol.theory.errors import InputError


class Batches(Protocol):
    """Training data: a batch as a function of the step."""

    def batch(self, step: int) -> dict[str, Any]:
        """Arguments of the model for update `step`: tensors with the examples first, "labels"."""
        ...


class NumberedBatches(Batches, Protocol):
    """Batches whose examples have numbers, by which their states are found again."""

    def examples(self, step: int) -> Tensor:
        """The numbers of the examples in `batch(step)`, (rows,)."""
        ...


class Ahead:
    """Batches of which the one of the next step is made by a thread of its own.

    A batch is a function of its step, so that it is the same whoever makes it, and a step that was
    not foreseen (the first one, or one gone back to) is made when it is asked for. An error of the
    thread comes at the step that it belongs to.

    Args:
        data: the batches; all other calls go to it.
        steps: of the training; nothing is made beyond.
        pin: whether tensors are put where a GPU fetches them by itself.
    """

    def __init__(self, data: Batches, steps: int, *, pin: bool) -> None:
        self._data, self._steps, self._pin = data, steps, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[dict[str, Any]]] | None = None

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step, and the order to make that of the next one."""
        ready = self._next
        if ready is not None and ready[0] == step:
            batch = ready[1].result()
        else:
            batch = self._made(step)
        self._next = None
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._made, step + 1)
        return batch

    def __getattr__(self, name: str) -> Any:
        """All other calls."""
        return getattr(self._data, name)

    def close(self) -> None:
        """End the thread; a batch that it has not begun is never made."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _made(self, step: int) -> dict[str, Any]:
        batch = self._data.batch(step)
        if not self._pin:
            return batch
        return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def ahead(data: Batches, steps: int, device: torch.device) -> Iterator[Batches]:
    """The batches themselves on the CPU; on a GPU the next one is made while it computes."""
    if device.type != "cuda":
        yield data
        return
    found = Ahead(data, steps, pin=True)
    try:
        yield found
    finally:
        found.close()


def accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    kind: str,
    seed: int,
    step: int,
    slices: int = 1,
    penalty: Callable[[], Tensor] | None = None,
    frozen: FrozenStates | None = None,
) -> float:
    """Accumulate the gradient of the mean loss over the whole batch, and return that loss.

    The mean is over examples, or over predicted tokens for a language model, whatever the number
    of processes and slices: slice k of process r takes the examples r·slices + k, with the stride
    processes·slices. The gradient is that of the loss plus `penalty()`, where there is one. With
    `frozen`, the batch holds the numbers of its "examples", and their states are taken from there.

    Raises:
        InputError: There are fewer examples than slices.
    """
    rank, world, parts = accelerator.process_index, accelerator.num_processes, slices
    total, loss_sum = _weight(batch["labels"], kind), torch.zeros(())
    for part, inputs in enumerate(shares(accelerator, batch, kind, slices)):
        weight = _weight(inputs["labels"], kind) / max(total, 1)
        torch.manual_seed(step_seed(seed, step, rank, part))
        local = accelerator.no_sync(model) if part + 1 < parts else nullcontext()
        known = nullcontext()
        if frozen is not None:
            known = frozen.passing(inputs.pop("examples"), inputs["attention_mask"])
        device = accelerator.device.type
        precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        with local, known, attention(inputs, precision, device):
            outputs = model(**inputs)
            # A slice without a target has no mean loss; it still takes part in the backward pass.
            loss = outputs.loss * weight if weight else outputs.logits.sum() * 0.0
            share = penalty() / (world * parts) if penalty else 0.0
            accelerator.backward((loss + share) * world)
        loss_sum = loss_sum.to(loss.device) + loss.detach()
    return float(accelerator.reduce(loss_sum, reduction="sum"))  # type: ignore[arg-type]


def shares(
    accelerator: Accelerator, batch: Mapping[str, Any], kind: str, slices: int
) -> Iterator[dict[str, Any]]:
    """This process's slices of a batch, as arguments of the model on its device.

    Raises:
        InputError: There are fewer examples than slices.
    """
    rank, world, rows = accelerator.process_index, accelerator.num_processes, len(batch["labels"])
    if rows < world * slices:
        raise InputError(
            f"a batch of {rows} examples cannot be shared by {world} processes in {slices} slices; "
            f"choose batch_size >= {world * slices}"
        )
    for part in range(slices):
        piece = _rows(batch, slice(rank * slices + part, None, world * slices), rows)
        # From pinned memory the copy does not wait for the GPU.
        inputs = {
            k: v.to(accelerator.device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in piece.items()
        }
        if kind == "causal-lm":
            inputs["use_cache"] = False
        yield inputs


def examples(batch: Mapping[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """The examples of a batch that have a target, one after another, as batches of one."""
    rows = len(batch["labels"])
    for row in range(rows):
        one = _rows(batch, slice(row, row + 1), rows)
        if _weight(one["labels"], kind):
            yield one


def _rows(batch: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
    # Contiguous, because some models reshape their labels by `view`.
    return {
        k: v[rows].contiguous() if isinstance(v, Tensor) and v.dim() and len(v) == count else v
        for k, v in batch.items()
    }


def _weight(labels: Tensor, kind: str) -> int:
    if kind in ("causal-lm", "masked-lm"):
        predicted = labels[:, 1:] if kind == "causal-lm" else labels
        return int((predicted != -100).sum())
    return len(labels)


def num_tokens(batch: Mapping[str, Any]) -> int:
    """Number of tokens that are not padding."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["labels"].numel()


def step_seed(seed: int, step: int, process: int = 0, part: int = 0) -> int:
    """Seed of torch's generator, a 63-bit hash of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}/{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
