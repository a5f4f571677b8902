"""Claims of what a step does, run on a tiny setting: descent, orders of errors, stable lengths."""

from __future__ import annotations

import math
from dataclasses import replace
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


def test_claim_8_the_neglected_curvature(tiny: Tiny) -> None:
    claim = tiny("08_lq_loss_drop", SEEDS=(0, 1), **FEW)
    outcome = judge(claim.CLAIM)
    part = outcome.part()
    assert part.evidence.assumption_met and part.evidence.value < -1.5
    assert part.control.value > -0.5 and part.passing is not None and part.passing.value < -1.5
    ratios = part.evidence.details["found over predicted coefficient"]
    assert set(ratios) == set(outcome.prediction) == {"seed 0", "seed 1"}
    # Along the directions of the passing case the model has no curvature to leave out.
    flat = part.passing.details
    for seed, bend in flat["d'Gd"].items():
        assert abs(bend) < 1e-10 * abs(flat["predicted coefficients"][seed])


@pytest.mark.parametrize("factor", [0.0, 1.3, -1.0])
def test_claim_8_another_coefficient_does_not_pass(tiny: Tiny, factor: float) -> None:
    claim = tiny("08_lq_loss_drop", SEEDS=(0, 1), **FEW)
    wrong = {s: claim._line(s, "step")["coefficient"] * (factor or 1e-3) for s in claim.SEEDS}
    evidence = claim._evidence(wrong, "step", 1.0, "")
    assert not claim.CLAIM.parts[0].threshold.passes(evidence.value)


@pytest.mark.slow
def test_claim_14_slopes_of_the_best_ratios(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # At the width that the fixed number of inputs has, the control is the measurement.
    torch.testing.assert_close(few(fixed=64).losses(64, 0), few().losses(64, 0))
    monkeypatch.setattr(lora_widths, "WidthStudy", few)
    claim = tiny("14_lora_step_ratio", WIDTHS=(64, 256), SEEDS=(0, 1), FIXED=64)
    exact = replace(claim.CLAIM, parts=claim.CLAIM.parts[:1], runs=None)
    part = judge(replace(exact, predict=lambda: {"slope": 1.0})).part()
    assert part.passing is not None
    for evidence in (part.evidence, part.control, part.passing):
        ratios = evidence.details["log2 of the best ratio"]
        slopes = [(high - low) / 2 for low, high in ratios.values()]
        assert evidence.value == pytest.approx(sum(slopes) / 2)
        assert evidence.details["largest best loss over that at the start"] < 1
    first = part.evidence.details["log2 of the best ratio"]["seed 0"][0]
    assert part.control.details["log2 of the best ratio"]["seed 0"][0] == first


def test_claim_14_a_known_ratio_gives_its_slope(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios that grow as the width pass; those that stay, or grow as its square, do not."""
    claim = tiny("14_lora_step_ratio", SEEDS=(0, 1, 2))
    threshold = claim.CLAIM.parts[0].threshold
    for power, passes in ((1.0, True), (0.0, False), (2.0, False)):
        found = lambda width, seed, *_: (power * math.log2(width) + 1e-3 * seed, 1e-3, False)  # noqa: B023, E731
        monkeypatch.setattr(claim, "_best", found)
        evidence = claim._measure({"slope": 1.0}, None)
        assert evidence.value == pytest.approx(power, abs=1e-9)
        assert threshold.passes(evidence.value) is passes and evidence.assumption_met
    edges = lambda width, seed, *_: (math.log2(width), 0.5, width == 64)  # noqa: E731
    monkeypatch.setattr(claim, "_best", edges)
    assert not any(claim._measure({"slope": 1.0}, None).assumptions.values())


@pytest.mark.slow
def test_claim_25_the_largest_stable_step(tiny: Tiny) -> None:
    name = "lora:rank=2"
    claim = tiny("25_stable_step", DELTAS=(name,), SEEDS=(0, 1), HEAD_ROWS=32, STEPS=12, **FEW)
    outcome = judge(replace(claim.CLAIM, parts=claim._parts((name,))))
    start, path = outcome.part("a"), outcome.part("d")
    assert start.evidence.interval is not None and start.evidence.interval.count == 2
    ratios = []
    for seed in (0, 1):
        predicted = outcome.prediction[f"{name}/{seed}"]
        assert predicted["step"] == pytest.approx(2 / predicted["lambda_max"])
        found = start.evidence.details[f"seed {seed}"]
        ratios.append(abs(math.log2(found["ratio"])))
        # The two ends of the last bracket: a step in it that is stable, and one that is not.
        step, half = predicted["step"] * found["ratio"], 2.0 ** (claim.RESOLUTION / 2)
        assert claim._descended(name, seed, step / half, 1.0) is not None
        assert claim._descended(name, seed, step * half, 1.0) is None
        after = path.evidence.details[f"seed {seed}"]
        assert after["step"] == pytest.approx(step / half)
        assert after["loss_after"] < after["loss_before"]
        # Eight times shorter is away from the edge.
        shorter = path.control.details[f"seed {seed}"]
        assert shorter["step"] == pytest.approx(after["step"] / claim.CAUTION)
    assert start.evidence.value == pytest.approx(sum(ratios) / 2)
    # Where the outputs are nearly linear theory must be right at the start and along the path.
    assert start.passing is not None and start.passing.value <= claim.RESOLUTION
    assert path.passing is not None and 1.5 <= path.passing.value <= 2.3
    assert path.control.value < path.evidence.value


@pytest.mark.slow
def test_claim_25_twice_the_eigenvalue_shifts_the_ratio_by_one(tiny: Tiny) -> None:
    claim = tiny("25_stable_step", SEEDS=(0, 1), HEAD_ROWS=32, STEPS=20, **FEW)
    top = claim._lambda_max(*claim._start("bitfit", 0, 1.0))
    right, wrong = (
        claim._threshold("bitfit", 0, 2 / (factor * top), claim.NEAR)["log2_ratio"]
        for factor in (1.0, 8.0)
    )
    assert abs(right) <= claim.RESOLUTION
    assert wrong - right == pytest.approx(3, abs=claim.RESOLUTION)


@pytest.mark.slow
def test_claim_25_lambda_max_is_that_of_the_dense_matrix(tiny: Tiny) -> None:
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature

    claim = tiny("25_stable_step", HEAD_ROWS=32, **FEW)
    problem, u, mask = claim._start("bitfit", 0, 1.0)
    curvature = GaussNewtonCurvature(problem, u)
    dense = torch.stack([mask * (curvature @ row) for row in torch.diag(mask)])
    values = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    assert claim._lambda_max(problem, u, mask) == pytest.approx(float(values[-1]), rel=1e-4)
    assert float(values[:-6].abs().max()) < 1e-10 * float(values[-1])  # three examples' two outputs
    assert int((mask == 0).sum()) == len(claim._fitted_head(0))
    # Other targets, the same matrix: it is that of the outputs alone.
    far, again, _ = claim._start("bitfit", 0, claim.FAR)
    assert claim._lambda_max(far, again, mask) == pytest.approx(float(values[-1]), rel=1e-4)
    initial = [float(p.objective(u)) for p in (problem, far)]
    assert initial[1] == pytest.approx(claim.FAR**2 * initial[0], rel=1e-9)
