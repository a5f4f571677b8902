"""Claim 15: d90 falls with pre-training and with model size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Records, Threshold

if TYPE_CHECKING:
    import numpy as np

    from deltacontrol.experiments.runs.record import Record
    from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension

CONFIDENCE = 0.95
# Aghajanyan et al., table 1: (base, large) of BERT and RoBERTa by SAID on MRPC and QQP.
PUBLISHED_SIZES = ((1608, 1037), (8030, 1200), (896, 207), (896, 774))

Pair = tuple["Record", "Record"]


def _runs() -> list[FineTuningDimension]:
    """The searches of the study behind the figure, and those from random weights on their own."""
    from deltacontrol.experiments.studies.d90 import grid as d90

    models = (d90.SMALL, d90.LARGE, d90.WIDE)
    methods: tuple[d90.Method, ...] = ("said", "did")
    starts = [s for model in models for method in methods for s in d90.starts(model, method)]
    return [*starts, *d90.own()]


def _searches(
    records: Records, model: str, *, pretrained: bool, method: Any = "said"
) -> dict[str, Record]:
    """Records by task."""
    from deltacontrol.experiments.studies.d90 import grid as d90

    found = [s for s in d90.starts(model, method) if s.pretrained is pretrained]
    return {search.task: records(search) for search in found}


def _own(records: Records) -> dict[str, Record]:
    """Records by task of what is held to full fine-tuning from the same random weights."""
    from deltacontrol.experiments.studies.d90 import grid as d90

    return {search.task: records(search) for search in d90.own()}


def _pairs(before: dict[str, Record], after: dict[str, Record]) -> dict[str, Pair]:
    return {task: (before[task], after[task]) for task in before if task in after}


def _predict(records: Records) -> dict[str, Any]:
    """Both ratios are below one; the published sizes differ by this factor on average."""
    logs = [math.log10(large / base) for base, large in PUBLISHED_SIZES]
    return {"log10 ratio": 0.0, "published, base to large": sum(logs) / len(logs)}


def _draws(
    record: Record, *, before: bool, rule: Record | None = None, seed: int = 0
) -> np.ndarray:
    """Bootstrap draws of d90, on the side that makes the ratio larger where they are bounds.

    A draw beyond the searched dimensions is a bound only: as ``before``, "more than the largest"
    counts as the largest and "less than the smallest" as one; after, as infinite and the smallest.
    The target is that of the record, or of another one; the draws of two records, and those of two
    seeds, are independent.
    """
    import numpy as np

    from deltacontrol.experiments.studies.d90.dimension import estimate_from
    from deltacontrol.theory.dimension.estimate import Baseline

    config, result = record.config, record.result
    found = estimate_from(
        record.curve(),
        Baseline(tuple((rule or record).result["baseline"]), config["share"]),
        chance=result["chance"],
        confidence=result["confidence"],
        seed=int(record.id, 16) % 2**32 + seed,
    )
    smallest, largest = found.dimensions[0], found.dimensions[-1]
    draws = np.array(found.draws or (found.dimension,))
    draws = np.where(draws <= 0, 1.0 if before else smallest, draws)
    return np.where(np.isinf(draws), largest, draws) if before else draws


def _log_ratio(
    pairs: dict[str, Pair], *, common: bool = False, seed: int = 0
) -> tuple[float, tuple[float, float], dict[str, Any]]:
    """Mean over tasks of log10(d90 after / d90 before): median, interval, and each task's.

    With ``common`` both are held to the target of the first.
    """
    import numpy as np

    by_task, details = [], {}
    for task, (before, after) in pairs.items():
        rule = before if common else None
        first = _draws(before, before=True, rule=rule)
        second = _draws(after, before=False, rule=rule, seed=seed)
        size = min(len(first), len(second))
        by_task.append(np.log10(second[:size]) - np.log10(first[:size]))
        details[task] = f"{before.result['text']} to {after.result['text']}"
        if common:
            details[task] = f"{np.median(first):,.0f} to {np.median(second):,.0f}"
    size = min(map(len, by_task))
    mean = np.mean([draws[:size] for draws in by_task], axis=0)
    tails = [1 - CONFIDENCE, 0.5, CONFIDENCE]
    low, middle, high = np.quantile(mean, tails, method="inverted_cdf")
    return float(middle), (float(low), float(high)), details


def _effects(records: Records, method: str = "said") -> dict[str, dict[str, Pair]]:
    from deltacontrol.experiments.studies.d90 import grid as d90

    small = _searches(records, d90.SMALL, pretrained=True, method=method)
    large = _searches(records, d90.LARGE, pretrained=True, method=method)
    effects = {"size": _pairs(small, large)}
    if method == "said":
        random = _searches(records, d90.SMALL, pretrained=False)
        effects = {"pre-training": _pairs(random, small), **effects}
    return {name: pairs for name, pairs in effects.items() if pairs}


def _beside(records: Records) -> dict[str, dict[str, Pair]]:
    """What is told beside the judged effects: other rules, methods and models."""
    from deltacontrol.experiments.studies.d90 import grid as d90

    small, large, wide = (
        _searches(records, model, pretrained=True) for model in (d90.SMALL, d90.LARGE, d90.WIDE)
    )
    random = (_searches(records, model, pretrained=False) for model in (d90.SMALL, d90.LARGE))
    # Where full fine-tuning learns nothing, its share is reached by guessing.
    own = {task: r for task, r in _own(records).items() if r.result["dimensions"]}
    told = {f"{name} by DID": pairs for name, pairs in _effects(records, "did").items()}
    return told | {
        f"pre-training, each by its own full fine-tuning ({', '.join(own)})": _pairs(own, small),
        "size from random weights": _pairs(*random),
        "MPNet (12 layers, width 768) against MiniLM of 6": _pairs(large, wide),
    }


def _measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The upper ends of both mean log ratios; the greater one is judged."""
    details: dict[str, Any] = dict(prediction)
    upper, lower, met = {}, {}, True

    def tell(name: str, pairs: dict[str, Pair], **options: Any) -> tuple[float, float]:
        middle, (low, high), tasks = _log_ratio(pairs, **options)
        details[f"{name}, log10 ratio"] = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        details[f"{name}, by task"] = tasks
        return low, high

    effects = _effects(records)
    for name, pairs in effects.items():
        lower[name], upper[name] = tell(name, pairs)
        told = (record.result for pair in pairs.values() for record in pair)
        met &= all(result["target"] > result["chance"] for result in told)
    tell("size, both by the target of 3 layers", effects["size"], common=True)
    for name, pairs in _beside(records).items():
        if pairs:
            tell(name, pairs)
    reached, missed = [], []
    for task, record in _own(records).items():
        scores, goal = record.result["baseline"], effects["pre-training"][task][1].result["target"]
        details[f"full fine-tuning from random weights, {task}"] = (
            f"{_mean(scores):.3f}, target {goal:.3f}"
        )
        (reached if _mean(scores) >= goal else missed).append(task)
    worst = max(upper, key=lambda name: upper[name])
    return Evidence(
        value=upper[worst],
        spread=(lower[worst], upper[worst]),
        details=details,
        assumption_met=met,
        note=(
            f"{worst} decides. MiniLM of 3 layers by SAID, from pre-trained against random weights "
            "(which need at least the largest dimension that they were given), and of 6 against 3 "
            "layers, both pre-trained, each on data of its own; target: 90 % of the pre-trained "
            "model's full fine-tuning. In as many steps full fine-tuning from random weights "
            f"reaches it on {', '.join(reached) or 'none'} and misses it on "
            f"{', '.join(missed) or 'none'}, where no dimension can"
        ),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _negative_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Nothing differs: every search from pre-trained weights against itself."""
    from deltacontrol.experiments.studies.d90 import grid as d90

    pairs = {
        f"{model}, {task}": (record, record)
        for model in (d90.SMALL, d90.LARGE)
        for task, record in _searches(records, model, pretrained=True).items()
    }
    middle, (low, high), tasks = _log_ratio(pairs, seed=1)
    return Evidence(
        value=high,
        spread=(low, high),
        details={"log10 ratio": middle, "by search": tasks},
        note="every search against itself, by bootstrap draws of its own: nothing falls",
    )


CLAIM = Claim(
    id=15,
    name="d90-falls",
    title="d90 falls with pre-training and with model size",
    statement=(
        "the dimension of a random subspace in which a language model reaches 90 % of full "
        "fine-tuning is less from pre-trained than from random weights, and less in a larger "
        "pre-trained model, in geometric mean over tasks"
    ),
    source="Aghajanyan, Gupta & Zettlemoyer, ACL 2021, sections 4 and 5",
    notebook="15_d90_falls",
    threshold=Threshold(
        "<", 0.0, "95 % upper end of the mean log10 ratio of d90, the greater of both"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    runs=_runs,
)
