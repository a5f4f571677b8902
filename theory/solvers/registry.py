"""Solvers by name: found in ``theory/solvers``, written as ``newton-cg:radius=2,forcing=0.2``.

A solver's name is that of its class in kebab case; an optimiser of `torch.optim`, taken by
`TorchOptimiser`, is named by its class in lower case ("adamw", "sgd", "lbfgs"). Options are the
fields that are numbers, texts or switches. Users' own solvers are found as
`deltacontrol.theory.plugins` says.

Two options differ from torch's defaults, because a solver lowers ``J`` alone: ``weight_decay`` is
0, and LBFGS searches along its lines by the strong Wolfe conditions.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltacontrol.theory import parsing, plugins, solvers
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown
from deltacontrol.theory.solvers.minimisers import GradientStep, Minimiser
from deltacontrol.theory.solvers.solving import Solver
from deltacontrol.theory.solvers.torch_optimiser import OPTIMISERS, TorchOptimiser

__all__ = ["available", "fields", "make", "parse", "text_of"]

_PLAIN = (bool, int, float, str)
# What a text does not choose: how torch computes, and the direction, which is down.
_FIXED = {"capturable", "differentiable", "foreach", "fused", "maximize"}
_OWN_DEFAULTS: dict[str, Any] = {"weight_decay": 0.0, "line_search_fn": "strong_wolfe"}
# Optimisers of torch that take no controls, and why.
_UNUSABLE = {
    "SparseAdam": "takes sparse gradients alone, and those of controls are dense",
    "Muon": "takes matrices alone, and the controls of a step are one vector",
}


def available() -> dict[str, type[Solver] | type[Optimizer]]:
    """All solvers by name, in alphabetical order; users' own among them."""
    added = ((_kebab(kind.__name__), kind) for kind in plugins.members(Solver))
    return plugins.merged("solver", _own(), added)


@cache
def _own() -> dict[str, type[Solver] | type[Optimizer]]:
    found: dict[str, Any] = {
        name.lower(): kind for name, kind in OPTIMISERS.items() if name not in _UNUSABLE
    }
    found |= {_kebab(kind.__name__): kind for kind in plugins.defined(solvers, Solver)}
    del found[_kebab(TorchOptimiser.__name__)]  # which is written by the optimiser's name
    return found


def users_own(config: Mapping[str, Any]) -> set[type[Solver]]:
    """Users' own classes that a configuration names as its ``solver`` or ``optimiser``."""
    own = {_kebab(kind.__name__): kind for kind in plugins.members(Solver)}
    named = (str(config.get(field, "")).partition(":")[0] for field in ("solver", "optimiser"))
    return {own[name] for name in named if name in own}


def fields(name: str) -> dict[str, tuple[Any, Any]]:
    """The options of a solver with their types and defaults; ``rate`` is that of a gradient step.

    Raises:
        InputError: there is no such solver, or torch has it and it takes no controls.
    """
    if name not in available():
        for left_out, reason in _UNUSABLE.items():
            if name == left_out.lower():
                raise InputError(f"the optimiser {name} {reason}; take adamw or sgd.")
        raise unknown("solver", name, available())
    kind = available()[name]
    if issubclass(kind, Optimizer):
        return _torch_fields(kind)
    found = {}
    for field, (hint, default) in parsing.fields_of(kind).items():
        plain = _plain(hint)
        if plain is not None:
            found["rate" if _is_rate(hint) else field] = (plain, default)
    return found


@typed
def parse(text: str) -> Solver:
    """The solver of a text such as ``ddp``, ``msa:rate=0.1`` or ``adamw:lr=0.01,betas=0.9+0.99``.

    Raises:
        InputError: unknown name or option, a value of the wrong type, or one that the solver
            refuses.

    Example:
        >>> parse("newton-cg:radius=2")
        NewtonCG(radius=2.0, forcing=0.1, max_products=250, keep=True)
        >>> parse("sgd:lr=0.1")
        TorchOptimiser(SGD, lr=0.1, weight_decay=0.0)
    """
    name, values = parsing.split("solver", text, fields)
    return make(name, values)


def make(name: str, values: Mapping[str, Any]) -> Solver:
    """The solver of a name, with options.

    Raises:
        InputError: as `parse`.
    """
    known = fields(name)
    found = parsing.converted("solver", name, values, known)
    kind = available()[name]
    if issubclass(kind, Optimizer):
        own = {key: value for key, value in _OWN_DEFAULTS.items() if key in known}
        solver = TorchOptimiser(kind, **(own | found))
        try:
            kind([torch.nn.Parameter(torch.zeros(2, 2))], **solver.options)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise InputError(f"the solver {name} cannot be made: {error}") from error
        return solver
    for key, (hint, _) in parsing.fields_of(kind).items():
        if _is_rate(hint) and "rate" in found:
            found[key] = found.pop("rate")
    return kind(**found)


def text_of(solver: Solver) -> str:
    """The text of a solver, with every option: equal solvers have equal texts, and only they.

    Of an optimiser of torch the text has the options that were given, and the two defaults above.

    Raises:
        InputError: an option cannot be written, such as a schedule or a minimiser with settings.
    """
    plain, name = True, _kebab(type(solver).__name__)
    if isinstance(solver, TorchOptimiser):
        name, plain = solver.optimiser.__name__.lower(), solver.schedule is None
        values = dict(solver.options)
        values = {k: v for k, v in _OWN_DEFAULTS.items() if k in fields(name)} | values
    else:
        values = {}
        for field, (hint, default) in parsing.fields_of(type(solver)).items():
            value = getattr(solver, field)
            if _is_rate(hint) and isinstance(value, GradientStep):
                values["rate"] = value.step_size
            elif _plain(hint) is not None and not isinstance(value, Minimiser):
                values[field] = value
            else:
                plain = plain and value == default
    unknown_options = set(values) - set(fields(name))
    if not plain or unknown_options:
        raise InputError(
            f"{solver!r} cannot be written as a text, as a record's configuration needs it; its "
            f"options are {', '.join(fields(name)) or 'none'}"
        )
    values = parsing.converted("solver", name, values, fields(name))
    written = ",".join(f"{key}={_written(values[key])}" for key in sorted(values))
    return f"{name}:{written}" if written else name


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _torch_fields(kind: type[Optimizer]) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(kind.__init__)
    found = {}
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        plain = _plain(hints.get(key))
        if key not in _FIXED and plain is not None:
            found[key] = (plain, _OWN_DEFAULTS.get(key, parameter.default))
    return found


def _plain(hint: Any) -> Any:
    """The type of an option as a text gives it; None where a text cannot."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN or origin is typing.Literal:
        return hint
    if origin in (typing.Union, types.UnionType):
        plain = [a for a in args if _plain(a) is not None or a is type(None)]
        others = [a for a in args if a not in plain]
        if not plain or plain == [type(None)] or not all(_replaceable(a) for a in others):
            return None
        return typing.Union[tuple(plain)]  # noqa: UP007 - of a list
    if origin is tuple and args and _plain(args[0]) is not None:
        return tuple[_plain(args[0]), ...]
    return None


def _replaceable(kind: Any) -> bool:
    """Whether a number may stand for an instance."""
    return kind in (Tensor, Minimiser)


def _is_rate(hint: Any) -> bool:
    return set(typing.get_args(hint)) == {Minimiser, float}


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()
