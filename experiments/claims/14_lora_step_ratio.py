"""Claim 14: LoRA's B wants a larger step than A, by a ratio that grows with the width.

The best ratio of rates is the vertex of the parabola in the logarithm of the ratio through the
least log loss and its two neighbours, where a ratio's loss is the least of all rates of A.

Of pre-trained models the widths are those of the family of `deltacontrol pretrain`, which differ in
nothing else. With a multiplier s of B A the rates at which both factors move the features are
η_A = Θ(1/n) and η_B = Θ(1/(s r)), so that the ratio is Θ(n/(s r)). With s fixed and a rank in
proportion to the width it stays, which is the control; with s in proportion to 1/r it grows as it
does with one rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Records, Threshold

WIDTHS = (64, 128, 256, 512)
SEEDS = tuple(range(20, 28))  # fresh: 10 to 15 were judged before
FIXED = 128  # entries of the layer's input in the control
FITTED = 0.05  # of the best loss over that at the start
EDGES = 0.1  # share of the best pairs of rates that may lie at the edge of the grid
# Of the pre-trained models, fixed before the measurement.
FAMILY = (48, 80, 128, 192, 288)
SERIES = tuple((task, seed) for task in ("rt", "trec6", "tweets", "amazon") for seed in (14, 15))
RANK, EACH = 4, 16  # or one rank for so many entries of the width
RATES = tuple(2.0**k for k in range(-13, -2, 2))  # of A
RATIOS = tuple(2.0**k for k in range(-2, 12, 2))
STANDARD, FIXED_MULTIPLIER = 1.0, 0.0  # γ of the multiplier s₀ (r/r₀)^-γ
LEARNT = 0.9  # the least loss over that of the smallest rates, at most


def _run(width: int, task: str, seed: int) -> Any:
    from deltacontrol.experiments.studies.learning_rates.ranks import RankRates

    return RankRates(
        model=f"family/encoder-{width}", task=task, ranks=sorted({RANK, width // EACH}),
        exponents=(STANDARD, FIXED_MULTIPLIER), reference=RANK, rates=RATES, step_ratios=RATIOS,
        seed=seed,
    )  # fmt: skip


def _runs() -> list[Any]:
    """One a width and series."""
    return [_run(width, *series) for series in SERIES for width in FAMILY]


def _predict(records: Records) -> dict[str, Any]:
    """A step of A moves its n inputs' sum by Θ(n), one of B by Θ(1): ratio Θ(n), slope 1."""
    return {"slope": 1.0}


@cache
def _best(width: int, seed: int, features: float, fixed: int) -> tuple[float, float, bool]:
    """log2 of the best ratio of rates, the least loss, and whether its rates are at an edge."""
    from deltacontrol.experiments.measures.lora_widths import WidthStudy

    study = WidthStudy(features=features, fixed=fixed)
    losses = study.losses(width, seed)
    i, j = divmod(int(losses.argmin()), losses.shape[1])
    edge = i in (0, losses.shape[0] - 1) or j in (0, losses.shape[1] - 1)
    return study.best_ratio(losses), float(losses.min()), edge


def _slopes(prediction: Mapping[str, Any], note: str, features: float, fixed: int) -> Evidence:
    """The slope of each seed's log2 ratios on log2 width, over the predicted one."""
    import numpy as np

    x = np.log2(np.array(WIDTHS, dtype=float))
    best = {seed: [_best(w, seed, features, fixed) for w in WIDTHS] for seed in SEEDS}
    slopes = [
        float(np.polyfit(x, [ratio for ratio, _, _ in found], 1)[0]) / prediction["slope"]
        for found in best.values()
    ]
    worst = max(loss for found in best.values() for _, loss, _ in found)
    edges = [edge for found in best.values() for _, _, edge in found]
    return Evidence.mean(
        slopes,
        "seed",
        details={
            "log2 of the best ratio": {
                f"seed {seed}": [ratio for ratio, _, _ in found] for seed, found in best.items()
            },
            "widths": list(WIDTHS),
            "largest best loss over that at the start": worst,
            "share of best rates at the edge of the grid": sum(edges) / len(edges),
        },
        assumptions={
            "the best rates fit the target": worst <= FITTED,
            "the grid holds the best rates": sum(edges) <= EDGES * len(edges),
        },
        note=note,
    )


def _measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Two-layer networks, Adam, a grid of both rates."""
    note = (
        "networks with frozen Gaussian weights, rank 4, 64 examples, 60 steps, rates over a grid "
        "of factors of two"
    )
    return _slopes(prediction, note, 1.0, 0)


def _negative_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The layer's outputs grow with the width, its inputs do not."""
    note = f"{FIXED} inputs of the layer at every width, so that a step of A has the same effect"
    return _slopes(prediction, note, 1.0, FIXED)


def _passing_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The layer's inputs differ in number from its outputs, but grow with them."""
    return _slopes(prediction, "half as many inputs of the layer as outputs, growing", 0.5, 0)


# -- pre-trained models of one family --------------------------------------------------------------


