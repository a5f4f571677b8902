"""Every solver, and the problems that it is for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import isabstract

import pytest
import torch

from deltacontrol.theory import solvers
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.solvers import MSA, Solution, Solver, TorchOptimiser, solve
from deltacontrol.theory.solvers.emsa import ExtendedMSA
from deltacontrol.theory.solvers.gauss_newton import GaussNewton, NewtonCG
from deltacontrol.theory.solvers.ilqr import DDP, ILQR
from deltacontrol.theory.solvers.riccati import Riccati
from tests.theory.dense import flat, hessian
from tests.theory.problems import CASES, Case

F64 = torch.float64


@dataclass(frozen=True)
class Entry:
    """A solver of the suite: how to make it for a problem, and which cases it is for."""

    kind: type[Solver]
    tol: float
    max_steps: int
    tol32: float = 1e-4  # the residual that it reaches in float32
    variant: str = ""

    @property
    def name(self) -> str:
        return self.kind.__name__ + (f"-{self.variant}" if self.variant else "")

    def make(self, problem: ControlProblem, at: Controls) -> Solver:
        return MAKERS.get(self.name, self.kind.example)(problem, at)

    def solves(self, case: Case) -> bool:
        if self.kind is ExtendedMSA or self.variant == "adam":
            return case.name in EXTENDED
        return case.linear_quadratic or not self.kind.linear_quadratic


def msa(problem: ControlProblem, at: Controls) -> Solver:
    return MSA(1.0 / float(torch.linalg.eigvalsh(hessian(problem, at))[-1]))


def descent(problem: ControlProblem, at: Controls) -> Solver:
    rate = 1.0 / float(torch.linalg.eigvalsh(hessian(problem, at))[-1])
    return TorchOptimiser(torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True)


def quasi_newton(problem: ControlProblem, at: Controls) -> Solver:
    """One iteration of L-BFGS a step."""
    return TorchOptimiser(
        "LBFGS",
        max_iter=1,
        max_eval=25,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )


def found() -> Iterator[type[Solver]]:
    """Every solver of the package, wherever its file."""
    for info in pkgutil.iter_modules(solvers.__path__, solvers.__name__ + "."):
        for kind in vars(importlib.import_module(info.name)).values():
            if isinstance(kind, type) and issubclass(kind, Solver) and not isabstract(kind):
                if kind.__module__ == info.name and not kind.__name__.startswith("_"):
                    yield kind


MAKERS = {
    "MSA": msa,
    "TorchOptimiser-sgd": descent,
    "TorchOptimiser-adam": lambda problem, at: TorchOptimiser("Adam", lr=0.02),
    "TorchOptimiser-lbfgs": quasi_newton,
}
# Extended MSA and Adam are slow where J is badly conditioned; tests/theory/test_msa.py and
# tests/theory/test_torch_optimiser.py have more of them.
EXTENDED = ("scalar", "varying-batch", "varying-per-example", "classifier")
# A solver that is not listed has to reach 1e-7 in 20,000 steps.
FASTER = {
    ILQR: (1e-8, 200),
    DDP: (1e-9, 30),
    GaussNewton: (1e-8, 200),
    NewtonCG: (1e-8, 30),
    Riccati: (1e-9, 2),
}
SOLVERS = [
    *(Entry(k, *FASTER.get(k, (1e-7, 20_000))) for k in found() if k is not TorchOptimiser),
    Entry(TorchOptimiser, 1e-7, 20_000, variant="sgd"),
    Entry(TorchOptimiser, 1e-7, 20_000, variant="adam"),
    # Torch's line search gives up at (eps |J| curvature)^(1/2), 6e-4 for the network in float32.
    Entry(TorchOptimiser, 1e-7, 200, tol32=3e-4, variant="lbfgs"),
]
GENERAL = [entry for entry in SOLVERS if not entry.kind.linear_quadratic]
# L-BFGS of torch mixes the entries of a control, so its steps cannot be projected.
KEEPING = [e for e in SOLVERS if e.kind.takes_box and e.variant != "lbfgs"]

# Sweeps of extended MSA minimise at every step: seconds where the others take milliseconds.
FIRST_ORDER = ("MSA", "TorchOptimiser-sgd")
SLOW_KINDS = (ExtendedMSA, ILQR)
SLOW_CASES = ("varying-batch", "varying-per-example")


def slow_marked(entries: list[Entry]) -> list[object]:
    """The entries as parameters; the slowest are left to `make slow`."""
    return [
        pytest.param(
            e,
            id=e.name,
            marks=pytest.mark.slow if e.kind in SLOW_KINDS or e.variant in ("adam", "sgd") else (),
        )
        for e in entries
    ]


def is_slow(entry: Entry, case: Case) -> bool:
    """Whether a pair is left to `make slow`."""
    if entry.variant == "adam":  # thousands of steps; test_torch_optimiser.py has quicker ones
        return case.name != "scalar"
    if entry.kind in (MSA, ILQR, GaussNewton) or entry.variant == "sgd":
        return case.name == "low-rank" or (entry.name in FIRST_ORDER and case.name in SLOW_CASES)
    return entry.kind is ExtendedMSA and case.name in SLOW_CASES


# Of the quicker pairs `make test` takes each fifth one, so that the tests share their solutions.
_solved_pairs = [(entry, case) for entry in SOLVERS for case in CASES if entry.solves(case)]
_quick_pairs = [pair for pair in _solved_pairs if not is_slow(*pair)][::5]
PAIRS = [
    pytest.param(
        *pair,
        id=f"{pair[0].name}-{pair[1].name}",
        marks=() if pair in _quick_pairs else pytest.mark.slow,
    )
    for pair in _solved_pairs
]
LQ_PAIRS = [pair for pair in PAIRS if pair.values[1].linear_quadratic]

_solved: dict[tuple[str, str], Solution] = {}


def solved(entry: Entry, case: Case) -> Solution:
    """The solution of a case, computed once."""
    key = (entry.name, case.name)
    if key not in _solved:
        problem = case.make()
        # A bilinear problem is stationary at zero, so that one starts elsewhere.
        start = case.start(problem, 0.0 if case.strongly_convex else 0.5)
        solver = entry.make(problem, start)
        _solved[key] = solve(problem, solver, start, max_steps=entry.max_steps, tol=entry.tol)
    return _solved[key]


def curvature(case: Case, at: Controls) -> float:
    """The smallest eigenvalue of the Hessian of ``J``."""
    return float(torch.linalg.eigvalsh(hessian(case.make(), at))[0])


def distance(a: Controls, b: Controls) -> float:
    return float((flat(a) - flat(b)).norm())
