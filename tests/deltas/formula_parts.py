"""How tests of formulas read controls and states."""

import torch
from torch import Tensor, nn

from deltacontrol.deltas import DeltaModel

CAUSAL = ("gpt2", "opt", "llama", "gpt_neox", "qwen3", "gemma3")


def controls(controlled: DeltaModel, path: str) -> dict[str, Tensor]:
    """The controls under a path, by the rest of their names."""
    prefix = f"{controlled.attachments[0].namespace}.{path}."
    found = controlled.trainable().items()
    return {k.removeprefix(prefix): v.detach() for k, v in found if k.startswith(prefix)}


def seen_by(model: nn.Module, entry: nn.Module, end: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """The first input of one module and the last output of another in a pass."""
    states: list[Tensor] = []
    outputs: list[Tensor] = []
    first = entry.register_forward_pre_hook(
        lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    last = end.register_forward_hook(
        lambda _, args, o: outputs.append(o if isinstance(o, Tensor) else o[0])
    )
    with torch.no_grad():
        model(**batch)
    first.remove()
    last.remove()
    return states[0], outputs[-1]
