"""Solves that are interrupted and go on from their file, as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pandas import DataFrame
from pandas.testing import assert_frame_equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import Box, ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import solving as base
from deltacontrol.theory.solvers.emsa import ExtendedMSA
from deltacontrol.theory.solvers.minimisers import ExactArgmin, InnerLBFGS
from deltacontrol.theory.solvers.msa import MSA
from deltacontrol.theory.solvers.shooting import Shooting
from deltacontrol.theory.solvers.solving import Iterate, Solver, Status, solve
from tests.theory.dense import flat
from tests.theory.problems import Case, low_rank, normal, residual_network, scalar, varying

F64 = torch.float64

SOLVERS = {
    "msa": MSA(0.05),
    "msa-exact": MSA(ExactArgmin()),
    "msa-lbfgs": MSA(InnerLBFGS(3)),
    "emsa": ExtendedMSA(1e-2, InnerLBFGS(3)),
    "emsa-exact": ExtendedMSA(1e-2, ExactArgmin()),
}


class Interrupt(Exception):
    """Stands for whatever ends a solve."""


def at(iteration: int) -> Callable[[Iterate], None]:
    def callback(iterate: Iterate) -> None:
        if iterate.iteration == iteration:
            raise Interrupt

    return callback


def start_of(problem: ControlProblem) -> Controls:
    return tuple(normal(m, seed=t) for t, m in enumerate(problem.dynamics.control_sizes))


def iterates(
    problem: ControlProblem, solver: Solver, steps: int, path: Path | None = None, **options
) -> tuple[list[Tensor], DataFrame]:
    seen: list[Tensor] = []
    solution = solve(
        problem,
        solver,
        start_of(problem),
        max_steps=steps,
        tol=0.0,
        checkpoint=path,
        callback=lambda it: seen.append(flat(it.controls)),
        **options,
    )
    return seen, solution.history


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "broken_at", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 4))]
)
@pytest.mark.one_in(2)
def test_an_interrupted_solve_goes_on_bit_for_bit(
    name: str, broken_at: int, tmp_path: Path
) -> None:
    problem = varying(4) if "exact" in name else low_rank()
    steps, path = 6, tmp_path / "kept" / "solve.safetensors"
    expected, history = iterates(problem, SOLVERS[name], steps)
    with pytest.raises(Interrupt):
        solve(
            problem,
            SOLVERS[name],
            start_of(problem),
            max_steps=steps,
            tol=0.0,
            checkpoint=path,
            callback=at(broken_at),
        )
    resumed, resumed_history = iterates(problem, SOLVERS[name], steps, path)
    assert len(expected) == steps + 1 and len(resumed) == steps - broken_at
    for one, other in zip(resumed, expected[broken_at + 1 :], strict=True):
        assert torch.equal(one, other)
    same_history(resumed_history, history)


def same_history(one: DataFrame, other: DataFrame) -> None:
    """Equal bit for bit; the work is a sum of fractions, equal to rounding."""
    assert one["sweeps"].tolist() == pytest.approx(other["sweeps"].tolist())
    assert_frame_equal(one.drop(columns="sweeps"), other.drop(columns="sweeps"), check_exact=True)


@pytest.mark.parametrize("name", ["msa", "emsa"])
def test_a_solve_that_was_killed_goes_on_from_the_file_of_its_last_iterate(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written on the way out; the file is the one that a running solve keeps."""
    monkeypatch.setattr(base, "CHECKPOINT_SECONDS", 0.0)
    problem, path, copy = low_rank(), tmp_path / "solve", tmp_path / "copy"
    expected, history = iterates(problem, SOLVERS[name], 6)

    def copying(iterate: Iterate) -> None:
        if iterate.iteration == 4:  # the file still holds iterate 3
            copy.write_bytes(path.read_bytes())

    solve(
        problem,
        SOLVERS[name],
        start_of(problem),
        max_steps=5,
        tol=0.0,
        checkpoint=path,
        callback=copying,
    )
    resumed, resumed_history = iterates(problem, SOLVERS[name], 6, copy)
    assert len(resumed) == 3
    for one, other in zip(resumed, expected[4:], strict=True):
        assert torch.equal(one, other)
    same_history(resumed_history, history)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_memory_of_extended_msa_is_what_makes_it_go_on_the_same(tmp_path: Path) -> None:
    """Without its rho the resumed iterates are others: the memory is needed, and is used."""
    problem, path = low_rank(), tmp_path / "solve"
    solver = SOLVERS["emsa"]
    iterates(problem, solver, 3, path)
    expected, _ = iterates(problem, solver, 4)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert float(tensors["memory.rho"]) != 1e-2
    tensors["memory.rho"] = torch.tensor(1e-2 * 3, dtype=F64)
    save_file(tensors, path, metadata=metadata)
    resumed, _ = iterates(problem, solver, 4, path)
    assert not torch.equal(resumed[0], expected[4])


