"""Claim 21: with a tracking cost the middle layers of a deep network are a turnpike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

if TYPE_CHECKING:
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.depth.turnpike import SteadyState

DEPTH = 60
OUTER = 10
SEEDS = range(30, 42)  # networks that no earlier check has seen; twelve by cost alone
WIDTH = 4
TRACKING = 4.0
TOLERANCE = 1e-9
ENDS = 0.2  # how far the ends may be from the turnpike, in shares of its state
NEAR = 0.5  # how far an argument of tanh may be from that of the turnpike: else it saturates


def _problem(seed: int, tracking: float) -> ControlProblem:
    """``J = 1/2 ||x_L - y||² + Σ tracking/2 ||x_t - d||² + 1/2 ||u_t||²``, one layer repeated.

    The layer is ``x + 0.1 tanh(K x + D u)``, with ``D`` diagonal in [0.5, 1.5] and ``K``
    antisymmetric (Haber & Ruthotto, Inverse Problems 34, 2018): it neither damps nor amplifies, so
    that a decay is not the network's own. Ends are anywhere: `_with_near_ends` puts them near.
    """
    import torch

    from deltacontrol.theory.control.costs import QuadraticCost
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.control.systems import ResidualNetwork

    generator = torch.Generator().manual_seed(500 + seed)
    weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    x0, wanted, target = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    strength = torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    dynamics = ResidualNetwork(
        W1=[(weight - weight.mT) / (2 * WIDTH) ** 0.5] * DEPTH,
        W2=[0.1 * eye] * DEPTH,
        B=[torch.diag(0.5 + strength)] * DEPTH,
    )
    cost = QuadraticCost(
        Q=[tracking * eye] * DEPTH,
        R=[eye] * DEPTH,
        q=[-tracking * wanted] * DEPTH,
        Qf=eye,
        qf=-target,
    )
    return ControlProblem(dynamics, cost, x0)


@cache
def _steady(seed: int) -> SteadyState:
    import torch

    from deltacontrol.theory.depth.turnpike import SteadyState

    problem = _problem(seed, TRACKING)
    return SteadyState.of(problem, torch.zeros_like(problem.x0))


def _reach(problem: ControlProblem, steady: SteadyState) -> float:
    """How far the ends are put: at most `ENDS`, and half of what saturates by the steady law."""
    import torch

    W1, B = _layer(problem)
    slope = float(torch.linalg.matrix_norm(W1 - B @ steady.gain, ord=2))
    return min(ENDS * float(steady.x.norm()), NEAR / 2 / slope)


def _layer(problem: ControlProblem):
    from deltacontrol.theory.control.systems import ResidualNetwork

    assert isinstance(problem.dynamics, ResidualNetwork)
    return problem.dynamics.W1[0], problem.dynamics.B[0]


def _with_near_ends(seed: int, tracking: float, share: float) -> ControlProblem:
    """The problem with its first state, and the target of its last, next to the turnpike's.

    They are a share of `_reach` away.

    The slope of the last cost, x_L - y, is the last costate: y = x̄ - p̄ ends on the turnpike.
    """
    from dataclasses import replace

    import torch

    problem, steady = _problem(seed, tracking), _steady(seed)
    generator = torch.Generator().manual_seed(900 + seed)
    away = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
    first, last = share * _reach(problem, steady) * away / away.norm(dim=1, keepdim=True)
    cost: Any = problem.cost
    return replace(
        problem,
        cost=replace(cost, qf=-(steady.x - steady.p + last)),
        x0=steady.x + first,
    )


def _predict() -> dict[str, Any]:
    """Rates from the steady problem and its Riccati equation; no long problem is solved."""
    return {"rates": {str(seed): _steady(seed).rate for seed in SEEDS}}


@cache
def _fitted(seed: int, tracking: float, share: float) -> dict[str, float]:
    """The rate at which the optimal controls approach those of the steady problem."""
    import torch

    from deltacontrol.theory.depth.turnpike import two_sided_rate
    from deltacontrol.theory.solvers.ilqr import DDP
    from deltacontrol.theory.solvers.solving import solve

    problem, steady = _with_near_ends(seed, tracking, share), _steady(seed)
    solution = solve(problem, DDP(), problem.zero_controls(), max_steps=60, tol=TOLERANCE)
    at = steady.u if tracking else torch.zeros_like(steady.u)
    distances = torch.stack([torch.linalg.vector_norm(u - at) for u in solution.controls])
    W1, B = _layer(problem)
    off = [
        float((W1 @ (x - steady.x) + B @ (u - steady.u)).norm())
        for x, u in zip(solution.states[:-1], solution.controls, strict=True)
    ]
    ends = [float((solution.states[t] - steady.x).norm() / steady.x.norm()) for t in (0, -1)]
    return {
        "rate": two_sided_rate(distances[OUTER:-OUTER]),
        "distance of the first state": ends[0],
        "distance of the last state": ends[1],
        "largest offset": max(off),
        "residual": solution.residual.norm,
    }


def _evidence(tracked: float, share: float, note: str, prediction: Mapping[str, Any]) -> Evidence:
    """Fitted rate over predicted rate, one a network, with a share of the tracking cost."""
    fits = {str(seed): _fitted(seed, tracked * TRACKING, share) for seed in SEEDS}
    ratios = {seed: fit["rate"] / prediction["rates"][seed] for seed, fit in fits.items()}
    far = max(fit[f"distance of the {end} state"] for fit in fits.values() for end in _ENDS)
    offset = max(fit["largest offset"] for fit in fits.values())
    return Evidence.mean(
        list(ratios.values()),
        "network",
        details={"ratios": ratios, "largest distance": far, "largest offset": offset, "fits": fits},
        assumptions={
            f"both ends are within {ENDS:.0%} of the turnpike's state": far <= ENDS * (1 + 1e-9),
            f"no layer saturates: arguments of tanh are off by at most {NEAR:g}": offset <= NEAR,
            "the solver converged": all(fit["residual"] <= TOLERANCE for fit in fits.values()),
        },
        note=note,
    )


_ENDS = ("first", "last")

CLAIM = Claim(
    id=21,
    name="turnpike",
    title="Tracking makes the middle layers a turnpike",
    statement=(
        "with a tracking cost in every layer of a depth-invariant network, and ends near the "
        "steady optimum, ‖u_t - ū‖ decays as C(e^{-μt} + e^{-μ(L-t)}), with μ from the Riccati "
        "equation of the steady problem"
    ),
    source=(
        "Esteve, Geshkovski, Pighin, Zuazua, arXiv 2008.02491, 2020; "
        "Trélat & Zuazua, J. Differential Equations 258(1), 2015"
    ),
    notebook="21_turnpike",
    threshold=Threshold("within", (0.8, 1.25), "mean over networks of fitted over predicted rate"),
    predict=_predict,
    measure=partial(
        _evidence, 1.0, 1.0, "60 equal antisymmetric layers, fitted to layers 10 to 49"
    ),
    negative_control=partial(_evidence, 0.0, 1.0, "the same networks and ends without tracking"),
    passing_control=partial(
        _evidence, 1.0, 0.01, "with tracking, ends a hundred times nearer: almost linear"
    ),
    on="random network",
    revised=(
        "the statement is local, but the ends were anywhere and layers saturated, so that it was "
        "judged outside of its assumptions; the ends are now near and this is checked"
    ),
)
