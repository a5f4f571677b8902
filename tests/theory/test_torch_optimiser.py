"""Torch's optimisers as solvers: the iterates of the plain loop, also across an interrupt."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import Iterate, Status, TorchOptimiser, solve
from deltacontrol.theory.solvers.torch_optimiser import ENTRYWISE, OPTIMISERS
from tests.theory.dense import flat, hessian
from tests.theory.problems import boxed, low_rank, normal, residual_network, scalar, varying

F64 = torch.float64


def halving(step: int) -> float:
    return 0.5 ** (step // 3)


LINEAR = partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=8)
PLATEAU = partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.3)
ONE_CYCLE = partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=9)
WOLFE: dict[str, Any] = {"line_search_fn": "strong_wolfe", "max_iter": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    "SGD": {"lr": 0.02, "momentum": 0.9},
    "LBFGS": WOLFE,
}
REFUSED = ("SparseAdam", "Muon")  # sparse gradients; matrices
NAMES = sorted(set(OPTIMISERS) - set(REFUSED))


def start_of(problem: ControlProblem) -> Controls:
    return tuple(normal(m, seed=t) for t, m in enumerate(problem.dynamics.control_sizes))


def plain_loop(
    problem: ControlProblem, name: str, options: dict[str, Any], schedule: Any, steps: int
) -> list[Tensor]:
    """The loop as everyone writes it, with automatic differentiation of ``J``'s own costates."""
    leaves = [u.clone().requires_grad_() for u in start_of(problem)]
    optimiser = getattr(torch.optim, name)(leaves, **options)
    scheduler = None
    if schedule is halving:
        scheduler = lr_scheduler.LambdaLR(optimiser, halving)
    elif schedule is not None:
        scheduler = schedule(optimiser)
    seen = []

    def closure() -> Tensor:
        now = problem.evaluate(tuple(u.detach() for u in leaves))
        for leaf, gradient in zip(leaves, now.gradient, strict=True):
            leaf.grad = gradient
        return now.objective

    for _ in range(steps):
        seen.append(flat(tuple(u.detach().clone() for u in leaves)))
        optimiser.step(closure)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(float(closure()))
        elif scheduler is not None:
            scheduler.step()
    return [*seen, flat(tuple(u.detach() for u in leaves))]


def iterates(
    problem: ControlProblem, solver: TorchOptimiser, steps: int, **options
) -> list[Tensor]:
    seen: list[Tensor] = []
    solve(
        problem,
        solver,
        start_of(problem),
        max_steps=steps,
        tol=0.0,
        callback=lambda it: seen.append(flat(it.controls)),
        **options,
    )
    return seen


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", NAMES)
def test_the_iterates_are_exactly_those_of_a_plain_loop(name: str) -> None:
    problem, options = low_rank(), OPTIONS.get(name, {"lr": 0.01})
    expected = plain_loop(problem, name, options, None, 6)
    assert same(iterates(problem, TorchOptimiser(name, **options), 6), expected)
    assert not torch.equal(expected[0], expected[-1])


SCHEDULES = {"function": halving, "linear": LINEAR, "plateau": PLATEAU, "one-cycle": ONE_CYCLE}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_a_plain_loop(schedule: str) -> None:
    problem, options = varying(None), {"lr": 0.4, "weight_decay": 0.0}
    rule = SCHEDULES[schedule]
    expected = plain_loop(problem, "AdamW", options, rule, 8)
    solver = TorchOptimiser(torch.optim.AdamW, schedule=rule, **options)
    found = iterates(problem, solver, 8)
    assert same(found, expected)
    constant = plain_loop(problem, "AdamW", options, None, 8)
    assert not torch.equal(constant[-1], expected[-1]), "a schedule that does nothing tests nothing"


