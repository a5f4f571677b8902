"""Claims of what a step does, run on a tiny setting: descent, orders of errors, stable lengths."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from typing import Any

import pandas as pd
import pytest
import torch

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny

FEW = {"EXAMPLES": 3, "TOKENS": 6}


FAMILIES = ("residual", "low-rank", "minilm")


def _few_of_claim_3(tiny: Tiny, **constants: Any) -> Any:
    """Few problems, and a threshold that so few can meet."""
    few: dict[str, Any] = {
        "GRID": (8.0, 64.0),
        "FIT": dict.fromkeys(FAMILIES, range(1)),
        "HELD_OUT": dict.fromkeys(FAMILIES, range(1, 4)),
        "BROKEN": dict.fromkeys(FAMILIES, range(1, 3)),
        "ITERATIONS": dict.fromkeys(FAMILIES, 2),
        "INNER_STEPS": dict.fromkeys(FAMILIES, 3),
        "FIRST_BLOCK": 1,
    }
    return tiny("03_emsa_descent", **(few | FEW | constants))


@pytest.mark.slow
def test_claim_3_counts_problems_in_which_a_step_ascends(tiny: Tiny) -> None:
    claim = _few_of_claim_3(tiny)
    outcome = judge(claim.CLAIM)
    assert [part.name for part in outcome.parts] == ["a", "b", "c"]
    for part, family in zip(outcome.parts, FAMILIES, strict=True):
        assert part.passing is not None
        assert part.evidence.details["rho*"] in claim.GRID[:-1] and part.evidence.assumption_met
        assert part.evidence.value == 0 == part.passing.value
        # Three problems cannot tell a share of 5 %.
        assert part.verdict is Verdict.INCONCLUSIVE
        counts = [
            e.interval and e.interval.count for e in (part.evidence, part.control, part.passing)
        ]
        assert counts == [3, 2, 3], family


def test_claim_3_needs_a_grid_that_goes_on_above_the_fitted_penalty(tiny: Tiny) -> None:
    claim = _few_of_claim_3(tiny, GRID=(64.0,))
    evidence = claim._measure("residual")
    assert not evidence.assumption_met and math.isnan(evidence.value)


def test_claim_3_without_a_penalty_problems_ascend(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out problems that are solved without a penalty by mistake are the control's."""
    many = dict.fromkeys(FAMILIES, range(1, 5))
    claim = _few_of_claim_3(tiny, HELD_OUT=many, BROKEN=many)
    right = claim._solver
    monkeypatch.setattr(claim, "_fit", lambda family: 8.0)
    monkeypatch.setattr(claim, "_solver", lambda family, rho: right(family, 0.0))
    found = claim._measure("residual")
    assert found.value == claim._negative_control("residual").value > 0.5
    assert claim._passing_control("residual").value == 0


