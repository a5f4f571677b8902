"""What goes through a module, and what goes on around a whole forward pass of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

_SLOT = "deltacontrol_passes"


def first_tensor(output: Any) -> Tensor:
    """The hidden state in a module's output, which is a tensor or a tuple that starts with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_first_tensor(output: Any, value: Tensor) -> Any:
    """The same output with another hidden state."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, ModelOutput):
        changed = copy(output)
        changed[next(iter(output))] = value
        return changed
    return (value, *output[1:])


class Carried:
    """What one module of a forward pass leaves for a later one; see :meth:`Host.carry`."""

    def __init__(self) -> None:
        self.value: Any = None

    def take(self) -> Any:
        """The value, which is needed no longer."""
        value, self.value = self.value, None
        return value


def around_passes(
    model: PreTrainedModel, begin: Callable[[], None], end: Callable[[], None]
) -> list[Callable[[], None]]:
    """Call ``begin`` before and ``end`` behind every pass of a model, also one that fails.

    A pass that runs inside another one is part of it. In generation an encoder runs by itself,
    outside of the model's own forward, and counts as a pass then.

    Returns:
        What takes both off again.
    """
    running: list[nn.Module] = []

    def enter(module: nn.Module, _args: tuple) -> None:
        if module is model and running:  # an interrupt left the pass before; torch calls no hook
            running.clear()
            end()
        running.append(module)
        if len(running) == 1:
            begin()

    def leave(module: nn.Module, _args: tuple, _output: Any) -> None:
        if running and running.pop() is module and not running:
            end()

    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    around = (begin, end)
    model.__dict__.setdefault(_SLOT, []).append(around)

    def forget() -> None:
        model.__dict__[_SLOT].remove(around)
        if not model.__dict__[_SLOT]:
            del model.__dict__[_SLOT]

    undo: list[Callable[[], None]] = [forget]
    for module in filter(None, (model, encoder)):
        undo.append(module.register_forward_pre_hook(enter).remove)
        undo.append(module.register_forward_hook(leave, always_call=True).remove)
    return undo


@contextmanager
def counted_as_pass(model: PreTrainedModel) -> Iterator[None]:
    """Let a part of a model that is called by itself, such as a block, be a pass of its own."""
    begun: list[Callable[[], None]] = []
    try:
        for begin, end in model.__dict__.get(_SLOT, ()):
            begun.append(end)
            begin()
        yield
    finally:
        for end in begun:
            end()
