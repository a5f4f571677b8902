"""Any optimiser of `torch.optim` as a solver of control problems.

An iterate is one ``optimiser.step()`` on the controls, with ``grad_u H_t`` by costates as their
gradients: exactly the iterates of the usual loop of a fine-tuning on fixed data.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.errors import InputError, unknown
from deltacontrol.theory.solvers.solving import Ending, Memory, Report, Solver, Status

__all__ = ["Schedule", "TorchOptimiser"]

Schedule: TypeAlias = Callable[[int], float] | Callable[[Optimizer], LRScheduler]

OPTIMISERS: Mapping[str, type[Optimizer]] = {
    name: made
    for name, made in vars(torch.optim).items()
    if isinstance(made, type) and issubclass(made, Optimizer) and made is not Optimizer
}

ENTRYWISE = (
    *(torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop, torch.optim.RMSprop),
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam),
    *(torch.optim.RAdam, torch.optim.Adagrad, torch.optim.Adadelta),
)
"""At rest these move each entry against its own gradient, so that with the projection their fixed
points are the stationary points in a box. A step that mixes entries need not descend projected
(Bertsekas, SIAM J. Control Optim. 20(2), 1982)."""


@dataclass(frozen=True, init=False, repr=False)
class TorchOptimiser(Solver):
    """A `torch.optim.Optimizer` on all controls, one parameter a step of the dynamics.

    What decides is the residual: optimisers with a fixed rate approach a minimum up to the rate
    only, and need a ``schedule`` that falls to go further. A decoupled ``weight_decay``, of which
    AdamW has 0.01 unless told otherwise, is no part of ``J`` and draws the iterates away from its
    stationary points: set it to 0 and put the decay into the cost.

    Optimisers that evaluate several times a step, such as LBFGS, do so; each step is one iterate.
    LBFGS ends the solve where a step no longer changes the controls.

    A box is kept by projecting each iterate, with the optimisers in `ENTRYWISE`.

    An interrupted solve continues with the same iterates: the states of optimiser and schedule are
    in the checkpoint. A schedule that is a function enters the solver's ``repr``, by which
    checkpoints are told apart, by its name.

    Args:
        optimiser: the class, or its name in `torch.optim`.
        schedule: of the rate: a function of the step ``k = 0, 1, ...`` that multiplies the rate, or
            a class of `torch.optim.lr_scheduler`, or a `functools.partial` of one.
        **options: of the optimiser, such as ``lr``.

    Raises:
        InputError: for a name that torch does not have, or for ``maximize``; from `run`, for
            options that the optimiser does not take, and for a box with another optimiser than
            those of `ENTRYWISE`.

    Example:
        ``J(u) = 1/2 (1 + u)^2 + 1/2 u^2``: one step of gradient descent with the right rate.

        >>> from deltacontrol.theory import ControlProblem, LinearDynamics, QuadraticCost, solve
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=one)
        >>> problem = ControlProblem(LinearDynamics.constant(1, one, one), cost, x0=one[0])
        >>> solver = TorchOptimiser("SGD", lr=0.5)
        >>> solver
        TorchOptimiser(SGD, lr=0.5)
        >>> solution = solve(problem, solver)
        >>> solution.iterations, solution.controls[0].item()
        (1, -0.5)
    """

    optimiser: type[Optimizer]
    schedule: Schedule | None
    options: Mapping[str, Any] = field(hash=False)

    takes_box: ClassVar[bool] = True
    default_steps: ClassVar[int] = 2000
    descends: ClassVar[bool] = False

    def __init__(
        self,
        optimiser: type[Optimizer] | str,
        *,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        if isinstance(optimiser, str):
            if optimiser not in OPTIMISERS:
                raise unknown("optimiser of torch.optim", optimiser, OPTIMISERS)
            optimiser = OPTIMISERS[optimiser]
        if not (isinstance(optimiser, type) and issubclass(optimiser, Optimizer)):
            raise InputError(
                f"optimiser is {optimiser!r}; expected a class of torch.optim or its name"
            )
        for name, value in options.items():
            if isinstance(value, int | float) and not abs(value) < sys.float_info.max:
                raise InputError(f"{name} is not a finite number; expected one, such as 0.01")
        if options.get("maximize"):
            raise InputError("maximize=True would raise J; a ControlProblem is minimised")
        object.__setattr__(self, "optimiser", optimiser)
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "options", dict(sorted(options.items())))

    def __repr__(self) -> str:
        """The optimiser, its options and its schedule."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        schedule = "" if self.schedule is None else f", schedule={_described(self.schedule)}"
        return f"TorchOptimiser({self.optimiser.__name__}{options}{schedule})"

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Step until `report` says stop, or until LBFGS no longer moves."""
        name = self.optimiser.__name__
        if problem.box is not None and not issubclass(self.optimiser, ENTRYWISE):
            raise InputError(
                f"{name} mixes the entries of a control, so that its steps cannot be projected on "
                "a box; take SGD or an Adam, or Shooting, ILQR or DDP"
            )
        u, now = u0, problem.evaluate(u0)
        if not u0:
            report(u, now)
            return None
        loop = _Loop(problem, self, u)
        if memory:
            loop.load(memory)
        while not report(u, now, loop.memory()):
            before = u
            u, now = loop.step(u, now)
            if issubclass(self.optimiser, torch.optim.LBFGS) and _equal(before, u):
                return Ending(
                    Status.LINE_SEARCH_FAILED,
                    f"{name} no longer changes the controls (its own max_eval, tolerance_grad "
                    "and tolerance_change end its steps)",
                )
        return None


class _Loop:
    """The optimiser, its schedule and the parameters on which they act."""

    def __init__(self, problem: ControlProblem, solver: TorchOptimiser, u: Controls) -> None:
        self.problem = problem
        self.parameters = [Parameter(control.detach().clone()) for control in u]
        try:
            _try(solver, u)
            self.optimiser = solver.optimiser(self.parameters, **solver.options)
            self.schedule = _scheduler(solver.schedule, self.optimiser)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise InputError(
                f"{solver!r} cannot be made: "
                f"{str(error).partition(chr(10))[0] or type(error).__name__}; see the options of "
                f"torch.optim.{solver.optimiser.__name__}"
            ) from error

    def step(self, u: Controls, now: Evaluation) -> tuple[Controls, Evaluation]:
        """One step of the optimiser and of its schedule; the next iterate.

        Args:
            u: the present controls.
            now: what is known there, so that an optimiser of one evaluation a step costs one.
        """

        def closure() -> Tensor:
            nonlocal u, now
            wanted = self.controls()
            if not _equal(u, wanted):
                u, now = wanted, self.problem.evaluate(wanted)
            for parameter, gradient in zip(self.parameters, now.gradient, strict=True):
                parameter.grad = gradient.clone()
            return now.objective

        self.optimiser.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if self.problem.box is not None:
            for parameter, inside in zip(
                self.parameters, self.problem.box.project(self.controls()), strict=True
            ):
                parameter.data.copy_(inside)
        new = self.controls()
        if not _equal(u, new):
            u, now = new, self.problem.evaluate(new)
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(float(now.objective))
        elif self.schedule is not None:
            self.schedule.step()
        return new, now

    def controls(self) -> Controls:
        """The parameters' present values, copied."""
        return tuple(parameter.detach().clone() for parameter in self.parameters)

    def memory(self) -> dict[str, Tensor]:
        """The states of optimiser and schedule, copied, as tensors."""
        state = {"optimiser": self.optimiser.state_dict()}
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        return _packed(state)

    def load(self, memory: Memory) -> None:
        """Go on from what `memory` gave."""
        state = _unpacked(memory)
        self.optimiser.load_state_dict(state["optimiser"])
        # Torch casts the states to the parameters' dtype, in which NAdam's float32 product of
        # momenta would round otherwise.
        for index, kept in state["optimiser"]["state"].items():
            loaded = self.optimiser.state[self.parameters[index]]
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    loaded[name] = value.to(loaded[name].device)
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])


