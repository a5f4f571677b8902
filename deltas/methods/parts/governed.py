"""Controls that other controls govern: what one delta trains becomes a function of another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltacontrol.deltas.editing.merging import Merge
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas.editing.host import Host

Values = Callable[[], dict[str, Tensor]]


class Governed:
    """The controls of a delta, held in the hands of another one.

    They stop being parameters. Around every forward pass, ``values()`` takes their places; under
    gradient checkpointing it stays until the next pass, because the backward pass runs parts of
    the forward again. Merging sees ``values()`` too.

    Args:
        host: the model.
        build: lays the controls on it, in the present namespace.
        values: their values by name; called only after ``build``.

    Attributes:
        start: their initial values by name.
        paths: the module of the base model that each acts at, by name; "" where it acts on all.

    Raises:
        InputError: the delta has no controls, or asks for something at the training loop that
            only its own parameters can answer.
    """

    def __init__(self, host: Host, build: Callable[[], None], values: Values) -> None:
        self._host = host
        self._values = values
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._replaced: dict[str, str] = {}  # base parameter -> control that stands for it
        self._earlier: list[tuple[nn.Module, str, Tensor]] = []
        before = dict(host.controls.named_parameters())
        asked = [len(requests) for requests in self._requests()]
        merges, shared = len(host.merges), set(host.shared)
        # Before what the controls themselves do around a pass, because that reads them.
        host.edits.around_passes(self._begin, self._end)
        build()
        if asked != [len(requests) for requests in self._requests()]:
            raise InputError(
                f"{host.namespace}: what it should act over has a penalty, a schedule or a look at "
                "the data of its own, which needs its own parameters; choose another delta."
            )
        added = {n: p for n, p in host.controls.named_parameters() if n not in before}
        if not added:
            raise InputError(f"{host.namespace}: what it should act over has no parameters.")
        self.start = {name: p.detach().clone() for name, p in added.items()}
        self.paths = {
            name: "" if name in set(host.shared) - shared else host.state_path[name]
            for name in added
        }
        for name, parameter in added.items():
            self._demote(name, parameter)
        host.shared[:] = [name for name in host.shared if name not in added]
        host.merges[merges:] = [self._merged(merge) for merge in host.merges[merges:]]
        host.edits.is_reparametrised = True

    def _requests(self) -> tuple[list, list, list]:
        requests = self._host.requests
        return requests.preparations, requests.penalties, requests.after_step

    def _demote(self, name: str, parameter: nn.Parameter) -> None:
        """Make a parameter, wherever it is, a buffer that is not saved."""
        host = self._host
        parameter.requires_grad_(False)
        self._places[name] = []
        for module in host.controls.modules():
            for leaf in [n for n, p in module._parameters.items() if p is parameter]:
                delattr(module, leaf)
                module.register_buffer(leaf, parameter.detach(), persistent=False)
                setattr(module, leaf, parameter.detach())  # modules may keep lists of their own
                self._places[name].append((module, leaf))
        for base in [base for base, control in host.replaced.items() if control == name]:
            self._replaced[base] = host.replaced.pop(base)
            path, _, leaf = base.rpartition(".")
            self._places[name].append((host.sites.modules[path], leaf))
        host.state_path.pop(name)
        host.rate_factors.pop(name, None)

    def _begin(self) -> None:
        for name, value in self._values().items():
            for module, leaf in self._places[name]:
                self._earlier.append((module, leaf, getattr(module, leaf)))
                _put(module, leaf, value)

    def _end(self) -> None:
        # With gradients under checkpointing, the backward pass needs what is there; without them,
        # that of an earlier pass may need what was there before.
        if not (self._host.model.is_activation_checkpointing and torch.is_grad_enabled()):
            self._take_back()
        self._earlier.clear()

    def _take_back(self) -> None:
        for module, leaf, value in self._earlier:
            _put(module, leaf, value)

    @contextmanager
    def _placed(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._take_back()
            self._earlier.clear()

    def _merged(self, merge: Merge) -> Merge:
        """The same merge with the governed values."""
        control = self._replaced.get(merge.name) if merge.whole else None

        def value(present: Tensor) -> Tensor:
            if control is not None:
                return self._values()[control].detach().double()
            with torch.no_grad(), self._placed():
                return merge.value(present)

        return dataclasses.replace(merge, value=value)


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._parameters:  # a base parameter's place takes any tensor this way only
        module._parameters[leaf] = value  # type: ignore[assignment]
    else:
        setattr(module, leaf, value)
