"""d90: dimensions that tasks need, by model, start and method; and the first such measurement.

The dimension is that of 90 % of full fine-tuning. A random start is held against the pre-trained
model's full fine-tuning, and against its own where guessing does not reach that. For the networks
of digits there is the absolute rule besides, 90 % of all images.
"""

from __future__ import annotations

from typing import Any, get_args

from experiments.dimension import DimensionSearch, FineTuningDimension
from experiments.mnist import MnistDimension, Net

TASKS = ("movie", "trec6", "amazon", "tweets")
SMALL, LARGE = "minilm-l3", "minilm-l6"
# Short trainings on short texts: the steps of a subspace cost the same for any batch.
TRAINING: dict[str, Any] = {"steps": 40, "batch_size": 32, "max_length": 32, "eval_limit": 500}
SEARCH: dict[str, Any] = {"largest": 100_000, "budget": 10}


def experiments(preset: str) -> list[DimensionSearch]:
    """The searches, each with all of its trainings."""
    if preset == "quick":
        short = TRAINING | {"steps": 10, "eval_limit": 100}
        bound: dict[str, Any] = {"largest": 10_000, "budget": 4, "baseline_seeds": 2}
        return [
            FineTuningDimension(model=SMALL, task="trec6", **short, **bound),
            MnistDimension(net="lenet", budget=4, steps=60),
        ]
    return [*digits(), *pretrained(SMALL), *random_start(SMALL), *pretrained(LARGE)]


def digits() -> list[MnistDimension]:
    """Both networks under both rules."""
    return [
        MnistDimension(net=net, target=target) for net in get_args(Net) for target in (None, 0.9)
    ]


def pretrained(model: str, methods: tuple[str, ...] = ("said", "did")) -> list[FineTuningDimension]:
    """Every task, from the pre-trained model."""
    return [_search(model, task, method) for method in methods for task in TASKS]


def random_start(model: str) -> list[FineTuningDimension]:
    """Every task from random weights, against the pre-trained model's full fine-tuning."""
    return [
        _search(model, task, "said", pretrained=False, baseline="pretrained", start=100_000)
        for task in TASKS
    ]


def _search(model: str, task: str, method: Any, **options: Any) -> FineTuningDimension:
    return FineTuningDimension(
        model=model, task=task, method=method, **TRAINING, **SEARCH, **options
    )
