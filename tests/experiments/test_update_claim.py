"""Claim 24: each of its three parts can fail, and each of its controls can pass."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

RANKS = [1, 2, 4, 8, 12, 16, 24, 32]


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_module("deltacontrol.experiments.claims.24_low_rank_update")


def made_record(tails: list[float], gaps: list[float], stable_rank: float, seed: int = 0) -> Any:
    """Losses between 1 (the head alone) and 0 (full fine-tuning), which are the gaps."""
    module = {"step": 60, "shape": [64, 48], "norm": 1.0, "stable_rank": stable_rank}
    rows = [
        {"rank": rank, "loss": gap, "truncated_loss": gap, "tail_share": tail}
        for rank, gap, tail in zip(RANKS, gaps, tails, strict=True)
    ]
    return SimpleNamespace(
        config={"task": "a", "seed": seed, "steps": 60},
        result={
            "modules": [module],
            "ranks": rows,
            "losses": {"full": 0.0, "head": 1.0},
            "at_the_end": [],
        },
    )


TAILS = [0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02]
ORDERED = [0.3, 0.25, 0.2, 0.15, 0.1, 0.08, 0.05, 0.01]  # as the tails are, and not their size


def judged(claim: Any, monkeypatch: pytest.MonkeyPatch, *made: Any) -> Any:
    """The outcome of two runs with the same numbers."""
    records = {seed: made_record(*made, seed=seed) for seed in (0, 1)}
    monkeypatch.setattr(claim, "_runs", lambda: list(records))
    return judge(replace(claim.CLAIM, runs=claim._runs), records.__getitem__)


@pytest.mark.parametrize(
    ("gaps", "stable_rank", "verdicts"),
    [
        (ORDERED, 1.0, "holds holds"),
        (ORDERED, 40.0, "fails holds"),
        (ORDERED[::-1], 1.0, "holds fails"),
    ],
)
@pytest.mark.one_in(2)
def test_stable_rank_and_order_are_judged_apart(
    gaps: list[float],
    stable_rank: float,
    verdicts: str,
    claim: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = judged(claim, monkeypatch, TAILS, gaps, stable_rank)
    assert [outcome.part(name).verdict.text for name in "ab"] == verdicts.split()
    assert outcome.part("b").evidence.interval.unit == "run"


@pytest.mark.one_in(2)
def test_what_was_trained_foretells_nothing(claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = judged(claim, monkeypatch, TAILS, TAILS, 1.0).part("c")
    assert size.evidence.value == 0 and size.control.value > 0.25
    assert size.verdict is Verdict.ASSUMPTION_NOT_MET
    assert list(size.evidence.assumptions.values()) == [False, True]
    rises = judged(claim, monkeypatch, TAILS, [*TAILS[:-1], 0.06], 1.0).part("c")
    assert list(rises.evidence.assumptions.values()) == [False, False]


@pytest.mark.slow
def test_the_controls_pass_where_they_must(claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tails = claim._gaussian((64, 48))
    like = [tails[rank] for rank in RANKS]
    found = judged(claim, monkeypatch, like, like, 40.0)
    assert found.part("c").control.value == pytest.approx(0)  # the update is as a Gaussian matrix
    for part in judged(claim, monkeypatch, TAILS, ORDERED, 1.0).parts:
        assert part.threshold.side(*part.passing.bounds()) == "good"
        assert part.threshold.side(*part.control.bounds()) == "bad"
