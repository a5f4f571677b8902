"""Contestants paired over tasks and seeds, by closed forms; and the command on small trainings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from deltacontrol.experiments.cli.compare import Compare, Contestant
from deltacontrol.experiments.measures.paired import paired
from deltacontrol.experiments.runs import running
from deltacontrol.theory.errors import InputError

NAMES = ("a", "b")


def scores(values: dict[str, list[float]]) -> dict[tuple[str, int], float]:
    return {(task, seed): x for task, xs in values.items() for seed, x in enumerate(xs)}


def test_seeds_of_one_task_give_the_paired_t_test() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(size=6)
    a, b = noise + 0.8, noise + 0.1 * random.normal(size=6)
    found = paired(
        NAMES, scores({"x": a.tolist()}), scores({"x": b.tolist()}), margin=0.1, quantity="accuracy"
    )
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert found.sides == pytest.approx(tuple(expected))
    assert found.verdict == "a is higher" and found.needed == ""
    other = paired(
        NAMES, scores({"x": b.tolist()}), scores({"x": a.tolist()}), margin=0.1, quantity="accuracy"
    )
    assert other.verdict == "b is higher"


def test_several_tasks_are_the_unit_whatever_the_seeds() -> None:
    a = scores({"x": [0.9, 0.8], "y": [0.7, 0.7], "z": [0.5, 0.9]})
    b = scores({"x": [0.8, 0.8], "y": [0.5, 0.6], "z": [0.6, 0.6]})
    found = paired(NAMES, a, b, margin=0.1, quantity="accuracy")
    means = [0.05, 0.15, 0.1]
    assert found.evidence.value == pytest.approx(np.mean(means))
    assert found.sides == pytest.approx(tuple(stats.ttest_1samp(means, 0).confidence_interval()))
    assert found.evidence.interval is not None and found.evidence.interval.unit == "task"


def test_equivalence_is_two_one_sided_tests() -> None:
    random = np.random.default_rng(3)
    for scale in (0.002, 0.01, 0.03):
        d = 0.002 + scale * random.normal(size=8)
        found = paired(
            NAMES, scores({"x": d.tolist()}), scores({"x": [0.0] * 8}), margin=0.01,
            quantity="accuracy",
        )  # fmt: skip
        below = stats.ttest_1samp(d, 0.01, alternative="less").pvalue
        above = stats.ttest_1samp(d, -0.01, alternative="greater").pvalue
        assert found.equivalent == (max(below, above) <= 0.05)
        assert ("equivalent within 0.01" in found.verdict) == found.equivalent


def test_what_is_missing_shrinks_with_the_spread() -> None:
    wide = paired(
        NAMES, scores({"x": [0.0, 0.3, -0.2]}), scores({"x": [0.0] * 3}), margin=0.02, quantity="s"
    )
    assert wide.verdict == "cannot be told"
    half = (wide.sides[1] - wide.sides[0]) / 2
    count = int(np.ceil(3 * (half / abs(wide.evidence.value)) ** 2))
    assert wide.needed == f"about {count} seeds would tell them apart"


def test_only_shared_pairs_count() -> None:
    a, b = scores({"x": [1.0, 2.0, 3.0]}), scores({"x": [0.0, 0.0], "y": [5.0]})
    assert paired(NAMES, a, b, margin=1.0, quantity="s").evidence.value == 1.5
    with pytest.raises(InputError, match="share 1 pairs"):
        paired(NAMES, a, {("x", 0): 0.0}, margin=1.0, quantity="s")
    for margin in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="margin"):
            paired(NAMES, a, b, margin=margin, quantity="s")


def test_a_contestant_is_deltas_and_a_rate() -> None:
    assert Contestant.parse("lora:rank=8 houlsby@1e-3") == Contestant(
        "lora:rank=8 houlsby@1e-3", ("lora:rank=8", "houlsby"), 1e-3
    )
    assert Contestant.parse("bitfit").rate is None
    for text, words in (("@1e-3", "no delta"), ("lora@fast", "no learning rate"), ("", "no delta")):
        with pytest.raises(InputError, match=words):
            Contestant.parse(text)


def test_tasks_of_one_corpus_are_one_unit() -> None:
    a = {(task, seed): value + seed for task, value in (("x", 1.0), ("y", 3.0), ("z", 8.0))
         for seed in (0, 1)}  # fmt: skip
    b = dict.fromkeys(a, 0.0)
    found = paired(NAMES, a, b, margin=1.0, quantity="s", corpora={"x": "one", "y": "one"}).evidence
    assert found.interval is not None and found.interval.unit == "corpus"
    assert found.interval.data == (2.5, 8.5) and found.value == 5.5
    assert found.details["by corpus"] == {"one": 2.5, "z": 8.5}
    assert "2 corpora" in found.text
    # Of one corpus alone the seeds are what is repeated.
    same = dict.fromkeys("xyz", "one")
    found = paired(NAMES, a, b, margin=1.0, quantity="s", corpora=same).evidence
    assert found.interval is not None and found.interval.unit == "seed"
    assert found.interval.data == (4.0, 5.0)
    one_seed = {key: value for key, value in a.items() if key[1] == 0}
    with pytest.raises(InputError, match="tasks of two corpora, or two seeds"):
        paired(NAMES, one_seed, b, margin=1.0, quantity="s", corpora=same)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contestants": ("lora",)}, "at least two different"),
        ({"contestants": ("lora", "lora")}, "at least two different"),
        ({"contestants": ("lora", "bitfit"), "seeds": 0}, "seeds is 0"),
        ({"contestants": ("lora", "bitfit"), "measure": "dimension", "seeds": 10}, "two to five"),
        ({"contestants": ("lora", "bitfit"), "measure": "dimension", "seeds": 1}, "two to five"),
        ({"contestants": ("lora", "bitfit"), "tasks": ("movie", "movie")}, "different tasks"),
        ({"contestants": ("lora", "bitfit"), "margin": float("nan")}, "margin is nan"),
        ({"contestants": ("lora", "bitfit"), "tasks": ("movie",), "seeds": 1}, "no interval"),
        ({"contestants": ("lora", "bitfit"), "tasks": ("movie", "rt"), "seeds": 1}, "one corpus"),
        ({"contestants": ("lora", "bitfit@0")}, "positive number"),
        ({"contestants": ("lora", "bitfit@nan")}, "positive number"),
        (
            {"contestants": ("lora bitfit", "head"), "measure": "dimension"},
            "searched for one delta",
        ),
        ({"contestants": ("lora", "bitfit"), "tune": True, "workers": 0}, "workers is 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(
    options: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        Compare(**options, runs=tmp_path).run()
    assert not list(tmp_path.iterdir())


def test_a_search_that_tried_no_dimension_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A training that is no better than guessing has no share of its score to be reached."""
    reason = "guessing reaches the target already: 0.35"
    result = {"num_runs": 0, "reason": reason, "text": "?", "verdict": "inconclusive"}
    monkeypatch.setattr(running, "run", lambda *_, **__: SimpleNamespace(result=result))
    asked = Compare(("lora", "bitfit"), measure="dimension", runs=tmp_path)
    with pytest.raises(InputError, match="no dimension of lora on movie was tried, for guessing"):
        asked.run()


