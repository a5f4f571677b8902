"""Claim 14: LoRA's B wants a larger step than A, by a ratio that grows with the width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

WIDTHS = (64, 128, 256, 512, 1024)
SEEDS = tuple(range(10, 16))


def _predict() -> dict[str, Any]:
    """A step of A moves its n inputs' sum by Θ(n), one of B by Θ(1): ratio Θ(n), slope 1."""
    return {"slope": 1.0}


def _slope(*, scaled: bool) -> tuple[float, tuple[float, float], dict[str, Any]]:
    from deltacontrol.experiments.measures.lora_widths import WidthStudy, slope_interval

    study = WidthStudy(scaled=scaled)
    ratios, least, edges = [], {}, 0
    for width in WIDTHS:
        found = [study.losses(width, seed) for seed in SEEDS]
        ratios.append([study.best_ratio(losses) for losses in found])
        least[f"width {width}"] = max(float(losses.min()) for losses in found)
        for losses in found:
            i, j = divmod(int(losses.argmin()), losses.shape[1])
            edges += i in (0, losses.shape[0] - 1) or j in (0, losses.shape[1] - 1)
    slope, low, high = slope_interval(WIDTHS, ratios)
    details = {
        "log2 of the best ratio": {
            f"width {w}": [round(r, 2) for r in row] for w, row in zip(WIDTHS, ratios, strict=True)
        },
        "loss after / before, worst seed": least,
        "best rates at the edge of the grid": edges,
    }
    return slope, (low, high), details


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Two-layer networks of widths 64 to 1024, Adam, a grid of both rates, six seeds."""
    slope, spread, details = _slope(scaled=False)
    return Evidence(
        value=slope,
        spread=spread,
        details=details | {"predicted slope": prediction["slope"]},
        note=(
            "networks with frozen Gaussian weights, rank 4, 64 examples, 60 steps, rates over a "
            "grid of factors of two; spread: 90 % bootstrap interval over six seeds"
        ),
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """A = (128/n) A': the effect of a step of A' no longer grows with the width."""
    slope, spread, details = _slope(scaled=True)
    return Evidence(
        value=slope,
        spread=spread,
        details=details | {"predicted slope without the scaling": prediction["slope"]},
        note="the same networks with A scaled by 128/n, which takes the width out of A's steps",
    )


CLAIM = Claim(
    id=14,
    name="lora-step-ratio",
    title="LoRA's B wants a larger step than A, more so in wide networks",
    statement=(
        "the ratio of the best step sizes of B and A under Adam grows in proportion to the width n"
    ),
    source="Hayou, Ghosh & Yu, ICML 2024, theorem 1",
    notebook="14_lora_step_ratio",
    threshold=Threshold("within", (0.5, 1.5), "slope of log best step ratio on log width"),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
