"""Claim 6: a rank-one terminal Hessian stays rank one through layers linear in the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

DEPTH, WIDTH, CONTROL, BATCH = 8, 6, 3, 5
RELATIVE = 1e-10
SEEDS = range(0, 800, 100)  # of the draws; each uses the numbers that follow it


def _normal(*shape: int, seed: int):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _one_logit(seed: int, tracking: float = 0.0):
    """``Phi = 1/2 (g'x - 1)²``, ``l = 1/2 ||u||² + tracking/2 ||x||²``."""
    import torch

    from deltacontrol.theory.control.costs import QuadraticCost

    g = _normal(WIDTH, seed=seed + 1)
    return QuadraticCost(
        Q=[tracking * torch.eye(WIDTH, dtype=torch.float64)] * DEPTH,
        R=[torch.eye(CONTROL, dtype=torch.float64)] * DEPTH,
        Qf=torch.outer(g, g),
        qf=-g,
    )


def _linear(seed: int):
    from deltacontrol.theory.control.systems import LinearDynamics

    return LinearDynamics(
        A=_normal(DEPTH, WIDTH, WIDTH, seed=seed + 2) / WIDTH**0.5,
        B=_normal(DEPTH, WIDTH, CONTROL, seed=seed + 3),
    )


def _binary_classifier(seed: int):
    """The same layers and a readout without control to two logits, whose Hessian has rank one."""
    from deltacontrol.theory.control.systems import LinearDynamics

    layers = _linear(seed)
    return LinearDynamics(
        A=[*layers.A, _normal(2, WIDTH, seed=seed + 4)], B=[*layers.B, _normal(2, 0, seed=seed + 5)]
    )


def _ranks(dynamics: Any, cost: Any, seed: int, *, second_order: bool = True) -> list[int]:
    """The largest numerical rank of ``V_t`` over the examples, for ``t = 0..L``.

    The controls are one per example, away from the optimum. What counts as zero is less than 1e-10
    of the largest singular value.
    """
    import torch

    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.solvers.quadratic_model import QuadraticModel, sweep

    problem = ControlProblem(dynamics, cost, _normal(BATCH, WIDTH, seed=seed + 6))
    u = tuple(
        0.1 * _normal(BATCH, m, seed=seed + 7 + t) for t, m in enumerate(dynamics.control_sizes)
    )
    now = problem.evaluate(u)
    model = QuadraticModel.of(problem, u, now, second_order=second_order)
    ranks = []
    for V in sweep(model).V:
        values = torch.linalg.svdvals(V)
        ranks.append(int((values > RELATIVE * values[:, :1]).sum(-1).max()))
    return ranks


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Second-order sweeps through linear layers; the largest rank of all."""
    import torch

    from deltacontrol.theory.control.costs import CrossEntropyCost
    from deltacontrol.theory.control.systems import ResidualNetwork

    entropy = CrossEntropyCost(torch.arange(BATCH) % 2, weight_decay=1.0)
    ranks = {}
    for seed in SEEDS:
        ranks[f"one logit, draw {seed}"] = _ranks(_linear(seed), _one_logit(seed), seed)
        ranks[f"two classes, draw {seed}"] = _ranks(_binary_classifier(seed), entropy, seed)
    network = ResidualNetwork.random(DEPTH, WIDTH, 8, CONTROL, seed=8)
    gauss_newton = _ranks(network, _one_logit(0), 0, second_order=False)
    return Evidence.worst(
        {name: max(found) for name, found in ranks.items()},
        details={"Gauss-Newton through tanh layers, by layer": gauss_newton},
        assumptions={"the terminal Hessian has rank one": {r[-1] for r in ranks.values()} == {1}},
        note="numerical rank at 1e-10 per example, 8 layers of width 6, one control per example",
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The running cost depends on the state; the draw with the smallest rank.

    What else breaks it is in the details: layers that are not linear in the state, a control that
    multiplies the state, and a terminal cost of full rank.
    """
    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.systems import ResidualNetwork

    network = ResidualNetwork.random(DEPTH, WIDTH, 8, CONTROL, seed=8)
    full = SquaredErrorCost(_normal(BATCH, WIDTH, seed=9), weight_decay=1.0)
    others = {
        "tanh layers": _ranks(network, _one_logit(0), 0),
        "control multiplies the state": _ranks(*_bilinear(), 0),
        "full-rank terminal cost": _ranks(_linear(0), full, 0),
    }
    note = "a tracking cost of 0.1 on the state; the draw with the smallest rank"
    return Evidence.worst(_tracked(0.1), least=True, details=others, note=note)


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """The same with a tracking cost of no weight."""
    return Evidence.worst(_tracked(0.0), note="the tracking cost has no weight; largest rank")


def _tracked(weight: float) -> dict[str, float]:
    """The largest rank over the layers with this tracking cost, for every draw."""
    return {
        f"tracking cost, draw {seed}": max(_ranks(_linear(seed), _one_logit(seed, weight), seed))
        for seed in SEEDS
    }


def _bilinear():
    """Layers linear in the state whose control multiplies it, and one logit at the end."""
    import torch

    from deltacontrol.theory.control.costs import QuadraticCost
    from deltacontrol.theory.control.systems import LowRankDynamics

    dynamics = LowRankDynamics(list(_normal(DEPTH, WIDTH, WIDTH, seed=2) / WIDTH**0.5), rank=1)
    g = _normal(WIDTH, seed=1)
    eye = torch.eye(2 * WIDTH, dtype=torch.float64)
    zero = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    cost = QuadraticCost([zero] * DEPTH, [100 * eye] * DEPTH, Qf=torch.outer(g, g), qf=-g)
    return dynamics, cost


CLAIM = Claim(
    id=6,
    name="rank-one-value-hessian",
    title="A rank-one terminal Hessian stays rank one",
    statement=(
        "through layers x ↦ A_t x + b_t(u) with a state-free running cost, rank V_xx does not grow "
        "in DDP's backward sweep, so a terminal Hessian φ'' g gᵀ stays rank one per example"
    ),
    source="Liu, Chen, Theodorou, ICLR 2021 (DDPNOpt), Proposition 3",
    notebook="06_rank_one_value_hessian",
    threshold=Threshold("<=", 1.0, "largest numerical rank of V_xx over layers and examples"),
    revised=(
        "four broken assumptions were judged as one control, which could not pass; now it is a "
        "tracking cost, harmless without weight, and eight draws are swept instead of one"
    ),
    predict=dict,
    measure=_measure,
    negative_control=_negative_control,
    passing_control=_passing_control,
    on="exact problem",
)
