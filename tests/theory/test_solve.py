"""The defaults of a solve, how its results print, and a checkpoint that cannot be written."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import Box, ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics, Segment
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import (
    DDP,
    ILQR,
    MSA,
    ExtendedMSA,
    GaussNewton,
    Iterate,
    NewtonCG,
    Riccati,
    Shooting,
    Solver,
    Status,
    TorchOptimiser,
    checkpoint,
    solve,
)
from tests.theory.dense import flat, hessian
from tests.theory.problems import (
    Pendulum,
    boxed,
    embedding_problem,
    normal,
    residual_network,
    scalar,
    varying,
)

F64 = torch.float64

# Defaults


def step_of(problem: ControlProblem) -> float:
    return 1.0 / float(torch.linalg.eigvalsh(hessian(problem, problem.zero_controls()))[-1])


SOLVERS: dict[str, Solver] = {
    "shooting": Shooting(),
    "ilqr": ILQR(),
    "ddp": DDP(),
    "gauss-newton": GaussNewton(),
    "newton-cg": NewtonCG(),
    "emsa": ExtendedMSA(),
    "msa": MSA(step_of(residual_network())),
    "torch": TorchOptimiser("SGD", lr=step_of(residual_network()), momentum=0.5),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "emsa" else n for n in SOLVERS]
)
def test_the_defaults_solve_to_the_stated_tolerance(name: str) -> None:
    problem = residual_network()
    solution = solve(problem, SOLVERS[name])
    assert solution.status is Status.CONVERGED, solution.message
    start = problem.residual(problem.zero_controls()).norm
    assert solution.history["residual"].iloc[0] == pytest.approx(start)
    tol = torch.finfo(F64).eps ** (1 / 3) * start
    assert solution.residual.norm <= tol
    assert (solution.history["residual"].iloc[:-1] > tol).all(), "it stops at the tolerance"
    assert f"<= tol {tol:.3g}" in solution.message


def test_the_tolerance_follows_the_precision_and_the_start() -> None:
    one = torch.ones(1, 1)
    cost = QuadraticCost.constant(2, Q=0 * one, R=one, Qf=one)
    problem = ControlProblem(LinearDynamics.constant(2, one, one), cost, 5.0 * one[0])
    solution = solve(problem, Riccati())
    assert solution.controls[0].dtype == torch.float32
    tol = torch.finfo(torch.float32).eps ** (1 / 3) * 5.0 * 2**0.5
    assert f"<= tol {tol:.3g}" in solution.message


def test_the_default_steps_are_the_solvers() -> None:
    class Idle(Solver):
        default_steps = 7

        def run(self, problem, u0, report, memory) -> None:
            while not report(u0, problem.evaluate(u0)):
                pass

    solution = solve(scalar(), Idle())
    assert solution.status is Status.MAX_STEPS and solution.iterations == 7


def test_a_resumed_solve_keeps_the_tolerance_of_its_start(tmp_path: Path) -> None:
    problem, path, step = residual_network(), tmp_path / "solve", MSA(step_of(residual_network()))
    whole = solve(problem, step)
    solve(problem, step, max_steps=3, checkpoint=path)
    resumed = solve(problem, step, checkpoint=path)
    assert resumed.iterations == whole.iterations and resumed.message == whole.message


def test_the_start_is_that_of_the_dynamics() -> None:
    class Warm(Pendulum):
        def initial_controls(self, x0: torch.Tensor) -> Controls:
            return tuple(normal(1, seed=t) for t in range(self.horizon))

    weight = torch.eye(2, dtype=F64)
    cost = QuadraticCost.constant(4, Q=weight, R=weight[:1, :1], Qf=weight)
    problem = ControlProblem(Warm(4, 0.1), cost, torch.ones(2, dtype=F64))
    solution = solve(problem, MSA(0.1), max_steps=0)
    assert torch.equal(flat(solution.controls), flat(problem.initial_controls()))
    part = ControlProblem(Segment(problem.dynamics, 1, 3), cost, torch.ones(2, dtype=F64))
    assert torch.equal(flat(part.initial_controls()), flat(problem.initial_controls()[1:3]))
    cold = scalar()
    assert flat(solve(cold, MSA(0.1), max_steps=0).controls).tolist() == [0.0] * 5
    tokens = embedding_problem()
    assert [u.shape for u in tokens.initial_controls()] == [(0,), (4,), (4,)]
    assert all(u.is_floating_point() for u in tokens.initial_controls())


# Printing


def test_a_solution_prints_in_a_few_lines() -> None:
    seen: list[Iterate] = []
    solution = solve(residual_network(), NewtonCG(), tol=1e-8, callback=seen.append)
    lines = repr(solution).splitlines()
    assert [line.split()[0] for line in lines] == [
        "Solution",
        "status",
        "J",
        "residual",
        "iterations",
        "message",
    ]
    assert lines[1].split()[1] == "converged" and lines[5].endswith(solution.message)
    assert float(lines[2].split()[1]) == pytest.approx(solution.objective, rel=1e-5)
    html = solution._repr_html_()
    assert "<th>status</th><td>converged</td>" in html and "&lt;= tol" in html
    assert "tensor" not in repr(solution) + html
    assert repr(seen[0]).startswith("Iterate(0: J = ") and len(repr(seen[0])) < 80


def test_a_problem_prints_in_a_few_lines() -> None:
    assert repr(varying(6)) == "\n".join(
        [
            "ControlProblem",
            "  dynamics       LinearDynamics, horizon 4",
            "  initial state  (6, 3) float64",
            "  controls       6 in 3 of 4 steps",
            "  cost           QuadraticCost",
            "  box            none",
        ]
    )
    assert "[-0.3, 1]" in repr(boxed(scalar(), -0.3, 1.0))
    low = [torch.zeros(1, dtype=F64)] * 5
    problem = ControlProblem(scalar().dynamics, scalar().cost, scalar().x0, Box(low))
    assert "[one bound a step, inf]" in repr(problem)
    assert "<td>LinearDynamics, horizon 4</td>" in varying(6)._repr_html_()


@pytest.mark.slow
def test_the_solvers_are_imported_without_pandas() -> None:
    code = "import sys, deltacontrol.theory.solvers; sys.exit('pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# A checkpoint that cannot be written


def test_a_full_disk_does_not_lose_the_solution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, path = scalar(), tmp_path / "solve"
    solve(problem, MSA(0.1), max_steps=1, tol=0.0, checkpoint=path)
    before = path.read_bytes()

    def full(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.warns(RuntimeWarning, match=r"could not be written \(.*No space left"):
        solution = solve(problem, MSA(0.1), max_steps=4, tol=0.0, checkpoint=path)
    assert solution.status is Status.MAX_STEPS and solution.iterations == 4
    assert f"the checkpoint {path} could not be written" in solution.message
    expected = solve(problem, MSA(0.1), max_steps=4, tol=0.0)
    assert torch.equal(flat(solution.controls), flat(expected.controls))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_vanishes_does_not_lose_the_solution(tmp_path: Path) -> None:
    """What safetensors itself raises."""
    path = tmp_path / "folder" / "solve"

    def vanish(iterate: Iterate) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)

    with pytest.warns(RuntimeWarning, match="could not be written"):
        solution = solve(scalar(), Riccati(), checkpoint=path, callback=vanish)
    assert solution.status is Status.CONVERGED and "could not be written" in solution.message


def test_a_failure_that_passes_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltacontrol.theory.solvers import solving as base

    monkeypatch.setattr(base, "CHECKPOINT_SECONDS", 0.0)
    write, failures = checkpoint.save_file, iter([True, True])

    def once(*arguments, **options) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", once)
    path = tmp_path / "solve"
    with pytest.warns(RuntimeWarning) as warned:
        solution = solve(scalar(), MSA(0.1), max_steps=6, tol=0.0, checkpoint=path)
    assert len(warned) == 1 and "written" not in solution.message
    assert solve(scalar(), MSA(0.1), max_steps=6, tol=0.0, checkpoint=path).iterations == 6


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen: list[Iterate] = []
    with pytest.raises(InputError, match="folder of the checkpoint .* cannot be made"):
        solve(scalar(), MSA(0.1), checkpoint=tmp_path / "file" / "solve", callback=seen.append)
    assert not seen
