"""Keep the states below the lowest control during a training, where that is asked for or pays.

An example that comes n times passes the frozen blocks once instead of n times. By default states
are kept where the examples come `REPEATS` times or more on average, nothing is random, and the
states of all of them take at most `LARGEST` bytes. That is a function of the run alone, and not of
the machine, so that a training that goes on from a checkpoint decides the same. It then passes the
batches from before the checkpoint through the frozen blocks once more, in the same composition, and
so has the states of the uninterrupted training to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from deltacontrol.deltas.dynamics.frozen_states import FrozenStates
from deltacontrol.experiments.training.gradients import Batches, examples, num_tokens
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas import DeltaModel
    from deltacontrol.experiments.training.settings import Settings

__all__ = ["check", "kept"]

REPEATS = 1.5
LARGEST = 2 * 2**30
AGREEMENT = 1e-3  # of losses, in whatever precision
OF_LOGITS = {"fp32": 1e-3, "bf16": 5e-2}  # of their largest magnitude
BYTES = 4  # of a number; states in half precision take less


def check(data: Batches, settings: Settings) -> None:
    """Refuse what was asked for and cannot be.

    Raises:
        InputError: the states are random, or the examples have no numbers.
    """
    if not settings.cache_frozen:
        return
    if settings.dropout:
        raise InputError(
            "with dropout the hidden states are other ones each time; train without cache_frozen, "
            "or with dropout=False."
        )
    if not hasattr(data, "examples"):
        raise InputError(
            f"cache_frozen finds states by the numbers of the examples, but {type(data).__name__} "
            "has no method examples(step)."
        )


def kept(
    delta_model: DeltaModel,
    data: Batches,
    settings: Settings,
    device: torch.device,
    *,
    precision: str,
    first: int,
    replay: Callable[[int, FrozenStates], None],
) -> FrozenStates | None:
    """The states to train with, empty or of the steps before ``first``; None to keep none.

    Args:
        delta_model: in training mode.
        data: the batches.
        settings: of the training.
        device: of the model.
        precision: "fp32" or "bf16".
        first: the step at which this attempt begins.
        replay: passes a batch through the frozen blocks, as the training did.

    Raises:
        InputError: as in `FrozenStates`, where states were asked for.
    """
    wanted = settings.cache_frozen
    if wanted is False or (wanted is None and not _repeats(data, settings)):
        return None
    batch = data.batch(0)  # of whichever attempt, so that all of them decide the same
    if "attention_mask" not in batch:
        if wanted:
            raise InputError(
                "states are kept of the tokens that the attention_mask shows, and the batches have "
                "none; train without cache_frozen."
            )
        return None
    lengths = [(int(e["attention_mask"].sum()), e) for e in examples(batch, settings.kind)]
    with_tokens = [pair for pair in lengths if pair[0]]
    _, one = min(with_tokens, key=lambda pair: pair[0], default=(0, None))  # the most padded
    if one is None:  # without a target there is no loss to compare
        if wanted:
            raise InputError(
                "the first batch has no target, so kept states cannot be held against a whole "
                "pass; train without cache_frozen."
            )
        return None
    one = {k: v.to(device) for k, v in one.items() if isinstance(v, torch.Tensor)}
    if settings.kind == "causal-lm":
        one["use_cache"] = False  # type: ignore[assignment]
    try:
        frozen = FrozenStates(delta_model, one, strict=bool(wanted))
        _compare(delta_model, frozen, one, OF_LOGITS[precision])
    except InputError:
        if wanted:
            raise
        return None
    tokens = num_tokens(batch) / len(batch["labels"])  # of an example, on average
    if wanted is None and _visits(data, settings)[1] * tokens * frozen.width * BYTES > LARGEST:
        return None
    for step in range(first):
        replay(step, frozen)
    return frozen


def _repeats(data: Batches, settings: Settings) -> bool:
    """Whether nothing is random, and the examples come often enough."""
    if settings.dropout or settings.gradient_checkpointing or not hasattr(data, "examples"):
        return False
    visits, different = _visits(data, settings)
    return visits >= REPEATS * different


def _visits(data: Any, settings: Settings) -> tuple[int, int]:
    """How many examples the steps show, and how many different ones."""
    seen: set[int] = set()
    visits = 0
    for step in range(settings.steps):
        numbers = data.examples(step).tolist()
        visits += len(numbers)
        seen.update(numbers)
    return visits, len(seen)


@torch.no_grad()
def _compare(
    delta_model: DeltaModel, frozen: FrozenStates, one: Mapping[str, Any], agreement: float
) -> None:
    """See on one example that a pass from its state, kept without padding, gives what a whole does.

    Raises:
        InputError: it does not: the output depends on more than the last state of the frozen
            blocks, that state depends on padding, or they are random.
    """
    number, other = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    mask = one["attention_mask"]
    length, name = int(mask.sum()), type(delta_model.model).__name__
    tokens = {
        k: v[:, :length] if isinstance(v, torch.Tensor) and v.shape[:2] == mask.shape else v
        for k, v in one.items()
    }
    found = []
    for inputs, known in (
        (one, frozen.passing(other, mask)),  # a whole pass, as it learns a state
        (tokens, frozen.passing(number, tokens["attention_mask"])),
        (one, frozen.passing(number, mask)),
    ):
        with torch.random.fork_rng(enabled=True), known:
            torch.manual_seed(0)
            found.append(delta_model(**inputs))
    frozen.forget()
    if not frozen.steady:
        raise InputError(
            f"{name} pads by itself, so that its states are not those of the tokens alone; train "
            "without cache_frozen."
        )
    whole, kept = float(found[0].loss), float(found[2].loss)
    logits = _of_tokens(found[0].logits, mask)
    change = float((_of_tokens(found[2].logits, mask) - logits).abs().max())
    alike = change <= agreement * float(logits.abs().max())
    if not (alike and math.isclose(whole, kept, rel_tol=AGREEMENT, abs_tol=AGREEMENT)):
        raise InputError(
            f"a pass that starts from kept states gives the loss {kept:.6g}, a whole one "
            f"{whole:.6g}, and logits that differ by {change:.3g}: {name} uses more than the last "
            "state of its frozen blocks, or its states depend on padding; train without "
            "cache_frozen."
        )


def _of_tokens(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits without those of padding, and of the rows of a prompt."""
    if logits.dim() < 3:
        return logits
    return logits[:, -mask.shape[1] :][mask.bool()]
