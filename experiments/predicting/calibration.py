"""How good predictions are, once the trainings that they foretold are done.

Of each task there are the scores of a predictor (the lower the better) and what the methods reached
(losses, the lower the better). Over tasks

    rank correlation   Spearman's, between the two; 0 where one of them is constant
    regret             the loss of the method with the best score, less the least loss
    top k              whether the best method is among the k best scores
    octaves            log2(predicted rate / best rate)

Where scores are tied, regret and hits are means over all orders of the tied methods. Tasks of one
corpus are not independent: an interval is over corpora, and a predictor that learns from tasks
learns from other corpora than it is judged on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import Evidence

__all__ = [
    "Calibration",
    "Foretold",
    "calibrate",
    "octaves",
    "over_corpora",
    "rank_correlation",
    "regret",
    "split_by_corpus",
    "top_share",
]


@dataclass(frozen=True)
class Foretold:
    """A task, what was predicted of it, and what came.

    Attributes:
        task: its name.
        corpus: whose texts these are.
        scores: by method; the lower the better it was predicted to do.
        losses: by method; methods without a score, or without a loss, are left out.
    """

    task: str
    corpus: str
    scores: Mapping[str, float]
    losses: Mapping[str, float]

    @property
    def pairs(self) -> tuple[list[float], list[float]]:
        """Scores and losses of the methods that have both, in one order.

        Raises:
            InputError: fewer than two methods have both.
        """
        shared = [
            name
            for name, score in self.scores.items()
            if not math.isnan(score) and not math.isnan(self.losses.get(name, math.nan))
        ]
        if len(shared) < 2:
            raise InputError(
                f"{self.task}: {len(shared)} methods have a score and a loss; an order takes two"
            )
        return [self.scores[n] for n in shared], [self.losses[n] for n in shared]


def rank_correlation(scores: Sequence[float], losses: Sequence[float]) -> float:
    """Spearman's, ties at their mean ranks.

    Raises:
        InputError: the numbers differ, or there are fewer than two.

    Example:
        >>> rank_correlation([1, 2, 3], [0.1, 0.3, 0.2])
        0.5
    """
    a, b = (_ranks(values) for values in _checked(scores, losses))
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1].round(12))


def regret(scores: Sequence[float], losses: Sequence[float]) -> float:
    """What is lost by taking the method with the best score.

    Example:
        >>> regret([1, 2, 3], [0.5, 0.25, 0.75])
        0.25
    """
    s, found = _checked(scores, losses)
    return float(found[s == s.min()].mean() - found.min())


def top_share(scores: Sequence[float], losses: Sequence[float], count: int) -> float:
    """Whether a best method is among the first ``count``: 1 or 0, between them with ties.

    Args:
        scores: of the methods.
        losses: of the methods; several may be best.
        count: how many are looked at.

    Raises:
        InputError: a count below one, and as `rank_correlation`.

    Example:
        >>> top_share([2, 1, 1, 3], [0.1, 0.2, 0.3, 0.4], 3), top_share([1, 1], [0.1, 0.2], 1)
        (1.0, 0.5)
    """
    s, found = _checked(scores, losses)
    if count < 1:
        raise InputError(f"count is {count}; expected 1 or more")
    if count >= len(s):
        return 1.0
    edge = np.sort(s)[count - 1]
    best = found == found.min()
    if best[s < edge].any():
        return 1.0
    tied = s == edge
    places, hits = count - int((s < edge).sum()), int(best[tied].sum())
    others = int(tied.sum()) - hits
    # Of all ways to fill the places from the tied ones, those without a best method are missed.
    return 1.0 - math.comb(others, places) / math.comb(int(tied.sum()), places)


def octaves(predicted: float, best: float) -> float:
    """``log2(predicted / best)`` of two rates: 1 where the predicted one is twice as large.

    Raises:
        InputError: a rate is not positive.

    Example:
        >>> octaves(4e-3, 1e-3)
        2.0
    """
    if not (predicted > 0 and best > 0):
        raise InputError(f"the rates are {predicted} and {best}; expected positive numbers")
    return math.log2(predicted / best)


def over_corpora(values: Sequence[float], corpora: Sequence[str]) -> Evidence:
    """The mean over corpora of each corpus's mean, with its bootstrap interval over corpora.

    Args:
        values: one a task.
        corpora: of each task.

    Raises:
        InputError: the numbers differ, or there are fewer corpora than a bootstrap takes.
    """
    if len(values) != len(corpora):
        raise InputError(f"{len(values)} values of {len(corpora)} tasks; expected one each")
    groups: dict[str, list[float]] = {}
    for value, corpus in zip(values, corpora, strict=True):
        groups.setdefault(corpus, []).append(value)
    means = [float(np.mean(groups[corpus])) for corpus in sorted(groups)]
    return Evidence.resampled(lambda drawn: float(drawn.mean()), [means], "corpus")


def split_by_corpus(
    corpora: Sequence[str], share: float, *, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Numbers of tasks to learn from and to judge on, without a corpus on both sides.

    Args:
        corpora: of each task.
        share: of the corpora that are learnt from, above 0 and below 1; at least one is on each
            side.
        seed: of the draw.

    Raises:
        InputError: a share that is none, or fewer than two corpora.
    """
    names = sorted(set(corpora))
    if not 0 < share < 1 or len(names) < 2:
        raise InputError(
            f"share is {share} of {len(names)} corpora; expected a number between 0 and 1, and two "
            "corpora or more"
        )
    drawn = np.random.default_rng(seed).permutation(len(names))
    count = min(max(1, round(share * len(names))), len(names) - 1)
    learnt = {names[i] for i in drawn[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for number, corpus in enumerate(corpora):
        sides[corpus not in learnt].append(number)
    return sides


@dataclass(frozen=True)
class Calibration:
    """How good a predictor is over tasks, each number with an interval over corpora.

    Attributes:
        correlation: mean rank correlation.
        regret: mean regret.
        top_one: how often the best method has the best score.
        top_three: how often it is among the three best.
    """

    correlation: Evidence
    regret: Evidence
    top_one: Evidence
    top_three: Evidence


def calibrate(tasks: Sequence[Foretold]) -> Calibration:
    """Judge a predictor on tasks that it has not learnt from.

    Raises:
        InputError: as `Foretold.pairs` and `over_corpora`.
    """
    pairs, corpora = [task.pairs for task in tasks], [task.corpus for task in tasks]
    return Calibration(
        over_corpora([rank_correlation(*pair) for pair in pairs], corpora),
        over_corpora([regret(*pair) for pair in pairs], corpora),
        over_corpora([top_share(*pair, 1) for pair in pairs], corpora),
        over_corpora([top_share(*pair, 3) for pair in pairs], corpora),
    )


def _checked(scores: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(scores, float), np.asarray(losses, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2 or np.isnan([a, b]).any():
        raise InputError(
            f"{len(a)} scores and {len(b)} losses; expected one each of two methods or more, all "
            "of them numbers"
        )
    return a, b


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on, ties at the mean of their places."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal + 1) / 2
