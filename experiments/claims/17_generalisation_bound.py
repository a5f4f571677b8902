"""Claim 17: a fine-tuning in few dimensions has a bound on its test error that says something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Records, Threshold

SMALL = "subspace:dimension=50,of=selected-modules:sites=bert.pooler+classifier"
# Task, seeds, and what differs from the defaults of the experiment.
SETTINGS: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("trec6", (0, 1, 2), {}),
    ("movie", (0, 1), {}),
    ("sms", (0,), {"delta": SMALL, "learning_rate": 1.0}),
)
CONTROL = ("trec6", (0, 1))
BOUNDS = ("compression", "pac_bayes")


def _bounds(random_labels: bool) -> dict[str, list[Any]]:
    """The experiments by task, one a seed."""
    from deltacontrol.experiments.measures.bounds import GeneralisationBound

    return {
        task: [
            GeneralisationBound(task=task, seed=seed, random_labels=random_labels, **options)
            for seed in seeds
        ]
        for task, seeds, options in ([(*CONTROL, {})] if random_labels else SETTINGS)
    }


def _runs() -> list[Any]:
    """Every bound, then those of random labels."""
    return [e for dealt in (False, True) for seeds in _bounds(dealt).values() for e in seeds]


def _results(records: Records, random_labels: bool) -> dict[str, list[dict[str, Any]]]:
    """Results by task, one a seed."""
    found = _bounds(random_labels).items()
    return {task: [records(experiment).result for experiment in seeds] for task, seeds in found}


def _predict(records: Records) -> dict[str, Any]:
    """Chance is known without training; a bound below it is non-vacuous."""
    return {"bound over chance, below": 1.0}


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: result[name] for name in ("chance", "train_error", "test_error", "num_rows")}
    for kind in BOUNDS:
        found = result[kind]
        row[kind] = {
            "bound": found["bound"],
            "vacuous": found["bound"] >= result["chance"],
            "nats": found["nats"],
            "train error of what is bounded": found["train_error"],
            "test error of what is bounded": found["test_error"],
        }
    return row


def _evidence(results: Mapping[str, list[dict[str, Any]]], note: str) -> Evidence:
    """Of the best task, the worst seed's bound over chance; and no bound below its test error."""
    compression = {
        task: [r["compression"]["bound"] / r["chance"] for r in seeds]
        for task, seeds in results.items()
    }
    best = min(compression, key=lambda task: max(compression[task]))
    below = max(
        r[kind]["test_error"] / r[kind]["bound"]
        for seeds in results.values()
        for r in seeds
        for kind in BOUNDS
    )
    details: dict[str, Any] = {
        "compression bound over chance": compression,
        "PAC-Bayes bound over chance": {
            task: [r["pac_bayes"]["bound"] / r["chance"] for r in seeds]
            for task, seeds in results.items()
        },
        "largest test error over bound": below,
        "best task": best,
    }
    details |= {
        f"{task}, run {i}": _row(r) for task, seeds in results.items() for i, r in enumerate(seeds)
    }
    return Evidence(
        value=max(*compression[best], below),
        details=details,
        spread=(min(compression[best]), max(compression[best])),
        note=note,
    )


def _measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Three tasks; every bound beside chance and beside the test error of what it bounds."""
    return _evidence(
        _results(records, random_labels=False),
        "MiniLM-L3, a random subspace of the last block, pooler and head (sms: pooler and head), "
        "all training rows; each bound holds with probability 0.99 and pays for 10,000 settings; "
        "spread over the seeds of the best task",
    )


def _negative_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Labels dealt out at random: whatever fits them must not be promised to generalise."""
    dealt = _results(records, random_labels=True)
    return _evidence(dealt, "the same rows of trec6 with random labels")


CLAIM = Claim(
    id=17,
    name="generalisation-bound",
    title="A subspace of few dimensions gives a non-vacuous generalisation bound",
    statement=(
        "on a real task the compression bound of a subspace fine-tuning, its coefficients rounded "
        "and coded, is below chance, and no bound is below the test error of what it bounds"
    ),
    source="Lotfi et al., NeurIPS 2022; Arora et al., ICML 2018; Seeger, JMLR 2002",
    notebook="17_generalisation_bound",
    threshold=Threshold(
        "<", 1.0, "bound over chance, worst seed of the best task, or test error over bound"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    runs=_runs,
)
