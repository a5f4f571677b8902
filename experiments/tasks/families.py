"""Families of tasks: one corpus asks many questions.

A derived task has a name of two parts, its parent and a rule, and nothing to fetch of its own:

    20ng:is-sci.space               is it of this class, or of another one?
    20ng:sci.space-vs-rec.autos     which of the two classes?
    20ng:same-class                 are two texts of one class?              (a pair)
    intensity:more-positive         which of two texts has the higher rating? (a pair)
    intensity:beyond-1            the sign of a rating beyond 1 in absolute value
    bbc:text                        a language model of the texts, without labels

Every split is derived from that split of the parent, so that no test row of one task is a training
row of another one of the family. The classes of a derived classification are of equal size in each
split: rows of the larger one are left out, by a seed that belongs to the task. A row occurs in one
pair at most, and so does its text, unless the parent has that text in several rows. Tasks of one
corpus share their texts: the corpus is the unit of independence.

`chosen` is the study's list of tasks. It is drawn by a seeded rule from the sizes alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from deltacontrol.experiments.tasks.base import Kind, PackagedTask, Task
from deltacontrol.experiments.tasks.splits import in_fair_order
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LEAST_TEST", "LEAST_TRAIN", "Derived", "chosen", "derive"]

VERSION = 1
SEED = 20230302  # of the rows that are left out, of the pairs, and of the study's draw
LEAST_TRAIN, LEAST_TEST = 100, 80  # rows of a class, in a task of the study
GAP = 1.0  # between the ratings of a pair

Frames = Callable[["pd.DataFrame", np.random.Generator], "pd.DataFrame"]


@dataclass(frozen=True)
class Derived:
    """A task made of another one; it has the attributes of a `PackagedTask`."""

    parent: PackagedTask
    rule: str
    kind: Kind
    labels: tuple[str, ...]
    category: str
    description: str
    frames: Frames

    @property
    def name(self) -> str:
        """Parent and rule."""
        return f"{self.parent.name}:{self.rule}"

    @property
    def corpus(self) -> str:
        """The parent's."""
        return self.parent.corpus

    @property
    def source(self) -> str:
        """The parent's, and that this is derived."""
        return f"derived from {self.parent.name}: {self.parent.source}"

    @property
    def digest(self) -> str:
        """Of the parent, the rule and its version."""
        identity = [self.parent.digest, self.rule, VERSION, SEED]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def load(self) -> Task:
        """The parent's splits, each by the rule.

        Raises:
            InputError: a split has too few rows for it, or as in the parent's.
        """
        import pandas as pd

        whole = self.parent.load()
        parts = []
        for number, split in enumerate(("train", "validation", "test")):
            generator = np.random.default_rng([SEED, number])
            part = self.frames(getattr(whole, split), generator)
            if len(part) < 2 or (self.labels and part["label"].nunique() < len(self.labels)):
                raise InputError(
                    f"{self.name} has {len(part)} {split} rows, too few for its classes; choose "
                    f"larger classes of {self.parent.name}"
                )
            parts.append(part.assign(split=split))
        rows = in_fair_order(pd.concat(parts, ignore_index=True))
        train, validation, test = (
            rows[rows["split"] == split].drop(columns="split").reset_index(drop=True)
            for split in ("train", "validation", "test")
        )
        return Task(self.name, self.kind, self.labels, train, validation, test, self.digest,
                    self.source)  # fmt: skip


def derive(name: str, parents: Mapping[str, PackagedTask]) -> Derived:
    """The derived task of a name with a colon.

    Raises:
        InputError: no such parent, or no such rule for it.
    """
    start, _, rule = name.partition(":")
    if start not in parents:
        raise unknown("parent of a derived task", start, parents)
    parent = parents[start]
    if rule == "text":
        return Derived(parent, rule, "causal-lm", (), "language model",
                       f"the texts of {start}, for a language model",
                       lambda frame, _: frame[["text"]])  # fmt: skip
    found = _of_ratings(parent, rule) if parent.kind == "regression" else None
    if parent.kind == "classification":
        found = _of_classes(parent, rule)
    if found is None:
        raise unknown(f"rule for {start}", rule, _rules(parent))
    return found


