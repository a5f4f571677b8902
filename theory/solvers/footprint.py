"""How much memory a solver will need, before it is started.

A problem on few examples is measured: the sizes of its states, and what each step keeps for its
backward sweep. States and what is kept grow linearly with the number of examples, so that two
small problems tell a large one. What the solvers add:

    any method        the states and costates of two iterates, and the graph of one step
    Gauss-Newton and  the graphs of all steps, kept between products (twice, for the second
    Newton-CG         derivative), unless ``keep`` is off
    iLQR and DDP      dense first and second derivatives of every step,
                      sum_t n_{t+1} (n_t + m_t) + (n_t + m_t)^2 numbers, and the graph of one
                      step for each of the sweeps that are done at once
    L-BFGS            the steps that it remembers

These are estimates of the largest parts, to the factor two or so: they tell what fits from what
does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.solvers.gauss_newton import GaussNewton, NewtonCG
from deltacontrol.theory.solvers.ilqr import DDP, ILQR
from deltacontrol.theory.solvers.quadratic_model import MAX_STATE
from deltacontrol.theory.solvers.shooting import Shooting
from deltacontrol.theory.solvers.solving import Solver
from deltacontrol.theory.solvers.torch_optimiser import TorchOptimiser

__all__ = ["Footprint", "obstacle"]

_SWEEPS = 256  # of `quadratic_model`, at once
_COPIES = 3  # of dense derivatives: as taken, their negative part, and what a sweep makes of them


@dataclass(frozen=True)
class Footprint:
    """The sizes of a problem whose controls are shared by its examples.

    Attributes:
        states: the numbers of entries of ``x_0..x_L``; 0 where a state holds integers.
        controls: the numbers of entries of ``u_0..u_{L-1}``.
        kept: the bytes that each step keeps for its backward sweep.
        itemsize: the bytes of a number.
    """

    states: tuple[float, ...]
    controls: tuple[int, ...]
    kept: tuple[float, ...]
    itemsize: int

    @classmethod
    def of(cls, problem: ControlProblem) -> Footprint:
        """Measure a problem by one rollout."""
        x, states, kept = problem.x0, [problem.x0], []
        controls = problem.initial_controls()
        for t, u in enumerate(controls):
            seen: dict[int, int] = {}

            def keep(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
                return tensor

            start = x.detach()
            if start.is_floating_point():
                start.requires_grad_()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda s: s):
                x = problem.dynamics.step(t, start, u.detach().requires_grad_())
            x = x.detach()
            states.append(x)
            kept.append(float(sum(seen.values())))
        return cls(
            tuple(float(s.numel() * s.is_floating_point()) for s in states),
            tuple(u.numel() for u in controls),
            tuple(kept),
            max((u.element_size() for u in controls), default=8),
        )

    def extended(self, other: Footprint, examples: int) -> Footprint:
        """The footprint for so many examples, this being that of one, and ``other`` that of two."""

        def line(one: tuple[float, ...], two: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(
                a + max(b - a, 0.0) * (examples - 1) for a, b in zip(one, two, strict=True)
            )

        return Footprint(
            line(self.states, other.states),
            self.controls,
            line(self.kept, other.kept),
            self.itemsize,
        )

    def needed(self, solver: Solver) -> float:
        """The bytes that a solver needs, about."""
        numbers = 4.0 * sum(self.states) + 6.0 * sum(self.controls)
        graphs = max(self.kept, default=0.0)
        if isinstance(solver, GaussNewton | NewtonCG):
            graphs = 2 * (sum(self.kept) if solver.keep else graphs)
        elif isinstance(solver, ILQR | DDP):
            pairs = zip(self.states, self.states[1:], self.controls, strict=False)
            dense = sum(after * (n + m) + (n + m) ** 2 for n, after, m in pairs)
            numbers += _COPIES * (dense + self.states[-1] ** 2)
            graphs *= min(_SWEEPS, max(self.states))
        elif isinstance(solver, Shooting):
            numbers += 2.0 * solver.memory * sum(self.controls)
        elif isinstance(solver, TorchOptimiser):
            past = solver.options.get("history_size", 100)
            remembers = issubclass(solver.optimiser, torch.optim.LBFGS)
            numbers += 2.0 * past * sum(self.controls) if remembers else 0.0
        return numbers * self.itemsize + graphs


def obstacle(solver: Solver, footprint: Footprint, available: float) -> str:
    """Why a solver cannot serve a problem of this size, and what can; empty where it can.

    Args:
        solver: the method.
        footprint: of the problem.
        available: bytes of memory that are free.
    """
    name = type(solver).__name__
    largest = max(footprint.states)
    if isinstance(solver, ILQR | DDP) and largest > MAX_STATE:
        return (
            f"{name} forms dense second derivatives, of states with at most {MAX_STATE} entries; "
            f"here a state of all examples has {largest:.0f}: take fewer examples or shorter "
            "texts, or NewtonCG or GaussNewton, which form no matrix"
        )
    needed = footprint.needed(solver)
    if needed <= available:
        return ""
    if isinstance(solver, ILQR | DDP):
        advice = "fewer examples or smaller controls, or NewtonCG or GaussNewton, which form none"
        why = f"dense derivatives, of up to {max(footprint.controls):,} controls in a step"
    elif isinstance(solver, GaussNewton | NewtonCG) and solver.keep:
        advice = "fewer examples, the option keep=false, or Shooting"
        why = "the graphs of all steps"
    else:
        advice = "fewer examples or shorter texts; an optimiser on small batches serves any number"
        why = "the states of all examples"
    return (
        f"{name} would need about {needed / 2**30:.3g} GiB here, for {why}, and "
        f"{available / 2**30:.3g} GiB are free; take {advice}"
    )
