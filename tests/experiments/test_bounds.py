"""Bounds of a real fine-tuning: their parts recomputed, what they refuse, random labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deltacontrol.experiments import tasks
from deltacontrol.experiments.measures.bounds import GeneralisationBound, _Bench, _relabelled
from deltacontrol.experiments.runs.experiment import Outcome, Workspace
from deltacontrol.experiments.training.evaluation import evaluate
from deltacontrol.theory.bounds import countable_class_bound, pac_bayes_bound, quantise
from deltacontrol.theory.errors import InputError

ROWS = 48
SMALL: dict[str, Any] = {
    "task": "sms",
    "delta": "subspace:dimension=5,of=selected-modules:sites=bert.pooler+classifier",
    "learning_rate": 1.0,
    "steps": 8,
    "batch_size": 4,
    "max_length": 8,
    "levels": (3, 9),
    "ratios": (0.1, 0.5),
    "draws": 32,
}


@pytest.fixture(scope="module", autouse=True)
def few_rows() -> Iterator[None]:
    """The bound needs all rows, so that the task has to have few of them here."""
    task = tasks.load("sms")
    frames = {name: getattr(task, name).head(ROWS) for name in ("train", "validation", "test")}
    few = replace(task, **frames)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load", lambda name, **_: few if name == "sms" else task)
        yield


@pytest.fixture(scope="module")
def small(minilm_l6: str) -> GeneralisationBound:
    return GeneralisationBound(model=minilm_l6, **SMALL)


@pytest.fixture(scope="module")
def outcome(small: GeneralisationBound, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return small.execute(Workspace(tmp_path_factory.mktemp("bounds"), progress=False))


def test_bounds_follow_from_their_parts(outcome: Outcome) -> None:
    result = outcome.result
    assert (result["num_rows"], result["num_controls"]) == (ROWS, 5)
    labels = tasks.load("sms").train["label"]
    assert result["chance"] == pytest.approx(1 - labels.value_counts(normalize=True).max())
    for row in result["by_level"]:
        expected = countable_class_bound(row["train_error"], row["nats"], ROWS, 0.01)
        assert row["bound"] == pytest.approx(expected, rel=1e-9)
        assert row["nats"] > math.log(10_000) + math.log(2) + math.log(128)
    best = result["compression"]
    assert best["bound"] == min(row["bound"] for row in result["by_level"])
    gauss = result["pac_bayes"]
    assert gauss["train_error_bound"] > gauss["train_error"]
    expected = pac_bayes_bound(gauss["train_error_bound"], gauss["nats"], ROWS, 0.005)
    assert gauss["bound"] == pytest.approx(expected, rel=1e-9)
    # 48 rows cannot pay for 20 nats: both are vacuous, and say so by being above chance.
    assert min(best["bound"], gauss["bound"]) > result["chance"]


@pytest.mark.slow
def test_the_same_run_gives_the_same_numbers(
    small: GeneralisationBound, outcome: Outcome, tmp_path
) -> None:
    again = small.execute(Workspace(tmp_path, progress=False))
    assert again.result == outcome.result


@pytest.fixture(scope="module")
def bench(small: GeneralisationBound) -> _Bench:
    return _Bench(small)


def test_errors_are_those_of_the_model_at_w(bench: _Bench) -> None:
    w = 3 * torch.randn(5)
    for split in ("train", "test", "train"):
        found = bench.error(w, split)
        metrics = evaluate(
            bench.controlled, bench.encoded.eval_batches(split, 16), "classification"
        )
        assert found == pytest.approx(1 - metrics["accuracy"], abs=1e-12)
    assert torch.allclose(bench.controls(), w)
    assert bench.frozen is not None and len(bench.frozen) == 2 * ROWS


def test_errors_do_not_depend_on_what_is_kept(bench: _Bench, small: GeneralisationBound) -> None:
    plain = _Bench(small)
    plain.frozen = None
    for seed in range(3):
        w = quantise(torch.randn(5, generator=torch.Generator().manual_seed(seed)), 3).vector
        assert plain.error(20 * w, "train") == bench.error(20 * w, "train")


def test_the_mean_error_of_a_narrow_gaussian_is_the_error(bench: _Bench) -> None:
    w = 3 * torch.ones(5)
    narrow = bench.mean_error(w, 1e-9, 60, "train", 1)
    exact = bench.error(w, "train")
    assert 0 < exact < 1
    assert abs(narrow - exact) < 4 * math.sqrt(exact * (1 - exact) / (60 * 8))


def test_random_labels_keep_their_shares(small: GeneralisationBound) -> None:
    task = tasks.load("sms")
    dealt = _relabelled(task, 3)
    before, after = task.train["label"].to_numpy(), dealt.train["label"].to_numpy()
    assert sorted(before) == sorted(after) and not np.array_equal(before, after)
    assert dealt.train["text"].equals(task.train["text"])
    assert not np.array_equal(after, _relabelled(task, 4).train["label"].to_numpy())
    assert _Bench(replace(small, random_labels=True)).chance == pytest.approx(_Bench(small).chance)


def test_what_the_bound_does_not_pay_for_is_refused(
    small: GeneralisationBound, bench: _Bench, tmp_path
) -> None:
    with pytest.raises(InputError, match="fisher-mask.* by looking at the rows"):
        _Bench(replace(small, delta="fisher-mask"))
    name = next(iter(bench.fixed))
    kept = bench.fixed[name]
    bench.fixed[name] = kept + 1
    with pytest.raises(InputError, match="by looking at the rows"):
        bench.controls()
    bench.fixed[name] = kept


def test_wrong_settings_are_named() -> None:
    for options, words in (
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"levels": (1,)}, "levels"),
        ({"ratios": (0.0,)}, "ratios"),
        ({"draws": 0}, "draws 0"),
    ):
        with pytest.raises(InputError, match=words):
            GeneralisationBound(**options)
