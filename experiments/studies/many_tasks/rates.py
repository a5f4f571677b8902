"""The learning rate of every method for every category of tasks, searched on validation rows.

Two tasks of a category are drawn by a seed, of two corpora where there are, among those with enough
validation rows to tell rates apart; `deltacontrol.experiments.studies.learning_rates.of_study` says
which rate is chosen.

    python -m deltacontrol.experiments.studies.many_tasks.rates --workers 1

runs what is recorded neither in the folder ``runs`` nor with the package, and prints the rates.
With ``--publish``, from a clean checkout, it puts the records into ``experiments/records/rates``
and the rates beside them, from which the grid takes its own.
"""

from __future__ import annotations

import numpy as np

from deltacontrol.experiments.studies.many_tasks.grid import (
    DELTAS,
    MODEL,
    RATES,
    Question,
    questions,
    training,
)
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.rates import default_rate

TASKS_EACH = 2
FACTORS = (1 / 3, 1.0, 3.0)  # of the method's own rate for this model
OWN = "movie"  # the task of which that rate is
LEAST_ROWS = 100  # of validation
ROWS = 300
SEED = 20230302


def searched() -> dict[str, tuple[Question, ...]]:
    """The tasks that each category's rates are searched on."""
    generator = np.random.default_rng(SEED)
    found = {}
    for category in dict.fromkeys(q.category for q in questions().values()):
        own = [q for q in questions().values() if q.category == category]
        own = [q for q in own if q.validation >= LEAST_ROWS] or own
        order = [own[i] for i in generator.permutation(len(own))]
        others = [q for q in order if q.corpus != order[0].corpus]
        rest = [q for q in order[1:] if q not in others]
        found[category] = tuple([order[0], *others, *rest][:TASKS_EACH])
    return found


def rates_of(delta: str) -> tuple[float, ...]:
    """What is tried: around the rate of the recorded search for this model, rising."""
    own = default_rate(MODEL, OWN, ({"name": delta},)).value
    return tuple(float(f"{factor * own:.3g}") for factor in FACTORS)


def experiments() -> list[FineTuning]:
    """The whole search: categories × tasks × methods × rates."""
    return [
        training(question.name, delta, rate, eval_limit=ROWS, evaluate_on="validation")
        for chosen in searched().values()
        for question in chosen
        for delta in DELTAS
        for rate in rates_of(delta)
    ]


if __name__ == "__main__":
    RATES.command(experiments, __doc__)
