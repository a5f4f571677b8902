"""Seven methods on encoders of one recipe that differ in size alone, on six tasks of six corpora.

The models are those of `deltacontrol pretrain`. Three of the methods choose which parameters are
trained, and not equally many: the last block, the attention, and a random twentieth. Every method
has a rate of its own at every size, searched on validation rows
(`deltacontrol.experiments.studies.scale.rates`).

Sources: Ding et al., Nature Machine Intelligence 5, 2023, "The power of scale"; Su et al.,
*Exploring the impact of model scaling on parameter-efficient tuning*, EMNLP 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.experiments.models.family import SIZES, Member
from deltacontrol.experiments.studies.combination.grid import TASKS
from deltacontrol.experiments.studies.learning_rates.of_study import StudyRates
from deltacontrol.experiments.training.finetune import FineTuning

DELTAS = (
    *("full", "lora", "houlsby", "prefix"),
    *("last-layers", "selected-modules", "random-mask:density=0.05"),
)
SEEDS = 2
STEPS, BATCH = 80, 8
LENGTH = 24  # tokens of a text; a pair has two
ROWS, LOOKS = 300, 10


def models(preset: str) -> list[str]:
    """Names of the encoders, the smallest first; at quick two that need no pre-training here."""
    if preset == "quick":
        return ["minilm-l3", "minilm-l6"]
    return [Member("encoder", width).name for width in SIZES]


def key(model: str, delta: str) -> str:
    """Name of a searched rate."""
    return f"{model}/{delta}"


def _key(config: Mapping[str, Any]) -> str:
    return key(config["model"], config["deltas"][0]["name"])


RATES = StudyRates("scale", _key)


def training(model: str, task: str, delta: str, rate: float | None, **more: Any) -> FineTuning:
    """One run of the study; without a rate, at the method's default."""
    given: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": BATCH,
        "max_length": LENGTH * (2 if TASKS[task] == "pair" else 1),
        "train_limit": STEPS * BATCH,
        "eval_limit": ROWS,
        "eval_every": STEPS // LOOKS,
        "precision": "fp32",
    }
    return FineTuning(model=model, task=task, deltas=(delta,), learning_rate=rate, **(given | more))


def experiments(preset: str) -> list[FineTuning]:
    """Models × tasks × methods × seeds; at quick two models, one task and a few steps.

    Raises:
        InputError: the rates of the grid "paper" are not searched.
    """
    sizes, names = models(preset), [delta.partition(":")[0] for delta in DELTAS]
    if preset == "quick":
        rates: Mapping[str, float] = RATES.recorded()
        tasks, seeds = ("bbc",), 1
        short: dict[str, Any] = {"steps": 6, "eval_every": 3, "eval_limit": 40}
    else:
        rates = RATES.known(key(model, name) for model in sizes for name in names)
        tasks, seeds, short = tuple(TASKS), SEEDS, {}
    return [
        training(model, task, delta, rates.get(key(model, name)), seed=seed, **short)
        for model in sizes
        for task in tasks
        for delta, name in zip(DELTAS, names, strict=True)
        for seed in range(seeds)
    ]
