"""Solvers by name: found, written as texts, refused by name; and what memory they need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltacontrol.theory import ControlProblem, plugins, solve
from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import (
    DDP,
    ILQR,
    MSA,
    ExtendedMSA,
    GaussNewton,
    InnerLBFGS,
    NewtonCG,
    Shooting,
    TorchOptimiser,
    registry,
)
from deltacontrol.theory.solvers.footprint import Footprint, obstacle

MINE = '''
from dataclasses import dataclass

from deltacontrol.theory.solvers import Solver


@dataclass(frozen=True)
class SlowDescent(Solver):
    """Gradient descent."""

    rate: float = 0.1

    def run(self, problem, u0, report, memory):
        u, now = u0, problem.evaluate(u0)
        while not report(u, now):
            u = tuple(a - self.rate * g for a, g in zip(u, now.gradient))
            now = problem.evaluate(u)
'''


def problem(size: int = 3, examples: int | None = None) -> ControlProblem:
    generator = torch.Generator().manual_seed(0)
    A = torch.eye(size, dtype=torch.float64) * 0.9
    B = torch.randn(size, 2, dtype=torch.float64, generator=generator)
    cost = QuadraticCost.constant(4, Q=0 * A, R=torch.eye(2, dtype=torch.float64), Qf=A)
    shape = (size,) if examples is None else (examples, size)
    x0 = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return ControlProblem(LinearDynamics.constant(4, A, B), cost, x0)


def test_every_solver_of_the_folder_has_its_name() -> None:
    known = registry.available()
    ours = {"ddp": DDP, "ilqr": ILQR, "msa": MSA, "newton-cg": NewtonCG, "shooting": Shooting}
    ours |= {"gauss-newton": GaussNewton, "extended-msa": ExtendedMSA}
    assert {name: known[name] for name in ours} == ours
    assert known["lbfgs"] is torch.optim.LBFGS and known["rmsprop"] is torch.optim.RMSprop
    assert "torch-optimiser" not in known and "sparseadam" not in known
    assert "muon" not in known


@pytest.mark.parametrize(
    ("text", "solver"),
    [
        ("ddp", DDP()),
        ("newton-cg:radius=2,keep=false", NewtonCG(radius=2.0, keep=False)),
        ("gauss-newton:max_products=7", GaussNewton(max_products=7)),
        ("msa:rate=0.1", MSA(0.1)),
        ("extended-msa:rho=3", ExtendedMSA(rho=3.0)),
        ("sgd:lr=0.1,momentum=0.9", TorchOptimiser("SGD", lr=0.1, momentum=0.9, weight_decay=0.0)),
        ("adamw:betas=0.8+0.9", TorchOptimiser("AdamW", betas=(0.8, 0.9), weight_decay=0.0)),
        ("lbfgs:max_eval=none", TorchOptimiser("LBFGS", max_eval=None,
                                               line_search_fn="strong_wolfe")),
    ],
)  # fmt: skip
def test_a_text_is_a_solver_and_back(text: str, solver: object) -> None:
    parsed = registry.parse(text)
    assert parsed == solver
    assert registry.parse(registry.text_of(parsed)) == parsed


def test_texts_of_equal_solvers_are_equal() -> None:
    assert registry.text_of(NewtonCG()) == registry.text_of(registry.parse("newton-cg:radius=1"))
    assert registry.text_of(NewtonCG()) != registry.text_of(NewtonCG(radius=2.0))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ddq", "unknown solver 'ddq'; nearest: ddp"),
        ("muon", "the optimiser muon takes matrices alone, and the controls .*; take adamw"),
        ("sparseadam:lr=0.1", "the optimiser sparseadam takes sparse gradients alone, and"),
        ("newton-cg:radious=2", "unknown field of the solver newton-cg 'radious'; nearest: radius"),
        ("newton-cg:radius=wide", "newton-cg: radius='wide' is not a number"),
        ("newton-cg:radius=-1", "radius = -1.0 must be positive"),
        ("newton-cg:radius", "'radius' in the solver 'newton-cg:radius' is not FIELD=VALUE"),
        ("newton-cg:radius=1,radius=2", "radius is given twice in the solver"),
        ("msa", "the solver msa needs rate, a number"),
        ("sgd:lr=-1", "the solver sgd cannot be made: Invalid learning rate"),
        ("adamw:maximize=true", "unknown field of the solver adamw 'maximize'"),
    ],
)
def test_mistakes_are_named(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        registry.parse(text)


def test_what_a_text_cannot_hold_is_refused() -> None:
    for solver in (
        TorchOptimiser("SGD", lr=0.1, schedule=lambda k: 1.0),
        ExtendedMSA(minimiser=InnerLBFGS(steps=3)),
        MSA(InnerLBFGS()),
    ):
        with pytest.raises(InputError, match="cannot be written as a text"):
            registry.text_of(solver)


def test_a_users_solver_is_found_and_solves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_loaded", {})
    (tmp_path / "mine.py").write_text(MINE)
    plugins.load(tmp_path / "mine.py")
    solver = registry.parse("slow-descent:rate=0.05")
    assert registry.text_of(solver) == "slow-descent:rate=0.05"
    lq = problem()
    exact = solve(lq, registry.parse("riccati"))
    found = solve(lq, solver, max_steps=5000, tol=1e-10)
    assert found.status == "converged"
    for ours, theirs in zip(found.controls, exact.controls, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_two_small_problems_tell_the_footprint_of_a_large_one() -> None:
    one, two, many = (Footprint.of(problem(5, examples)) for examples in (1, 2, 40))
    assert one.extended(two, 40) == many
    assert many.states == (200.0,) * 5 and many.controls == (2,) * 4 and many.itemsize == 8


def test_what_is_too_large_is_refused_and_told_what_serves() -> None:
    many = Footprint.of(problem(50, 100))  # states of 5000 entries
    assert "at most 4096 entries; here a state of all examples has 5000" in obstacle(
        DDP(), many, 1e15
    )
    assert "NewtonCG" in obstacle(DDP(), many, 1e15)
    few = Footprint.of(problem(50, 2))
    # first and second derivatives: 4 steps of 100 (100 + 2) + (100 + 2)^2 numbers
    dense = 3 * (4 * (100 * 102 + 102**2) + 100**2) * 8
    needed = few.needed(ILQR())
    assert dense < needed < 5 * dense
    assert obstacle(ILQR(), few, needed) == ""
    assert "dense derivatives" in obstacle(ILQR(), few, needed - 1)
    assert "keep=false" in obstacle(NewtonCG(), few, 10.0)
    assert few.needed(NewtonCG()) > few.needed(NewtonCG(keep=False)) > few.needed(MSA(0.1))
