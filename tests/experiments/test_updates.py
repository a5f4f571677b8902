"""The update of a real fine-tuning: spectra against matrices, its cuts, its overlaps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tqdm.auto import tqdm

from deltacontrol.deltas import FullFineTuning
from deltacontrol.experiments.runs.experiment import Outcome, Workspace
from deltacontrol.experiments.studies.spectra.decompositions import (
    decomposed,
    overlaps_with,
    tail_share,
)
from deltacontrol.experiments.studies.spectra.updates import UpdateSpectra, _Bench, _Trained
from deltacontrol.theory.errors import InputError

SMALL: dict[str, Any] = {
    "sites": ("attention.value",),
    "ranks": (1, 384),
    "steps": 4,
    "snapshots": 2,
    "batch_size": 4,
    "max_length": 8,
    "train_rows": 16,
    "full_rates": (1e-9, 3e-4),
    "lora_rates": (1e-2,),
    "head_rates": (1e-2,),
}


@pytest.fixture(scope="module")
def small(minilm_l6: str) -> UpdateSpectra:
    return UpdateSpectra(model=minilm_l6, **SMALL)


@pytest.fixture(scope="module")
def outcome(small: UpdateSpectra, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return small.execute(Workspace(tmp_path_factory.mktemp("updates"), progress=False))


@pytest.mark.slow
def test_the_best_rate_counts_and_is_recorded(outcome: Outcome) -> None:
    losses = {(t["trained"], t["rate"]): t["loss"] for t in outcome.result["trials"]}
    assert len(losses) == 6 and losses["full", 90.0] > losses["full", 3e-4]  # one beyond the best
    ends = outcome.result["losses"]
    assert ends["full"] == losses["full", 3e-4] < losses["full", 1e-9]
    assert losses["full", 1e-9] == pytest.approx(ends["before"], abs=1e-4)
    assert outcome.result["full_rate"] == 3e-4 and outcome.result["at_the_end"] == []


@pytest.mark.parametrize(
    ("best", "tried", "at_the_end"),
    [
        (1.0, [1.0, 3.0, 0.333], []),
        (27.0, [1.0, 3.0, 9.0, 27.0, 81.0], []),
        (0.1, [1.0, 3.0, 0.333, 0.111, 0.037], []),
        (1e9, [1.0, 3.0, 9.0, 27.0, 81.0, 243.0, 729.0], ["lora"]),
    ],
)
def test_rates_follow_until_the_best_lies_between_two(
    best: float, tried: list[float], at_the_end: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = object.__new__(_Bench)
    bench.at_the_end, seen = [], []

    def trained(name: str, deltas: Any, rate: float, look: Any) -> _Trained:
        seen.append(rate)
        return _Trained(abs(math.log(rate / best)), rate, {}, {1: None})

    monkeypatch.setattr(bench, "trained", trained)
    with tqdm(total=2, disable=True) as bar:
        found = bench.best("lora", [], (1.0, 3.0), lambda _: None, bar)
    assert seen == tried and bench.at_the_end == at_the_end
    assert found.loss == min(abs(math.log(rate / best)) for rate in tried)


@pytest.mark.slow
def test_cutting_at_the_full_rank_leaves_the_loss_of_full_fine_tuning(outcome: Outcome) -> None:
    ends, rows = outcome.result["losses"], {r["rank"]: r for r in outcome.result["ranks"]}
    assert rows[384]["truncated_loss"] == pytest.approx(ends["full"], abs=1e-6)
    assert rows[384]["tail_share"] == 0 and 0 < rows[1]["tail_share"] < 1
    assert ends["full"] < rows[1]["truncated_loss"] < ends["full_without_update"] < ends["before"]


@pytest.mark.slow
def test_stable_ranks_follow_from_the_recorded_spectrum(outcome: Outcome) -> None:
    last = [row for row in outcome.result["modules"] if row["step"] == 4]
    assert len(outcome.result["modules"]) == 2 * len(last) == 12
    for row in last:
        values = outcome.curve.query(f"layer == {row['layer']} and site == '{row['site']}'")[
            "value"
        ]
        assert len(values) == 384 and values.is_monotonic_decreasing
        assert row["norm"] == pytest.approx(math.sqrt((values**2).sum()), rel=1e-5)
        assert row["stable_rank"] == pytest.approx((values**2).sum() / values.max() ** 2, rel=1e-5)


@pytest.mark.slow
def test_a_snapshot_is_seen_at_each_of_its_steps(outcome: Outcome) -> None:
    rows = outcome.result["overlaps"]
    assert [(r["step"], r["rank"]) for r in rows] == [(2, 1), (4, 1), (2, 384), (4, 384)]
    whole = next(r for r in rows if r["rank"] == 384)
    assert whole["right"] == pytest.approx(1) and whole["right_by_chance"] == 1
    assert all(0 <= r["left"] <= 1 + 1e-12 for r in rows)


@pytest.mark.slow
def test_what_is_seen_is_the_weight_that_acts(small: UpdateSpectra) -> None:
    bench = _Bench(small)
    with tqdm(disable=True) as bar:
        full = bench.best("full", [FullFineTuning()], [3e-4], bench.changes, bar)
    for key, change in full.seen[4].items():
        end = full.state[f"full.{bench.sites[key].path}.weight"]
        assert torch.equal(end - bench.start[key], change) and change.norm() > 0
        assert torch.equal(bench.sites[key].module.get_parameter("weight"), bench.start[key])


def test_tails_and_overlaps_of_made_up_updates() -> None:
    made = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))[:, :3]
    last = decomposed({"site": made, "other": torch.eye(4)[:, :3]})
    assert tail_share(last, 0) == 1
    assert tail_share(last, 1) == pytest.approx((5 + 2) / (14 + 3))
    assert tail_share(last, 9) == 0
    basis = torch.eye(4)
    found = overlaps_with({"site": (basis[:, :1] + basis[:, 3:], basis[:3, 1:2])}, last)
    assert found["left"] == pytest.approx(0.5) and found["right"] == pytest.approx(0, abs=1e-12)
    assert (found["left_by_chance"], found["right_by_chance"]) == (1 / 4, 1 / 3)


def test_wrong_settings_are_named(minilm_l6: str, tmp_path) -> None:
    for options, words in (
        ({"ranks": (4, 2)}, "increasing"),
        ({"steps": 10, "snapshots": 4}, "no 4 equal parts"),
        ({"full_rates": ()}, "full_rates"),
        ({"lora_rates": (2e-3, 1e-3)}, "increasing positive numbers"),
        ({"train_rows": 0}, "train_rows 0"),
    ):
        with pytest.raises(InputError, match=words):
            UpdateSpectra(**options)
    space = Workspace(tmp_path, progress=False)
    with pytest.raises(InputError, match="training rows"):
        UpdateSpectra(model=minilm_l6, **SMALL | {"train_rows": 10**6}).execute(space)
    with pytest.raises(InputError, match="not a linear map"):
        UpdateSpectra(model=minilm_l6, **SMALL | {"sites": ("attention",)}).execute(space)
