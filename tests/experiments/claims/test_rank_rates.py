"""Claim 31 on records written by hand, and what its records are: plain trainings with Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from deltacontrol.deltas import LoRA, attach
from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.studies.learning_rates.ranks import RankRates
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.judging import Outcome, judge

from .conftest import Tiny

FEW = {"TASKS": ("one", "two", "three"), "RANKS": (1, 4, 16), "DRAWS": range(2)}
Best = Callable[[str, int, float], float]  # of a task, a rank and γ, the log2 of the best rate


def records(best: Best, *, falls: float = 1.0, ends: float = math.inf) -> Callable[[Any], Any]:
    """Losses 2 - falls + (log2 rate - best)²/20 where that is below 2, and none from a rate on."""

    def record(experiment: RankRates) -> Any:
        rows = []
        for exponent in experiment.exponents:
            for rank in experiment.ranks:
                pair = {"rank": rank, "multiplier": experiment.scaled(rank, exponent)}
                middle = best(experiment.task, rank, exponent)
                for rate in experiment.rates:
                    loss = 2 - falls + (math.log2(rate) - middle) ** 2 / 20
                    steps = range(1, experiment.steps + 1 if rate < ends else 3)
                    rows += [pair | {"rate": rate, "step": s, "loss": min(loss, 2)} for s in steps]
        return SimpleNamespace(curve=lambda: pd.DataFrame(rows).drop_duplicates())

    return record


def predicted(task: str, rank: int, exponent: float) -> float:
    return -8.3 + 0.01 * len(task) * math.log2(rank) - (1 - exponent) / 2 * math.log2(rank / 4)


def verdicts(outcome: Outcome) -> list[str]:
    return [part.verdict.value for part in outcome.parts]


@pytest.fixture
def claim(tiny: Tiny) -> Any:
    return tiny("31_lora_rank_rates", **FEW)


def test_best_rates_as_predicted_hold(claim: Any) -> None:
    outcome = judge(claim.CLAIM, records(predicted))
    assert verdicts(outcome) == ["holds", "holds"]
    for part, slope in zip(outcome.parts, (0.0, -0.5), strict=True):
        # Losses are parabolas, so that the vertex is the best rate itself.
        mean = slope + 0.01 * (3 + 3 + 5) / 3
        assert part.evidence.value == pytest.approx(mean, abs=1e-9)
        assert part.evidence.interval is not None and part.evidence.interval.count == 3
        assert part.control.value == pytest.approx(mean - 0.5 - 2 * slope, abs=1e-9)
        assert part.passing is not None and part.passing.value == pytest.approx(slope, abs=0.15)


def test_the_other_multipliers_rates_fail(claim: Any) -> None:
    """The same trainings with the two multipliers exchanged: each part has the other's slope."""
    outcome = judge(claim.CLAIM, records(lambda task, r, g: predicted(task, r, 1.0 - g)))
    for part, slope in zip(outcome.parts, (-0.5, 0.0), strict=True):
        assert not part.threshold.passes(part.evidence.value)
        assert part.evidence.value == pytest.approx(slope, abs=0.05)
    assert verdicts(outcome) == ["inconclusive"] * 2  # the controls pass now, and say so


def test_slopes_that_are_not_predicted(claim: Any) -> None:
    outcome = judge(claim.CLAIM, records(lambda task, r, g: predicted(task, r, 1.0)))
    assert verdicts(outcome) == ["inconclusive", "fails"]  # a's control passes as well
    steep = judge(claim.CLAIM, records(lambda task, r, g: predicted(task, r, 2 * g - 1)))
    assert verdicts(steep) == ["holds", "fails"]  # slope -1 with a fixed multiplier


@pytest.mark.parametrize(
    ("made", "missed"),
    [
        (records(lambda task, r, g: -3.2), "the grid holds every best rate"),  # at its end
        (records(predicted, ends=2.0**-8), "the grid holds every best rate"),  # at a divergence
        (records(predicted, falls=0.1), "training lowers the loss"),
    ],
)
def test_what_the_records_have_to_be(claim: Any, made: Any, missed: str) -> None:
    outcome = judge(claim.CLAIM, made)
    assert verdicts(outcome) == ["assumption_not_met"] * 2
    assert [n for n, met in outcome.part("a").evidence.assumptions.items() if not met] == [missed]


def test_the_exact_problem_has_the_slopes_of_the_formula(claim: Any) -> None:
    """At one number of inputs, where no control is made to pass."""
    flat, falling = (
        claim._exact(exponent, lambda rank: 1024, "").value
        for exponent in (claim.STANDARD, claim.FIXED)
    )
    assert flat == pytest.approx(0.0, abs=0.1) and falling == pytest.approx(-0.5, abs=0.1)


# -- the trainings ---------------------------------------------------------------------------------


@pytest.fixture
def study(places: Any) -> RankRates:
    return RankRates(
        **places, ranks=(1, 2), rates=(1e-3, 1e-2), reference=2, multiplier=2.0, rows=16,
        head_rows=32, max_length=8, batch_size=4, steps=6,
    )  # fmt: skip


def test_a_training_is_adam_on_a_and_b_alone(study: RankRates, tmp_path: Path) -> None:
    record = run(study, RunStore(tmp_path), progress=False)
    assert record is not None
    curve = record.curve()
    # Both multipliers are one at the reference rank, which is trained once.
    assert curve.groupby(["rank", "multiplier"]).ngroups == 3
    assert record.result["num_trainings"] == 6 and len(curve) == 6 * study.steps
    setting, _ = study._fitted()
    controlled = attach(setting.base, LoRA(rank=1, alpha=4.0), seed=0)
    named = controlled.trainable()
    assert {name.rpartition(".")[2] for name in named} == {"A", "B"}
    adam, losses = torch.optim.Adam(named.values(), lr=1e-2), []
    for step in range(study.steps):
        batch = setting.encoded.training_batch(step, seed=0, batch_size=4)
        loss = controlled(**batch).loss
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    controlled.detach()
    found = curve[(curve["multiplier"] == 4.0) & (curve["rate"] == 1e-2)]
    assert found["rank"].unique().tolist() == [1]
    assert found["loss"].tolist() == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


def test_a_study_that_was_stopped_trains_the_rest(
    study: RankRates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study.execute(Workspace(tmp_path / "whole", progress=False))
    trained, right = [], RankRates._losses

    def stopping(own: RankRates, setting: Any, pair: Any, rate: float) -> list[float]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(pair)
        return right(own, setting, pair, rate)

    with monkeypatch.context() as patch:
        patch.setattr(RankRates, "_losses", stopping)
        with pytest.raises(KeyboardInterrupt):
            study.execute(Workspace(tmp_path / "stopped", progress=False))
    trained.clear()
    monkeypatch.setattr(
        RankRates,
        "_losses",
        lambda own, setting, pair, rate: trained.append(pair) or right(own, setting, pair, rate),
    )
    rest = study.execute(Workspace(tmp_path / "stopped", progress=False))
    assert len(trained) == 4  # the first pair's two are kept
    pd.testing.assert_frame_equal(rest.curve, whole.curve, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ranks": (4, 1)}, "ranks are"),
        ({"rates": ()}, "rates are"),
        ({"rates": (0.0, 1.0)}, "rates are"),
        ({"exponents": (math.nan,)}, "exponents are"),
        ({"multiplier": 0.0}, "multiplier is 0"),
        ({"rows": 4, "batch_size": 8}, "at most the next"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RankRates(**fields)
