"""What linear-quadratic solves say, against the dense Hessian of ``J`` in all controls.

Random problems have indefinite ``Q``, ``R``, ``Qf`` and cross terms; a multiple of the identity in
``R`` then gives the Hessian a least eigenvalue of chosen sign and size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import UnboundedError, riccati
from deltacontrol.theory.solvers import Status, solve
from deltacontrol.theory.solvers.riccati import Riccati
from tests.theory.dense import flat

F32, F64 = torch.float32, torch.float64
SOLVED = 5  # of so many problems one is given to `solve` too, which costs more than the recursion


@dataclass(frozen=True)
class LQ:
    """The terms of a problem, in the order of `riccati`, and its first state."""

    A: list[Tensor]
    B: list[Tensor]
    Q: list[Tensor]
    R: list[Tensor]
    Qf: Tensor
    N: list[Tensor]
    c: list[Tensor]
    q: list[Tensor]
    r: list[Tensor]
    qf: Tensor
    x0: Tensor

    def terms(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "x0"}

    def to(self, dtype: torch.dtype) -> LQ:
        made = {
            name: [part.to(dtype) for part in value] if isinstance(value, list) else value.to(dtype)
            for name, value in vars(self).items()
        }
        return LQ(**made)

    def problem(self) -> ControlProblem:
        cost = QuadraticCost(self.Q, self.R, self.Qf, self.N, self.q, self.r, self.qf)
        return ControlProblem(LinearDynamics(self.A, self.B, self.c), cost, self.x0)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """``J(u) = v + g'u + 1/2 u'Hu`` in float64: ``H``, ``g``, ``v``."""
        p = self.to(F64)
        eye = torch.eye(sum(B.shape[1] for B in p.B), dtype=F64)
        choices = eye.split([B.shape[1] for B in p.B])
        x, X = p.x0, torch.zeros(len(p.x0), len(eye), dtype=F64)
        H, g, v = torch.zeros_like(eye), torch.zeros_like(eye[0]), torch.zeros_like(eye[0, 0])
        for t, U in enumerate(choices):
            cross = X.mT @ p.N[t] @ U
            H = H + X.mT @ p.Q[t] @ X + U.mT @ p.R[t] @ U + cross + cross.mT
            g = g + X.mT @ (p.Q[t] @ x + p.q[t]) + U.mT @ (p.N[t].mT @ x + p.r[t])
            v = v + 0.5 * x @ p.Q[t] @ x + p.q[t] @ x
            x, X = p.A[t] @ x + p.c[t], p.A[t] @ X + p.B[t] @ U
        H, g = H + X.mT @ p.Qf @ X, g + X.mT @ (p.Qf @ x + p.qf)
        return 0.5 * (H + H.mT), g, v + 0.5 * x @ p.Qf @ x + p.qf @ x


def random_problem(seed: int, dtype: torch.dtype, least: float) -> LQ:
    """Sizes 1 to 6, horizons 1 to 8; ``H``'s least eigenvalue is in ``+-[least, 1]``, by seed."""
    generator = torch.Generator().manual_seed(seed)

    def size(largest: int) -> int:
        return int(torch.randint(1, largest + 1, (), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    def symmetric(n: int) -> Tensor:
        root = normal(n, n)
        return 0.5 * (root + root.mT)

    horizon = size(8)
    n, m = [size(6) for _ in range(horizon + 1)], [size(6) for _ in range(horizon)]
    if seed % 2:  # equal sizes take another path
        n, m = [n[0]] * len(n), [m[0]] * len(m)
    drawn = LQ(
        A=[normal(after, now) / now**0.5 for now, after in zip(n, n[1:], strict=False)],
        B=[normal(after, k) for k, after in zip(m, n[1:], strict=True)],
        Q=[symmetric(now) for now in n[:-1]],
        R=[symmetric(k) for k in m],
        Qf=symmetric(n[-1]),
        N=[0.5 * normal(now, k) for now, k in zip(n, m, strict=False)],
        c=[normal(after) for after in n[1:]],
        q=[normal(now) for now in n[:-1]],
        r=[normal(k) for k in m],
        qf=normal(n[-1]),
        x0=normal(n[0]),
    )
    exponent = float(torch.rand((), generator=generator, dtype=F64))
    wanted = least**exponent if seed % 4 < 2 else -(least**exponent)
    shift = wanted - float(torch.linalg.eigvalsh(drawn.dense()[0])[0])
    shifted = [R + shift * torch.eye(len(R), dtype=F64) for R in drawn.R]
    return replace(drawn, R=shifted).to(dtype)


def in_other_units(lq: LQ, seed: int, largest: int) -> LQ:
    """``u = D v`` with powers of two, which round nothing: as bounded as before."""
    generator = torch.Generator().manual_seed(seed)
    scales = [
        2.0 ** torch.randint(-largest, largest + 1, (len(r),), generator=generator).to(r)
        for r in lq.r
    ]
    return replace(
        lq,
        B=[B * d for B, d in zip(lq.B, scales, strict=True)],
        R=[d[:, None] * R * d for R, d in zip(lq.R, scales, strict=True)],
        N=[N * d for N, d in zip(lq.N, scales, strict=True)],
        r=[r * d for r, d in zip(lq.r, scales, strict=True)],
    )


def check_unbounded(lq: LQ, *, solved: bool = True) -> None:
    """Every solve says so, and the direction it names has negative curvature."""
    with pytest.raises(UnboundedError, match="unbounded at step") as caught:
        riccati(**lq.terms())
    t, direction = caught.value.step, caught.value.direction
    assert direction is not None and direction.shape == lq.r[t].shape
    if solved:
        assert solve(lq.problem(), Riccati()).status is Status.UNBOUNDED
    if t == len(lq.B) - 1:
        value = lq.R[t] + lq.B[t].mT @ lq.Qf @ lq.B[t]
        assert float(direction @ value @ direction) < 0


@pytest.mark.parametrize(
    ("dtype", "seeds", "least", "tol"),
    [(F32, range(200, 300), 10**-1.5, 1e-3), (F64, range(200), 1e-3, 1e-8)],
    ids=["float32", "float64"],
)
@pytest.mark.one_in(2)
def test_statuses_and_values_are_those_of_the_dense_problem(
    dtype: torch.dtype, seeds: range, least: float, tol: float
) -> None:
    counts = {True: 0, False: 0}
    for seed in seeds:
        lq = random_problem(seed, dtype, least)
        H, g, v = lq.dense()
        bounded = float(torch.linalg.eigvalsh(H)[0]) > 0
        counts[bounded] += 1
        if not bounded:
            check_unbounded(lq, solved=seed % SOLVED == 0)
            continue
        u = -torch.linalg.solve(H, g)
        value = float(v + 0.5 * g @ u)
        policy = riccati(**lq.terms())
        assert not policy.singular
        values, found = [float(policy.cost_to_go(0, lq.x0))], [policy.simulate(lq.x0).controls]
        if seed % SOLVED == 0:
            solution = solve(lq.problem(), Riccati())
            assert solution.status is Status.CONVERGED
            values.append(solution.objective)
            found.append(solution.controls)
        assert values == pytest.approx([value] * len(values), rel=tol)
        for controls in found:
            assert float((flat(controls).double() - u).norm()) <= tol * float(u.norm())
    assert counts == {True: len(seeds) // 2, False: len(seeds) // 2}


@pytest.mark.parametrize("largest", [5, 25])
@pytest.mark.slow
def test_the_units_of_the_controls_hide_no_negative_curvature(largest: int) -> None:
    for seed in range(20):
        lq = in_other_units(random_problem(seed, F64, 1e-3), seed, largest)
        if seed % 4 < 2:
            assert not riccati(**lq.terms()).singular
            assert solve(lq.problem(), Riccati()).status is Status.CONVERGED
        else:
            check_unbounded(lq)


def test_controls_without_curvature_are_bounded_where_the_cost_has_no_slope_along_them() -> None:
    for seed in range(0, 20, 4):  # bounded ones, with one more control that does nothing
        lq = random_problem(seed, F64, 1e-3)
        wider = replace(
            lq,
            B=[torch.nn.functional.pad(B, (0, 1)) for B in lq.B],
            R=[torch.nn.functional.pad(R, (0, 1, 0, 1)) for R in lq.R],
            N=[torch.nn.functional.pad(N, (0, 1)) for N in lq.N],
            r=[torch.nn.functional.pad(r, (0, 1)) for r in lq.r],
        )
        plain, policy = riccati(**lq.terms()), riccati(**wider.terms())
        assert policy.singular == tuple(range(len(lq.B)))
        value = float(plain.cost_to_go(0, lq.x0))
        assert float(policy.cost_to_go(0, lq.x0)) == pytest.approx(value, rel=1e-8)
        assert solve(wider.problem(), Riccati()).status is Status.CONVERGED
        for r in wider.r:
            r[-1] = 0.1
        with pytest.raises(UnboundedError, match="slope"):
            riccati(**wider.terms())
        assert solve(wider.problem(), Riccati()).status is Status.UNBOUNDED


@pytest.mark.parametrize(("n", "least"), [(3, 1e-8), (3, 3e-9), (4, 1e-8)])
def test_rounding_of_float32_is_not_called_unbounded(n: int, least: float) -> None:
    """R > 0, Q = 0 and Qf = I have a minimum; in float32 its pivots drown where R is turned."""
    draw = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))
    reach = turn @ torch.diag(torch.logspace(0, -4, n, dtype=torch.float64))
    cost = turn @ torch.diag(torch.logspace(0, math.log10(least), n, dtype=torch.float64)) @ turn.T
    steps = 5
    terms = [[turn] * steps, [reach] * steps, [torch.zeros_like(turn)] * steps, [cost] * steps]
    last = torch.eye(n, dtype=torch.float64)
    riccati(*terms, last)
    single = [[term.float() for term in each] for each in terms]
    assert torch.linalg.eigvalsh(single[3][0].double())[0] > 0  # as given it is bounded
    try:
        riccati(*single, last.float())
    except UnboundedError as error:
        pytest.fail(str(error))
    except InputError as error:
        assert "in float64 it has a minimum" in str(error)
    solution = solve(
        ControlProblem(
            LinearDynamics(single[0], single[1]),
            QuadraticCost(single[2], single[3], last.float()),
            torch.ones(n),
        ),
        Riccati(),
    )
    assert solution.status is not Status.UNBOUNDED
