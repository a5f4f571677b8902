"""What the blocks of a model hand to each other in one forward pass.

Besides the hidden states, a block may receive other values that depend on them or on the controls:
the encoder's output in a decoder, T5's bias of relative positions, a value that a control has left.
Those are *messages*. One pass, recorded with gradients, tells them: a message requires a gradient.
Where it comes from is told by identity, since the blocks hand on the very same tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache

from deltacontrol.deltas.editing.passes import Carried
from deltacontrol.theory.errors import InputError

HIDDEN = "hidden"
_PLACE = "carried."


class BlockCall:
    """One call of a block: arguments and result, each taken apart into leaves.

    Args:
        block: the module.
        args: its positional arguments.
        kwargs: its arguments by keyword.
        places: what controls may have left at its entry.

    Raises:
        InputError: there are no hidden states among them.

    Attributes:
        arguments: the leaves of the arguments.
        names: of the arguments that the leaves are in.
        hidden: which leaf is the hidden states.
        carried: the messages that controls have left at its entry, by name.
        left: those at its end.
        result: the leaves of the result; the first are the hidden states.
    """

    def __init__(
        self, block: nn.Module, args: tuple, kwargs: dict[str, Any], places: Sequence[Carried]
    ) -> None:
        found, self._form = pytree.tree_flatten_with_path((args, kwargs))
        self.arguments: list[Any] = [leaf for _, leaf in found]
        self.names = [_name(path, _parameters(block)) for path, _ in found]
        state = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(state, Tensor):
            raise InputError(
                f"{type(block).__name__} is called without hidden states: expected them as its "
                "first argument or as 'hidden_states'."
            )
        self.hidden = next(k for k, leaf in enumerate(self.arguments) if leaf is state)
        self.carried = _left(places)
        self.left: dict[str, Tensor] = {}
        self.result: list[Any] = []
        self._result_form: pytree.TreeSpec | None = None

    @property
    def messages(self) -> dict[int, Tensor]:
        """The leaves of the arguments beside the hidden states that are messages."""
        leaves = enumerate(self.arguments)
        return {k: leaf for k, leaf in leaves if k != self.hidden and is_message(leaf)}

    def end(self, output: Any, places: Sequence[Carried]) -> None:
        """Take the result down, and what controls have left."""
        self.result, self._result_form = pytree.tree_flatten(output)
        self.left = _left(places)

    def with_arguments(self, values: dict[int, Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with other leaves."""
        leaves = [values.get(k, leaf) for k, leaf in enumerate(self.arguments)]
        return pytree.tree_unflatten(leaves, self._form)

    def result_with(self, state: Tensor) -> Any:
        """The result with other hidden states, and NaN in place of the messages.

        So whatever reads a message from where it is no part of the state gives itself away.
        """
        assert self._result_form is not None
        return pytree.tree_unflatten([state, *self.result[1:]], self._result_form)

    def release(self) -> None:
        """Keep what is constant, and let the graph go."""
        for k in (*self.messages, self.hidden):
            self.arguments[k] = None
        self.carried, self.left = {}, {}
        self.result = [
            torch.full_like(leaf, torch.nan, requires_grad=False)
            if k == 0 or is_message(leaf)
            else leaf
            for k, leaf in enumerate(self.result)
        ]

    def has_constants_of(self, other: BlockCall) -> bool:
        """Whether another call, released as this one, has the same arguments beside the state."""
        return (
            self.names == other.names
            and self._form == other._form
            and self.hidden == other.hidden
            and all(map(_is_same, self.arguments, other.arguments))
        )

    def check_cache(self, index: int) -> None:
        """Refuse an argument that the call changes.

        Raises:
            InputError: a cache is among the arguments.
        """
        for name, leaf in zip(self.names, self.arguments, strict=True):
            if isinstance(leaf, Cache):
                raise InputError(
                    f"block {index} receives a cache as {name!r}, which would change its next "
                    "call; set model.config.use_cache = False."
                )


