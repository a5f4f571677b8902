"""Whether saved controls fit a model with deltas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError


def require_fit(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    fixed: Iterable[str],
    namespaces: Sequence[str],
) -> None:
    """Refuse a state that is not one of these controls.

    Args:
        state: saved controls by name.
        own: the model's controls by name.
        fixed: names of constants, such as the seed of a projection, that have to be equal.
        namespaces: of the model's deltas, for the message.

    Raises:
        InputError: keys, shapes or a constant differ.
    """
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise InputError(
            f"these controls do not fit: {len(missing)} missing {missing[:3]}, {len(extra)} "
            f"unknown {extra[:3]}. Attach the deltas that they were saved with: this model has "
            f"{', '.join(namespaces)}."
        )
    for key, value in own.items():
        saved = state[key]
        if not isinstance(saved, Tensor) or saved.shape != value.shape:
            told = f"has shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else "is none"
            raise InputError(f"control {key} {told}, expected a tensor {tuple(value.shape)}.")
        if saved.is_meta or saved.layout is not torch.strided or saved.is_complex():
            kind = "on meta, without values" if saved.is_meta else f"{saved.layout}, {saved.dtype}"
            raise InputError(f"control {key} is {kind}; expected a dense tensor of real values.")
    for key in fixed:
        if not torch.equal(state[key].cpu(), own[key].cpu()):
            remedy = (
                "the same seed draws another projection now, so that the controls mean nothing "
                "here; train them again."
                if key.endswith("fixed_draws")
                else "attach with the seed that the controls were saved with."
            )
            raise InputError(
                f"{key} is {state[key].tolist()}, but this model has {own[key].tolist()}: {remedy}"
            )


def is_fixed(name: str) -> bool:
    """Whether a buffer is a constant of the attached delta, such as the seed of a projection."""
    leaf = name.rpartition(".")[2]
    return leaf == "seed" or leaf.startswith("fixed_")
