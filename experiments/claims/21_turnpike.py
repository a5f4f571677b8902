"""Claim 21: with a tracking cost the middle layers of a deep network are a turnpike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

DEPTH = 60
OUTER = 10
SEEDS = range(5)
WIDTH = 4
TRACKING = 4.0
TOLERANCE = 1e-9
NEAR = 0.5


def _problem(seed: int, tracking: float):
    """``J = 1/2 ||x_L - y||² + Σ tracking/2 ||x_t - d||² + 1/2 ||u_t||²``, one layer repeated.

    The layer is ``x + 0.1 tanh(K x + D u)``, with ``D`` diagonal in [0.5, 1.5] and ``K``
    antisymmetric (Haber & Ruthotto, Inverse Problems 34, 2018): it neither damps nor amplifies, so
    that a decay is not the network's own.
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


def _steady(seed: int):
    import torch

    from deltacontrol.theory.depth.turnpike import SteadyState

    problem = _problem(seed, TRACKING)
    return SteadyState.of(problem, torch.zeros_like(problem.x0))


def _predict() -> dict[str, Any]:
    """Rates from the steady problem and its Riccati equation; no long problem is solved."""
    return {"rates": [_steady(seed).rate for seed in SEEDS]}


def _fitted(seed: int, tracking: float) -> dict[str, Any]:
    """The rate at which the optimal controls approach those of the steady problem."""
    import torch

    from deltacontrol.theory.control.systems import ResidualNetwork
    from deltacontrol.theory.depth.turnpike import two_sided_rate
    from deltacontrol.theory.solvers.ilqr import DDP
    from deltacontrol.theory.solvers.solving import solve

    problem = _problem(seed, tracking)
    solution = solve(problem, DDP(), problem.zero_controls(), max_steps=60, tol=TOLERANCE)
    steady = _steady(seed)
    at = steady.u if tracking else torch.zeros_like(steady.u)
    distances = torch.stack([torch.linalg.vector_norm(u - at) for u in solution.controls])
    # Where an argument of tanh is off by more than 1/2, the layer is far from its linearisation.
    layers = problem.dynamics
    assert isinstance(layers, ResidualNetwork)
    W1, B = layers.W1[0], layers.B[0]
    off = torch.stack(
        [
            torch.linalg.vector_norm(W1 @ (x - steady.x) + B @ (u - steady.u))
            for x, u in zip(solution.states[:-1], solution.controls, strict=True)
        ]
    )
    near = torch.nonzero(off <= NEAR).flatten()
    enough = len(near) >= 8
    return {
        "rate": two_sided_rate(distances[OUTER:-OUTER]),
        "largest_offset": float(off[OUTER:-OUTER].max()),
        "near_layers": [int(near[0]), int(near[-1])] if enough else [],
        "near_rate": two_sided_rate(distances[near[0] : near[-1] + 1]) if enough else None,
        "residual": solution.residual.norm,
    }


def _ratios(prediction: Mapping[str, Any], tracking: float) -> tuple[list[float], dict[str, Any]]:
    fits = [_fitted(seed, tracking) for seed in SEEDS]
    rates = prediction["rates"]
    ratios = [fit["rate"] / rate for fit, rate in zip(fits, rates, strict=True)]
    near = [
        fit["near_rate"] and fit["near_rate"] / rate for fit, rate in zip(fits, rates, strict=True)
    ]
    return ratios, {"ratios": ratios, "ratios of unsaturated layers": near, "fits": fits}


def _distance_from_one(ratio: float) -> float:
    return max(ratio, 1 / ratio) if ratio > 0 else float("inf")


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Fit the optimal controls of the 60-layer network; worst of the seeds."""
    ratios, details = _ratios(prediction, TRACKING)
    return Evidence(
        value=max(ratios, key=_distance_from_one),
        details=details,
        assumption_met=all(fit["residual"] <= TOLERANCE for fit in details["fits"]),
        note=(
            "60 equal antisymmetric layers, layers 10 to 49, DDP to 1e-9, worst of 5 seeds; the "
            "rate is local, and saturated layers approach the turnpike at their own, bounded speed "
            "(the ratios of the unsaturated layers do not enter the verdict)"
        ),
        spread=(min(ratios), max(ratios)),
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The same networks without the tracking cost; the steady optimum then has u = 0."""
    ratios, details = _ratios(prediction, 0.0)
    return Evidence(
        value=min(ratios, key=_distance_from_one),
        details=details,
        note="without tracking, rates over those predicted with it; best of 5 seeds",
        spread=(min(ratios), max(ratios)),
    )


CLAIM = Claim(
    id=21,
    name="turnpike",
    title="Tracking makes the middle layers a turnpike",
    statement=(
        "with a tracking cost in every layer of a depth-invariant network, ‖u_t - ū‖ decays as "
        "C(e^{-μt} + e^{-μ(L-t)}), with μ from the Riccati equation of the steady problem"
    ),
    source=(
        "Esteve, Geshkovski, Pighin, Zuazua, arXiv 2008.02491, 2020; "
        "Trélat & Zuazua, J. Differential Equations 258(1), 2015"
    ),
    notebook="21_turnpike",
    threshold=Threshold("within", (0.8, 1.25), "fitted rate over predicted rate, worst of 5 seeds"),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
