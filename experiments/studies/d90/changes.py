"""Changes of d90 from one model to another, over tasks: draws, bounds and an interval.

A change is Σ w log10 d90 over the searches of a task: weights -1 and 1 give a log10 ratio, those of
least squares the slope of a line.

A number of dimensions is known from bootstrap draws over the trainings of its search; one beyond
the dimensions that were searched is a bound only. A change is therefore taken twice, with the
bounds on either side, which go in by the signs of the weights: the interval reaches from the lower
end of the lesser change to the upper end of the greater one. Tasks are drawn again as well: they
are the unit of replication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Evidence

if TYPE_CHECKING:
    import numpy as np

    from deltacontrol.experiments.runs.record import Record

MOST = 2e8  # more numbers than any of the packaged models has
DRAWS = 4000
UNKNOWN = 2000  # draws of a search that trained at no dimension
RATIO = (-1.0, 1.0)  # the weights of a log10 ratio

Searches = tuple["Record", ...]  # of one task


def draws_of(
    record: Record, rule: Record | None = None, seed: int = 0, most: float = MOST
) -> tuple[np.ndarray, ...]:
    """Bootstrap draws of d90, with what is a bound only at its lesser end, and at its greater end.

    "Less than the smallest dimension" lies between one and that, "more than the largest" between
    that and all of the model's numbers, ``most``; where nothing was trained, as guessing reaches
    the target, d90 may be anything. The target is that of the record, or of another one; the draws
    of two records, and those of two seeds, are independent.
    """
    import numpy as np

    from deltacontrol.experiments.studies.d90.dimension import estimate_from
    from deltacontrol.theory.dimension.estimate import Baseline

    config, result = record.config, record.result
    if not result["dimensions"]:
        return np.full(UNKNOWN, 1.0), np.full(UNKNOWN, most)
    found = estimate_from(
        record.curve(),
        Baseline(tuple((rule or record).result["baseline"]), config["share"]),
        chance=result["chance"],
        confidence=result["confidence"],
        seed=int(record.id, 16) % 2**32 + seed,
    )
    smallest, largest = found.dimensions[0], found.dimensions[-1]
    draws = np.array(found.draws or (found.dimension,))
    return tuple(
        np.where(draws <= 0, low, np.where(np.isinf(draws), high, draws))
        for low, high in ((1.0, largest), (smallest, most))
    )


def weighted(
    searches: Searches,
    weights: Sequence[float],
    *,
    common: bool = False,
    seed: int = 0,
    most: Sequence[float] = (),
) -> tuple[np.ndarray, ...]:
    """Draws of Σ w log10 d90, with bounds for the claim, and against it.

    With ``common`` all are held to the target of the first. ``most`` has the number of parameters
    of each model; without it the number is `MOST`.
    """
    import numpy as np

    rule = searches[0] if common else None
    draws = [
        draws_of(search, rule, seed if i else 0, most[i] if most else MOST)
        for i, search in enumerate(searches)
    ]
    size = min(len(low) for low, _ in draws)
    logs = [tuple(np.log10(bound[:size]) for bound in bounds) for bounds in draws]
    return tuple(
        sum(w * of[side if w > 0 else 1 - side] for w, of in zip(weights, logs, strict=True))
        for side in (0, 1)
    )


def over_tasks(
    pairs: Mapping[str, Searches],
    *,
    weights: Sequence[float] = RATIO,
    called: str = "log10 ratio",
    common: bool = False,
    seed: int = 0,
    most: Sequence[float] = (),
    **more: Any,
) -> Evidence:
    """Mean over tasks of the weighted sum: tasks are drawn again, and of each a draw of its sum.

    The value has bounds on the side against the claim.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    tasks = random.integers(0, len(pairs), (DRAWS, len(pairs)))
    places = random.random((DRAWS, len(pairs)))
    means, values = [], []
    found = [
        weighted(pair, weights, common=common, seed=seed, most=most) for pair in pairs.values()
    ]
    for ratios in zip(*found, strict=True):
        drawn = [
            [ratios[t][int(x * len(ratios[t]))] for t, x in zip(row, column, strict=True)]
            for row, column in zip(tasks, places, strict=True)
        ]
        means.append(np.sort(np.mean(drawn, axis=1)))
        values.append([float(np.median(r)) for r in ratios])
    half = DRAWS // 2
    by_task = {
        task: f"{' to '.join(s.result['text'] for s in searches)}, {called} {low:.3f}"
        + ("" if low == high else f" to {high:.3f}")
        for (task, searches), low, high in zip(pairs.items(), *values, strict=True)
    }
    return Evidence.of_draws(
        float(np.mean(values[1])),
        np.concatenate([means[0][:half], means[1][half:]]),
        "task",
        len(pairs),
        details={"by task, d90 as searched": by_task, **more.pop("details", {})},
        **more,
    )
