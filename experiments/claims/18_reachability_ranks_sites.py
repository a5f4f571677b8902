"""Claim 18: Gramians at the start predict which layers and sites are worth tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Records, Threshold

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 2000


def _runs() -> list[Any]:
    """Gramians of the model and of one with random weights, and the tunings of every site."""
    from deltacontrol.experiments.studies.reachability import grid as reachability

    random = reachability.predictions(pretrained=False)
    return [*reachability.predictions(), *random, *reachability.measurements()]


def _scores(records: Records, pretrained: bool) -> dict[str, Any]:
    """For each (layer, site) the mean of every score over the seeds, and the judged one by seed."""
    from deltacontrol.experiments.studies.reachability import grid as reachability

    by_seed = []
    for record in map(records, reachability.predictions(pretrained=pretrained)):
        rows = [r for r in record.result["parts"] if r["layer"] is not None and r["site"]]
        by_seed.append(rows)
    names = [f"{row['layer']}/{row['site']}" for row in by_seed[0]]
    scores = {
        score: [sum(rows[i][score] for rows in by_seed) / len(by_seed) for i in range(len(names))]
        for score in ("predicted_gain", "predicted_loss_drop", "trace", "slope")
    }
    own = [[row["predicted_gain"] for row in rows] for rows in by_seed]
    return {"pairs": names, "scores": scores, "by_seed": own}


def _predict(records: Records) -> dict[str, Any]:
    """½ gᵀ(λI + W H)⁻¹ W g of every layer and site, from the untrained delta."""
    return _scores(records, pretrained=True)


def _gains(records: Records) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """Measured gains: their means over the seeds, and those of each seed."""
    import pandas as pd

    from deltacontrol.experiments.studies.reachability import grid as reachability

    curves = [records(tuning).curve() for tuning in reachability.measurements()]
    return pd.concat(curves).groupby(level=0).mean(numeric_only=True), curves


def _spearman(first: Any, second: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap over the pairs of layer and site."""
    import numpy as np

    a, b, random = np.asarray(first), np.asarray(second), np.random.default_rng(0)
    drawn = random.integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.nanpercentile([_spearman(a[i], b[i]) for i in drawn], [2.5, 97.5])
    return float(low), float(high)


def _evidence(prediction: Mapping[str, Any], records: Records, note: str) -> Evidence:
    gains, curves = _gains(records)
    names = [f"{row.layer}/{row.site}" for row in curves[0].itertuples()]
    if names != list(prediction["pairs"]):
        raise AssertionError("predictions and measurements are of different sites")
    scores = prediction["scores"]
    judged, measured = scores["predicted_gain"], gains["loss_drop"].tolist()
    details: dict[str, Any] = {
        "against training loss": {k: _spearman(v, measured) for k, v in scores.items()},
        "predicted gain against": {
            column: _spearman(judged, gains[column].tolist())
            for column in ("objective_drop", "test_loss_drop", "test_accuracy_gain")
        },
        "by seed": [
            _spearman(own, curve["loss_drop"].tolist())
            for own, curve in zip(prediction["by_seed"], curves, strict=True)
        ],
        "seeds against each other, measured": [
            _spearman(curves[i]["loss_drop"].tolist(), curves[i - 1]["loss_drop"].tolist())
            for i in range(len(curves))
        ],
        "pairs": len(names),
        "measured": dict(zip(names, measured, strict=True)),
        "test_accuracy_gain": dict(zip(names, gains["test_accuracy_gain"].tolist(), strict=True)),
    }
    for axis in (0, 1):
        # Layers summed over their sites, and sites summed over the layers.
        keys = [name.split("/")[axis] for name in names]
        groups = list(dict.fromkeys(keys))
        totals = [
            [sum(v for v, k in zip(values, keys, strict=True) if k == g) for g in groups]
            for values in (judged, measured)
        ]
        details[("layers", "sites")[axis] + " alone"] = _spearman(*totals)
    return Evidence(
        value=_spearman(judged, measured),
        details=details,
        spread=_interval(judged, measured),
        note=note,
    )


def _measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """LoRA tuned at one site of one layer alone, all of them, three seeds."""
    return _evidence(
        prediction,
        records,
        "MiniLM-L6, 48 snippets of movie a seed, 6 layers × 6 sites, 15 iterations of L-BFGS "
        "each; the spread is a bootstrap over the pairs",
    )


def _negative_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The Gramians of the same architecture with random weights, against the same tunings."""
    random = _scores(records, pretrained=False)
    return _evidence(random, records, "predicted from a backbone of random weights")


CLAIM = Claim(
    id=18,
    name="reachability-ranks-sites",
    title="The controllability Gramian ranks layers and sites",
    statement=(
        "½ gᵀ(λI + W H)⁻¹ W g, with the Gramian W of one layer's site at the untrained delta, "
        "ranks the fall of the training loss that tuning that site alone brings"
    ),
    source="this project; W: Kalman, Ho, Narendra 1963",
    notebook="18_reachability_ranks_sites",
    threshold=Threshold(
        ">=", 0.5, "Spearman correlation over (layer, site) of predicted and measured gain"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    runs=_runs,
)
