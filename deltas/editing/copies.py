"""What the hooks of deltas do while several copies of them share a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from deltacontrol.theory.errors import InputError

# A dictionary of a module and the key under which it keeps a tensor.
Place = tuple[dict[str, Any], str]


class Actors(Protocol):
    """Deltas whose hooks ask whether several copies of them share the present pass."""

    copies: Copies | None


class Copies:
    """The copies of a pass: the values of their controls, and how a law acts for each of them.

    Args:
        values: of every control and its constants by name, (size, …).
        places: where modules keep them.
        size: how many copies.
        rows: of the whole batch.
        used: filled with the names of the controls that each law uses; keep it for the next pass.

    Raises:
        InputError: the rows cannot be shared among the copies.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        places: Mapping[str, list[Place]],
        size: int,
        rows: int,
        used: dict[Any, list[str]],
    ) -> None:
        if rows % size:
            raise InputError(
                f"a batch of {rows} rows cannot be shared by {size} copies; put the rows of every "
                "copy one after another, as many for each."
            )
        self.values, self.places, self.size, self.used = dict(values), places, size, used
        self.rows = rows // size

    @contextmanager
    def acting(self, actors: Actors) -> Iterator[None]:
        """Let deltas act for these copies in the passes inside."""
        if self.size == 1:  # an ordinary pass, with other values
            with self._in_place({name: value[0] for name, value in self.values.items()}):
                yield
            return
        actors.copies = self
        try:
            yield
        finally:
            actors.copies = None

    def output(
        self, law: Callable[[tuple, Tensor], Tensor], inputs: tuple, output: Tensor
    ) -> Tensor:
        """``law(inputs, output)`` of every copy.

        Raises:
            InputError: the output does not hold rows of each copy, such as that of an embedding of
                one list of positions for all rows.
        """
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 1:
            raise self._no_rows(output)
        whole = list(inputs)
        own = [i for i, value in enumerate(inputs) if self._is_shared_out(value)]

        def one(values: dict[str, Tensor], parts: list[Tensor], output: Tensor) -> Tensor:
            for i, part in zip(own, parts, strict=True):
                whole[i] = part
            with self._in_place(values):
                return law(tuple(whole), output)

        parts = [self._share_out(inputs[i]) for i in own]
        return self._map(law, one, parts, self._share_out(output)).flatten(0, 1)

    def call(self, law: Callable[[tuple, dict], tuple], args: tuple, kwargs: dict) -> tuple:
        """``law(args, kwargs)`` of every copy, one after another: arguments are of any kind.

        What the law passes on unchanged, and is not shared out, stays what it is: a table of all
        rows may be as long as the rows of one copy.
        """
        leaves, tree = tree_flatten((args, kwargs))
        common = {id(leaf) for leaf in leaves if not self._is_shared_out(leaf)}
        results = []
        for k in range(self.size):
            own = [self._share_out(x)[k] if self._is_shared_out(x) else x for x in leaves]
            with self._in_place({name: value[k] for name, value in self.values.items()}):
                results.append(law(*tree_unflatten(own, tree)))
        flat = [tree_leaves(result) for result in results]
        merged = []
        for pieces in zip(*flat, strict=True):
            first = pieces[0]
            rows = isinstance(first, Tensor) and first.dim() > 1 and not len(first) % self.rows
            merged.append(torch.cat(pieces) if rows and id(first) not in common else first)
        return tree_unflatten(merged, tree_flatten(results[0])[1])

    def prefix(self, prefix: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of a prefix, each (all rows, heads, length, head width)."""

        def one(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with self._in_place(values):
                return prefix()

        keys, values = self._map(prefix, one)
        return keys.repeat_interleave(self.rows, 0), values.repeat_interleave(self.rows, 0)

    def module(self, forward: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """The output of a base module whose weights are controls, other ones in each copy."""

        def one(values: dict[str, Tensor], state: Tensor) -> Tensor:
            with self._in_place(values):
                return forward(state)

        return self._map(forward, one, self._share_out(state)).flatten(0, 1)

    def _map(self, law: Any, one: Callable[..., Any], *parts: Any) -> Any:
        """``one(values, *parts)`` of every copy, with the values that ``law`` uses.

        The first time it is mapped over all values, and watched; wrapping hundreds of values at
        every site would cost more than the laws.
        """
        if law in self.used:
            values = {name: self.values[name] for name in self.used[law]}
            return vmap(one, randomness="different")(values, *parts)
        used: set[str] = set()

        def watched(values: dict[str, Tensor], *parts: Any) -> Any:
            with _Watch({id(value): name for name, value in values.items()}, used):
                return one(values, *parts)

        result = vmap(watched, randomness="different")(self.values, *parts)
        if used:
            self.used[law] = sorted(used)
        return result

    @contextmanager
    def _in_place(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        places = [
            (place, leaf, value) for n, value in values.items() for place, leaf in self.places[n]
        ]
        earlier = [place[leaf] for place, leaf, _ in places]
        for place, leaf, value in places:
            place[leaf] = value
        try:
            yield
        finally:
            for (place, leaf, _), value in zip(places, earlier, strict=True):
                place[leaf] = value

    def _is_shared_out(self, value: Any) -> bool:
        """Whether a tensor holds the copies' rows (or tokens) one after another.

        One with a single axis does not: no law of a delta that can be stacked takes one number a
        row, and models hold the positions of all rows in such a list.
        """
        whole = self.size * self.rows
        return isinstance(value, Tensor) and value.dim() > 1 and not len(value) % whole

    def _share_out(self, value: Tensor) -> Tensor:
        if not self._is_shared_out(value):
            raise self._no_rows(value)
        return value.unflatten(0, (self.size, -1))

    def _no_rows(self, value: Tensor) -> InputError:
        return InputError(
            f"a control acts at a state of shape {tuple(value.shape)}, which does not hold "
            f"{self.rows} rows of each of {self.size} copies; train one after another."
        )


class _Watch(TorchFunctionMode):
    """Notes which of the tensors in question reach a function of torch."""

    def __init__(self, names: Mapping[int, str], used: set[str]) -> None:
        super().__init__()
        self.names, self.used = names, used

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Note, and call."""
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.names:
                self.used.add(self.names[id(leaf)])
        return func(*args, **kwargs)


def map_over_copies(module: nn.Module, current: Callable[[], Copies | None]) -> Callable[[], None]:
    """Let a module whose weights are controls use each copy's own while copies share a pass.

    Args:
        module: a linear map or a normalisation.
        current: the copies of the present pass, or None.

    Returns:
        What takes it back.
    """
    plain, earlier = module.forward, module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        copies = current()
        return copies.module(plain, *args, **kwargs) if copies else plain(*args, **kwargs)

    def undo() -> None:
        del module.__dict__["forward"]
        if earlier is not None:
            module.__dict__["forward"] = earlier

    module.__dict__["forward"] = forward
    return undo
