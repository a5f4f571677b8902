"""The learning rate of every method at every size, searched on validation rows of two tasks.

    python -m deltacontrol.experiments.studies.scale.rates --workers 1

runs what is recorded neither in the folder ``runs`` nor with the package, and prints the rates;
``--publish``, from a clean checkout, commits them. How one is chosen stands in
`deltacontrol.experiments.studies.learning_rates.of_study`.
"""

from __future__ import annotations

from deltacontrol.experiments.studies.scale.grid import DELTAS, RATES, models, training
from deltacontrol.experiments.training.finetune import FineTuning

TASKS = ("movie", "bbc")
TRIED = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PREFIX_TRIED = (3e-3, 1e-2, 3e-2, 1e-1)


def experiments() -> list[FineTuning]:
    """The whole search: models × tasks × methods × rates."""
    return [
        training(model, task, delta, rate, evaluate_on="validation", eval_every=None)
        for model in models("paper")
        for task in TASKS
        for delta in DELTAS
        for rate in (PREFIX_TRIED if delta == "prefix" else TRIED)
    ]


if __name__ == "__main__":
    RATES.command(experiments, __doc__)