def test_claim_3_counts_rises_and_what_is_not_finite(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Solution:
        history = pd.DataFrame({"objective": [3.0, 2.0, 2.0 + 1e-13, 2.5, 1.0, math.inf]})

    module = import_module("deltacontrol.theory.solvers.solving")
    monkeypatch.setattr(module, "solve", lambda *_, **__: Solution)
    claim = tiny("03_emsa_descent")
    assert claim._ascents("residual", None, None, None) == (2, 5)
    count = claim._Count()
    for ascents, steps in ((2, 5), (0, 5), (0, 0)):
        count.add(ascents, steps)
    evidence = count.evidence()
    assert evidence.value == 0.5 and evidence.details["problems without a step"] == 1


def test_claim_4_the_hamiltonians_bound_a_step(tiny: Tiny) -> None:
    bases = {"FIT": range(1), "HELD_OUT": range(1, 3), "BROKEN": range(1, 2)}
    claim = tiny("04_hamiltonian_bound", KINDS=("gradient", "one layer"), **bases, **FEW)
    outcome = judge(claim.CLAIM)
    for part in outcome.parts:
        sizes, of_control, _ = claim.CHECKS[part.name]
        details = part.evidence.details
        assert part.evidence.interval is not None and part.evidence.interval.count == 2
        assert details["steps"] == 2 * len(sizes) * len(claim.KINDS)
        assert details["violations"] <= details["violations with C = 0"] > 0
        needed = [v for name, v in details.items() if name.startswith("largest C needed by kind")]
        assert len(needed) == 2 and 0 < details["fitted C"] <= max(needed)
        assert part.control.details["steps"] == len(of_control) * len(claim.KINDS)
        assert part.passing is not None and part.passing.value == 0
        # Two bases cannot tell a share of a quarter.
        assert part.verdict is Verdict.INCONCLUSIVE
    assert outcome.part("b").control.details["violations"] > 0


def test_claim_4_a_base_violates_if_one_of_its_steps_does(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tiny("04_hamiltonian_bound", FIT=range(2), HELD_OUT=range(2, 22), BROKEN=range(2, 22))

    def steps(base: int, sizes: tuple[float, ...] = (), wrong: float = 0.0) -> tuple[Any, ...]:
        """Each needs C = 1, but one step of every base needs ten times more where it is wrong."""
        return tuple(
            claim._Step(base, kind, size, 10.0 if wrong and kind == "gradient" else 1.0, 0.0, 1.0)
            for size in claim._all_sizes()
            for kind in claim.KINDS
        )

    monkeypatch.setattr(claim, "_steps", steps)
    part = judge(claim.CLAIM).part("a")
    assert (part.evidence.value, part.control.value) == (0, 1)
    assert part.evidence.details["largest C needed, relative to what is allowed"] == 0.5
    # Two bases of the fit are too few for the passing case; with enough of them the part holds.
    assert part.verdict is Verdict.INCONCLUSIVE
    monkeypatch.setattr(claim, "FIT", range(2, 22))
    monkeypatch.setattr(claim, "HELD_OUT", range(22, 42))
    assert judge(claim.CLAIM).part("a").verdict is Verdict.HOLDS
    # Bases that differ from those of the fit turn it.
    monkeypatch.setattr(
        claim, "_steps", lambda base, sizes=(), wrong=0.0: steps(base, sizes, wrong or base >= 22)
    )
    assert judge(claim.CLAIM).part("a").verdict is Verdict.FAILS


def test_claim_4_wrong_costates_err_at_first_order(tiny: Tiny) -> None:
    """Over squares, an error of first order needs a C that grows as one over the step."""
    wrong, right = [], []
    for size in (1e-3, 1e-4):  # in one direction, as the seed is that of the first step
        checks = {"a": ((size,), (size,), 1.0)}
        claim = tiny("04_hamiltonian_bound", KINDS=("all layers",), CHECKS=checks, **FEW)
        wrong += [abs(step.needed) for step in claim._steps(0, (size,), 1.0)]
        right += [abs(step.needed) for step in claim._steps(0)]
    assert wrong[1] / wrong[0] == pytest.approx(10, rel=0.05)
    assert right[1] <= 1.05 * right[0] < wrong[0]  # of second order: C does not grow


def test_claim_8_orders_of_the_predicted_loss_drop(tiny: Tiny) -> None:
    claim = tiny("08_lq_loss_drop", SEEDS=(0,), **FEW)
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    line = outcome.evidence.details["seed 0"]
    assert outcome.evidence.spread == (outcome.evidence.value, outcome.evidence.value)
    assert line["order_of_the_exact_model"] == pytest.approx(3, abs=0.3)
    # The error of the shortest step is the curvature that Gauss-Newton leaves out.
    assert line["error_over_s_squared_at_the_shortest_step"] == pytest.approx(
        line["half_the_neglected_curvature"], rel=0.02
    )
    assert line["predicted_over_actual"][-1] == pytest.approx(1, abs=1e-3)
    assert outcome.control.value == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_claim_14_the_control_takes_the_width_out(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's step in A' is one in A with η_A 128/n: the slope falls by exactly one.

    128/n is a step of the grid of rates.
    """
    from deltacontrol.experiments.measures import lora_widths

    few = partial(
        lora_widths.WidthStudy,
        inputs=8,
        rank=1,
        examples=32,
        steps=15,
        rates_a=tuple(range(-13, 1)),
        rates_b=tuple(range(-8, 4)),
    )
    plain, scaled = few().losses(64, 0), few(scaled=True).losses(64, 0)
    torch.testing.assert_close(plain[1:], scaled[:-1], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(lora_widths, "WidthStudy", few)
    claim = tiny("14_lora_step_ratio", WIDTHS=(64, 256), SEEDS=(0, 1))
    outcome = judge(claim.CLAIM)
    assert outcome.evidence.value - outcome.control.value == pytest.approx(1, abs=0.05)
    assert outcome.evidence.value > 0 > outcome.control.value
    for evidence in (outcome.evidence, outcome.control):
        assert evidence.spread is not None
        assert evidence.spread[0] <= evidence.value <= evidence.spread[1]
        ratios = evidence.details["log2 of the best ratio"]
        means = [sum(ratios[f"width {n}"]) / 2 for n in (64, 256)]
        assert evidence.value == pytest.approx((means[1] - means[0]) / 2, abs=0.01)
        assert max(evidence.details["loss after / before, worst seed"].values()) < 1


@pytest.mark.slow
def test_claim_25_the_largest_stable_step(tiny: Tiny) -> None:
    claim = tiny("25_stable_step", RUNS=(("lora:rank=2", 0),), HEAD_ROWS=32, STEPS=20, **FEW)
    outcome = judge(claim.CLAIM)
    assert outcome.verdict is Verdict.HOLDS
    (predicted,) = outcome.prediction.values()
    (found,) = outcome.evidence.details.values()
    (control,) = outcome.control.details.values()
    top, mean = predicted["lambda_max"], predicted["mean_nonzero_eigenvalue"]
    assert predicted["step"] == pytest.approx(2 / top)
    assert top / 6 <= mean < top  # of three examples' two outputs
    # The same step against another prediction, and at the two ends of the last bracket.
    assert control["log2_ratio"] - found["log2_ratio"] == pytest.approx(math.log2(mean / top))
    step, half = found["largest_stable_step"], 2.0 ** (claim.RESOLUTION / 2)
    assert claim._descended("lora:rank=2", 0, step / half) is not None
    assert claim._descended("lora:rank=2", 0, step * half) is None
    assert found["loss_after"] < predicted["loss"]


@pytest.mark.slow
def test_claim_25_lambda_max_is_that_of_the_dense_matrix(tiny: Tiny) -> None:
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature

    claim = tiny("25_stable_step", HEAD_ROWS=32, **FEW)
    problem, u, mask = claim._start("bitfit", 0)
    curvature = GaussNewtonCurvature(problem, u)
    dense = torch.stack([mask * (curvature @ row) for row in torch.diag(mask)])
    values = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    assert claim._lambda_max(problem, u, mask) == pytest.approx(float(values[-1]), rel=1e-6)
    nonzero = values[-6:]  # of three examples' two outputs
    assert claim._mean_eigenvalue("bitfit", 0) == pytest.approx(float(nonzero.mean()), rel=1e-6)
    assert float(values[:-6].abs().max()) < 1e-10 * float(values[-1])
    assert int((mask == 0).sum()) == len(claim._fitted_head())
