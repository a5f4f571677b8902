"""Claims of exact identities, run on a tiny setting: rounding alone, and a control that shows."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory.claims import Verdict, judge

from .conftest import Tiny

FEW = {"EXAMPLES": 3, "TOKENS": 6}
DELTAS = ("lora:rank=2", "houlsby:bottleneck=4", "prefix:length=2", "prompt:length=2", "bitfit")


def test_claim_1_costates_give_the_gradient(tiny: Tiny) -> None:
    outcome = judge(tiny("01_costate_gradient", DELTAS=DELTAS, **FEW).CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    for evidence in (outcome.evidence, outcome.control):
        assert set(evidence.details) == set(DELTAS)
    # Controls that are 1 % away leave an error of about as much, in every delta.
    assert all(1e-4 < error < 1e-1 for error in outcome.control.details.values())


def test_claim_1_sees_a_gradient_that_is_off_by_a_millionth(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltacontrol.theory.control.problem import ControlProblem

    right = ControlProblem.gradient
    monkeypatch.setattr(
        ControlProblem, "gradient", lambda p, u: tuple((1 + 1e-6) * g for g in right(p, u))
    )
    claim = tiny("01_costate_gradient", DELTAS=DELTAS[-1:], **FEW)
    assert claim._measure(claim._predict()).value == pytest.approx(1e-6, rel=1e-3)


def test_claim_2_msa_is_gradient_descent(tiny: Tiny) -> None:
    claim = tiny("02_msa_gradient_descent", ITERATIONS=3, **FEW)
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.prediction["iterations"] == 3
    details = outcome.evidence.details
    assert details["moved"] > 1e-3 and details["objective_end"] < details["objective_start"]


def test_claim_2_the_controls_error_is_of_first_order_in_the_step(tiny: Tiny) -> None:
    """After one step, states of updated layers change a gradient by O(η), hence u by O(η²)."""
    errors = []
    for step in (0.02, 0.01):
        claim = tiny("02_msa_gradient_descent", ITERATIONS=1, STEP_SIZE=step, **FEW)
        errors.append(claim._negative_control(claim._predict()).value)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_claim_5_sweeps_of_ddp(tiny: Tiny) -> None:
    claim = tiny("05_ddp_backpropagation", ITERATIONS=1)
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    for evidence in (outcome.evidence, outcome.control):
        assert set(evidence.details) == {"stage-wise Newton", "gradient descent"}
        found = [error for kind in evidence.details.values() for error in kind.values()]
        assert len(found) == 6
    assert min(found) == outcome.control.value > 1e-4
    # Stage-wise Newton is no gradient descent, so that neither reference passes for the other.
    problem, u = claim._problems()["low rank"]
    newton, descent = (torch.cat(f(problem, u)) for f in (claim._stagewise_newton, claim._descent))
    assert (newton - descent).norm() > 0.1 * newton.norm()


def test_claim_6_ranks_of_the_value_hessian(tiny: Tiny) -> None:
    claim = tiny("06_rank_one_value_hessian")
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    for name, ranks in outcome.evidence.details.items():
        assert set(ranks) == {1}, name
    assert len(outcome.evidence.details["squared error of one logit"]) == claim.DEPTH + 1
    broken = outcome.control.details
    assert set(broken["full-rank terminal cost"]) == {claim.WIDTH}
    for name in ("tracking cost", "tanh layers", "control multiplies the state"):
        assert broken[name][-1] == 1 < broken[name][0], name


def test_claim_7_gauss_newton_is_layerwise(tiny: Tiny) -> None:
    claim = tiny("07_gauss_newton_layerwise", DAMPINGS=(0.1,))
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.prediction["dampings"] == [0.1]
    for evidence in (outcome.evidence, outcome.control):
        assert len(evidence.details) == 3
    assert max(outcome.evidence.details.values()) < 1e-6 * outcome.control.value


def test_claim_9_a_prefix_leaves_relative_attention(tiny: Tiny) -> None:
    claim = tiny("09_prefix_bias", EXAMPLES=3, TOKENS=8, LENGTHS=(1, 2), SEEDS=(0,))
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.prediction["dimensions"] == {"1": 1, "2": 2}
    details = outcome.evidence.details
    assert details["mean softmax mass on the prefix, least"] > 0.01
    # Of the two layers the first sees the same input whatever the prefix of its own.
    assert set(outcome.control.details["relative attention"]) == {
        "layer 1, length 1, seed 0",
        "layer 1, length 2, seed 0",
    }


def test_claim_9_one_direction_less_does_not_hold_the_term(tiny: Tiny) -> None:
    """The term of two positions fills both of its dimensions: the judged share is not always 0."""
    from deltacontrol.experiments.measures.attention_probe import each_layer

    claim = tiny("09_prefix_bias", EXAMPLES=3, TOKENS=8)
    for _, plain, controlled in each_layer(claim._probe(), (2,), 1.0, (0,)):
        added = controlled.rows(controlled.output - (1 - controlled.gate) * plain.output)
        values = torch.linalg.svdvals(added)
        assert bool((values[:, 1] > 1e-3 * values[:, 0]).all())
        assert claim._left_over(plain, controlled) < 1e-12


def test_claim_10_a_prefix_is_a_gated_adapter(tiny: Tiny) -> None:
    claim = tiny("10_prefix_gated_adapter", EXAMPLES=3, TOKENS=8, LENGTHS=(1, 3), SEEDS=(0,))
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.evidence.details["variation of the gate over tokens and heads, least"] > 0.01
    assert len(outcome.control.details["best constant gate"]) == 4  # layers × lengths
    assert min(outcome.control.details["no gate, Attn(h) + adapter"].values()) > 1e-2
