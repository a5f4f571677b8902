"""The learning rate of every subset, searched on validation rows of two tasks, by model and form.

    python -m deltacontrol.experiments.studies.combination.rates --workers 1

runs what is recorded neither in the folder ``runs`` nor with the package, and prints the rates;
``--publish``, from a clean checkout, commits them. How one is chosen stands in
`deltacontrol.experiments.studies.learning_rates.of_study`.
"""

from __future__ import annotations

from deltacontrol.experiments.studies.combination.grid import FORMS, RATES, subsets, training
from deltacontrol.experiments.training.finetune import FineTuning

TASKS = ("movie", "bbc")
TRIED = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def experiments() -> list[FineTuning]:
    """The whole search: tasks × subsets × rates, and the same of heads and templates."""
    return [
        training(task, subset, rate, form, evaluate_on="validation")
        for form in (None, *FORMS)
        for task in TASKS
        for subset in (subsets()[1:] if form else subsets())
        for rate in TRIED
    ]


if __name__ == "__main__":
    RATES.command(experiments, __doc__)
