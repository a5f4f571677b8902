"""What predictions are worth, once the trainings that they foretold are done, in one table.

Of every task there are a predictor's scores of the methods, and what these reached: the loss on
test rows, of which the rank correlation is, and 100 × accuracy, of which regret and hits are. Means
are over corpora, of each the mean over its tasks, and intervals draw corpora. What learns from
tasks (the combination, the nearest task, the mean order) learns from the other half of the corpora.

The combination is a ridge regression of the rank of a method's loss within its task on the ranks of
its scores, all standardised within the task, by the predictors that follow from the method's start
and by the number of its parameters. The mean order is the mean of these ranks of a method's losses:
always the same order, but a learnt one. The fit of the head, which all methods share, is in none
of the costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltacontrol.experiments.predicting.calibration import (
    Foretold,
    calibrate,
    octaves,
    over_corpora,
    rank_correlation,
    split_by_corpus,
)
from deltacontrol.experiments.studies.many_tasks.grid import RATES, key, questions
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import Evidence

if TYPE_CHECKING:
    import pandas as pd

    from deltacontrol.experiments.runs.record import Record

THEORY = (
    *("linearised", "curvature", "kernel-condition", "effective-dimension", "control-energy"),
    *("gradient-spectrum", "critical-sharpness"),
)
COMBINATION, NEAREST, MEAN_ORDER = "combination", "nearest task", "mean order"
LEARNT = (COMBINATION, NEAREST, MEAN_ORDER)
SHARE, FOLD_SEED, RIDGE = 0.5, 0, 1.0

Outcomes = Mapping[tuple[str, str], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a training of the study reached.

    Attributes:
        loss: on test rows; NaN after a divergence.
        points: 100 × accuracy; that of the majority class after a divergence.
    """

    loss: float
    points: float

    @classmethod
    def of(cls, record: Record) -> Outcome:
        """From the record of a classification."""
        loss, accuracy = (record.result[name] for name in ("loss", "accuracy"))
        share = record.result["majority_share"] if accuracy is None else accuracy
        return cls(float("nan") if loss is None else float(loss), 100 * float(share))


def table(records: Sequence[Record], known: Outcomes) -> pd.DataFrame:
    """One row per task, predictor and method: score, loss, points, cost and rate.

    Args:
        records: of the predictions.
        known: what came of each task and method.

    Raises:
        InputError: a training that was foretold is lacking.
    """
    import pandas as pd

    rows, rates = [], RATES.recorded()
    for record in records:
        task = str(record.config["task"])
        result, question = record.result, questions()[task]
        for predictor, scores in result["scores"].items():
            for name, score in scores.items():
                if (task, name) not in known:
                    raise InputError(f"the study of many tasks has no run of {name} on {task}")
                came, rate = known[task, name], result["rates"][name][0]
                rows.append(
                    {
                        "task": task,
                        "corpus": question.corpus,
                        "category": question.category,
                        "predictor": predictor.partition(":")[0],
                        "method": name,
                        "score": _number(score),
                        "loss": came.loss,
                        "points": came.points,
                        "cost": _number(result["costs"][predictor][name]),
                        "cost_of_training": result["cost_of_training"],
                        "rate": _number(rate),
                        "searched_rate": rates.get(key(question.category, name), np.nan),
                        "model": record.config["model"],
                        "rows": record.config["rows"],
                        "run": record.id,
                    }
                )
    frame = pd.concat([pd.DataFrame(rows), _learnt(pd.DataFrame(rows), records)])
    order = {name: place for place, name in enumerate(predictors(frame))}
    places = {task: place for place, task in enumerate(questions())}
    methods = {name: place for place, name in enumerate(sorted(set(frame["method"])))}
    return frame.sort_values(
        ["predictor", "task", "method"],
        key=lambda c: c.map({"predictor": order, "task": places, "method": methods}[str(c.name)]),
    ).reset_index(drop=True)


def judge(table: pd.DataFrame, predictor: str) -> dict[str, Evidence]:
    """Correlation with losses; regret and hits in points, against the best of all methods."""
    own = table[table["predictor"] == predictor]
    losses = calibrate(_foretold(own, lambda row: row["loss"]))
    points = calibrate(_foretold(own, lambda row: -row["points"], silent_last=True))
    return {
        "correlation": losses.correlation,
        "regret": points.regret,
        "top 1": points.top_one,
        "top 3": points.top_three,
    }


def between(table: pd.DataFrame, one: str, other: str) -> Evidence:
    """Mean difference of the rank correlations of two predictors, over the same tasks."""
    found = {}
    for name in (one, other):
        own = table[table["predictor"] == name]
        found[name] = {
            task.task: (task.corpus, rank_correlation(*task.pairs))
            for task in _foretold(own, lambda row: row["loss"])
        }
    shared = [task for task in found[one] if task in found[other]]
    values = [found[one][task][1] - found[other][task][1] for task in shared]
    return over_corpora(values, [found[one][task][0] for task in shared])


def best(judged: Mapping[str, Mapping[str, Evidence]], *kinds: str) -> str:
    """The predictor of these kinds with the largest mean rank correlation."""
    names = [name for name in judged if kind(name) in kinds]
    return max(names, key=lambda name: judged[name]["correlation"].value)


def cost_share(table: pd.DataFrame, predictor: str) -> float:
    """Cost of the scores over that of training every method, mean over tasks."""
    own = table[table["predictor"] == predictor].groupby("task")
    return float((own["cost"].sum() / own["cost_of_training"].sum()).mean())


