"""Claim 16: random subspaces succeed from the dimension that the spectrum predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Records, Threshold

# Fixed before the measurement.
ERROR = 0.2  # relative, of the predicted dimension against the measured median
LEAST = 8.0  # predicted dimensions below are not judged: an error of order one always remains


def _runs() -> list[Any]:
    """The study behind the figure."""
    from deltacontrol.experiments.studies.threshold import grid as threshold

    return threshold.experiments("paper")


def _cases(records: Records) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Record and comparison, by name."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for record in map(records, _runs()):
        config = record.config
        if record.kind == "quadratic-threshold":
            where = f"eigenvalues i^-{config['exponent']:g}"
        else:
            where = f"{config['rows']} rows of {config['task']}, {'+'.join(config['deltas'])}"
        for case in record.result["cases"]:
            name = f"{case['kind']}, {where}, target {case['target']:g}, seed {config['seed']}"
            if name in found:
                raise AssertionError(f"two comparisons are called {name}")
            found[name] = (record, case)
    return found


def _predict(records: Records) -> dict[str, Any]:
    """d* of every case: by Lanczos, or from the tangent kernel of the initial model."""
    return {name: case["predicted"] for name, (_, case) in _cases(records).items()}


def _isotropic(record: Any, case: Mapping[str, Any]) -> float:
    """d* if all curved directions were alike: rank times the share of the largest fall."""
    result, config = record.result, record.config
    if case["kind"] == "quadratic":
        return config["size"] * case["target"]
    start, least = result["start"], result["least"]
    return result["rank"] * (1 - case["target"]) * start / (start - least)


def _moves(record: Any) -> list[float]:
    return [float(move) for move in record.result["displacement"]]


def _judged(records: Records, predicted: Callable[[Any, Mapping[str, Any]], float]) -> Evidence:
    import math

    worst: dict[str, list[float]] = {}
    details: dict[str, Any] = {}
    for name, (record, case) in _cases(records).items():
        d = predicted(record, case)
        measured = math.inf if case["measured"] is None else case["measured"]
        text = f"predicted {d:.4g} (width {case['width']:.3g}), measured {measured:.4g}"
        high = math.inf if case["high"] is None else case["high"]
        text += f" in [{case['low'] or math.inf:.4g}, {high:.4g}]"
        if case["kind"] == "fine-tuned" and measured == record.config["dimensions"][0]:
            text += ", the least dimension that was trained"
        if "cone" in case:
            text += f"; with the cross-entropy itself {case['cone']:.4g} ± {case['cone_error']:.2g}"
        details[name] = text
        if case["predicted"] < LEAST:
            details[name] += " (too small to be judged)"
            continue
        kind = case["kind"]
        if kind == "fine-tuned":
            kind += f" {'+'.join(record.config['deltas'])}"
        worst.setdefault(kind, []).append(abs(d / measured - 1))
    for record in map(records, _runs()):
        if record.config.get("dimensions"):
            name = f"change of a parameter at the optimum, {'+'.join(record.config['deltas'])}"
            details[name] = (
                "predicted root mean square for targets "
                f"{record.config['targets']}: {[float(f'{x:.3g}') for x in _moves(record)]}, of "
                f"the parameters themselves {record.result['parameters']:.3g}"
            )
    value = max(max(errors) for errors in worst.values())
    summary = {f"errors, {kind}": sorted(errors) for kind, errors in worst.items()}
    everything = [e for errors in worst.values() for e in errors]
    return Evidence(
        value=value, details=summary | details, spread=(min(everything), max(everything))
    )


def _measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Exact solves, and L-BFGS in subspaces of the controls of the real model."""
    from dataclasses import replace

    found = _judged(records, lambda _, case: case["predicted"])
    return replace(
        found,
        note=(
            "quadratic losses of 400 dimensions and the Gauss-Newton model of MiniLM-L3 on 128 "
            "rows, 200 subspaces each; MiniLM-L3 itself on 48 rows of movie, subspaces over the "
            "parameters of head, BitFit, LoRA and all blocks, 4 a dimension, L-BFGS; a target "
            "that no dimension reached counts as an error of 1; spread over the cases"
        ),
    )


def _negative_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The spectrum ignored: all curved directions alike."""
    import math
    from dataclasses import replace
    from statistics import median

    apart: dict[str, list[float]] = {}
    for record, case in _cases(records).values():
        if case["predicted"] >= LEAST:
            ratio = abs(math.log(_isotropic(record, case) / case["predicted"]))
            apart.setdefault(case["kind"], []).append(ratio)
    told = ", ".join(f"{math.exp(median(logs)):.3g} ({kind})" for kind, logs in apart.items())
    return replace(
        _judged(records, _isotropic),
        note=(
            f"d* = rank × share of the largest fall, which is the prediction times or over {told} "
            f"in median: kinds where that is within {1 + ERROR:g} do not tell the two apart"
        ),
    )


CLAIM = Claim(
    id=16,
    name="subspace-threshold",
    title="Random subspaces succeed from the dimension that the spectrum predicts",
    statement=(
        "half of the random subspaces θ₀ + Pz reach a target loss at d* = Σ λ_i/(λ_i + κ), κ such "
        "that ½ g'(H + κI)⁻¹g is the fall, for a quadratic loss with Hessian H; for a model with "
        "its Gauss-Newton matrix at θ₀, and for its real fine-tuning in subspaces as well"
    ),
    source="Larsen, Fort, Becker & Ganguli, ICLR 2022, theorem 3.1, section 3.3",
    notebook="16_subspace_threshold",
    threshold=Threshold(
        "<=", ERROR, "largest relative error of d*, over quadratic, linearised and fine-tuned"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    runs=_runs,
)