def _losses(record: Any, rank: int, multiplier: float, steps: int) -> dict[float, list[float]]:
    """By ratio, the mean loss of the last quarter of the steps, one a rate; ∞ if it diverged."""
    curve, found = record.curve(), {}
    curve = curve[(curve["rank"] == rank) & (curve["multiplier"] == multiplier)]
    for ratio in RATIOS:
        of_ratio, found[ratio] = curve[curve["step_ratio"] == ratio], []
        for rate in RATES:
            losses = of_ratio[of_ratio["rate"] == rate].sort_values("step")["loss"].tolist()
            late = losses[steps - steps // 4 :]
            whole = len(losses) == steps and all(map(math.isfinite, late))
            found[ratio].append(sum(late) / len(late) if whole else math.inf)
    return found


def _vertex(least: Sequence[float]) -> float:
    """log2 of the best ratio; NaN where it is an end of the grid, or beside a divergence."""
    logs = [math.log(loss) if 0 < loss < math.inf else math.inf for loss in least]
    i = min(range(len(logs)), key=lambda k: logs[k])
    if i in (0, len(logs) - 1) or not math.isfinite(logs[i - 1] + logs[i + 1]):
        return math.nan
    low, mid, high = logs[i - 1 : i + 2]
    curvature, width = low - 2 * mid + high, math.log2(RATIOS[1] / RATIOS[0])
    shift = 0.5 * (low - high) / curvature if curvature > 0 else 0.0
    return math.log2(RATIOS[i]) + width * shift


def _of_family(
    prediction: Mapping[str, Any], records: Records, note: str, exponent: float, each: int
) -> Evidence:
    """The slope of each series over the widths, over the predicted one.

    The rank is fixed, or the width over ``each``.
    """
    import numpy as np

    x = [math.log2(width) for width in FAMILY]
    best: dict[str, list[float]] = {}
    shares, edges = [], []
    for task, seed in SERIES:
        name = f"{task}, seed {seed}"
        best[name] = []
        for width in FAMILY:
            experiment, rank = _run(width, task, seed), width // each if each else RANK
            multiplier = experiment.scaled(rank, exponent)
            losses = _losses(records(experiment), rank, multiplier, experiment.steps)
            best[name].append(_vertex([min(of_ratio) for of_ratio in losses.values()]))
            least = min(losses.values(), key=min)
            shares.append(min(least) / losses[RATIOS[0]][0])
            edges.append(math.isnan(best[name][-1]) or min(least) in (least[0], least[-1]))
    slopes = []
    for ratios in best.values():
        known = [pair for pair in zip(x, ratios, strict=True) if not math.isnan(pair[1])]
        line = np.polyfit(*zip(*known, strict=True), 1) if len(known) > 2 else [math.nan]
        slopes.append(float(line[0]) / prediction["slope"])
    return Evidence.mean(
        slopes,
        "series",
        details={
            "log2 of the best ratio by width": best,
            "widths": list(FAMILY),
            "largest share that is left of the smallest rates' loss": max(shares),
        },
        assumptions={
            "the grid holds the best rates": sum(edges) <= EDGES * len(edges),
            "training lowers the loss": max(shares) <= LEARNT,
        },
        note=note,
    )


def _family(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Encoders of one pre-training recipe, LoRA of one rank, a fitted head that stays."""
    own = _run(FAMILY[0], *SERIES[0])
    note = (
        f"encoders of widths {FAMILY[0]} to {FAMILY[-1]} pre-trained alike, rank {RANK} at query "
        f"and value of every block, a fitted head that stays, {own.rows} rows, {own.steps} steps "
        f"of {own.batch_size} rows with Adam at constant rates, {len(SERIES)} series of task and "
        "seed"
    )
    return _of_family(prediction, records, note, STANDARD, 0)


def _growing_rank(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """A fixed multiplier, and a rank that grows with the width: n/(s r) stays."""
    note = f"a fixed multiplier and rank n/{EACH}, with which the ratio n/(s r) stays"
    return _of_family(prediction, records, note, FIXED_MULTIPLIER, EACH)


def _growing_rank_scaled(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The usual multiplier makes up for a rank that grows with the width."""
    note = f"rank n/{EACH} with the usual multiplier, with which the ratio n/(s r) grows"
    return _of_family(prediction, records, note, STANDARD, EACH)


SLOPE = "slope of log best step ratio on log width, over the predicted one"

CLAIM = Claim(
    id=14,
    name="lora-step-ratio",
    title="LoRA's B wants a larger step than A, more so in wide networks",
    statement=(
        "the ratio of the best step sizes of B and A under Adam grows in proportion to the width n"
    ),
    source="Hayou, Ghosh & Yu, ICML 2024, theorem 1",
    notebook="14_lora_step_ratio",
    revised=(
        "the control, a scaling of A by 128/n, equalled the measurement less one by algebra; it is "
        "now a layer whose inputs do not grow. Random networks alone cannot decide a statement "
        "about fine-tuning: part b has pre-trained models of five widths from one family"
    ),
    predict=_predict,
    parts=(
        Part(
            "a",
            "random networks",
            Threshold("within", (0.5, 1.5), SLOPE),
            _measure,
            _negative_control,
            _passing_control,
            "random network",
        ),
        Part(
            "b",
            "pre-trained models of one family",
            Threshold("within", (0.5, 1.5), f"{SLOPE}, encoders of one family"),
            _family,
            _growing_rank,
            _growing_rank_scaled,
            "real fine-tuning",
        ),
    ),
    runs=_runs,
)