def rate_error(table: pd.DataFrame) -> Evidence:
    """Mean size of the error of a predicted rate in octaves, over methods."""
    rows = rates(table)
    errors = [abs(octaves(r["rate"], r["searched_rate"])) for _, r in rows.iterrows()]
    return over_corpora(errors, rows["corpus"].tolist())


def _learnt(frame: pd.DataFrame, records: Sequence[Record]) -> pd.DataFrame:
    """Scores of what learns from tasks, every task judged by the half without its corpus."""
    import pandas as pd

    tasks = list(dict.fromkeys(frame["task"]))
    corpora = [questions()[task].corpus for task in tasks]
    one, other = split_by_corpus(corpora, SHARE, seed=FOLD_SEED)
    features = {str(r.config["task"]): r.result["features"] for r in records}
    parts = []
    for learn, held in ((one, other), (other, one)):
        known = frame[frame["task"].isin([tasks[i] for i in learn])]
        new = frame[frame["task"].isin([tasks[i] for i in held])]
        for name, score, cost in (
            (COMBINATION, _combined(known, new), _theory_cost(new)),
            (MEAN_ORDER, _mean_order(known, new), 0.0),
            (NEAREST, _nearest(known, new, features), 0.0),
        ):
            base = _one_row_each(new)
            parts.append(base.assign(predictor=name, score=score.loc[base.index], cost=cost))
    return pd.concat(parts)


def _one_row_each(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a task and method, under both."""
    rows = frame.drop_duplicates(["task", "method"])
    return rows.set_index(["task", "method"], drop=False).rename_axis([None, None])


def _standardised(wide: pd.DataFrame) -> pd.DataFrame:
    """Within each task less its mean, over its standard deviation; nothing said is the mean."""
    ranks = wide.groupby(level="task").rank()
    groups = ranks.groupby(level="task")
    centred = (ranks - groups.transform("mean")) / groups.transform("std").replace(0, np.nan)
    return centred.fillna(0.0)


def _inputs(frame: pd.DataFrame) -> pd.DataFrame:
    own = frame[frame["predictor"].isin([*THEORY, "parameters"])]
    wide = own.pivot(index=["task", "method"], columns="predictor", values="score")
    return _standardised(wide)


def _targets(frame: pd.DataFrame) -> pd.Series:
    rows = frame.drop_duplicates(["task", "method"]).set_index(["task", "method"])
    return _standardised(rows[["loss"]])["loss"]


def _combined(known: pd.DataFrame, new: pd.DataFrame) -> pd.Series:
    import pandas as pd
    from sklearn.linear_model import Ridge

    x, y = _inputs(known), _targets(known)
    fitted = Ridge(alpha=RIDGE).fit(x.to_numpy(), y.loc[x.index].to_numpy())
    z = _inputs(new)[x.columns]
    return pd.Series(fitted.predict(z.to_numpy()), z.index)


def _mean_order(known: pd.DataFrame, new: pd.DataFrame) -> pd.Series:
    import pandas as pd

    means = _targets(known).groupby(level="method").mean()
    index = _one_row_each(new).index
    return pd.Series([float(means[name]) for _, name in index], index)


def _nearest(
    known: pd.DataFrame, new: pd.DataFrame, features: Mapping[str, Sequence[float]]
) -> pd.Series:
    import pandas as pd

    names = list(dict.fromkeys(known["task"]))
    points = np.array([features[name] for name in names], dtype=float)
    spread = points.std(0)
    spread[spread == 0] = 1.0
    targets, index = _targets(known), _one_row_each(new).index
    values = []
    for task, name in index:
        distance = (((points - np.array(features[task])) / spread) ** 2).sum(1)
        values.append(float(targets[names[int(distance.argmin())], name]))
    return pd.Series(values, index)


def _theory_cost(new: pd.DataFrame) -> float:
    """One linearisation and the passes of what is not part of it, per method."""
    own = new[new["predictor"].isin(["linearised", "gradient-spectrum", "critical-sharpness"])]
    return float(own.groupby(["task", "method"])["cost"].sum().mean())


def _foretold(
    own: pd.DataFrame, loss: Callable[[Any], float], *, silent_last: bool = False
) -> list[Foretold]:
    """The tasks; a method without a score is left out, or stands behind all others."""
    found = []
    for task, rows in own.groupby("task", sort=False):
        scores = dict(zip(rows["method"], rows["score"], strict=True))
        if silent_last:
            scores = {m: np.inf if np.isnan(score) else score for m, score in scores.items()}
        losses = {row["method"]: float(loss(row)) for _, row in rows.iterrows()}
        told = [m for m in scores if not np.isnan(scores[m]) and not np.isnan(losses[m])]
        if len(told) > 1:
            found.append(Foretold(str(task), str(rows["corpus"].iloc[0]), scores, losses))
    return found


def predictors(table: pd.DataFrame) -> list[str]:
    """Theory first, then what is learnt, then the baselines."""
    present = list(dict.fromkeys(table["predictor"]))
    order = [*THEORY, *LEARNT]
    return [n for n in order if n in present] + sorted(n for n in present if n not in order)


def kind(predictor: str) -> str:
    """Theory (from a method's start), learnt (from tasks alone) or baseline."""
    if predictor in (*THEORY, COMBINATION):
        return "theory"
    return "learnt" if predictor in LEARNT else "baseline"


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """A row a task and method of which there are a predicted and a searched rate."""
    rows = table[table["predictor"] == "linearised"]
    return rows[(rows["rate"] > 0) & (rows["searched_rate"] > 0)]


def spoken(table: pd.DataFrame, predictor: str) -> int:
    """Of how many methods it says something, the median over tasks."""
    own = table[table["predictor"] == predictor]
    return int(own.groupby("task")["score"].count().median())


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
