"""The search for a dimension: on problems whose answer is known, and on real trainings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from deltacontrol.experiments import models
from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
from deltacontrol.experiments.studies.d90.mnist import MnistTraining, network
from deltacontrol.experiments.studies.d90.search import Search, Trial, climb, steadiest
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.dimension.estimate import Baseline, DimensionVerdict
from deltacontrol.theory.dimension.projections import DenseProjection
from deltacontrol.theory.errors import InputError

Measure = Callable[[int, float, int], Trial]


def curve(truth: float, noise: float = 0.015, best_move: float = 31.6, seed: int = 0) -> Measure:
    """Performance 0.7 at the truth, 0.2 a decade, less at other moves than the best."""

    def measure(d: int, move: float, run_seed: int) -> Trial:
        random = np.random.default_rng([seed, d, run_seed, round(100 * move)])
        clean = 0.7 + 0.2 * math.log10(d / truth) - 0.05 * math.log10(move / best_move) ** 2
        test, validation = clean + noise * random.standard_normal(2)
        name = f"{d}-{move:g}-{run_seed}"
        rate = move / math.sqrt(d)
        return Trial(d, run_seed, move, rate, test, validation, 0.0, "completed", name)

    return measure


def test_the_toy_quadratic_has_ten_dimensions_exactly() -> None:
    """Li et al., section 2: 1000 numbers, the sums of each hundred are given; solved exactly."""
    wanted = torch.arange(1.0, 11.0, dtype=torch.float64)

    def measure(d: int, move: float, seed: int) -> Trial:
        P = DenseProjection(1000, d, seed, torch.float64).dense()
        sums = P.view(10, 100, d).sum(1)
        z = torch.linalg.lstsq(sums, wanted[:, None], driver="gelsd").solution
        error = float((sums @ z - wanted[:, None]).square().sum())
        return Trial(d, seed, move, move, math.exp(-error), 0.0, 0.0, "completed", f"{d}-{seed}")

    search = Search(
        measure,
        0.9,
        start=100,
        smallest=1,
        largest=1000,
        stride=2.0,
        resolution=1.01,
        width=1.001,
        budget=60,
    )
    found = search.run()
    assert found.verdict is DimensionVerdict.ESTIMATED
    assert {9, 10} <= {t.dimension for t in search.trials}
    for trial in search.trials:
        assert trial.dimension is not None
        if trial.dimension < 10:
            assert trial.performance < 0.9
        else:
            assert trial.performance == pytest.approx(1.0, abs=1e-12)
    assert math.ceil(found.dimension) == math.ceil(found.low) == math.ceil(found.high) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "truth", [30, *(pytest.param(d, marks=pytest.mark.slow) for d in (400, 3000, 20_000))]
)
def test_the_search_covers_the_truth_within_its_budget(truth: float) -> None:
    hits = 0
    for trial in range(10):
        random = np.random.default_rng([trial, 7])
        baseline = Baseline(tuple(0.7 / 0.9 + 0.015 * random.standard_normal(3)))
        search = Search(curve(truth, seed=trial), baseline, budget=25)
        found = search.run()
        assert len(search.trials) <= 25
        assert len({t.run for t in search.trials}) == len(search.trials)
        # At the best move or one factor from it: 0.0125 less, which is part of the answer.
        hits += found.low <= truth * 10 ** (0.0125 / 0.2) and truth <= found.high
        if search.stopped == "the interval is narrow enough":
            assert found.verdict is DimensionVerdict.ESTIMATED and found.high <= 2 * found.low
    assert hits >= 7


@pytest.mark.slow
def test_intervals_cover_as_often_as_is_told() -> None:
    """90 % nominally; a search that looks at its results covers a little less."""
    hits = []
    for trial in range(200):
        random = np.random.default_rng([trial, 8])
        truth = 10 ** random.uniform(1.5, 4.5)
        baseline = Baseline(tuple(0.7 / 0.9 + 0.015 * random.standard_normal(4)))

        def measure(d: int, move: float, seed: int, truth: float = truth, trial: int = trial):
            noise = np.random.default_rng([trial, d, seed, round(100 * move)]).standard_normal(2)
            test, validation = 0.7 + 0.2 * math.log10(d / truth) + 0.015 * noise
            return Trial(d, seed, move, move, test, validation, 0.0, "completed", "")

        found = Search(measure, baseline, budget=16).run()
        if found.verdict is DimensionVerdict.ESTIMATED:
            hits.append(found.low <= truth <= found.high)
    assert len(hits) > 150 and 0.78 < np.mean(hits) < 0.95


@pytest.mark.parametrize(
    ("truth", "budget", "verdict", "words"),
    [
        (1e8, 20, DimensionVerdict.ABOVE_BUDGET, "largest dimension does not reach"),
        (1e-3, 20, DimensionVerdict.BELOW_SMALLEST, "smallest dimension reaches"),
        (1e5, 2, DimensionVerdict.INCONCLUSIVE, "the runs are spent"),
        (99_000, 20, DimensionVerdict.INCONCLUSIVE, "has its seeds"),
    ],
)
def test_a_search_says_why_it_ended(truth: float, budget: int, verdict: str, words: str) -> None:
    search = Search(curve(truth, noise=0.03, seed=3), 0.7, budget=budget)
    found = search.run()
    assert found.verdict is verdict and words in search.stopped
    assert len(search.trials) <= budget


@pytest.mark.slow
def test_an_open_interval_is_closed_first() -> None:
    """A plateau just above the target, below which single runs on it fall; further on it rises."""

    def measure(d: int, move: float, seed: int, draw: int) -> Trial:
        random = np.random.default_rng([draw, d, seed, round(100 * move)])
        plateau = 0.72 + 0.01 * math.log10(d / 100)
        clean = 0.57 + 0.07 * math.log10(d / 10) if d < 100 else plateau if d < 5000 else 0.77
        test, validation = clean + 0.02 * random.standard_normal(2)
        name = f"{d}-{move:g}-{seed}"
        return Trial(d, seed, move, move, test, validation, 0.0, "completed", name)

    for draw in range(20):
        random = np.random.default_rng([draw, 99])
        baseline = Baseline(tuple(0.7875 + 0.012 * random.standard_normal(4)))
        search = Search(partial(measure, draw=draw), baseline, budget=16)
        assert search.run().verdict is DimensionVerdict.ESTIMATED


def test_a_dimension_between_two_others_gets_a_move_between_theirs() -> None:
    def measure(d: int, move: float, seed: int) -> Trial:
        return curve(2000.0, noise=0.0, best_move={1000: 10.0, 10_000: 31.6}.get(d, 10.0))(
            d, move, seed
        )

    search = Search(measure, 0.7, budget=20)
    search.run()
    assert {t.move for t in search.trials if t.dimension == 3162} == {10.0, 31.6}
    assert {t.move for t in search.chosen() if t.dimension == 3162} == {10.0}


def test_a_greater_dimension_that_does_worse_gets_smaller_moves() -> None:
    """At the move of d = 1000 and above, d = 10,000 does not learn at all, nor a factor below."""

    def measure(d: int, move: float, seed: int) -> Trial:
        trial = curve(5000.0, noise=0.0, best_move=31.6 if d <= 1000 else 3.16)(d, move, seed)
        broken = d > 1000 and move > 5
        return replace(trial, performance=0.1, validation=0.1) if broken else trial

    search = Search(measure, 0.7, budget=20)
    assert search.run().verdict is DimensionVerdict.ESTIMATED
    assert {t.move for t in search.chosen() if t.dimension == 10_000} == {3.16}
    assert {t.move for t in search.chosen() if t.dimension == 1000} == {31.6}

    search = Search(measure, 0.7, budget=6)  # spent before it has found that move
    search.run()
    assert {t.dimension for t in search.trials} == {1000, 10_000}
    assert {t.dimension for t in search.chosen()} == {1000}


def test_smaller_moves_come_first_where_that_of_a_smaller_dimension_fails() -> None:
    """Moves that are too large fail alike, with losses that would lead to ever larger ones."""

    def measure(d: int, move: float, seed: int) -> Trial:
        trial = curve(5000.0, noise=0.0, best_move=31.6 if d <= 1000 else 10.0)(d, move, seed)
        if d <= 1000 or move < 20:
            return trial
        return replace(trial, performance=0.1, validation=0.1, validation_loss=1 / move)

    search = Search(measure, 0.7, budget=20)
    assert search.run().verdict is DimensionVerdict.ESTIMATED
    tried = [t.move for t in search.trials if t.dimension == 10_000 and t.seed == 0]
    assert tried == [31.6, 9.99, 3.16]


def test_a_move_that_fails_with_some_seeds_is_chosen_anew() -> None:
    """At d = 1000 the chosen one of two moves that learn alike does not learn with seed 1."""

    def measure(d: int, move: float, seed: int) -> Trial:
        value = 0.2 * math.log10(d) + 0.001 * (move > 20)
        if d == 1000 and move < 40 and seed == 1:
            value = 0.1
        return Trial(d, seed, move, move, value, value, 0.0, "completed", "")

    search = Search(measure, 0.5, budget=30)
    for d in (10, 100, 1000):
        search._tune(d)
    assert search._chosen[1000].move == 31.6
    search._reseed([1000])
    assert search._chosen[1000].move == 99.9 and search._count(1000) == 1
    search._reseed([1000])
    found = [t.performance for t in search.chosen() if t.dimension == 1000]
    assert found == pytest.approx([0.601, 0.601])
    search._reseed([100])
    assert search._chosen[100].move == 31.6  # nothing failed there


@pytest.mark.parametrize("best", [0.1, 1.0, 10.0, 100.0])
def test_climbing_finds_the_best_rate_and_tries_its_neighbours(best: float) -> None:
    tried: list[float] = []

    def known(rate: float) -> Trial:
        tried.append(rate)
        height = -(math.log10(rate / best) ** 2)
        return Trial(None, 0, rate, rate, 0.0, height, 0.0, "completed", f"{rate:g}")

    found = climb(1.0, known, tries=9)
    assert found.rate == pytest.approx(best, rel=1e-2)
    assert min(tried) < best < max(tried)
    tried.clear()
    assert climb(1.0, known, tries=9, ways=(1,)).rate == pytest.approx(max(best, 1.0), rel=1e-2)
    assert min(tried) == 1.0


def test_a_rate_at_which_only_some_seeds_learn_does_not_win() -> None:
    done: list[tuple[float, int]] = []

    def known(rate: float, seed: int) -> Trial:
        done.append((rate, seed))
        height = {1.0: 0.75, 3.16: 0.8 if seed != 1 else 0.5, 10.0: 0.4}.get(rate, 0.3)
        return Trial(None, seed, rate, rate, height, height, 0.0, "completed", f"{rate}-{seed}")

    found = steadiest(1.0, known, 3)
    assert [(t.rate, t.seed) for t in found] == [(1.0, 0), (1.0, 1), (1.0, 2)]
    assert len(done) == len(set(done)) == 7  # seeds 1 and 2 at the two best of three rates


def test_a_steady_rate_is_not_doubted() -> None:
    def known(rate: float, seed: int) -> Trial:
        height = {1.0: 0.75, 3.16: 0.8 - 0.01 * seed}.get(rate, 0.3)
        return Trial(None, seed, rate, rate, height, height, 0.0, "completed", f"{rate}-{seed}")

    assert [(t.rate, t.seed) for t in steadiest(1.0, known, 3)] == [(3.16, s) for s in range(3)]


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    def known(rate: float) -> Trial:
        return Trial(None, 0, rate, rate, 0.5, 0.5, abs(math.log10(rate)), "completed", "")

    assert climb(0.1, known).rate == pytest.approx(1.0, rel=1e-2)


def test_the_networks_have_the_published_sizes() -> None:
    sizes = {net: sum(p.numel() for p in network(net, 0).parameters()) for net in ("fc", "lenet")}  # type: ignore[arg-type]
    assert sizes == {"fc": 199_210, "lenet": 44_426}
    images = torch.zeros(2, 1, 28, 28)
    for net in ("fc", "lenet"):
        logits = network(net, 1)(images)  # type: ignore[arg-type]
        assert logits.shape == (2, 10) and not torch.equal(logits, network(net, 2)(images))  # type: ignore[arg-type]
        assert torch.equal(logits, network(net, 1)(images))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "extent"),
    [
        ({}, (6, 17_390_594)),
        ({"method": "did"}, (1, 17_390_594)),
        ({"delta": "bitfit", "method": "did"}, (1, 13_440)),
        ({"delta": "bitfit"}, (5, 13_440)),
    ],
)
def test_dimensions_end_with_the_parameters(fields: dict, extent: tuple[int, int]) -> None:
    try:
        models.resolve("minilm-l3")
    except InputError as error:
        pytest.skip(f"minilm-l3 cannot be had here: {error}")
    assert FineTuningDimension(model="minilm-l3", **fields).extent() == extent


def test_what_a_fine_tuning_search_trains() -> None:
    spec = FineTuningDimension(
        model="minilm-l3", delta="lora:rank=2,alpha=4", baseline="delta", pretrained=False
    )
    one = spec.training(500, 0.1, 2)
    assert one.deltas[0]["name"] == "said" and one.deltas[0]["of"] == "lora:rank=2;alpha=4"
    assert one.deltas[0]["dimension"] == 500 and not one.pretrained and one.seed == 2
    assert one.eval_every == one.steps and one.evaluate_on == "test"
    assert spec.baseline_training(0.1, 1).deltas[0]["rank"] == 2
    own = replace(spec, baseline="full", method="did")
    assert own.training(500, 0.1, 0).deltas[0]["name"] == "subspace"
    assert own.baseline_training(0.1, 0).deltas[0]["name"] == "full"
    assert not own.baseline_training(0.1, 0).pretrained
    assert replace(own, baseline="pretrained").baseline_training(0.1, 0).pretrained
    json.dumps(spec.to_config(), allow_nan=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"smallest": 100, "largest": 100}, "smallest < largest"),
        ({"stride": 1.0}, "stride is 1.0"),
        ({"budget": 1}, "budget is 1"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"share": 0.0}, "share is 0.0"),
        ({"target": math.nan}, "target is nan"),
        ({"target": 80.0}, "target is 80.0; expected a share between 0 and 1, such as 0.8"),
        ({"target": -1.0}, "target is -1.0"),
        ({"method": "dad"}, "said or did"),
        ({"baseline": "delta"}, "no delta is given"),
        ({"delta": "lorra"}, "nearest: lora"),
        ({"projection": "fastfod"}, "nearest: fastfood"),
        ({"delta": "said"}, "subspace itself"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(fields: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        FineTuningDimension(**fields)


def test_mistakes_in_digits_are_named() -> None:
    with pytest.raises(InputError, match="known: fc, lenet"):
        MnistTraining(net="lenets")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dimension is 0"):
        MnistTraining(dimension=0)
    with pytest.raises(InputError, match="learning_rate"):
        MnistTraining(learning_rate=math.inf)


@pytest.mark.slow
def test_digits_are_learned_in_a_subspace(tmp_path: Path) -> None:
    from deltacontrol.experiments.runs.experiment import Workspace

    run_ = MnistTraining(net="lenet", dimension=200, learning_rate=0.7, steps=150)
    first = run_.execute(Workspace(tmp_path, progress=False))
    assert first.result["accuracy"] > 0.6 and first.result["num_trainable"] == 200
    assert first.result == run_.execute(Workspace(tmp_path, progress=False)).result
    with pytest.raises(InputError, match="44426"):
        replace(run_, dimension=50_000).execute(Workspace(tmp_path, progress=False))


def test_a_loss_is_no_performance() -> None:
    from deltacontrol.experiments.runs.record import Record

    record = Record("x", "fine-tuning", {}, {"loss": 3.0, "perplexity": 20.0}, {}, "completed")
    with pytest.raises(InputError, match="no classification or regression"):
        FineTuningDimension().reading(record)
    assert isinstance(FineTuningDimension().baseline_training(1e-3, 0), FineTuning)
