"""All subsets of adapter, BitFit and prompt tuning, and their sequences, on six tasks.

A subset is trained at once, on 640 rows (each seen once) and on 16 rows a class; the empty one
trains the head alone. A sequence trains one delta after another, each for all steps, the earlier
ones frozen, and is evaluated on validation rows at the end of every stage. A subset has one
learning rate, searched on validation rows of two of the tasks
(`deltacontrol.experiments.studies.combination.rates`), for both amounts of rows; a sequence takes
the rate of all three.

Beside it stand both with a head and with a template, on a model that has the head of a masked
language model: the largest but one of the family of `deltacontrol pretrain`. A template's words
take the place of the head, so that there every subset but the empty one is trained.

Source: Ding et al., Nature Machine Intelligence 5, 2023, "Combinations of delta-tuning methods".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

from deltacontrol.experiments.studies.learning_rates.of_study import StudyRates
from deltacontrol.experiments.training.finetune import FineTuning

MODEL = "minilm-l3"
PARTS = ("houlsby", "bitfit", "prompt")
NONE = "head"  # what is trained where no part is
# Task → what it asks. One task a corpus, so that the tasks are independent of each other.
TASKS = {
    "movie": "sentiment",
    "tweets": "sentiment",
    "trec50:is-HUM:ind": "question type",
    "bbc": "topic",
    "20ng:same-class": "pair",
    "r8:same-class": "pair",
}
IN_TURN = ("movie", "bbc", "r8:same-class")
# Task → sentence, and the word of each class, one token of the family's vocabulary.
FEELING = "{text} It was [MASK].", ("negative=bad", "positive=great")
SAME = "{text} The same? [MASK]. {text_pair}", ("different=no", "same=yes")
TEMPLATES = {
    "movie": FEELING,
    "tweets": FEELING,
    "bbc": (
        "{text} It is about [MASK].",
        ("business=business", "entertainment=music", "politics=government", "sports=game",
         "tech=computer"),
    ),
    "trec50:is-HUM:ind": ("{text} Who? [MASK].", ("other=no", "HUM:ind=yes")),
    "20ng:same-class": SAME,
    "r8:same-class": SAME,
}  # fmt: skip
FORMS = HEAD, TEMPLATE = "head", "template"
TEMPLATE_MODEL = "family/encoder-192"
SEEDS = 3
SHOTS = 16
STEPS, BATCH = 80, 8
LENGTH = 24  # tokens of a text; a pair has two
ROWS = 300  # that a result is measured on, at most


def subsets() -> list[tuple[str, ...]]:
    """All eight, the smallest first."""
    return [s for n in range(len(PARTS) + 1) for s in combinations(PARTS, n)]


def name(deltas: Sequence[str]) -> str:
    """Of a subset, such as ``houlsby+prompt``; its order does not matter."""
    return "+".join(part for part in PARTS if part in deltas) or NONE


def key(subset: Sequence[str], form: str | None = None) -> str:
    """Name of a searched rate; the form is given on the model of the templates."""
    return f"{form}/{name(subset)}" if form else name(subset)


def form_of(config: Mapping[str, Any]) -> str | None:
    """Head or template on the model of the templates, None on the other."""
    if config["model"] != TEMPLATE_MODEL:
        return None
    return TEMPLATE if config.get("template") else HEAD


def _key(config: Mapping[str, Any]) -> str:
    return key([delta["name"] for delta in config["deltas"]], form_of(config))


RATES = StudyRates("combination", _key)


def training(
    task: str, deltas: Sequence[str], rate: float | None, form: str | None = None, **more: Any
) -> FineTuning:
    """One run of the study; without a rate, at the default."""
    given: dict[str, Any] = {
        "model": TEMPLATE_MODEL if form else MODEL,
        "steps": STEPS,
        "batch_size": BATCH,
        "max_length": LENGTH * (2 if TASKS[task] == "pair" else 1),
        "eval_limit": ROWS,
        "precision": "fp32",
    }
    if "shots" not in more:
        given["train_limit"] = STEPS * BATCH
    if form == TEMPLATE:
        given["template"], given["verbaliser"] = TEMPLATES[task]
    return FineTuning(
        task=task, deltas=tuple(deltas) or (NONE,), learning_rate=rate, **(given | more)
    )


def experiments(preset: str) -> list[FineTuning]:
    """Subsets with all rows, with few, sequences, and templates beside heads.

    At quick there are no templates, whose model has to be pre-trained, and one task, one seed and a
    few steps.

    Raises:
        InputError: the rates of the grid "paper" are not searched.
    """
    if preset == "quick":
        rates: Mapping[str, float] = RATES.recorded()
        tasks, in_turn, orders, seeds = ("bbc",), ("bbc",), [PARTS], 1
        short: dict[str, Any] = {"steps": 8, "eval_limit": 60}
    else:
        wanted = [*map(key, subsets()), *(key(s, form) for form in FORMS for s in subsets()[1:])]
        rates = RATES.known(wanted)
        tasks, in_turn, seeds, short = tuple(TASKS), IN_TURN, SEEDS, {}
        orders = list(permutations(PARTS))
    few: dict[str, Any] = {"shots": SHOTS}
    forms = [] if preset == "quick" else FORMS
    return [
        *(
            training(task, subset, rates.get(name(subset)), seed=seed, **rows, **short)
            for rows in ({}, few)
            for task in tasks
            for subset in subsets()
            for seed in range(seeds)
        ),
        *(
            training(
                task, order, rates.get(name(order)), seed=seed, sequential=True,
                **short, eval_every=short.get("steps", STEPS),
            )
            for task in in_turn
            for order in orders
            for seed in range(seeds)
        ),
        *(
            training(task, subset, rates[key(subset, form)], form, seed=seed, **rows)
            for form in forms
            for rows in ({}, few)
            for task in TEMPLATES
            for subset in subsets()[1:]
            for seed in range(seeds)
        ),
    ]  # fmt: skip
