"""d90: dimensions that tasks need, by model, start and method; and the first such measurement.

The dimension is that of 90 % of full fine-tuning; a random start is held against that of the
pre-trained model. The networks of digits have the absolute rule besides, 90 % of all images.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from deltacontrol.experiments.studies.d90.dimension import DimensionSearch
from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
from deltacontrol.experiments.studies.d90.mnist import MnistDimension, Net
from deltacontrol.experiments.training.pretraining.experiment import Pretraining

TASKS = ("movie", "trec6", "amazon", "nyt")
SMALL, LARGE, WIDE = "minilm-l3", "minilm-l6", "mpnet-base"
# Short trainings on short texts: the steps of a subspace cost the same for any batch.
TRAINING: dict[str, Any] = {"steps": 60, "batch_size": 32, "max_length": 32, "eval_limit": 500}
LARGEST = 100_000
SEARCH: dict[str, Any] = {"largest": LARGEST, "budget": 16, "baseline_seeds": 4}
Method = Literal["said", "did"]
PRETRAINED = {
    (SMALL, "said"): TASKS,
    (SMALL, "did"): TASKS,
    (LARGE, "said"): TASKS,
    (WIDE, "said"): TASKS[:1],  # a training in its 109 million dimensions takes minutes
}
RANDOM = {SMALL: TASKS, LARGE: TASKS}
# Models of one recipe of pre-training, on tasks of five corpora that leave room above guessing.
WIDTHS = (48, 80, 128, 192)
FAMILY_TASKS = ("trec6", "bbc", "r8", "20ng", "intensity")
FAMILY: dict[str, Any] = (
    TRAINING | {"batch_size": 16} | SEARCH | {"budget": 20, "baseline_seeds": 8}
)


def experiments(preset: str) -> list[DimensionSearch]:
    """The searches, each with all of its trainings."""
    if preset == "quick":
        short = TRAINING | {"steps": 10, "eval_limit": 100}
        bound: dict[str, Any] = {"largest": 10_000, "budget": 4, "baseline_seeds": 2}
        return [
            FineTuningDimension(model=SMALL, task="trec6", **short, **bound),
            MnistDimension(net="lenet", budget=4, steps=60),
        ]
    return [
        *digits(),
        *(
            s
            for model in (SMALL, LARGE, WIDE)
            for method in ("said", "did")
            for s in starts(model, method)
        ),
    ]


def digits() -> list[MnistDimension]:
    """Both networks under both rules."""
    return [
        MnistDimension(net=net, target=target) for net in get_args(Net) for target in (None, 0.9)
    ]


def starts(model: str, method: Method) -> list[FineTuningDimension]:
    """Tasks from the pre-trained model and, by one method, from random weights.

    What random weights do not reach with the greatest dimension by one method, they are not asked
    to by the other.
    """
    found = [_search(model, task, method) for task in PRETRAINED.get((model, method), ())]
    if method == "said":
        found += [
            _search(model, task, method, pretrained=False, baseline="pretrained", start=LARGEST)
            for task in RANDOM.get(model, ())
        ]
    return found


def own() -> list[FineTuningDimension]:
    """From random weights, held to full fine-tuning from the same start: what is to be had there.

    Of their trainings only those of the baseline are not in the searches above.
    """
    return [_search(SMALL, task, "said", pretrained=False, start=LARGEST) for task in RANDOM[SMALL]]


def sizes(task: str, *, own: bool = False) -> list[FineTuningDimension]:
    """Encoders of one recipe of pre-training, from the smallest to the largest.

    All are held to the full fine-tuning of the smallest, or each to its ``own``.
    """
    models = [f"family/encoder-{width}" for width in WIDTHS]
    return [
        FineTuningDimension(
            model=model,
            task=task,
            baseline_model="" if own or model == models[0] else models[0],
            **FAMILY,
        )
        for model in models
    ]


def pretraining() -> list[Pretraining]:
    """That of these encoders."""
    return [Pretraining(family="encoder", width=width) for width in WIDTHS]


def _search(model: str, task: str, method: Method, **options: Any) -> FineTuningDimension:
    return FineTuningDimension(
        model=model, task=task, method=method, **TRAINING, **SEARCH, **options
    )
