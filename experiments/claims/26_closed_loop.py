"""Claim 26: projecting hidden states onto clean subspaces restores accuracy under an attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Records, Threshold

SEEDS = (0, 1, 2)
LEAST_LOST = 0.1  # an attack that costs less accuracy than this leaves nothing to restore
MOST_CLEAN_LOSS = 0.01


def _predict(records: Records) -> dict[str, Any]:
    """What the sources report and the scoreboard asks for, before anything is measured."""
    return {"recovered_at_least": 0.25, "clean_loss_at_most": MOST_CLEAN_LOSS, "seeds": SEEDS}


def _runs() -> list[Any]:
    """One classifier, calibration, choice and measurement for each seed."""
    from deltacontrol.experiments.measures.robustness import Robustness

    return [Robustness(seed=seed) for seed in SEEDS]


def _results(records: Records) -> list[dict[str, Any]]:
    found = [records(experiment) for experiment in _runs()]
    return [{**record.result, "curve": record.curve()} for record in found]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(results: list[dict[str, Any]], corrected: str) -> tuple[float, float]:
    """95 % interval of the mean recovered share: seeds and test examples drawn again, 2000 times.

    The examples of a seed are drawn together for all conditions, which are paired.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    columns = [r["curve"][["clean", "attacked", corrected]].to_numpy(float) for r in results]
    drawn = []
    for _ in range(2000):
        shares = []
        for seed in generator.integers(len(columns), size=len(columns)):
            table = columns[seed]
            clean, attacked, after = table[generator.integers(len(table), size=len(table))].mean(0)
            shares.append((after - attacked) / (clean - attacked))
        drawn.append(np.mean(shares))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _evidence(records: Records, kind: str, recovered: str, note: str) -> Evidence:
    """The mean recovered share of a kind of correction; 0 where it costs too much clean accuracy.

    Accuracy that is bought with clean accuracy does not count as restored.
    """
    results = _results(records)
    corrected, clean = f"attacked_{kind}", f"clean_{kind}"
    accuracies = [r["accuracy"] for r in results]
    lost = [a["clean"] - a["attacked"] for a in accuracies]
    clean_loss = _mean([a["clean"] - a[clean] for a in accuracies])
    details = {
        "recovered_by_seed": [r[recovered] for r in results],
        "clean_loss": clean_loss,
        "lost_by_seed": lost,
        "choice": [r["choice" if kind == "corrected" else "choice_random"] for r in results],
        **{name: _mean([a[name] for a in accuracies]) for name in accuracies[0]},
    }
    affordable = clean_loss <= MOST_CLEAN_LOSS
    if not affordable:
        note += f"; it costs {100 * clean_loss:.1f} points of clean accuracy, so nothing counts"
    return Evidence(
        value=_mean(details["recovered_by_seed"]) if affordable else 0.0,
        details=details,
        assumption_met=min(lost) >= LEAST_LOST,
        note=note,
        spread=_interval(results, corrected) if affordable else None,
    )


def _measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The correction chosen on validation examples, on test examples, three trainings."""
    evidence = _evidence(
        records,
        "corrected",
        "recovered",
        "MiniLM-L6 with LoRA on movie, an adversary who does not know the correction",
    )
    more = ("recovered_adaptive", "recovered_same_random", "recovered_typos", "outside")
    results = _results(records)
    extra = {name: [r[name] for r in results] for name in (*more, "relative_time")}
    known = _mean(extra["recovered_adaptive"])
    note = f"{evidence.note}; against one who does, {known:.2f} is restored"
    return replace(evidence, details={**evidence.details, **extra}, note=note)


def _negative_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Random subspaces around the same means; rank and gain chosen by the same procedure."""
    return _evidence(
        records, "random", "recovered_random", "random subspaces, chosen in the same way"
    )


CLAIM = Claim(
    id=26,
    name="closed-loop",
    title="Projection at test time restores accuracy",
    statement=(
        "correcting hidden states towards the principal subspaces of clean ones restores at least "
        "a quarter of the accuracy that an attack on the embeddings cost, for at most one point of "
        "clean accuracy; the adversary does not know the correction"
    ),
    source=(
        "Chen, Li & Zhang, ICLR 2021 and JMLR 23(319), 2022; Yang & Liu, ICLR 2022; Chen et al., "
        "TMLR 2024"
    ),
    notebook="26_closed_loop",
    threshold=Threshold(">=", 0.25, "share of the lost accuracy that is restored, mean of 3 seeds"),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    runs=_runs,
)