@pytest.mark.parametrize("name", ["msa", "emsa"])
def test_more_steps_continue_where_the_steps_ran_out(name: str, tmp_path: Path) -> None:
    problem, path = low_rank(), tmp_path / "solve"
    expected, history = iterates(problem, SOLVERS[name], 5)
    first = solve(problem, SOLVERS[name], start_of(problem), max_steps=2, tol=0.0, checkpoint=path)
    assert first.status is Status.MAX_STEPS and first.iterations == 2
    resumed, resumed_history = iterates(problem, SOLVERS[name], 5, path)
    assert len(resumed) == 3 and torch.equal(resumed[-1], expected[-1])
    same_history(resumed_history, history)
    again, _ = iterates(problem, SOLVERS[name], 5, path)
    assert again == [], "a finished solve does nothing more"
    fewer = solve(problem, SOLVERS[name], start_of(problem), max_steps=1, tol=0.0, checkpoint=path)
    assert fewer.iterations == 5 and torch.equal(flat(fewer.controls), expected[-1])


def test_a_converged_solve_is_read_from_its_file_and_a_smaller_tol_continues(
    tmp_path: Path,
) -> None:
    problem, path, seen = scalar(), tmp_path / "solve", []
    options = {"checkpoint": path, "max_steps": 500, "callback": seen.append}
    first = solve(problem, MSA(0.1), problem.zero_controls(), tol=1e-4, **options)
    count = len(seen)
    again = solve(problem, MSA(0.1), problem.zero_controls(), tol=1e-4, **options)
    assert first.status is again.status is Status.CONVERGED and len(seen) == count
    assert torch.equal(flat(again.controls), flat(first.controls))
    further = solve(problem, MSA(0.1), problem.zero_controls(), tol=1e-8, **options)
    assert further.status is Status.CONVERGED and further.iterations > first.iterations
    assert len(seen) == further.iterations + 1


def test_shooting_goes_on_to_the_optimum(tmp_path: Path) -> None:
    """Its L-BFGS starts afresh, so that the iterates differ, but not where they lead."""
    problem, path = residual_network(), tmp_path / "solve"
    start = start_of(problem)
    with pytest.raises(Interrupt):
        solve(problem, Shooting(), start, max_steps=99, tol=1e-7, checkpoint=path, callback=at(3))
    resumed = solve(problem, Shooting(), start, max_steps=99, tol=1e-7, checkpoint=path)
    whole = solve(problem, Shooting(), start, max_steps=99, tol=1e-7)
    assert resumed.status is Status.CONVERGED
    assert resumed.history["objective"][:4].equals(whole.history["objective"][:4])
    assert resumed.objective == pytest.approx(whole.objective, abs=1e-12)


def test_a_diverged_solve_is_reported_so_again(tmp_path: Path) -> None:
    problem, path = scalar(), tmp_path / "solve"
    first, again = (
        solve(problem, MSA(1e3), problem.zero_controls(), max_steps=500, tol=1e-9, checkpoint=path)
        for _ in range(2)
    )
    assert first.status is again.status is Status.DIVERGED
    assert torch.equal(flat(first.controls), flat(again.controls))
    assert first.iterations == again.iterations
    assert torch.isfinite(flat(load_controls(path))).all()


def load_controls(path: Path) -> Controls:
    return tuple(v for name, v in sorted(load_file(path).items()) if name.startswith("control."))


# Unbounded problems


def unbounded_problem() -> ControlProblem:
    """``J = 1/2 x_1^2 - u^2`` with ``x_1 = 1 + u``: concave in ``u``."""
    one = torch.ones(1, 1, dtype=F64)
    cost = QuadraticCost([0 * one], [-2 * one], Qf=one)
    return ControlProblem(LinearDynamics([one], [one]), cost, torch.ones(1, dtype=F64))


def test_gradient_descent_on_a_concave_quadratic_is_unbounded(tmp_path: Path) -> None:
    problem, path = unbounded_problem(), tmp_path / "solve"
    first, again = (
        solve(problem, MSA(0.5), problem.zero_controls(), max_steps=9999, tol=1e-9, checkpoint=path)
        for _ in range(2)
    )
    assert first.status is again.status is Status.UNBOUNDED
    assert first.objective < -1e15 and first.iterations == again.iterations < 200
    assert "J fell to -" in first.message and "no minimum" in first.message
    assert "weight decay" in first.message and "box" in first.message
    boxed = ControlProblem(problem.dynamics, problem.cost, problem.x0, Box(-1.0, 2.0))
    bounded = solve(boxed, MSA(0.5), boxed.zero_controls(), max_steps=9999, tol=1e-9)
    assert bounded.status is Status.CONVERGED


# Files that do not fit


def written(path: Path, solver: Solver, problem: ControlProblem) -> Path:
    solve(problem, solver, start_of(problem), max_steps=1, tol=0.0, checkpoint=path)
    return path


