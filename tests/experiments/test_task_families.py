"""Derived tasks: what their names say is true of their rows, and nothing leaks."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest

from deltacontrol.experiments import tasks
from deltacontrol.experiments.tasks.base import Task
from deltacontrol.experiments.tasks.families import GAP, derive
from deltacontrol.theory.errors import InputError

SPLITS = ("train", "validation", "test")
SOME = (
    "trec6:is-LOC", "trec6:HUM-vs-NUM", "trec6:same-class", "trec50:is-HUM:ind",
    "nyt-intensity:more-positive", "nyt-intensity:beyond-1", "bbc:text",
)  # fmt: skip


def load(name: str) -> Task:
    try:
        return tasks.load(name)
    except InputError as error:
        pytest.skip(f"{name} cannot be had here: {error}")


def texts(frame: pd.DataFrame) -> list[str]:
    second = list(frame["text_pair"]) if "text_pair" in frame else []
    return [*frame["text"], *second]


@pytest.mark.parametrize("name", SOME)
def test_rows_stay_on_their_side_of_the_split_and_classes_are_balanced(name: str) -> None:
    task, parent = load(name), load(name.partition(":")[0])
    assert task.name == name and task.digest == tasks.digest(name) != parent.digest
    for split in SPLITS:
        own = texts(getattr(task, split))
        assert set(own) <= set(getattr(parent, split)["text"])
        # A text occurs once, unless the parent has it more often.
        assert not Counter(own) - Counter(getattr(parent, split)["text"])
        if task.labels:
            counts = getattr(task, split)["label"].value_counts()
            assert len(counts) == 2 and abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_what_the_name_says(split: str) -> None:
    coarse = load("trec6")
    kinds = dict(zip(getattr(coarse, split)["text"], getattr(coarse, split)["label"], strict=True))
    number = {label: i for i, label in enumerate(coarse.labels)}
    one = getattr(load("trec6:is-LOC"), split)
    assert ((one["text"].map(kinds) == number["LOC"]) == (one["label"] == 1)).all()
    two = getattr(load("trec6:HUM-vs-NUM"), split)
    expected = two["label"].map({0: number["HUM"], 1: number["NUM"]})
    assert (two["text"].map(kinds) == expected).all()
    pairs = getattr(load("trec6:same-class"), split)
    alike = pairs["text"].map(kinds) == pairs["text_pair"].map(kinds)
    assert (alike == (pairs["label"] == 1)).all()
    # A text that two editorials share has two ratings.
    rated = getattr(load("nyt-intensity"), split).drop_duplicates("text", keep=False)
    rating = rated.set_index("text")["label"]
    more = getattr(load("nyt-intensity:more-positive"), split)
    more = more[more["text"].isin(rating.index) & more["text_pair"].isin(rating.index)]
    assert len(more) > 50
    first, second = rating[more["text"]].to_numpy(), rating[more["text_pair"]].to_numpy()
    assert ((second - first >= GAP - 1e-9) == (more["label"] == 1)).all()
    assert (abs(second - first) >= GAP - 1e-9).all()
    beyond = getattr(load("nyt-intensity:beyond-1"), split)
    beyond = beyond[beyond["text"].isin(rating.index)]
    values = rating[beyond["text"]].to_numpy()
    assert ((values > 1) == (beyond["label"] == 1)).all() and (abs(values) > 1).all()


def test_a_derived_task_is_the_same_each_time() -> None:
    first, second = load("trec6:same-class"), load("trec6:same-class")
    for split in SPLITS:
        pd.testing.assert_frame_equal(getattr(first, split), getattr(second, split))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trec7:is-LOC", "trec6"),
        ("trec6:is-LOK", "nearest: LOC"),
        ("trec6:LOC-vs-LOC", "unknown rule for trec6"),
        ("trec6:LOC", "is-LOC"),
        ("sms:is-spam", "known: same-class, text$"),
        ("sms:ham-vs-spam", "known: same-class, text$"),
        ("intensity:beyond-9", "between 0 and 4"),
        ("intensity:beyond-x", "more-positive"),
        ("movie-lines:same-class", "text"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tasks.digest(name)


def test_a_split_too_small_is_refused() -> None:
    load("trec50")
    with pytest.raises(InputError, match="too few"):
        tasks.load("trec50:ENTY:currem-vs-ENTY:religion".replace("currem", "currency"))


def test_the_study_has_its_tasks_from_sizes_alone() -> None:
    for name in tasks.available():
        load(name)
    found = tasks.study_tasks()
    assert len(found) == len({t.name for t in found}) == len({t.digest for t in found}) == 120
    assert [t.name for t in found] == [t.name for t in tasks.study_tasks()]
    categories = Counter(t.category for t in found)
    assert set(categories) == {
        "sentiment", "topic", "question type", "spam", "pair", "regression", "language model",
    }  # fmt: skip
    assert len({t.corpus for t in found}) >= 10 and all(t.corpus and t.category for t in found)
    # Adding tasks keeps those that are there.
    assert {t.name for t in tasks.study_tasks(100)} <= {t.name for t in found}
    with pytest.raises(InputError, match="ask for fewer"):
        tasks.study_tasks(10_000)


def test_the_pairs_of_a_class_are_drawn_from_the_packaged_tasks() -> None:
    derived = derive("20ng:sci.space-vs-rec.autos", tasks.available())
    assert derived.labels == ("sci.space", "rec.autos") and derived.corpus == "20ng"
    assert derived.category == "topic" and "20 Newsgroups" in derived.source