@dataclass
class Messages:
    """Which messages are parts of the state at each block's entry, and where they come from.

    Attributes:
        entering: for each block, the parts beside the hidden states.
        surviving: for each block, those of them that are there before what lies in front of it.
        read: for each block, which leaves of its arguments are which parts.
        made: for each block, which leaves of its result are which parts of the next state.
        given: for the first block of each stack, which leaves of its arguments are which new parts.
    """

    entering: list[dict[str, Tensor]] = field(default_factory=list)
    surviving: list[dict[str, Tensor]] = field(default_factory=list)
    read: list[dict[int, str]] = field(default_factory=list)
    made: list[dict[str, int]] = field(default_factory=list)
    given: dict[int, dict[str, int]] = field(default_factory=dict)


def follow(calls: Sequence[BlockCall], first: AbstractSet[int]) -> Messages:
    """Find the messages of one pass.

    Args:
        calls: of the blocks, in order.
        first: the blocks that begin a stack; before them, the model computes something of its own.

    Raises:
        InputError: a message is computed between two blocks of a stack.
    """
    last_reader = {id(m): i for i, call in enumerate(calls) for m in call.messages.values()}
    found = Messages()
    parts: dict[str, Tensor] = {}

    def take(message: Tensor, name: str, reader: int) -> str:
        """Make a message a part; one that is read no more may leave it its name."""
        for old in [n for n, m in parts.items() if last_reader[id(m)] < reader]:
            del parts[old]
        unused, count = name, 2
        while unused in parts or unused == HIDDEN:
            unused, count = f"{name}.{count}", count + 1
        parts[unused] = message
        return unused

    for i, call in enumerate(calls):
        parts = {name: m for name, m in parts.items() if last_reader[id(m)] >= i}
        found.surviving.append(dict(parts))
        if i in first:
            found.given[i] = {
                take(message, call.names[k], i): k
                for k, message in call.messages.items()
                if _name_of(message, parts) is None
            }
        read = {k: _name_of(message, parts) for k, message in call.messages.items()}
        for k, name in read.items():
            if name is None:
                raise InputError(
                    f"block {i} receives {call.names[k]!r}, which depends on the state or the "
                    "controls and is computed between two blocks, so that it belongs to no stage; "
                    "leave what it is computed from out of the delta, or take another delta."
                )
        found.read.append({k: name for k, name in read.items() if name is not None})
        found.entering.append(parts | call.carried)
        made: dict[str, int] = {}
        if i + 1 < len(calls) and i + 1 not in first:
            for k, leaf in enumerate(call.result):
                later = is_message(leaf) and last_reader.get(id(leaf), 0) > i
                if later and _name_of(leaf, parts) is None:
                    made[take(leaf, _name_where_read(leaf, calls), i + 1)] = k
        found.made.append(made)
    return found


def set_places(places: Sequence[Carried], values: dict[str, Tensor]) -> None:
    """Leave the parts that controls have left where they find them."""
    for name, value in values.items():
        if name.startswith(_PLACE):
            places[int(name.removeprefix(_PLACE))].value = value


def take_places(places: Sequence[Carried], names: Iterable[str]) -> dict[str, Tensor]:
    """What controls have left, of the parts of these names."""
    found = {name: int(name.removeprefix(_PLACE)) for name in names if name.startswith(_PLACE)}
    return {name: places[k].value for name, k in found.items()}


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    return a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b)


def _left(places: Sequence[Carried]) -> dict[str, Tensor]:
    return {f"{_PLACE}{k}": p.value for k, p in enumerate(places) if is_message(p.value)}


def is_message(value: Any) -> bool:
    """Whether a value depends on the state or the controls."""
    return isinstance(value, Tensor) and value.requires_grad


def _name_of(message: Tensor, parts: dict[str, Tensor]) -> str | None:
    return next((name for name, part in parts.items() if part is message), None)


def _name_where_read(message: Tensor, calls: Sequence[BlockCall]) -> str:
    return next(c.names[k] for c in calls for k, m in c.messages.items() if m is message)


def _parameters(block: nn.Module) -> list[str]:
    parameters = list(signature(type(block).forward).parameters.values())[1:]
    plain = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain]


def _name(path: pytree.KeyPath, parameters: list[str]) -> str:
    """The name of an argument, and the keys to the leaf in it."""
    kind, entry, *inside = path
    assert isinstance(kind, pytree.SequenceKey)
    if isinstance(entry, pytree.SequenceKey):
        index = entry.idx
        name = parameters[index] if index < len(parameters) else f"argument {index + 1}"
    else:
        assert isinstance(entry, pytree.MappingKey)
        name = str(entry.key)
    return name + pytree.keystr(tuple(inside))
