"""Claim 39: what is computed at a method's start foretells which method does best.

The trainings are those of the study of many tasks, and were not looked at when this was written;
how scores are combined and judged stands in
`deltacontrol.experiments.studies.foretelling.judgement`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Records, Threshold

if TYPE_CHECKING:
    import pandas as pd

# Fixed before the measurement.
CORRELATION, REGRET, COST = 0.8, 1.0, 0.1
LEAST_TASKS, LEAST_CORPORA = 40, 4
DRAW_SEED = 0  # of scores that are drawn by lot


def _runs() -> list[Any]:
    """The predictions, and the trainings that they foretold."""
    from deltacontrol.experiments.studies.foretelling import grid
    from deltacontrol.experiments.studies.many_tasks import grid as many_tasks

    tasks = {question.name for question in grid.foretold()}
    trainings = [run for run in many_tasks.experiments("paper") if run.task in tasks]
    return [*grid.experiments("paper"), *trainings]


def _table(records: Records) -> pd.DataFrame:
    from deltacontrol.experiments.studies.foretelling import judgement
    from deltacontrol.experiments.studies.foretelling.measurement import Foretelling

    runs = _runs()
    known = {
        (run.task, run.deltas[0]["name"]): judgement.Outcome.of(records(run))
        for run in runs
        if not isinstance(run, Foretelling)
    }
    return judgement.table([records(r) for r in runs if isinstance(r, Foretelling)], known)


def _judged(table: pd.DataFrame, predictor: str, what: str, note: str = "") -> Evidence:
    """A number of a predictor, with an interval over corpora."""
    from dataclasses import replace

    from deltacontrol.experiments.studies.foretelling import judgement

    found = judgement.judge(table, predictor)[what]
    tasks, corpora = table["task"].nunique(), table["corpus"].nunique()
    enough = f"{LEAST_TASKS} tasks or more of {LEAST_CORPORA} corpora or more"
    return replace(
        found,
        details={"tasks": tasks, "corpora": corpora},
        assumptions={enough: tasks >= LEAST_TASKS and corpora >= LEAST_CORPORA},
        note=note or f"{predictor}, tasks of corpora that it has not learnt from",
    )


def _with(table: pd.DataFrame, scores: Mapping[tuple[str, str], float]) -> pd.DataFrame:
    """The combination's scores replaced."""
    from deltacontrol.experiments.studies.foretelling.judgement import COMBINATION

    own = table[table["predictor"] == COMBINATION]
    keys = zip(own["task"], own["method"], strict=True)
    return own.assign(score=[scores[key] for key in keys])


def _by_lot(table: pd.DataFrame) -> pd.DataFrame:
    """Scores that are drawn by lot."""
    import numpy as np

    random = np.random.default_rng(DRAW_SEED)
    keys = list(zip(table["task"], table["method"], strict=True))
    return _with(table, {key: float(random.normal()) for key in dict.fromkeys(keys)})


def _by_outcome(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """Scores that are what came, of which nobody knows beforehand."""
    sign = -1.0 if what == "points" else 1.0
    rows = table.drop_duplicates(["task", "method"])
    keys = zip(rows["task"], rows["method"], strict=True)
    return _with(table, dict(zip(keys, sign * rows[what], strict=True)))


def _baselines(table: pd.DataFrame) -> list[str]:
    from deltacontrol.experiments.studies.foretelling.judgement import kind, predictors

    return [name for name in predictors(table) if kind(name) in ("baseline", "learnt")]


def _ahead(table: pd.DataFrame, own: pd.DataFrame | None = None, note: str = "") -> Evidence:
    """The combination's correlation less that of the best baseline, paired over corpora.

    The best is chosen by the same tasks, which favours the baseline.
    """
    from dataclasses import replace

    import pandas as pd

    from deltacontrol.experiments.studies.foretelling import judgement

    others = {name: judgement.judge(table, name) for name in _baselines(table)}
    best = max(others, key=lambda name: others[name]["correlation"].value)
    if own is not None:
        table = pd.concat([own, table[table["predictor"] != judgement.COMBINATION]])
    return replace(
        judgement.between(table, judgement.COMBINATION, best),
        details={name: judged["correlation"].value for name, judged in others.items()},
        note=note or f"the best of {len(others)} baselines is {best}",
    )


def _cost(table: pd.DataFrame, predictor: str, note: str = "") -> Evidence:
    """Forward passes of all scores over those of training every method."""
    from deltacontrol.experiments.predicting.calibration import over_corpora

    own = table[table["predictor"] == predictor].groupby("task")
    shares = own["cost"].sum() / own["cost_of_training"].sum()
    corpora = own["corpus"].first()
    found = over_corpora(shares.tolist(), corpora.loc[shares.index].tolist())
    return Evidence(found.value, found.interval, note=note or predictor)


CLAIM = Claim(
    id=39,
    name="predictions",
    title="What is computed before training foretells which method does best",
    statement=(
        "a ridge regression of what follows from a method's start (the linearised training, "
        "curvature, the condition of the kernel, effective dimension, control energy, the spectrum "
        "of the gradient, critical sharpness, the number of parameters), fitted on other corpora, "
        f"orders methods with a rank correlation of {CORRELATION:g} or more (a), better than every "
        f"baseline (b), gives away at most {REGRET:g} point of accuracy (c), and costs at most a "
        "tenth of training all methods (d)"
    ),
    source="this project: `deltacontrol predict`",
    notebook="39_predictions",
    predict=lambda records: {},
    runs=_runs,
    parts=(
        Part(
            name="a",
            title="The order is foretold",
            threshold=Threshold(">=", CORRELATION, "mean rank correlation of scores and losses"),
            measure=lambda prediction, records: _judged(
                _table(records), "combination", "correlation"
            ),
            negative_control=lambda prediction, records: _judged(
                _by_lot(_table(records)), "combination", "correlation", "scores drawn by lot"
            ),
            passing_control=lambda prediction, records: _judged(
                _by_outcome(_table(records), "loss"), "combination", "correlation", "the outcome"
            ),
            on="real fine-tuning",
        ),
        Part(
            name="b",
            title="Better than every baseline",
            threshold=Threshold(">", 0.0, "mean difference of rank correlations to the best one"),
            measure=lambda prediction, records: _ahead(_table(records)),
            negative_control=lambda prediction, records: _ahead(
                table := _table(records), _by_lot(table), "scores drawn by lot"
            ),
            passing_control=lambda prediction, records: _ahead(
                table := _table(records), _by_outcome(table, "loss"), "the outcome"
            ),
            on="real fine-tuning",
        ),
        Part(
            name="c",
            title="Little accuracy is given away",
            threshold=Threshold("<=", REGRET, "mean points lost by the method with the best score"),
            measure=lambda prediction, records: _judged(_table(records), "combination", "regret"),
            negative_control=lambda prediction, records: _judged(
                _by_lot(_table(records)), "combination", "regret", "scores drawn by lot"
            ),
            passing_control=lambda prediction, records: _judged(
                _by_outcome(_table(records), "points"), "combination", "regret", "the outcome"
            ),
            on="real fine-tuning",
        ),
        Part(
            name="d",
            title="At a tenth of the cost",
            threshold=Threshold("<=", COST, "forward passes over those of training all methods"),
            measure=lambda prediction, records: _cost(_table(records), "combination"),
            negative_control=lambda prediction, records: _cost(
                _table(records), "probe", "short trainings of every method"
            ),
            passing_control=lambda prediction, records: _cost(
                _table(records), "parameters", "counting parameters"
            ),
            on="real fine-tuning",
        ),
    ),
)