def refuses(path: Path, problem: ControlProblem, solver: Solver, match: str) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match=match):
        solve(problem, solver, start_of(problem), max_steps=2, tol=0.0, checkpoint=path)
    assert path.read_bytes() == before, "a file that is refused is left alone"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08" + 7 * b"\x00" + b"{not json"])
def test_a_corrupt_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "solve"
    path.write_bytes(content)
    refuses(path, low_rank(), MSA(0.1), "is no checkpoint of a solve .* delete it")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "solve", MSA(0.1), low_rank())
    path.write_bytes(path.read_bytes()[:-9])
    refuses(path, low_rank(), MSA(0.1), "is no checkpoint of a solve")


@pytest.mark.parametrize(
    "history",
    [
        None,
        "[]",
        "{}",
        json.dumps({"objective": [], "residual": [], "step_size": [], "sweeps": []}),
        json.dumps({"objective": [1.0, 2.0], "residual": [1.0], "step_size": [0.0], "sweeps": [1]}),
        json.dumps({"objective": ["x"], "residual": [1.0], "step_size": [0.0], "sweeps": [1]}),
    ],
)
def test_tensors_that_are_no_checkpoint_are_refused(history: str | None, tmp_path: Path) -> None:
    path = tmp_path / "solve"
    tensors = {f"control.{t}": u for t, u in enumerate(start_of(low_rank()))}
    metadata = None if history is None else {"solver": repr(MSA(0.1)), "history": history}
    save_file(tensors, path, metadata=metadata)
    refuses(path, low_rank(), MSA(0.1), "is no checkpoint of a solve")


def test_another_solvers_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "solve", MSA(0.1), low_rank())
    for other in (MSA(0.2), MSA(InnerLBFGS()), ExtendedMSA(), Shooting()):
        refuses(path, low_rank(), other, r"is a checkpoint of MSA\(.*0\.1\)\), not of")


def test_controls_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "solve", MSA(0.1), low_rank())
    refuses(path, residual_network(), MSA(0.1), r"holds controls of shapes \[\(14,\), \(14,\)\]")


@pytest.mark.parametrize("steps", [4, 6])
def test_another_horizon_is_refused(steps: int, tmp_path: Path) -> None:
    """Also a file that begins with the wanted shapes and holds more."""
    one = torch.ones(1, 1, dtype=F64)

    def of(horizon: int) -> ControlProblem:
        cost = QuadraticCost.constant(horizon, Q=0 * one, R=one, Qf=one)
        return ControlProblem(LinearDynamics.constant(horizon, one, one), cost, one[0])

    path = written(tmp_path / "solve", MSA(0.1), of(5))
    refuses(path, of(steps), MSA(0.1), "holds controls of shapes")


def test_another_problem_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "solve", MSA(0.1), low_rank())
    problem = low_rank()
    other = ControlProblem(problem.dynamics, SquaredErrorCost(-problem.cost.target), problem.x0)
    refuses(path, other, MSA(0.1), "is a checkpoint of another problem: its controls had J = ")


# Boxes


@pytest.mark.parametrize("solver", [MSA(0.05), ExtendedMSA(), Shooting()], ids=repr)
def test_a_boxed_solve_stays_in_its_box_when_it_goes_on(solver: Solver, tmp_path: Path) -> None:
    problem = low_rank()
    boxed = ControlProblem(problem.dynamics, problem.cost, problem.x0, Box(-0.3, 0.4))
    path = tmp_path / "solve"
    with pytest.raises(Interrupt):
        solve(
            boxed,
            solver,
            start_of(boxed),
            max_steps=9,
            tol=0.0,
            checkpoint=path,
            callback=at(2),
        )
    assert any(float(u.min()) == -0.3 for u in load_controls(path))
    seen, _ = iterates(boxed, solver, 5, path)
    assert seen and all(-0.3 <= float(u.min()) and float(u.max()) <= 0.4 for u in seen)


def test_a_file_from_outside_the_box_is_refused(tmp_path: Path) -> None:
    """Without the box the controls were others, and so was the objective."""
    problem = low_rank()
    path = written(tmp_path / "solve", MSA(0.05), problem)
    boxed = ControlProblem(problem.dynamics, problem.cost, problem.x0, Box(-0.1, 0.1))
    refuses(path, boxed, MSA(0.05), "another problem")


def test_dtype_and_zero_sized_controls_survive(tmp_path: Path) -> None:
    problem = Case("varying", lambda: varying(None)).make()
    path = written(tmp_path / "solve", MSA(0.01), problem)
    solution = solve(problem, MSA(0.01), start_of(problem), max_steps=3, tol=0.0, checkpoint=path)
    assert [u.shape for u in solution.controls] == [(2,), (0,), (3,), (1,)]
    assert all(u.dtype == F64 for u in solution.controls)
