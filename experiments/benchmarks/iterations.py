"""Iterations of iLQR and DDP on a residual network, and the time to a residual of 1e-8.

    python -m deltacontrol.experiments.benchmarks.iterations

The problem. Twelve layers ``x + W2 tanh(W1 x + B u)`` of equal width, a control as wide as the
state, one normal start and one normal target, ``Phi = 1/2 ||x_L - target||^2``,
``l = 0.005 ||u||^2``, float64, from zero controls. Layers are Gaussian with variances ``1/width``
(``W1``, ``B``) and ``1/(12 width)`` (``W2``), drawn from seed 0; start and target lie near the edge
of what bounded layers reach, so that they saturate and the problem is far from convex.

An iteration is timed over the first ones of a solve, in turns: by derivatives of all steps at
once, as they are used, and by the loop over steps that is their reference; both walk the same
iterates. Then DDP and Newton's method by conjugate gradients run until the residual is 1e-8.
Times are the clock's, of one thread by default.

For comparison, an accelerated iLQR in JAX took 0.23, 1.4 and 5.8 ms an iteration at widths 16, 64
and 128, and 74 ms (329 iterations), 335 ms (234) and 2.3 s (400, not yet converged) to 1e-8, on two
cores of an AMD EPYC; it is no dependency, and these numbers are not measured here.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from deltacontrol.experiments.benchmarks.contest import quartiles
from deltacontrol.experiments.runs import provenance
from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Cost, Dynamics
from deltacontrol.theory.control.systems import ResidualNetwork
from deltacontrol.theory.solvers import DDP, ILQR, Iterate, NewtonCG, Solver, solve

LAYERS, WEIGHT_DECAY = 12, 1e-2


def network(width: int) -> ControlProblem:
    """The problem above."""
    generator = torch.Generator().manual_seed(1000)
    x0, target = torch.randn((2, width), generator=generator, dtype=torch.float64)
    dynamics = ResidualNetwork.random(LAYERS, width, width, width, seed=0)
    return ControlProblem(dynamics, SquaredErrorCost(target, WEIGHT_DECAY), x0)


class _Steps(Dynamics):
    """The steps of a system, one by one: it offers nothing else."""

    def __init__(self, whole: Dynamics) -> None:
        self.whole, self.horizon, self.control_sizes = whole, whole.horizon, whole.control_sizes

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return self.whole.step(t, x, u)


class _Costs(Cost):
    """The costs of each step, one by one."""

    def __init__(self, whole: Cost) -> None:
        self.whole = whole

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return self.whole.running(t, x, u)

    def terminal(self, x: Tensor) -> Tensor:
        return self.whole.terminal(x)


def one_by_one(problem: ControlProblem) -> ControlProblem:
    """The same problem, of which every step is differentiated and rolled out alone."""
    return ControlProblem(_Steps(problem.dynamics), _Costs(problem.cost), problem.x0)


@dataclass(frozen=True)
class Benchmark:
    """Time iterations of iLQR and DDP.

    Attributes:
        widths: sizes of the state, of the hidden layer and of the control.
        iterations: iterations of a timed solve.
        turns: how often each contestant is timed.
        tol: residual to reach.
        max_steps: iterations at most on the way there.
        threads: threads of torch and of BLAS.
        out: also write the result to this JSON file.
    """

    widths: tuple[int, ...] = (16, 64, 128)
    iterations: int = 10
    turns: int = 7
    tol: float = 1e-8
    max_steps: int = 400
    threads: int = 1
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """Measure, print and return the numbers."""
        import threadpoolctl

        torch.set_num_threads(self.threads)
        with threadpoolctl.threadpool_limits(self.threads):
            result = {
                "layers": LAYERS,
                "weight_decay": WEIGHT_DECAY,
                "threads": self.threads,
                "iteration": [self._iterations(width) for width in self.widths],
                "to_residual": [self._whole(width) for width in self.widths],
                "hardware": provenance.hardware(),
                "packages": provenance.package_versions(),
            }
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _iterations(self, width: int) -> dict[str, Any]:
        whole, found = network(width), {}
        problems = {"together": whole, "one by one": one_by_one(whole)}
        print(f"width {width}, an iteration of the first {self.iterations}")
        for name, solver in (("ilqr", ILQR()), ("ddp", DDP())):
            taken: dict[str, list[float]] = {form: [] for form in problems}
            reached: dict[str, float] = {}
            for turn in range(self.turns + 1):
                order = list(taken) if turn % 2 else list(taken)[::-1]
                for form in order:
                    seconds, reached[form] = timed(problems[form], solver, self.iterations)
                    if turn:  # the first one is warm-up
                        taken[form].append(1e3 * seconds / self.iterations)
            ratio = quartiles(np.divide(taken["together"], taken["one by one"]))
            spread = {form: quartiles(values) for form, values in taken.items()}
            difference = abs(reached["together"] - reached["one by one"])
            print(
                f"  {name:5} {spread['together']['median']:8.2f} ms, one by one "
                f"{spread['one by one']['median']:8.2f} ms, ratio {ratio['median']:.2f} "
                f"({ratio['q25']:.2f}-{ratio['q75']:.2f}), J differs by {difference:.0e}",
                flush=True,
            )
            found[name] = {"milliseconds": spread, "ratio": ratio, "difference": difference}
        return {"width": width} | found

    def _whole(self, width: int) -> dict[str, Any]:
        problem, found = network(width), {}
        print(f"width {width}, to a residual of {self.tol:.0e}")
        for name, solver in (("ilqr", ILQR()), ("ddp", DDP()), ("newton-cg", NewtonCG())):
            taken: list[float] = []
            for _ in range(3):
                began = time.perf_counter()
                solution = solve(problem, solver, max_steps=self.max_steps, tol=self.tol)
                taken.append(1e3 * (time.perf_counter() - began))
            spread = quartiles(taken)
            print(
                f"  {name:9} {spread['median']:9.1f} ms, {solution.iterations} iterations, "
                f"{solution.status.value}, residual {solution.residual.norm:.1e}, "
                f"J {solution.objective:.6f}",
                flush=True,
            )
            found[name] = {
                "milliseconds": spread,
                "iterations": solution.iterations,
                "status": solution.status.value,
                "residual": solution.residual.norm,
                "objective": solution.objective,
            }
        return {"width": width} | found


def timed(problem: ControlProblem, solver: Solver, iterations: int) -> tuple[float, float]:
    """Seconds of some iterations, without the first evaluation, and the last ``J``."""
    moments: list[float] = []
    values: list[float] = []

    def note(iterate: Iterate) -> None:
        moments.append(time.perf_counter())
        values.append(iterate.objective)

    solve(problem, solver, max_steps=iterations, tol=0.0, callback=note)
    return moments[-1] - moments[0], values[-1]


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
