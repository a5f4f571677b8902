"""Claim 24: its three terms, and a control that is judged by the one that has power against it."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

RANKS = [1, 2, 4, 8]


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_module("deltacontrol.experiments.claims.24_low_rank_update")


def made_record(tails: list[float], gaps: list[float], stable_rank: float) -> Any:
    """Losses between 1 (the head alone) and 0 (full fine-tuning), which are the gaps."""
    module = {"step": 60, "shape": [64, 48], "norm": 1.0, "stable_rank": stable_rank}
    rows = [
        {"rank": rank, "loss": gap, "truncated_loss": gap, "tail_share": tail}
        for rank, gap, tail in zip(RANKS, gaps, tails, strict=True)
    ]
    return SimpleNamespace(
        config={"task": "a", "seed": 0, "steps": 60},
        result={
            "modules": [module],
            "ranks": rows,
            "losses": {"full": 0.0, "head": 1.0},
            "at_the_end": [],
        },
    )


TAILS = [0.5, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("gaps", "stable_rank", "term"),
    [
        (TAILS, 1.0, None),
        (TAILS, 40.0, "stable rank"),
        ([0.1, 0.2, 0.3, 0.5], 1.0, "order"),
        ([0.05, 0.03, 0.02, 0.01], 1.0, "gaps"),
    ],
)
@pytest.mark.one_in(2)
def test_each_term_can_fail_the_claim(
    gaps: list[float],
    stable_rank: float,
    term: str | None,
    claim: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claim, "_runs", lambda: ["a run"])
    record = made_record(TAILS, gaps, stable_rank)
    found = claim._measure(claim._predict(lambda _: record), lambda _: record)
    over = found.details["a, seed 0"]["measured over limit"]
    assert found.value == max(over.values())
    if term is None:
        assert found.value <= 1 and over["gaps"] == 0
    else:
        assert over[term] > 1


@pytest.mark.slow
def test_the_control_passes_where_the_update_is_as_a_gaussian_matrix(
    claim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tails = claim._gaussian((64, 48))
    like = [tails[rank] for rank in RANKS]
    monkeypatch.setattr(claim, "_runs", lambda: ["a run"])

    def control(record: Any) -> float:
        return claim._negative_control(claim._predict(lambda _: record), lambda _: record).value

    assert control(made_record(like, like, 40.0)) == pytest.approx(0)
    assert control(made_record(TAILS, TAILS, 1.0)) > 1
