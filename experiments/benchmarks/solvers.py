"""Linear-quadratic problems: the Riccati recursion against NumPy, crocoddyl and mpc.pytorch.

    python -m deltacontrol.experiments.benchmarks.solvers

A contestant computes the gains of all steps and the optimal trajectory of one random problem. All
take turns, one solve each, in one process with a fixed number of threads, so that a slow minute of
the machine slows all; the ratios are taken within a turn. Times are processor seconds, which other
processes on the machine lengthen less than they do the clock's; with more than one thread take
`--clock wall`. Every answer is compared with ours, so that a time is never that of another problem.

NumPy's contestant is the textbook recursion, with SciPy's Cholesky solver and no check of its
input. crocoddyl's is one backward and one forward pass of its DDP, in C++; mpc.pytorch's one LQR
iteration. Both are left out with a line where they are not installed: `pip install crocoddyl` and
`pip install --no-deps mpc`, in an environment of their own.

Small problems run in compiled kernels where numba is installed (`pip install -e ".[fast]"`); a
process solves its first ones without, and they are no part of what is timed. A batch is compared
with a loop over its problems. The parallel scan over time, which
computes the gains only, is compared with the recursion over horizons.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import threadpoolctl
import torch
import tyro
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor

from deltacontrol.experiments.runs import provenance
from deltacontrol.theory.lq import factorise, factorise_by_scan, riccati

Solve: TypeAlias = Callable[[], np.ndarray]  # the gain K_0


@dataclass(frozen=True, eq=False)
class Problem:
    """A random time-varying problem without affine terms, of which ``A`` is nearly stable.

    Attributes:
        A: ``(horizon, ..., n, n)``; the others accordingly.
    """

    A: Tensor
    B: Tensor
    Q: Tensor
    R: Tensor
    Qf: Tensor
    x0: Tensor

    @classmethod
    def random(cls, n: int, m: int, horizon: int, *batch: int, seed: int = 0) -> Problem:
        """Gaussian matrices; weights with eigenvalues of at least one."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def weight(size: int) -> Tensor:
            root = normal(horizon + 1, *batch, size, size)
            return root @ root.mT / size + torch.eye(size, dtype=torch.float64)

        Q = weight(n)
        A = 0.9 * torch.eye(n, dtype=torch.float64) + 0.3 * normal(horizon, *batch, n, n) / n**0.5
        B = normal(horizon, *batch, n, m) / n**0.5
        return cls(A, B, Q[:-1].clone(), weight(m)[:-1], Q[-1].clone(), normal(*batch, n))

    @property
    def quadratic(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `riccati`."""
        return self.A, self.B, self.Q, self.R, self.Qf

    def example(self, i: int) -> Problem:
        """One problem of a batch."""
        A, B, Q, R, Qf = self.quadratic
        return Problem(A[:, i], B[:, i], Q[:, i], R[:, i], Qf[i], self.x0[i])


def ours(problem: Problem) -> Solve:
    """`deltacontrol.theory.lq.riccati` and its simulation."""

    def solve() -> np.ndarray:
        policy = riccati(*problem.quadratic)
        policy.simulate(problem.x0)
        return policy.gain(0).numpy()

    return solve


def plain_numpy(problem: Problem) -> Solve:
    """The textbook recursion."""
    A, B, Q, R, Qf = (part.numpy() for part in problem.quadratic)
    x0 = problem.x0.numpy()

    def solve() -> np.ndarray:
        P, gains = Qf, []
        for t in range(len(A) - 1, -1, -1):
            PA, PB, B_T = P @ A[t], P @ B[t], B[t].T
            factor = cho_factor(R[t] + B_T @ PB, lower=True, overwrite_a=True, check_finite=False)
            H_ux = B_T @ PA
            K = -cho_solve(factor, H_ux, check_finite=False)
            P = Q[t] + A[t].T @ PA + H_ux.T @ K
            P = 0.5 * (P + P.T)
            gains.append(K)
        gains.reverse()
        x, states, controls = x0, [x0], []
        for t, K in enumerate(gains):
            u = K @ x
            x = A[t] @ x + B[t] @ u
            states.append(x)
            controls.append(u)
        return gains[0]

    return solve


def crocoddyl(problem: Problem) -> Solve:
    """One direction of crocoddyl's DDP: derivatives, backward pass, forward pass."""
    import crocoddyl  # pyright: ignore[reportMissingImports]

    A, B, Q, R, Qf = (part.numpy() for part in problem.quadratic)
    n, m = B.shape[1:]
    cross, no_x, no_u = np.zeros((n, m)), np.zeros(n), np.zeros(m)
    steps = [
        crocoddyl.ActionModelLQR(A[t], B[t], Q[t], R[t], cross, no_x, no_x, no_u)
        for t in range(len(A))
    ]
    last = crocoddyl.ActionModelLQR(np.eye(n), cross, Qf, np.eye(m), cross, no_x, no_x, no_u)
    shooting = crocoddyl.ShootingProblem(problem.x0.numpy(), steps, last)
    shooting.nthreads = torch.get_num_threads()
    solver = crocoddyl.SolverDDP(shooting)
    states, controls = [problem.x0.numpy()] * (len(A) + 1), [no_u] * len(A)

    def solve() -> np.ndarray:
        solver.setCandidate(states, controls, False)
        solver.computeDirection(True)
        solver.tryStep(1.0)
        return -np.array(solver.K[0])

    return solve


def mpc_pytorch(problem: Problem) -> Solve:
    """One LQR iteration of mpc.pytorch; its gain is recovered from the first control."""
    from mpc import mpc  # pyright: ignore[reportMissingImports]

    A, B, Q, R, Qf = problem.quadratic
    horizon, n, m = B.shape
    # Its last step has a control too, which is kept at zero, and all have a batch axis.
    C = torch.zeros(horizon + 1, 1, n + m, n + m, dtype=A.dtype)
    C[:-1, 0, :n, :n], C[:-1, 0, n:, n:] = Q, R
    C[-1, 0, :n, :n], C[-1, 0, n:, n:] = Qf, torch.eye(m, dtype=A.dtype)
    cost = mpc.QuadCost(C, torch.zeros(horizon + 1, 1, n + m, dtype=A.dtype))
    system = mpc.LinDx(torch.cat([A, B], -1)[:, None])
    x0 = problem.x0[None]
    options = {"exit_unconverged": False, "detach_unconverged": False, "backprop": False}

    def solve() -> np.ndarray:
        solver = mpc.MPC(n, m, horizon + 1, lqr_iter=1, verbose=-1, n_batch=1, **options)
        return solver(x0, cost, system)[1][0, 0].numpy()

    return solve


CONTESTANTS: dict[str, Callable[[Problem], Solve]] = {
    "deltacontrol": ours,
    "numpy": plain_numpy,
    "crocoddyl": crocoddyl,
    "mpc.pytorch": mpc_pytorch,
}


@dataclass(frozen=True)
class Benchmark:
    """Time the Riccati recursion beside other implementations of it.

    Attributes:
        sizes: problems, each as its states, controls and horizon.
        seconds: how long the turns of one comparison last, about.
        batch: problems of the batch.
        batch_size: states, controls and horizon of the batch's problems.
        scan_sizes: states and controls of the scan's problems.
        scan_horizons: horizons of the scan's problems.
        threads: threads of torch and of BLAS.
        clock: processor seconds or the clock's.
        out: also write the result to this JSON file.
    """

    sizes: tuple[tuple[int, int, int], ...] = (
        (8, 4, 50),
        (37, 12, 100),
        (128, 64, 24),
        (512, 64, 24),
    )
    seconds: float = 10.0
    batch: int = 256
    batch_size: tuple[int, int, int] = (8, 4, 50)
    scan_sizes: tuple[tuple[int, int], ...] = ((2, 1), (4, 2), (8, 4), (16, 8))
    scan_horizons: tuple[int, ...] = (64, 256, 1024, 4096)
    threads: int = 1
    clock: Literal["cpu", "wall"] = "cpu"
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """Measure, print and return the numbers."""
        torch.set_num_threads(self.threads)
        # glibc keeps freed memory for the next caller once it has seen a large block come and go,
        # as it has in any process that has worked for a while. Before, every solve would pay the
        # system for its memory.
        torch.empty(30 * 2**20, dtype=torch.uint8).fill_(0)
        with threadpoolctl.threadpool_limits(self.threads), torch.no_grad():
            result = {
                "threads": self.threads,
                "clock": self.clock,
                "single": [self._single(*size) for size in self.sizes],
                "batch": self._batch(),
                "scan": [
                    self._scan(n, m, horizon)
                    for n, m in self.scan_sizes
                    for horizon in self.scan_horizons
                ],
                "hardware": provenance.hardware(),
                "packages": provenance.package_versions()
                | _versions("scipy", "numba", "crocoddyl", "mpc"),
            }
        if self.out is not None:
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _single(self, n: int, m: int, horizon: int) -> dict[str, Any]:
        problem, solves, absent = Problem.random(n, m, horizon), {}, []
        for name, make in CONTESTANTS.items():
            try:
                solves[name] = make(problem)
            except ImportError:
                absent.append(name)
        gain = solves["deltacontrol"]()
        differences = {}
        for name, solve in solves.items():
            found = solve()
            # A contestant without gains gives its first control.
            expected = gain if found.shape == gain.shape else gain @ problem.x0.numpy()
            differences[name] = float(abs(found - expected).max() / abs(expected).max())
        print(f"n = {n}, m = {m}, horizon {horizon}")
        if absent:
            print(f"  not installed, left out: {', '.join(absent)}")
        return {"n": n, "m": m, "horizon": horizon, "gain_difference": differences} | self._turns(
            solves, differences
        )

    def _batch(self) -> dict[str, Any]:
        problem = Problem.random(*self.batch_size, self.batch)
        examples = [problem.example(i) for i in range(self.batch)]
        whole, loops = ours(problem), {
            "loop": [ours(example) for example in examples],
            "numpy loop": [plain_numpy(example) for example in examples],
        }  # fmt: skip
        gains = whole()
        differences = {"deltacontrol": 0.0} | {
            name: max(
                float(abs(solve() - gain).max() / abs(gain).max())
                for solve, gain in zip(solves, gains, strict=True)
            )
            for name, solves in loops.items()
        }

        def looped(solves: list[Solve]) -> Solve:
            return lambda: np.stack([solve() for solve in solves])

        solves = {"deltacontrol": whole} | {name: looped(each) for name, each in loops.items()}
        n, m, horizon = self.batch_size
        print(f"a batch of {self.batch} problems, n = {n}, m = {m}, horizon {horizon}")
        return {
            "problems": self.batch,
            "n": n,
            "m": m,
            "horizon": horizon,
            "gain_difference": differences,
        } | self._turns(solves, differences)

    def _scan(self, n: int, m: int, horizon: int) -> dict[str, Any]:
        problem = Problem.random(n, m, horizon)
        solves: dict[str, Solve] = {
            "recursion": lambda: np.asarray(factorise(*problem.quadratic).gains[0]),
            "scan": lambda: np.asarray(factorise_by_scan(*problem.quadratic).gains[0]),
        }
        expected, found = solves["recursion"](), solves["scan"]()
        differences = {"scan": float(abs(found - expected).max() / abs(expected).max())}
        print(f"gains only, n = {n}, m = {m}, horizon {horizon}")
        return {"n": n, "m": m, "horizon": horizon, "gain_difference": differences} | self._turns(
            solves, differences, self.seconds / 4
        )

    def _turns(
        self, solves: dict[str, Solve], differences: dict[str, float], seconds: float | None = None
    ) -> dict[str, Any]:
        """Alternate, and compare everybody with the first."""
        now = time.process_time if self.clock == "cpu" else time.perf_counter
        taken: dict[str, list[float]] = {name: [] for name in solves}
        turn, begun = 0, now()
        while turn < 7 or now() - begun < (self.seconds if seconds is None else seconds):
            for name, solve in sorted(solves.items(), reverse=bool(turn % 2)):
                start = now()
                solve()
                if turn > 1:
                    taken[name].append(now() - start)
            turn += 1
        first = next(iter(solves))
        ratios = {n: _quartiles(np.divide(s, taken[first])) for n, s in taken.items() if n != first}
        spread = {name: _quartiles(np.array(s)) for name, s in taken.items()}
        for name, numbers in spread.items():
            line = f"  {name:13} {1e3 * numbers['median']:9.3f} ms"
            line += f" ({1e3 * numbers['q25']:.3f}-{1e3 * numbers['q75']:.3f})"
            if name != first:
                ratio = ratios[name]
                line += f", {ratio['median']:6.2f} times {first}"
                line += f" ({ratio['q25']:.2f}-{ratio['q75']:.2f})"
                line += f", gains differ by {differences[name]:.0e}"
            print(line, flush=True)
        return {"turns": turn - 2, "seconds": spread, f"time_over_{first}": ratios}


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high)}


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