def test_the_command_trains_compares_and_writes(
    minilm_l6: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    texts = [f"{w} number {i}" for i in range(12) for w in ("good", "bad")]
    pd.DataFrame({"text": texts, "label": [t.split()[0] for t in texts]}).to_csv(rows, index=False)
    command = Compare(
        ("head", "bitfit@1e-3"), tasks=(str(rows),), seeds=2, model=minilm_l6, steps=2,
        batch_size=4, max_length=8, runs=tmp_path / "runs", workers=1,
        csv=tmp_path / "out.csv", latex=tmp_path / "out.tex",
    )  # fmt: skip
    command.run()
    out = capsys.readouterr().out
    assert "4 trainings: 2 contestants × 1 tasks × 2 seeds, 0 of them recorded" in out
    table = pd.read_csv(tmp_path / "out.csv")
    assert table.loc[0, ["first", "second", "unit"]].tolist() == ["head", "bitfit@1e-3", "seed"]
    assert (tmp_path / "out.tex").read_text().startswith("\\begin{tabular}")
    command.run()
    assert "4 of them recorded" in capsys.readouterr().out


def test_differences_that_are_all_the_same_tell_nothing() -> None:
    """Two seeds on fifty rows agree by chance: a point is no interval."""
    a, b = scores({"x": [0.75, 0.75]}), scores({"x": [0.5, 0.5]})
    found = paired(NAMES, a, b, margin=0.02, quantity="accuracy")
    assert found.verdict == "cannot be told" and "more rows" in found.needed


def test_a_difference_next_to_nothing_names_no_number_of_units() -> None:
    a, b = scores({"x": [5e-324, 0.1, -0.1]}), scores({"x": [0.0, 0.0, 0.0]})
    found = paired(NAMES, a, b, margin=1e-9, quantity="accuracy")
    assert found.verdict == "cannot be told" and found.needed == ""
