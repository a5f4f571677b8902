"""Claims of controlled dynamics, run on a tiny setting: energies, growth, turnpikes, bounds."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory.claims import Verdict, judge

from .conftest import Tiny

DELTAS = ("lora:rank=2", "houlsby:bottleneck=4", "prefix:length=2", "bitfit")


def test_claim_19_no_control_is_cheaper_than_the_least_energy(tiny: Tiny) -> None:
    claim = tiny(
        "19_minimum_energy",
        DELTAS=DELTAS[:2],
        SEEDS=(0,),
        EXAMPLES=3,
        TOKENS=6,
        STEPS=10,
        LEARNING_RATE=1e-2,
    )
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    details = outcome.evidence.details
    names = {f"{delta}/0" for delta in claim.DELTAS}
    assert details["largest distance of gradient descent from 1"] < 1e-9
    assert set(details["AdamW, linear"]) == set(details["AdamW, real model"]) == names
    # AdamW leaves the range of C', and pays for it.
    assert min(details["AdamW, linear"].values()) > 1 + 1e-3
    assert set(outcome.control.details) == names | {"largest distance from 1"}
    assert outcome.control.value < 1 - 1e-6


def test_claim_19_a_control_in_the_null_space_is_paid_for(tiny: Tiny) -> None:
    """du = C⁺y costs just its least energy; with an orthogonal part, by so much more."""
    claim = tiny("19_minimum_energy", DELTAS=("bitfit",), SEEDS=(0,), EXAMPLES=2, TOKENS=5)
    (setting,) = claim._settings()
    du, y, _ = claim._train(setting, "sgd", linear=True)
    assert setting.ratio(du, y) == pytest.approx(1, abs=1e-9)
    assert setting.ratio(tuple(2 * u for u in du), 2 * y) == pytest.approx(1, abs=1e-9)
    assert setting.ratio(tuple(2 * u for u in du), y) == pytest.approx(4, rel=1e-9)


@pytest.mark.slow
def test_claim_20_growth_in_depth_is_bounded(tiny: Tiny) -> None:
    claim = tiny(
        "20_depth_perturbation",
        DELTAS=DELTAS[-1:],
        EXAMPLES=3,
        TOKENS=5,
        TRAINING_STEPS=5,
        LEARNING_RATE=1e-2,
        POINTS=2,
        FACTORS=(2, 4, 8),
    )
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    assert len(outcome.prediction["spectral_norm_of_each_block"]) == 2
    found = outcome.evidence.details
    names = {"worst case", "worst case, last block"} | {f"{n} steps a block" for n in (2, 4, 8)}
    assert set(found) == set(claim.DELTAS) | names == set(outcome.control.details)
    # A tiny change along the last block's top singular vector nearly attains the bound.
    assert max(found["worst case, last block"]["ratio"]) > 0.99
    assert outcome.evidence.value == max(max(case["ratio"]) for case in found.values())
    # The finer the steps, the less halving them changes: by a half in the limit.
    halved = [max(found[f"{n} steps a block"]["change_by_halving"]) for n in (4, 8)]
    assert 1.5 < halved[0] / halved[1] < 4
    mean = outcome.control.details["worst case"]["mean_constant"]
    assert all(m < n for m, n in zip(mean, found["worst case"]["mean_constant"], strict=True))


@pytest.mark.slow
def test_claim_21_the_rate_of_a_turnpike(tiny: Tiny) -> None:
    """A strong tracking cost, so that few layers will do, from a start that saturates few."""
    claim = tiny("21_turnpike", DEPTH=24, OUTER=6, TRACKING=16.0, SEEDS=range(3, 4))
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    (rate,), details = outcome.prediction["rates"], outcome.evidence.details
    (fit,) = details["fits"]
    assert outcome.evidence.assumption_met and fit["residual"] <= claim.TOLERANCE
    assert outcome.evidence.value == pytest.approx(fit["rate"] / rate)
    (near,) = details["ratios of unsaturated layers"]
    assert near == pytest.approx(1, abs=0.1)
    assert outcome.control.value < 0.2 < 0.5 < outcome.evidence.value < 1.25


def test_claim_21_the_rate_is_that_of_the_riccati_equation(tiny: Tiny) -> None:
    """Against the spectral radius of the closed loop, from scipy's solution of the equation."""
    import numpy as np
    from scipy.linalg import solve_discrete_are

    claim = tiny("21_turnpike")
    problem, steady = claim._problem(0, claim.TRACKING), claim._steady(0)
    A, B = torch.func.jacrev(lambda x, u: problem.dynamics.step(0, x, u), (0, 1))(
        steady.x, steady.u
    )
    x, u, p = steady.x, steady.u, steady.p
    hessian = torch.func.hessian(lambda z: problem.hamiltonian(0, z[:4], z[4:], p))
    H = hessian(torch.cat([x, u])).numpy()
    A, B = A.numpy(), B.numpy()
    P = solve_discrete_are(A, B, H[:4, :4], H[4:, 4:], s=H[:4, 4:])
    K = np.linalg.solve(H[4:, 4:] + B.T @ P @ B, B.T @ P @ A + H[4:, :4])
    radius = np.abs(np.linalg.eigvals(A - B @ K)).max()
    assert steady.rate == pytest.approx(-np.log(radius), rel=1e-6)


def test_claim_22_optima_in_a_box(tiny: Tiny) -> None:
    claim = tiny("22_bang_bang", DEPTHS=(2, 8), SEEDS=range(1))
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.prediction["fraction_at_bounds"] == {"2": 0.0, "8": 0.5}
    for evidence in (outcome.evidence, outcome.control):
        assert evidence.spread is not None
        assert evidence.spread[0] <= evidence.value <= evidence.spread[1]
        assert evidence.details["scores"] == [evidence.value]
    bound, inside = (
        e.details["medians"]["8"]["fraction_at_bounds"] for e in (outcome.evidence, outcome.control)
    )
    assert bound >= 0.5 > 0.1 > inside


def test_claim_22_no_flip_is_left_out(tiny: Tiny) -> None:
    """Every binary control of two layers: the search ends where no single flip helps."""
    claim = tiny("22_bang_bang")
    problem = claim._problem(2, 0, 0.0)
    signs = torch.ones(8, dtype=torch.float64)
    found, value = claim._flipped(problem, signs)
    every = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64)] * 8)
    values = torch.func.vmap(lambda z: problem.objective(tuple(z.reshape(-1, 4))))(every)
    neighbours = values[(every != found).sum(1) == 1]
    assert len(neighbours) == 8 and float(neighbours.min()) >= value
    assert float(values.min()) <= value < float(problem.objective(tuple(0.5 * signs.view(2, 4))))
