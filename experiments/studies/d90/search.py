"""The search for a dimension: where to train next, and with which learning rate.

A run at dimension d has rate = move / √d: AdamW moves d coordinates of unit columns by about that
move a step, so that one move serves many d.

**Rates.** At seed 0, on validation rows, by climbing in factors of about three: at the first d up,
then down; from the best move of a smaller d up, and from that of a greater one down, since the best
move mostly grows with d; but down first where that move does worse than at the smaller d, and down
after all where the greater d does, which a subspace of more directions need not. Between two
dimensions that are tuned only their moves and those in between are tried. Other seeds take the
chosen move; where one does worse than at two smaller dimensions, the move that is best in the mean
over its seeds is chosen anew. Test rows have no part in it: they give the performance, and say
where to look next.

Trainings that will be made whatever the others of them give are told ahead of the first of them, so
that they can be made at a time: the first two of a climb, the moves between two dimensions that are
tuned, the other seeds of a rate of the baseline.

**Dimensions.** (1) From a first d by a stride, up or down, until the target is between two of them.
(2) A second seed at the nearer one. (3) Until the runs are spent, or the interval is narrow enough
and both ends of the crossing's gap have two seeds: beyond an end of the range at which the interval
is open, else where the crossing's bootstrap draws have most weight (share of the draws × log of the
gap's width), in the middle of a gap that is wider than ``resolution``, else another seed at one of
its ends.

The search is ours; `deltacontrol.theory.dimension.estimate` has the estimate and its interval.
Where to train next
follows from the performances, which costs some coverage: of straight curves (tests) intervals of
90 % hold the dimension in about 85 % of searches. They tell of the spread over seeds, not of which
test rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from deltacontrol.theory.dimension.estimate import (
    Baseline,
    DimensionEstimate,
    DimensionVerdict,
    estimate_dimension,
)

FACTOR = math.sqrt(10)
TRIES = 5  # of rates at one dimension
MOVE = 10.0  # the first that is tried


@dataclass(frozen=True)
class Trial:
    """A training, as the search sees it.

    Attributes:
        dimension: d; None for a baseline.
        seed: of everything that is drawn.
        move: rate·√d; the rate itself for a baseline.
        rate: the peak learning rate.
        performance: on test rows; that of guessing after a divergence.
        validation: on validation rows; that of guessing after a divergence.
        validation_loss: breaks ties; infinite after a divergence.
        status: of the run.
        run: its id.
    """

    dimension: int | None
    seed: int
    move: float
    rate: float
    performance: float
    validation: float
    validation_loss: float
    status: str
    run: str


def _unheard(certain: Sequence[object]) -> None:
    """What is told ahead where nobody makes use of it."""


def climb(
    start: float,
    known: Callable[[float], Trial],
    tries: int = TRIES,
    ways: tuple[int, ...] = (1, -1),
    ahead: Callable[[Sequence[float]], None] = _unheard,
) -> Trial:
    """The trial with the best validation performance, by factors of √10 from ``start``.

    Args:
        start: the rate or the move to begin with.
        known: trains with one.
        tries: trainings at most.
        ways: 1 for up, -1 for down: on while it helps, and the next way where it did not at once.
        ahead: is told with what will be trained in any case, before the first of it is.
    """

    def value(step: int) -> float:
        return three_digits(start * FACTOR**step)

    if tries > 1:
        ahead([start, value(ways[0])])
    found = {0: known(start)}

    def better(a: int, b: int) -> bool:
        return _rank(found[a]) > _rank(found[b])

    best = 0
    for way in ways:
        while len(found) < tries:
            step = best + way
            found[step] = known(value(step))
            if not better(step, best):
                break
            best = step
        if best != 0:
            break
    return found[best]


def steadiest(
    start: float,
    known: Callable[[float, int], Trial],
    seeds: int,
    ahead: Callable[[Sequence[tuple[float, int]]], None] = _unheard,
) -> list[Trial]:
    """The runs of all seeds at the rate with the best mean validation performance.

    The climb is at seed 0. The other seeds run at the rate that it finds, and at another one only
    where seed 0 did better there than the mean here: a rate at which only some seeds learn does not
    win by one of them.

    Args:
        start: the rate to begin with.
        known: trains with a rate and a seed.
        seeds: how many.
        ahead: is told the rates and seeds that will be trained in any case, before the first is.
    """
    tried: dict[float, Trial] = {}

    def first(rate: float) -> Trial:
        tried[rate] = known(rate, 0)
        return tried[rate]

    def mean(runs: list[Trial]) -> float:
        return sum(trial.validation for trial in runs) / len(runs)

    climb(start, first, ahead=lambda rates: ahead([(rate, 0) for rate in rates]))
    best: list[Trial] = []
    for trial in sorted(tried.values(), key=_rank, reverse=True):
        if best and trial.validation <= mean(best):
            break
        others = [(trial.rate, seed) for seed in range(1, seeds)]
        ahead(others)
        runs = [trial, *(known(*other) for other in others)]
        if not best or mean(runs) > mean(best):
            best = runs
    return best


def _rank(trial: Trial) -> tuple[float, float]:
    return trial.validation, -trial.validation_loss


def three_digits(rate: float) -> float:
    """Rounded, so that a rate is the same number wherever it is computed."""
    return float(f"{rate:.3g}")


@dataclass
class Search:
    """The search over d; see the module.

    Attributes:
        measure: trains at (dimension, move, seed).
        target: the performance to reach.
        start: the first d.
        smallest: the least d that is tried.
        largest: the greatest.
        stride: factor between dimensions until the target is bracketed.
        resolution: gaps of at most this factor are not divided.
        width: the search ends where high/low of the interval is at most this.
        seeds: runs at one dimension at most.
        budget: runs in all.
        confidence: of the interval.
        ahead: is told several (dimension, move, seed) that will be trained in any case, before the
            first of them is.
    """

    measure: Callable[[int, float, int], Trial]
    target: float | Baseline
    start: int = 1000
    smallest: int = 10
    largest: int = 100_000
    stride: float = 10.0
    resolution: float = 4.0
    width: float = 2.0
    seeds: int = 3
    budget: int = 20
    confidence: float = 0.9
    ahead: Callable[[Sequence[tuple[int, float, int]]], None] = _unheard
    trials: list[Trial] = field(default_factory=list)
    stopped: str = "the runs are spent"
    _chosen: dict[int, Trial] = field(default_factory=dict)

    def run(self) -> DimensionEstimate:
        """Search, and estimate from every trial with the move that was chosen."""
        self._bracket()
        while not self._is_spent and self._step():
            pass
        return self.estimate()

    def estimate(self, chance: float | None = None) -> DimensionEstimate:
        """From the trials so far, beside the performance of guessing."""
        chosen = self.chosen()
        return estimate_dimension(
            [float(t.dimension or 0) for t in chosen],
            [t.performance for t in chosen],
            self.target,
            chance=chance,
            confidence=self.confidence,
        )

    def chosen(self) -> list[Trial]:
        """The trials with the move of their dimension, where it has one."""
        moves = {d: trial.move for d, trial in self._chosen.items()}
        return [t for t in self.trials if moves.get(t.dimension or 0) == t.move]

    @property
    def goal(self) -> float:
        """The performance to reach."""
        return self.target.target if isinstance(self.target, Baseline) else self.target

    @property
    def _is_spent(self) -> bool:
        return len(self.trials) >= self.budget

    def _run(self, d: int, move: float, seed: int) -> Trial:
        for trial in self.trials:
            if (trial.dimension, trial.move, trial.seed) == (d, move, seed):
                return trial
        self.trials.append(self.measure(d, move, seed))
        return self.trials[-1]

    def _ahead(self, d: int, moves: Sequence[float]) -> None:
        self.ahead([(d, move, 0) for move in moves])

    def _tune(self, d: int) -> Trial:
        """Choose the move of a dimension at seed 0."""
        below = max((x for x in self._chosen if x < d), default=None)
        above = min((x for x in self._chosen if x > d), default=None)
        left = max(1, self.budget - len(self.trials))
        if below is not None and above is not None:
            ends = sorted((self._chosen[below].move, self._chosen[above].move))
            count = round(math.log(ends[1] / ends[0], FACTOR))
            moves = [ends[0], *(three_digits(ends[0] * FACTOR**i) for i in range(1, count + 1))]
            self._ahead(d, moves[:left])
            best = max((self._run(d, m, 0) for m in moves[:left]), key=_rank)
        else:
            nearest = below if below is not None else above
            first = MOVE if nearest is None else self._chosen[nearest].move
            ways = (1, -1) if nearest is None else (1,) if nearest == below else (-1,)
            if below is not None:
                smaller = self._chosen[below]
                # Too large a move for more directions: whatever is larger still fails alike.
                if self._run(d, first, 0).validation < smaller.validation:
                    ways = (-1, 1)
            tries, ahead = min(TRIES, left), partial(self._ahead, d)
            best = climb(first, lambda move: self._run(d, move, 0), tries, ways, ahead)
            if below is not None:
                best = self._not_worse(d, first, best, self._chosen[below])
                if _rank(best) < _rank(self._chosen[below]) and self._is_spent:
                    return best  # its rate may be to blame: it says nothing of d
        self._chosen[d] = best
        return best

    def _not_worse(self, d: int, move: float, best: Trial, smaller: Trial) -> Trial:
        """The best trial of d, after smaller moves while it is worse than that of a smaller d."""
        for _ in range(TRIES):
            if _rank(best) >= _rank(smaller) or self._is_spent:
                break
            move = three_digits(move / FACTOR)
            best = max(best, self._run(d, move, 0), key=_rank)
        return best

    def _bracket(self) -> None:
        d: int | None = min(max(self.start, self.smallest), self.largest)
        while d is not None and d not in self._chosen and not self._is_spent:
            reached = self._tune(d).performance >= self.goal
            d = self._lower(d) if reached else self._higher(d)

    def _higher(self, d: int) -> int | None:
        return min(round(d * self.stride), self.largest) if d < self.largest else None

    def _lower(self, d: int) -> int | None:
        return max(round(d / self.stride), self.smallest) if d > self.smallest else None

    def _count(self, d: int) -> int:
        return sum(t.dimension == d for t in self.chosen())

    def _reseed(self, dimensions: Sequence[int]) -> bool:
        """Another seed where there are fewest; False where all have theirs."""
        d = min(dimensions, key=self._count)
        if self._count(d) >= self.seeds:
            return False
        found = self._run(d, self._chosen[d].move, self._count(d))
        better = [x for x, t in self._chosen.items() if x < d and t.validation > found.validation]
        if len(better) > 1:  # its move fails with some seeds
            self._chosen[d] = self._steadiest(d)
        return True

    def _steadiest(self, d: int) -> Trial:
        """The trial at seed 0 with the move that is best in the mean over its seeds so far."""
        found: dict[float, list[Trial]] = {}
        for trial in self.trials:
            if trial.dimension == d:
                found.setdefault(trial.move, []).append(trial)

        def mean(runs: list[Trial]) -> tuple[float, bool]:
            at_hand = runs[0].move == self._chosen[d].move  # which a tie leaves alone
            return sum(trial.validation for trial in runs) / len(runs), at_hand

        return max(found.values(), key=mean)[0]

    def _step(self) -> bool:
        """One more dimension or seed; False where there is nothing to gain."""
        found, d = self.estimate(), sorted(self._chosen)
        if all(self._count(x) < 2 for x in d):
            near = sorted(d, key=lambda x: abs(self._chosen[x].performance - self.goal))
            return self._reseed(near[:1])
        if self._settled(found, d):
            return False
        # The crossing itself counts too: where the draws agree there is no weight elsewhere.
        draws = (*found.draws, found.dimension)
        gaps: list[tuple[float, int | None, int | None]] = [
            (self._beyond(sum(x <= 0 for x in draws), len(draws)), None, d[0]),
            (self._beyond(sum(math.isinf(x) for x in draws), len(draws)), d[-1], None),
        ]
        for low, high in zip(d, d[1:], strict=False):
            share = sum(low < x <= high for x in draws)
            gaps.append((share * math.log(high / low), low, high))
        for weight, low, high in sorted(gaps, key=lambda gap: -gap[0]):
            if weight > 0 and self._improve(low, high):
                return True
        self.stopped = "every dimension has its seeds"
        return False

    def _beyond(self, number: int, draws: int) -> float:
        """The weight of what is beyond an end of the searched range.

        It comes first while so many draws are there that the interval is open.
        """
        is_open = number > (1 - self.confidence) / 2 * draws
        return math.log(self.stride) * (number + (draws if is_open else 0))

    def _settled(self, found: DimensionEstimate, d: list[int]) -> bool:
        verdict = found.verdict
        around = [(a, b) for a, b in zip(d, d[1:], strict=False) if a < found.dimension <= b]
        divided = all(
            b <= self.resolution * a and min(self._count(a), self._count(b)) > 1 for a, b in around
        )
        narrow = found.high <= self.width * found.low
        if verdict is DimensionVerdict.ESTIMATED and narrow and divided:
            self.stopped = "the interval is narrow enough"
        elif verdict is DimensionVerdict.ABOVE_BUDGET and d[-1] >= self.largest:
            self.stopped = "the largest dimension does not reach the target"
        elif verdict is DimensionVerdict.BELOW_SMALLEST and d[0] <= self.smallest:
            self.stopped = "the smallest dimension reaches the target"
        else:
            return False
        return True

    def _improve(self, low: int | None, high: int | None) -> bool:
        if low is None or high is None:
            end = high if low is None else low
            assert end is not None
            if self._count(end) < 2:
                return self._reseed([end])
            further = self._lower(end) if low is None else self._higher(end)
            if further is None:
                return self._reseed([end])
            self._tune(further)
            return True
        middle = round(math.sqrt(low * high))
        if high / low > self.resolution and low < middle < high:
            self._tune(middle)
            return True
        return self._reseed([low, high])
