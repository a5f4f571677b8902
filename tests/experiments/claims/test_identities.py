"""Claims of exact identities, run on a tiny setting: rounding alone, and a control that shows."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny

FEW = {"EXAMPLES": 3, "TOKENS": 6}
DELTAS = ("lora:rank=2", "houlsby:bottleneck=4", "prefix:length=2", "prompt:length=2", "bitfit")


def test_claim_1_costates_give_the_gradient(tiny: Tiny) -> None:
    outcome = judge(tiny("01_costate_gradient", DELTAS=DELTAS, **FEW).CLAIM)
    assert outcome.holds
    part = outcome.part()
    for evidence in (part.evidence, part.control):
        assert set(evidence.details) == set(DELTAS)
    # Controls that are 1 % away leave an error of about as much, in every delta.
    assert all(1e-4 < error < 1e-1 for error in part.control.details.values())


def test_claim_1_sees_a_gradient_that_is_off_by_a_millionth(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltacontrol.theory.control.problem import ControlProblem

    right = ControlProblem.gradient
    monkeypatch.setattr(
        ControlProblem, "gradient", lambda p, u: tuple((1 + 1e-6) * g for g in right(p, u))
    )
    outcome = judge(tiny("01_costate_gradient", DELTAS=DELTAS[-1:], **FEW).CLAIM)
    assert outcome.part().verdict is Verdict.FAILS
    assert outcome.part().evidence.value == pytest.approx(1e-6, rel=1e-3)


def test_claim_2_msa_is_gradient_descent(tiny: Tiny) -> None:
    outcome = judge(tiny("02_msa_gradient_descent", ITERATIONS=3, **FEW).CLAIM)
    assert outcome.holds
    evidence = outcome.part().evidence
    assert evidence.cases == 3 and evidence.details["iterate 3"] == evidence.value
    assert evidence.details["moved"] > 1e-3
    assert evidence.details["objective_end"] < evidence.details["objective_start"]


def test_claim_2_the_controls_error_is_of_first_order_in_the_step(tiny: Tiny) -> None:
    """After one step, states of updated layers change a gradient by O(η), hence u by O(η²)."""
    errors = []
    for step in (0.02, 0.01):
        claim = tiny("02_msa_gradient_descent", ITERATIONS=1, STEP_SIZE=step, **FEW)
        errors.append(claim._negative_control({}).value)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_claim_2_sees_a_step_of_another_length_and_controls_that_stand_still(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltacontrol.theory.solvers.minimisers import GradientStep

    claim = tiny("02_msa_gradient_descent", ITERATIONS=1, STEP_SIZE=1e-9, **FEW)
    assert judge(claim.CLAIM).part().verdict is Verdict.ASSUMPTION_NOT_MET
    right = GradientStep.minimise
    monkeypatch.setattr(
        GradientStep,
        "minimise",
        lambda self, stage: right(replace(self, step_size=(1 + 1e-6) * self.step_size), stage),
    )
    claim = tiny("02_msa_gradient_descent", ITERATIONS=2, STEP_SIZE=0.1, **FEW)
    assert judge(claim.CLAIM).part().verdict is Verdict.FAILS


def test_claim_5_sweeps_of_ddp(tiny: Tiny) -> None:
    claim = tiny("05_ddp_backpropagation", ITERATIONS=1)
    outcome = judge(claim.CLAIM)
    assert outcome.holds
    part = outcome.part()
    assert part.evidence.cases == part.control.cases == 6
    assert part.control.value == min(part.control.details.values()) > 1e-4
    curvatures = part.evidence.details["least eigenvalue of a block of the Hessian"]
    assert len(curvatures) == 3 and min(curvatures.values()) > 0
    # Stage-wise Newton is no gradient descent, so that neither reference passes for the other.
    problem, u = claim._problems()["low rank"]
    newton, descent = (torch.cat(f(problem, u)) for f in (claim._stagewise_newton, claim._descent))
    assert (newton - descent).norm() > 0.1 * newton.norm()


def test_claim_5_sees_a_wrong_sweep_and_an_indefinite_block(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tiny("05_ddp_backpropagation", ITERATIONS=1)
    right = claim._swept
    # Cross terms are kept by mistake: the measurement is then the control.
    monkeypatch.setattr(claim, "_swept", lambda p, u, cross, **rest: right(p, u, **rest))
    assert judge(claim.CLAIM).part().verdict is Verdict.FAILS
    monkeypatch.setattr(claim, "_least_curvature", lambda *_: -1.0)
    assert judge(claim.CLAIM).part().verdict is Verdict.ASSUMPTION_NOT_MET


def test_claim_6_ranks_of_the_value_hessian(tiny: Tiny) -> None:
    claim = tiny("06_rank_one_value_hessian", SEEDS=(0, 100))
    outcome = judge(claim.CLAIM)
    assert outcome.holds
    part = outcome.part()
    assert part.evidence.cases == 4
    (by_layer,) = (v for v in part.evidence.details.values() if isinstance(v, list))
    assert by_layer == [1] * (claim.DEPTH + 1)
    broken = part.control.details
    assert set(broken["full-rank terminal cost"]) == {claim.WIDTH}
    for name in ("tanh layers", "control multiplies the state"):
        assert broken[name][-1] == 1 < broken[name][0], name


def test_claim_6_sees_a_running_cost_of_the_state(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tiny("06_rank_one_value_hessian", SEEDS=(0,))
    right = claim._one_logit
    monkeypatch.setattr(claim, "_one_logit", lambda seed, tracking=0.1: right(seed, tracking))
    part = judge(claim.CLAIM).part()
    assert part.verdict is Verdict.FAILS and part.evidence.value == claim.WIDTH


def test_claim_7_gauss_newton_is_layerwise(tiny: Tiny) -> None:
    outcome = judge(tiny("07_gauss_newton_layerwise", DAMPINGS=(0.1,)).CLAIM)
    assert outcome.holds
    part = outcome.part()
    assert part.passing is not None
    for evidence in (part.evidence, part.control, part.passing):
        assert evidence.cases == 3
    assert part.evidence.value < 1e-6 * part.control.value


def test_claim_7_half_the_damping_is_another_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltacontrol.theory.solvers import layerwise

    right = layerwise.layerwise_step

    def halved(problem: Any, u: Any, damping: float) -> Any:
        return right(problem, u, damping / 2)

    claim = tiny("07_gauss_newton_layerwise", DAMPINGS=(1.0,))
    one = list(islice(claim._problems(), 1))
    monkeypatch.setattr(claim, "_problems", lambda: one)
    monkeypatch.setattr(layerwise, "layerwise_step", halved)
    part = judge(claim.CLAIM).part()
    assert part.evidence.value > 0.1 and part.verdict is not Verdict.HOLDS


def test_claim_9_a_prefix_leaves_relative_attention(tiny: Tiny) -> None:
    claim = tiny("09_prefix_bias", EXAMPLES=3, TOKENS=8, LENGTHS=(1, 2), SEEDS=(0,))
    outcome = judge(claim.CLAIM)
    assert outcome.holds and outcome.text == "a holds, b holds"
    for part in outcome.parts:
        assert part.passing is not None
        assert part.evidence.cases == 4  # layers × lengths
        assert part.evidence.details["softmax mass on the prefix, least and largest mean"][0] > 0.01
        # Of the two layers the first sees the same input whatever the prefix of its own.
        names = {f"layer {{}}, length {n}, seed 0" for n in (1, 2)}
        assert set(part.control.details) == {name.format(1) for name in names}
        assert set(part.passing.details) == {name.format(0) for name in names}


def test_claim_9_sees_prefixes_elsewhere_and_prefixes_that_are_not_attended_to(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"EXAMPLES": 2, "TOKENS": 6, "LENGTHS": (1,), "SEEDS": (0,)}
    claim = tiny("09_prefix_bias", **few)
    later = claim._in_all_layers()[1]
    monkeypatch.setattr(claim, "_alone", lambda: later)
    assert {part.verdict for part in judge(claim.CLAIM).parts} == {Verdict.FAILS}
    claim._alone().mass["layer 1, length 1, seed 0"] = 1e-4
    assert {part.verdict for part in judge(claim.CLAIM).parts} == {Verdict.ASSUMPTION_NOT_MET}


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
    assert outcome.holds
    part = outcome.part()
    assert part.passing is not None
    assert part.evidence.details["variation of the gate, least and largest"][0] > 0.01
    assert part.evidence.cases == part.control.cases == part.passing.cases == 4  # layers × lengths
    assert min(part.control.details["no gate, Attn(h) + adapter"].values()) > 1e-2


def test_claim_10_sees_a_gate_of_other_scores(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = tiny("10_prefix_gated_adapter", EXAMPLES=2, TOKENS=6, LENGTHS=(1,), SEEDS=(0,))
    right = claim._adapter

    def off(controlled: Any) -> Any:
        change, gate = right(controlled)
        return change, gate * (1 + 1e-6)

    monkeypatch.setattr(claim, "_adapter", off)
    assert judge(claim.CLAIM).part().verdict is Verdict.FAILS