class Interrupt(Exception):
    """Stands for whatever ends a solve."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [None, "linear"])
@pytest.mark.one_in(3)
def test_an_interrupted_solve_goes_on_with_the_same_iterates(
    name: str, schedule: str | None, tmp_path: Path
) -> None:
    problem, path = low_rank(), tmp_path / "solve"
    rule = None if schedule is None else SCHEDULES[schedule]
    solver = TorchOptimiser(name, schedule=rule, **OPTIONS.get(name, {"lr": 0.01}))
    expected = iterates(problem, solver, 7)

    def interrupt(iterate: Iterate) -> None:
        if iterate.iteration == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        solve(
            problem,
            solver,
            start_of(problem),
            max_steps=7,
            tol=0.0,
            callback=interrupt,
            checkpoint=path,
        )
    assert same(iterates(problem, solver, 7, checkpoint=path), expected[4:])


@pytest.mark.parametrize("schedule", ["plateau", "one-cycle", "function"])
def test_the_state_of_a_schedule_is_kept(schedule: str, tmp_path: Path) -> None:
    problem, path = varying(None), tmp_path / "solve"
    solver = TorchOptimiser("Adam", lr=0.4, schedule=SCHEDULES[schedule])
    expected = iterates(problem, solver, 8)
    iterates(problem, solver, 5, checkpoint=path)
    assert same(iterates(problem, solver, 8, checkpoint=path), expected[6:])


def test_an_optimiser_of_one_evaluation_costs_one_gradient_a_step() -> None:
    problem = residual_network()
    for solver in (TorchOptimiser("AdamW"), TorchOptimiser("SGD", lr=0.01, momentum=0.5)):
        history = solve(problem, solver, max_steps=3, tol=0.0).history
        assert history["sweeps"].tolist() == [2.0, 4.0, 6.0, 8.0]


@pytest.mark.slow
def test_the_repr_is_stable_across_processes_and_tells_solvers_apart() -> None:
    solver = TorchOptimiser("AdamW", weight_decay=0.0, lr=1e-3, schedule=LINEAR)
    expected = (
        "TorchOptimiser(AdamW, lr=0.001, weight_decay=0.0, "
        "schedule=LinearLR(start_factor=1.0, end_factor=0.0, total_iters=8))"
    )
    assert repr(solver) == expected
    assert solver == TorchOptimiser(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, schedule=LINEAR)
    assert solver != TorchOptimiser("AdamW", lr=1e-3, weight_decay=0.0)
    assert hash(solver) == hash(TorchOptimiser("AdamW", lr=1.0, schedule=LINEAR))
    named = TorchOptimiser("SGD", lr=0.1, schedule=halving)
    assert repr(named) == f"TorchOptimiser(SGD, lr=0.1, schedule={__name__}.halving)"
    code = (
        "from math import sqrt; from deltacontrol.theory.solvers import TorchOptimiser; "
        "print(TorchOptimiser('SGD', lr=0.1, schedule=sqrt))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert outputs == {b"TorchOptimiser(SGD, lr=0.1, schedule=math.sqrt)\n"}


def test_another_optimisers_checkpoint_is_refused(tmp_path: Path) -> None:
    problem, path = scalar(), tmp_path / "solve"
    iterates(problem, TorchOptimiser("SGD", lr=0.1), 2, checkpoint=path)
    with pytest.raises(InputError, match=r"checkpoint of TorchOptimiser\(SGD, lr=0.1\), not of"):
        iterates(problem, TorchOptimiser("SGD", lr=0.2), 2, checkpoint=path)


@pytest.mark.parametrize(("name", "rate"), [("SGD", 0.1), ("Adam", 0.02), ("RMSprop", 1e-3)])
def test_a_box_is_kept_and_its_optimum_found(name: str, rate: float) -> None:
    """``J = 1/2 sum u^2 + 1/2 (3 + sum u)^2``: all at -1/2 without a box, all at -0.3 in it."""
    problem = boxed(scalar(), -0.3, 1.0)
    seen: list[Iterate] = []
    solution = solve(
        problem, TorchOptimiser(name, lr=rate), max_steps=999, tol=1e-9, callback=seen.append
    )
    assert solution.status is Status.CONVERGED, solution.message
    assert flat(solution.controls).tolist() == [-0.3] * 5
    assert all(float(flat(it.controls).min()) >= -0.3 for it in seen)


def test_a_box_that_binds_some_entries_only() -> None:
    problem = boxed(residual_network(), -0.15, 0.1)
    start = problem.zero_controls()
    rate = 1.0 / float(torch.linalg.eigvalsh(hessian(problem, start))[-1])
    solver = TorchOptimiser("SGD", lr=rate, momentum=0.5)
    solution = solve(problem, solver, start, max_steps=2000, tol=1e-9)
    assert solution.status is Status.CONVERGED, solution.message
    u = flat(solution.controls)
    bound = (u == -0.15) | (u == 0.1)
    assert bound.any() and not bound.all()
    g = flat(problem.gradient(solution.controls))
    assert g[~bound].abs().max() < 1e-9 and (g[u == -0.15] > 0).all() and (g[u == 0.1] < 0).all()


def test_an_optimiser_that_mixes_entries_refuses_a_box() -> None:
    assert set(ENTRYWISE) < set(OPTIMISERS.values())
    problem = boxed(scalar(), -0.3, 1.0)
    with pytest.raises(InputError, match="LBFGS mixes the entries"):
        solve(problem, TorchOptimiser("LBFGS"))


def test_lbfgs_that_no_longer_moves_ends_the_solve_with_the_reason() -> None:
    solver = TorchOptimiser("LBFGS", **WOLFE, tolerance_grad=0.0, tolerance_change=0.0)
    solution = solve(residual_network(), solver, max_steps=99, tol=0.0)
    assert solution.status is Status.LINE_SEARCH_FAILED
    assert "LBFGS no longer changes the controls" in solution.message
    assert 0 < solution.iterations < 30 and solution.residual.norm < 1e-6


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="unknown optimiser of torch.optim 'AdamV'; nearest: Adam"):
        TorchOptimiser("AdamV")
    with pytest.raises(InputError, match="maximize=True would raise J"):
        TorchOptimiser("SGD", maximize=True)
    with pytest.raises(InputError, match=r"TorchOptimiser\(SGD, rate=1.0\) cannot be made: .*rate"):
        solve(scalar(), TorchOptimiser("SGD", rate=1.0))
    with pytest.raises(InputError, match="Invalid learning rate"):
        solve(scalar(), TorchOptimiser("Adam", lr=-1.0))
    with pytest.raises(InputError, match="2D parameters"):
        solve(scalar(), TorchOptimiser("Muon"))


def test_a_schedule_whose_state_is_no_plain_data_says_so() -> None:
    class Odd(lr_scheduler.ConstantLR):
        def __init__(self, optimiser: torch.optim.Optimizer) -> None:
            super().__init__(optimiser)
            self.odd = object()

    with pytest.raises(InputError, match="a checkpoint cannot keep"):
        solve(scalar(), TorchOptimiser("SGD", lr=0.1, schedule=Odd))
