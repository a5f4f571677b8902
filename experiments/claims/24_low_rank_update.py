"""Claim 24: full fine-tuning's update has low stable rank, and its tail predicts LoRA's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Records, Threshold

# Fixed before the measurement; the judged number is the largest of measured / limit.
STABLE_RANK = 0.1  # mean over the modules of stable rank / that of a Gaussian matrix of the shape
CORRELATION = 0.9  # least Spearman of tail energy and LoRA's loss over the ranks
ERROR = 0.25  # relative error of the predicted gaps to full fine-tuning
SHUFFLES = 2000


def _runs() -> list[Any]:
    """The study behind the figure."""
    from deltacontrol.experiments.studies.spectra import grid as spectra

    return spectra.experiments("paper")


def _last(record: Any) -> list[dict[str, Any]]:
    return [row for row in record.result["modules"] if row["step"] == record.config["steps"]]


def _gaussian(shape: tuple[int, int]) -> tuple[float, list[float]]:
    """Stable rank and shares of the tail energy of a Gaussian matrix."""
    import torch

    from deltacontrol.theory.rank.low_rank import singular_values, stable_rank, tail_energy

    values = singular_values(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    tails = tail_energy(values)
    return stable_rank(values), (tails / tails[0]).tolist()


def _predict(records: Records) -> dict[str, Any]:
    """From the update alone: its stable ranks, and the share of its energy beyond each rank."""
    runs = {}
    updates = [records(experiment) for experiment in _runs()]
    gaussian = {tuple(row["shape"]): None for r in updates for row in _last(r)}
    found = {shape: _gaussian(shape) for shape in gaussian}
    for record in updates:
        modules, ranks = _last(record), [row["rank"] for row in record.result["ranks"]]
        energy = sum(m["norm"] ** 2 for m in modules)
        random = [
            sum(m["norm"] ** 2 * found[tuple(m["shape"])][1][r] for m in modules) / energy
            for r in ranks
        ]
        shares = [m["stable_rank"] / found[tuple(m["shape"])][0] for m in modules]
        runs[f"{record.config['task']}, seed {record.config['seed']}"] = {
            "ranks": ranks,
            "tail shares": [row["tail_share"] for row in record.result["ranks"]],
            "tail shares of Gaussian matrices": random,
            "stable rank over a Gaussian's": sum(shares) / len(shares),
            "stable ranks, least and largest": [
                min(m["stable_rank"] for m in modules),
                max(m["stable_rank"] for m in modules),
            ],
        }
    return runs


def _spearman(first: Any, second: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _judged(
    prediction: Mapping[str, Any], records: Records, tails: str, terms: set[str]
) -> tuple[float, dict]:
    """The largest of measured / limit over all runs and terms, and every number behind it."""
    import numpy as np

    random = np.random.default_rng(0)
    excess, details = {}, {}
    for record, (name, run) in zip(map(records, _runs()), prediction.items(), strict=True):
        losses = np.array([row["loss"] for row in record.result["ranks"]])
        ends = record.result["losses"]
        gaps = (losses - ends["full"]) / (ends["head"] - ends["full"])
        shares = np.array(run[tails])
        share = run["stable rank over a Gaussian's"]
        correlation = _spearman(shares, losses)
        error = float(np.linalg.norm(shares - gaps) / np.linalg.norm(gaps))
        shuffled = [_spearman(random.permutation(shares), losses) for _ in range(SHUFFLES)]
        cut = [row["truncated_loss"] for row in record.result["ranks"]]
        over = {
            "stable rank": share / STABLE_RANK,
            "order": (1 - correlation) / (1 - CORRELATION),
            "gaps": error / ERROR,
        }
        excess[name] = max(value for term, value in over.items() if term in terms)
        details[name] = {
            "stable rank over a Gaussian's": share,
            "Spearman of tail energy and LoRA's loss": correlation,
            "share of shuffled tails with a Spearman as high": float(
                np.mean(np.array(shuffled) >= correlation)
            ),
            "relative error of the gaps": error,
            "predicted gaps": shares.tolist(),
            "measured gaps": gaps.tolist(),
            "LoRA's losses": losses.tolist(),
            "Spearman of LoRA's losses and those of the truncated update": _spearman(cut, losses),
            "losses of head alone, full": [ends["head"], ends["full"]],
            "measured over limit": over,
            "best at the last rate that was tried": record.result["at_the_end"],
        }
    return max(excess.values()), {"largest of measured over limit": excess, **details}


def _measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """LoRA at ranks 1 to 64 on every linear map of the blocks, two tasks, two seeds."""
    value, details = _judged(prediction, records, "tail shares", {"stable rank", "order", "gaps"})
    values = details["largest of measured over limit"].values()
    return Evidence(
        value=value,
        details=details,
        spread=(min(values), max(values)),
        note=(
            "MiniLM-L3, 512 rows of movie and of trec6, 60 steps; gap = (loss - loss of full) / "
            "(loss of the head alone - loss of full), predicted as the share of the update's "
            "energy beyond the rank; each loss the least of several rates; spread over the runs"
        ),
    )


def _negative_control(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Gaussian matrices of the same shapes and norms in the place of the update."""
    value, details = _judged(prediction, records, "tail shares of Gaussian matrices", {"gaps"})
    return Evidence(
        value=value,
        details=details,
        note=(
            "spectra of Gaussian matrices of equal shapes and norms, judged by the gaps alone: the "
            "rank correlation has no power against them, as every tail falls with the rank, and is "
            "held against shuffled tails instead"
        ),
    )


CLAIM = Claim(
    id=24,
    name="low-rank-update",
    title="Full fine-tuning's update is nearly low-rank, and its tail predicts LoRA's loss",
    statement=(
        "the update of full fine-tuning has at most a tenth of the stable rank of a Gaussian "
        "matrix; LoRA's loss at rank r is ordered by the update's tail energy beyond r, and the "
        "share of the gain that it leaves is the tail's share of the energy"
    ),
    source="ours; Eckart & Young, Psychometrika 1936",
    notebook="24_low_rank_update",
    threshold=Threshold(
        "<=",
        1.0,
        f"largest of stable rank share / {STABLE_RANK:g}, (1 - Spearman) / "
        f"{1 - CORRELATION:.1g}, relative error / {ERROR:g}",
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    runs=_runs,
)
