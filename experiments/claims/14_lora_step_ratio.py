"""Claim 14: LoRA's B wants a larger step than A, by a ratio that grows with the width."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

WIDTHS = (64, 128, 256, 512)
SEEDS = tuple(range(20, 28))  # fresh: 10 to 15 were judged before
FIXED = 128  # entries of the layer's input in the control
FITTED = 0.05  # of the best loss over that at the start
EDGES = 0.1  # share of the best pairs of rates that may lie at the edge of the grid


def _predict() -> dict[str, Any]:
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


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Two-layer networks, Adam, a grid of both rates."""
    note = (
        "networks with frozen Gaussian weights, rank 4, 64 examples, 60 steps, rates over a grid "
        "of factors of two"
    )
    return _slopes(prediction, note, 1.0, 0)


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The layer's outputs grow with the width, its inputs do not."""
    note = f"{FIXED} inputs of the layer at every width, so that a step of A has the same effect"
    return _slopes(prediction, note, 1.0, FIXED)


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """The layer's inputs differ in number from its outputs, but grow with them."""
    return _slopes(prediction, "half as many inputs of the layer as outputs, growing", 0.5, 0)


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
        "now a layer whose inputs do not grow. A decision needs pre-trained models of at least "
        "four widths from one family, which are not there"
    ),
    threshold=Threshold(
        "within", (0.5, 1.5), "slope of log best step ratio on log width, over the predicted one"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    passing_control=_passing_control,
    on="random network",
)