def _try(solver: TorchOptimiser, u: Controls) -> None:
    """One step on small tensors of the controls' kinds: torch reads most options only in a step."""
    known = inspect.signature(solver.optimiser).parameters
    for name, value in solver.options.items():
        usual = known[name].default if name in known else None
        # Some versions of torch take a tuple that is too long, and leave its end unread.
        fits = isinstance(value, tuple | list) and len(value) == len(usual or ())
        if isinstance(usual, tuple) and not fits:
            raise ValueError(f"{name} is {value!r}; expected {len(usual)} numbers")
    small = [Parameter(u_t.new_zeros([min(size, 2) for size in u_t.shape])) for u_t in u]
    optimiser = solver.optimiser(small, **solver.options)
    schedule = _scheduler(solver.schedule, optimiser)

    def closure() -> Tensor:
        for parameter in small:
            parameter.grad = torch.ones_like(parameter)
        return torch.ones((), dtype=small[0].dtype, device=small[0].device)

    optimiser.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if isinstance(schedule, ReduceLROnPlateau):
        schedule.step(1.0)
    elif schedule is not None:
        schedule.step()


def _scheduler(schedule: Schedule | None, optimiser: Optimizer) -> LRScheduler | None:
    if schedule is None:
        return None
    made = schedule.func if isinstance(schedule, partial) else schedule
    if isinstance(made, type) and issubclass(made, LRScheduler):
        return schedule(optimiser)  # pyright: ignore[reportArgumentType, reportReturnType]
    return LambdaLR(optimiser, schedule)  # pyright: ignore[reportArgumentType]


def _described(schedule: Any) -> str:
    """A name that is the same in each process."""
    if isinstance(schedule, partial):
        arguments = [_described(a) for a in schedule.args]
        arguments += [f"{name}={_described(a)}" for name, a in schedule.keywords.items()]
        return f"{_described(schedule.func)}({', '.join(arguments)})"
    if isinstance(schedule, type):
        return schedule.__name__
    if callable(schedule) and hasattr(schedule, "__qualname__"):
        return f"{schedule.__module__}.{schedule.__qualname__}"
    return repr(schedule)


def _equal(one: Controls, other: Controls) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


_STRUCTURE = "structure"


def _packed(state: Any) -> dict[str, Tensor]:
    """A nested state as named tensors; one of them spells its structure out as JSON."""
    tensors: dict[str, Tensor] = {}

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"state.{len(tensors)}"
            tensors[name] = value.detach().clone()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"mapping": [[key, place(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [place(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise InputError(
            f"the state of the optimiser or of its schedule holds {value!r}, which a checkpoint "
            "cannot keep; expected numbers, texts and tensors"
        )

    text = json.dumps(place(state)).encode()
    return {**tensors, _STRUCTURE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _unpacked(memory: Memory) -> Any:
    def value(place: Any) -> Any:
        if not isinstance(place, dict):
            return place
        ((kind, content),) = place.items()
        if kind == "tensor":
            return memory[content].clone()
        if kind == "mapping":
            return {key: value(item) for key, item in content}
        items = [value(item) for item in content]
        return tuple(items) if kind == "tuple" else items

    return value(json.loads(bytes(memory[_STRUCTURE].cpu().tolist())))
