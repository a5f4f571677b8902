"""Train and eval mode of a model with controls, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas import DeltaModel


@contextmanager
def training_mode(
    delta_model: DeltaModel, dropout: bool, gradient_checkpointing: bool
) -> Iterator[None]:
    """Put the controls in train mode; the frozen base in eval mode, or in train mode if `dropout`.

    transformers checkpoints a block only in train mode. Without dropout, the blocks alone get that
    mode, and the dropout rates that a block keeps itself are zero for the time.

    Raises:
        InputError: The architecture does not support gradient checkpointing.
    """
    base = delta_model.model
    modes = {module: module.training for module in delta_model.modules()}
    rates: list[tuple[object, str, float]] = []
    type(base).train(base, dropout)  # the base alone, whose own train() refuses that
    delta_model.controls.train()
    if gradient_checkpointing:
        _enable(base)
        blocks = [m for m in base.modules() if getattr(m, "gradient_checkpointing", False)]
        for block in [] if dropout else blocks:
            block.training = True
            for name, value in vars(block).items():
                if isinstance(value, float) and "drop" in name:
                    rates.append((block, name, value))
    for block, name, _ in rates:
        setattr(block, name, 0.0)
    try:
        yield
    finally:
        for block, name, value in rates:
            setattr(block, name, value)
        if gradient_checkpointing:
            _disable(base)
        for module, mode in modes.items():
            module.training = mode


def _enable(base) -> None:
    options = {"use_reentrant": False}
    try:
        if hasattr(base, "activation_checkpointing_enable"):  # the name since transformers 5.20
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise InputError(
            f"{type(base).__name__} does not support gradient checkpointing; "
            "try grad_accumulation to save memory"
        ) from error


def _disable(base) -> None:
    if hasattr(base, "activation_checkpointing_disable"):
        base.activation_checkpointing_disable()
    else:
        base.gradient_checkpointing_disable()