def _rules(parent: PackagedTask) -> list[str]:
    """Names of rules, for a message."""
    if parent.kind == "classification":
        first, second, *more = parent.labels
        of_one = [*(f"is-{label}" for label in parent.labels), f"{first}-vs-{second}"]
        return [*(of_one if more else ()), "same-class", "text"]  # two classes ask that themselves
    return ["more-positive", "beyond-1", "text"] if parent.kind == "regression" else ["text"]


def _of_classes(parent: PackagedTask, rule: str) -> Derived | None:
    labels, category = parent.labels, parent.category
    numbers = {label: number for number, label in enumerate(labels)}
    if rule == "same-class":
        return Derived(parent, rule, "classification", ("different", "same"), "pair",
                       f"are two texts of {parent.name} of one class?", _same)  # fmt: skip
    if rule.startswith("is-") and len(labels) > 2:
        label = rule.removeprefix("is-")
        if label not in numbers:
            raise unknown(f"class of {parent.name}", label, labels)
        return Derived(parent, rule, "classification", ("other", label), category,
                       f"texts of {parent.name}: {label}, or another class",
                       partial(_one, numbers[label]))  # fmt: skip
    for first in labels:
        second = rule.removeprefix(f"{first}-vs-")
        if second == rule or second not in numbers or second == first or len(labels) < 3:
            continue
        return Derived(parent, rule, "classification", (first, second), category,
                       f"texts of {parent.name}: {first}, or {second}",
                       partial(_two, numbers[first], numbers[second]))  # fmt: skip
    return None


def _of_ratings(parent: PackagedTask, rule: str) -> Derived | None:
    if rule == "more-positive":
        return Derived(parent, rule, "classification", ("first", "second"), "pair",
                       f"which of two texts of {parent.name} is rated higher, by {GAP:g} at least?",
                       _more)  # fmt: skip
    if not rule.startswith("beyond-"):
        return None
    try:
        least = float(rule.removeprefix("beyond-"))
    except ValueError:
        return None
    if not 0 < least < 4 or rule != f"beyond-{least:g}":
        raise InputError(f"the cut of {parent.name}:{rule} is no number between 0 and 4, such as "
                         "beyond-1")  # fmt: skip

    return Derived(parent, rule, "classification", ("negative", "positive"), "sentiment",
                   f"texts of {parent.name} with a rating beyond {least:g}, its sign",
                   partial(_beyond, least))  # fmt: skip


