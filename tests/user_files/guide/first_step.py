"""The cosine between the first gradient step and the final update foretells accuracy.

cos = <-g, u_T - u_0> / (|g| |u_T - u_0|),   g = the gradient of the loss of 64 rows at u_0
"""

from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run_all
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.claims import Claim, Evidence, Threshold

DELTAS = "lora lora:rank=1 bitfit houlsby pfeiffer layer-norm ia3 prefix vera full".split()
SEEDS, ROWS = range(2), range(64)
SETTING = {"model": "minilm-l3", "task": "trec6", "steps": 100, "max_length": 32}


def cosine(training, record):
    start = training.setting(dtype="float64").control_problem(ROWS)
    u0, end = start.initial_controls(), record.control_problem(ROWS).initial_controls()
    g = np.concatenate([x.numpy().ravel() for x in start.gradient(u0)])
    update = np.concatenate([(b - a).numpy().ravel() for a, b in zip(u0, end, strict=True)])
    return -(g @ update) / np.linalg.norm(g) / np.linalg.norm(update)


def measured():
    """Mean cosine and accuracy of each delta; what is recorded is not trained again."""
    trainings = [FineTuning(deltas=(d,), seed=s, **SETTING) for d in DELTAS for s in SEEDS]
    records = run_all(trainings, RunStore(Path("runs")))
    cosines = [cosine(*pair) for pair in zip(trainings, records, strict=True)]
    scores = [record.result["accuracy"] for record in records]
    return np.reshape([cosines, scores], (2, len(DELTAS), len(SEEDS))).mean(axis=2)


def correlation(x, y):
    """Spearman's, of ranks; NaN where all of one side are equal."""
    a, b = (rankdata(side) - (len(side) + 1) / 2 for side in (x, y))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else np.nan


def shuffled(x, y, swaps):
    """The broken link: so many pairs of accuracies change places, in forty ways."""
    random, found = np.random.default_rng(0), []
    for _ in range(40):
        z = np.array(y, float)
        for i, j in random.integers(0, len(z), (swaps, 2)):
            z[[i, j]] = z[[j, i]]
        found.append(correlation(x, z))
    return Evidence.mean(found, "shuffle")


CLAIM = Claim(
    id=912,
    name="first-step",
    title="The first step foretells accuracy",
    statement="over delta methods, the rank correlation of that cosine and accuracy is 0.5 or more",
    source="the guide",
    on="real fine-tuning",
    threshold=Threshold(">=", 0.5, "Spearman's correlation of cosine and accuracy"),
    predict=lambda: {"sign": 1},
    measure=lambda _: Evidence.resampled(correlation, measured(), "delta"),
    negative_control=lambda _: shuffled(*measured(), swaps=1000),
    # Made numbers in one order, of which one pair changes places: that must pass.
    passing_control=lambda _: shuffled(range(20), range(20), swaps=1),
)
