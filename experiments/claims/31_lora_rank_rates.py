"""Claim 31: how LoRA's best learning rate depends on the rank follows from the multiplier.

Of one training per rate, the best rate is the vertex of the parabola in the logarithm of the rate
through the least loss of the grid and its two neighbours. A best rate at an end of the grid is not
known, and neither is a slope then.

Each multiplier is the other's control: it breaks the assumption which of the two it is, and nothing
else. The cases in which a control passes are one example of which a layer's number of inputs makes
up for the multiplier: the best rate goes as (s r n)^(-1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Records, Threshold

# Fixed before the measurement.
MODEL, SEED = "minilm-l3", 31
TASKS = ("rt", "trec6", "tweets", "movie", "amazon")
RANKS = (1, 4, 16, 64)
RATES = tuple(2.0 ** (-1.5 * k) for k in range(8, 1, -1))  # of 1/4096 to 1/8
STANDARD, FIXED = 1.0, 0.0  # γ of the multiplier s₀ (r/r₀)^-γ
FLAT, FALLS = (-0.2, 0.2), (-0.7, -0.3)  # around 0 and -1/2
LEARNT = 0.9  # the least loss over that of the smallest rate, at most
# The exact problem: one example, a layer of n inputs, Adam.
DRAWS = range(6)
MULTIPLIER, INPUTS, OUTPUTS, STEPS = 1 / 64, 16, 4, 40
EXACT_RATES = tuple(2.0**k for k in range(-9, 3))


def _run(task: str) -> Any:
    from deltacontrol.experiments.studies.learning_rates.ranks import RankRates

    return RankRates(
        model=MODEL, task=task, ranks=RANKS, exponents=(STANDARD, FIXED), rates=RATES, seed=SEED
    )


def _runs() -> list[Any]:
    """One a task."""
    return [_run(task) for task in TASKS]


def _predict(records: Records) -> dict[str, Any]:
    """Nothing beside the slopes, which the thresholds lie around."""
    return {}


def _vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """log2 of the best of equally spaced rates; NaN at an end of them or beside a divergence."""
    i = min(range(len(losses)), key=lambda k: losses[k])
    if i in (0, len(losses) - 1) or not math.isfinite(losses[i + 1]):
        return math.nan
    low, mid, high = losses[i - 1 : i + 2]
    curvature, width = low - 2 * mid + high, math.log2(rates[i + 1] / rates[i])
    shift = 0.5 * (low - high) / curvature if curvature > 0 else 0.0
    return math.log2(rates[i]) + width * shift


def _slope(best: Mapping[int, float]) -> float:
    """Of log2 of the best rates in log2 of the ranks."""
    x = [math.log2(rank) for rank in best]
    mean = sum(x) / len(x)
    pairs = zip(x, best.values(), strict=True)
    return sum((a - mean) * b for a, b in pairs) / sum((a - mean) ** 2 for a in x)


# -- real fine-tuning ------------------------------------------------------------------------------


def _losses(record: Any, rank: int, multiplier: float, steps: int) -> list[float]:
    """The mean loss of the last quarter of the steps, one a rate; infinite after a divergence."""
    curve, found = record.curve(), []
    curve = curve[(curve["rank"] == rank) & (curve["multiplier"] == multiplier)]
    for rate in RATES:
        losses = curve[curve["rate"] == rate].sort_values("step")["loss"].tolist()
        late = losses[steps - steps // 4 :]
        whole = len(losses) == steps and all(map(math.isfinite, late))
        found.append(sum(late) / len(late) if whole else math.inf)
    return found


def _slopes(records: Records, exponent: float, note: str) -> Evidence:
    """The slope of each task."""
    best: dict[str, dict[int, float]] = {}
    shares = []
    for task in TASKS:
        experiment = _run(task)
        record = records(experiment)
        best[task] = {}
        for rank in RANKS:
            losses = _losses(record, rank, experiment.scaled(rank, exponent), experiment.steps)
            best[task][rank] = _vertex(RATES, losses)
            shares.append(min(losses) / losses[0])
    inside = not any(math.isnan(b) for of in best.values() for b in of.values())
    return Evidence.mean(
        [_slope(of) for of in best.values()],
        "task",
        details={
            "log2 of the best rate by rank": best,
            "largest share that is left of the smallest rate's loss": max(shares),
        },
        assumptions={
            "the grid holds every best rate": inside,
            "training lowers the loss": max(shares) <= LEARNT,
        },
        note=note,
    )


# -- the exact problem -----------------------------------------------------------------------------


@cache
def _exact_best(seed: int, rank: int, multiplier: float, inputs: int) -> float:
    """log2 of the best rate for ½‖s B A x - y‖², x and y of entries ±1: all rates at once."""
    import numpy as np

    random = np.random.default_rng([seed, rank])
    x, y = random.choice([-1.0, 1.0], inputs), random.choice([-1.0, 1.0], OUTPUTS)
    start = random.uniform(-1, 1, (1, rank, inputs)) / math.sqrt(inputs)
    rates = np.array(EXACT_RATES)[:, None, None]
    factors = np.repeat(start, len(rates), 0), np.zeros((len(rates), OUTPUTS, rank))
    means, squares = ([np.zeros_like(u) for u in factors] for _ in range(2))
    late = np.zeros(len(rates))
    for step in range(1, STEPS + 1):
        A, B = factors
        z = A @ x
        error = multiplier * np.einsum("kmr,kr->km", B, z) - y
        late += 0.5 * (error**2).sum(1) * (step > STEPS - STEPS // 4)
        of_a = multiplier * np.einsum("kmr,km->kr", B, error)[..., None] * x
        of_b = multiplier * error[..., None] * z[:, None]
        for u, mean, square, slope in zip(factors, means, squares, (of_a, of_b), strict=True):
            mean += 0.1 * (slope - mean)
            square += 0.001 * (slope**2 - square)
            root = np.sqrt(square / (1 - 0.999**step)) + 1e-8
            u -= rates * mean / (1 - 0.9**step) / root
    return _vertex(EXACT_RATES, late.tolist())


def _exact(exponent: float, inputs: Callable[[int], int], note: str) -> Evidence:
    """The slope of each draw, of a layer whose number of inputs depends on the rank."""

    def best(seed: int, rank: int) -> float:
        return _exact_best(seed, rank, MULTIPLIER * rank**-exponent, inputs(rank))

    found = {f"draw {seed}": {rank: best(seed, rank) for rank in RANKS} for seed in DRAWS}
    return Evidence.mean(
        [_slope(of) for of in found.values()],
        "draw",
        details={"log2 of the best rate by rank": found},
        note=note,
    )


def _fewer(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The fixed multiplier, of a layer with as many times fewer inputs as the rank is larger."""
    most = INPUTS * max(RANKS)
    note = f"a fixed multiplier, one example, {most} inputs at rank 1 and {INPUTS} at the largest"
    return _exact(FIXED, lambda rank: most // rank, note)


def _more(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The usual multiplier, of a layer with as many times more inputs as the rank is larger."""
    note = f"the multiplier 1/r, one example, {INPUTS} inputs for each rank"
    return _exact(STANDARD, lambda rank: INPUTS * rank, note)


def _multiplier(exponent: float) -> Callable[[Mapping[str, Any], Records], Evidence]:
    """The measurement of one multiplier, which is the other part's control."""
    said = "16/r" if exponent == STANDARD else "4 at every rank"

    def measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
        """The slopes over the tasks."""
        experiment = _run(TASKS[0])
        note = (
            f"{MODEL}, multiplier {said}, query and value of every block, a fitted head that "
            f"stays, {experiment.rows} rows of each task, {experiment.steps} steps of "
            f"{experiment.batch_size} rows with Adam at a constant rate, one seed"
        )
        return _slopes(records, exponent, note)

    return measure


# Fewer cases, for `claims run --preset quick`.
QUICK = {"TASKS": TASKS[:3], "RANKS": (4, 64), "DRAWS": range(2)}

SLOPE = "mean slope of log best rate in log rank over tasks"

CLAIM = Claim(
    id=31,
    name="lora-rank-rates",
    title="LoRA's best rate falls with the rank, or not, by the multiplier",
    statement=(
        "with A random, B zero and Adam, LoRA's best learning rate goes with the rank r as "
        "r^(-(1-γ)/2) where the multiplier of B A goes as r^-γ: it stays with the usual α/r (a), "
        "and falls as r^(-1/2) with a fixed one (b)"
    ),
    source=(
        "Chen, Villar & Hayou, arXiv 2602.06204, corollary 4.4, as cited in this project's list of "
        "claims; derived anew in the notebook"
    ),
    notebook="31_lora_rank_rates",
    predict=_predict,
    parts=(
        Part(
            "a",
            "the usual multiplier, no slope",
            Threshold("within", FLAT, f"{SLOPE}, multiplier α/r"),
            _multiplier(STANDARD),
            _multiplier(FIXED),
            _fewer,
            "real fine-tuning",
        ),
        Part(
            "b",
            "a fixed multiplier, slope -1/2",
            Threshold("within", FALLS, f"{SLOPE}, fixed multiplier"),
            _multiplier(FIXED),
            _multiplier(STANDARD),
            _more,
            "real fine-tuning",
        ),
    ),
    runs=_runs,
)