def _one(number: int, frame: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    return _balanced(frame.assign(label=(frame["label"] == number) * 1), generator)


def _two(
    first: int, second: int, frame: pd.DataFrame, generator: np.random.Generator
) -> pd.DataFrame:
    some = frame[frame["label"].isin([first, second])]
    return _balanced(some.assign(label=(some["label"] == second) * 1), generator)


def _beyond(least: float, frame: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    some = frame[frame["label"].abs() > least]
    return _balanced(some.assign(label=(some["label"] > 0) * 1), generator)


def _balanced(frame: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """As many rows of every class as the smallest has, in the order of the frame."""
    labels = frame["label"].to_numpy(dtype="int64")
    counts = np.bincount(labels, minlength=2)
    kept = [generator.permutation(np.flatnonzero(labels == c))[: counts.min()] for c in range(2)]
    rows = frame.iloc[np.sort(np.concatenate(kept))]
    return rows.assign(label=rows["label"].astype("int64"))


def _pairs(frame: pd.DataFrame, first: np.ndarray, second: np.ndarray, label: Any) -> pd.DataFrame:
    import pandas as pd

    text = frame["text"].to_numpy()
    return pd.DataFrame(
        {"text": text[first], "text_pair": text[second], "label": np.asarray(label, dtype="int64")}
    )


def _same(frame: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """Half of the rows in pairs of one class, the others in pairs of two."""
    labels = frame["label"].to_numpy()
    order = generator.permutation(len(frame))
    half = order[: len(order) // 2]
    alike = half[np.argsort(labels[half], kind="stable")]  # by class, in random order within
    alike = alike[: len(alike) // 2 * 2].reshape(-1, 2)
    alike = alike[labels[alike[:, 0]] == labels[alike[:, 1]]]
    rest = order[len(order) // 2 :]
    rest = rest[np.argsort(labels[rest], kind="stable")]
    middle = len(rest) // 2  # two classes that lie half of the rows apart
    unlike = np.stack([rest[:middle], rest[middle : 2 * middle]], 1)
    unlike = unlike[labels[unlike[:, 0]] != labels[unlike[:, 1]]]
    count = min(len(alike), len(unlike))
    alike, unlike = (generator.permutation(pairs)[:count] for pairs in (alike, unlike))
    pairs = generator.permuted(np.concatenate([unlike, alike]), axis=1)
    return _pairs(frame, pairs[:, 0], pairs[:, 1], np.repeat([0, 1], count))


def _more(frame: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """Each row in one pair of which the ratings lie apart; the higher one at a random place."""
    rating = frame["label"].to_numpy()
    order = np.argsort(rating + generator.normal(size=len(rating)) * 1e-9, kind="stable")
    middle = len(order) // 2
    low, high = order[:middle], generator.permutation(order[-middle:])
    apart = rating[high] - rating[low] >= GAP
    low, high = low[apart], high[apart]
    second = generator.permutation(np.arange(len(low)) % 2)  # the place of the higher one
    rows = np.where(second == 1, low, high), np.where(second == 1, high, low)
    return _pairs(frame, *rows, second)


def chosen(parents: Mapping[str, PackagedTask], count: int = 120) -> list[PackagedTask | Derived]:
    """The tasks of the study: all packaged ones, and derived ones up to ``count`` in all.

    Whatever is no topic or question type comes whole: pairs, cuts of the ratings, language models.
    The rest are the questions ``is-`` and ``-vs-`` of the corpora with several classes, drawn
    without looking at any result: corpora in turn, each in a seeded order of its questions, those
    left out whose classes have fewer than `LEAST_TRAIN` training or `LEAST_TEST` test rows.

    Raises:
        InputError: there are fewer than ``count``, or as in the tasks' loading.
    """
    from_all: list[str] = []
    by_corpus: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()  # r52 has the classes of r8 too
    for name, parent in parents.items():
        if parent.kind == "regression":
            from_all += [f"{name}:more-positive", f"{name}:beyond-1"]
        if parent.kind == "classification" and len(parent.labels) > 2:
            task = parent.load()
            train = task.train["label"].value_counts()
            test = task.test["label"].value_counts()
            large = [
                label
                for number, label in enumerate(parent.labels)
                if (parent.corpus, label) not in seen
                and train.get(number, 0) >= LEAST_TRAIN
                and test.get(number, 0) >= LEAST_TEST
            ]
            seen |= {(parent.corpus, label) for label in large}
            questions = [f"{name}:is-{label}" for label in large]
            questions += [f"{name}:{a}-vs-{b}" for a, b in combinations(large, 2)]
            by_corpus.setdefault(parent.corpus, []).extend(questions)
    from_all += [f"{name}:same-class" for name in SAME if name in parents]
    from_all += [f"{name}:text" for name in TEXTS if name in parents]
    names = [*parents, *from_all]
    generator = np.random.default_rng(SEED)
    queues = [list(generator.permutation(questions)) for questions in by_corpus.values()]
    while len(names) < count and any(queues):
        for queue in queues:
            if queue and len(names) < count:
                names.append(str(queue.pop()))
    if len(names) < count:
        raise InputError(f"there are {len(names)} tasks, not {count}; ask for fewer")
    return [derive(name, parents) if ":" in name else parents[name] for name in names]


SAME = ("20ng", "r8", "bbc", "trec6")
TEXTS = ("20ng", "r8", "bbc", "rt", "movie")
