"""Claim 17: a fine-tuning in few dimensions has a bound on its test error that says something.

A bound over chance has no interval: it is a number that follows from one training and its rows, and
that is right with probability 0.99 for each of them. What the claim says is said of every run that
was made, so the worst of them is judged; that other seeds do the same is not said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Records, Threshold

SMALL = "subspace:dimension=50,of=selected-modules:sites=bert.pooler+classifier"
# Task, seeds, and what differs from the defaults of the experiment: a part each.
SETTINGS: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("trec6", (0, 1, 2), {}),
    ("movie", (0, 1), {}),
    ("sms", (0,), {"delta": SMALL, "learning_rate": 1.0}),
)
CONTROL = ("trec6", (0, 1))
BOUNDS = ("compression", "pac_bayes")
ROWS, CASES = 4000, 8  # of the exact problems of the passing controls


def _experiments(
    setting: tuple[str, tuple[int, ...], dict[str, Any]], random_labels: bool = False
) -> list[Any]:
    """One a seed."""
    from deltacontrol.experiments.measures.bounds import GeneralisationBound

    task, seeds, options = setting
    return [
        GeneralisationBound(task=task, seed=seed, random_labels=random_labels, **options)
        for seed in seeds
    ]


def _dealt_out() -> list[Any]:
    return _experiments((*CONTROL, {}), random_labels=True)


def _runs() -> list[Any]:
    """Every bound, then those of random labels."""
    return [*(e for setting in SETTINGS for e in _experiments(setting)), *_dealt_out()]


def _results(records: Records, experiments: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Results by task and seed."""
    return {f"{e.task}, seed {e.seed}": records(e).result for e in experiments}


def _predict(records: Records) -> dict[str, Any]:
    """A bound that reaches chance says nothing; chance is known without training."""
    return {}


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: result[name] for name in ("chance", "train_error", "test_error", "num_rows")}
    for kind in BOUNDS:
        found = result[kind]
        row[kind] = {
            "bound": found["bound"],
            "bound over chance": found["bound"] / result["chance"],
            "nats": found["nats"],
            "train error of what is bounded": found["train_error"],
            "test error of what is bounded": found["test_error"],
        }
    return row


# -- a, b, c: a bound below chance ----------------------------------------------------------------


def _over_chance(results: Mapping[str, Any], **more: Any) -> Evidence:
    """The compression bound over chance, of every run."""
    ratios = {name: r["compression"]["bound"] / r["chance"] for name, r in results.items()}
    rows = {f"{name}, in full": _row(r) for name, r in results.items()}
    return Evidence.worst(ratios, details=rows, **more)


def _below_chance(part: int) -> Callable[..., Evidence]:
    """The measurement of one task."""

    def measure(prediction: Mapping[str, Any], records: Records) -> Evidence:
        """The worst seed's bound over chance."""
        return _over_chance(
            _results(records, _experiments(SETTINGS[part])),
            note=(
                "MiniLM-L3, a random subspace of the last block, pooler and head (sms: pooler and "
                "head), all training rows; each bound holds with probability 0.99 and pays for "
                "10,000 settings"
            ),
        )

    return measure


def _random_labels(part: int) -> Callable[..., Evidence]:
    """The control of one task."""

    def control(prediction: Mapping[str, Any], records: Records) -> Evidence:
        """Labels dealt out at random: whatever fits them must not be promised to generalise.

        They were trained on trec6 alone, and what another task would give is not known.
        """
        if SETTINGS[part][0] != CONTROL[0]:
            return Evidence(math.nan, note="no training with random labels is recorded")
        note = "the same rows with random labels; the seed that comes closest"
        return _over_chance(_results(records, _dealt_out()), least=True, note=note)

    return control


def _thresholds(share: float) -> float:
    """Bound over chance of the best of 202 thresholds, of whose labels a share is dealt out.

    The label of a number x in [0, 1] is whether x > 0.5. The classes are those of ``x > k/100`` and
    their opposites, all equally likely beforehand.
    """
    import numpy as np

    from deltacontrol.theory.bounds import countable_class_bound

    ratios = []
    for seed in range(CASES):
        random = np.random.default_rng(seed)
        x = random.random(ROWS)
        labels = x > 0.5
        dealt = random.permutation(ROWS)[: round(share * ROWS)]
        labels[dealt] = labels[random.permutation(dealt)]
        errors = [float(np.mean((x > k / 100) != labels)) for k in range(101)]
        error = min(*errors, *(1 - e for e in errors))
        bound = countable_class_bound(error, math.log(202), ROWS, 0.01)
        ratios.append(bound / min(labels.mean(), 1 - labels.mean()))
    return float(max(ratios))


def _few_dealt_out(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """A tenth of the labels dealt out, where a threshold on a line gives them."""
    note = "thresholds on a line, a tenth of the labels dealt out; the worst draw"
    return Evidence(_thresholds(0.1), cases=CASES, note=note)


# -- d: no bound below its test error -------------------------------------------------------------


def _kept(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Test error over bound of everything that is bounded, on the test rows that there are."""
    results = _results(records, [e for setting in SETTINGS for e in _experiments(setting)])
    found = {
        f"{name}, {kind}": r[kind]["test_error"] / r[kind]["bound"]
        for name, r in results.items()
        for kind in BOUNDS
    }
    return Evidence.worst(found, note="every task, seed and bound")


def _unpaid(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """As if the classifier had been fixed before the rows were seen: its choice costs nothing."""
    from deltacontrol.theory.bounds import countable_class_bound

    results = _results(records, [e for setting in SETTINGS for e in _experiments(setting)])
    found = {
        name: r["compression"]["test_error"]
        / countable_class_bound(r["compression"]["train_error"], 0.0, r["num_rows"], 0.01)
        for name, r in results.items()
    }
    return Evidence.worst(found, note="compression bounds with a code of no length")


def _fixed_before(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The same bound of classifiers that were fixed before, whose error is known."""
    import numpy as np

    from deltacontrol.theory.bounds import countable_class_bound

    error = 0.3
    seen = [np.random.default_rng(seed).binomial(ROWS, error) / ROWS for seed in range(CASES)]
    found = {
        f"draw {i}": error / countable_class_bound(float(share), 0.0, ROWS, 0.01)
        for i, share in enumerate(seen)
    }
    return Evidence.worst(found, note=f"classifiers of error {error:g}, not chosen by the rows")


OVER_CHANCE = "compression bound over chance, worst seed"


def _part(number: int) -> Part:
    task = SETTINGS[number][0]
    return Part(
        "abc"[number],
        f"bound below chance, {task}",
        Threshold("<", 1.0, f"{OVER_CHANCE} of {task}"),
        _below_chance(number),
        _random_labels(number),
        _few_dealt_out,
        "real fine-tuning",
    )


CLAIM = Claim(
    id=17,
    name="generalisation-bound",
    title="A subspace of few dimensions gives a non-vacuous generalisation bound",
    statement=(
        "the compression bound of a subspace fine-tuning, its coefficients rounded and coded, is "
        "below chance on (a) trec6, (b) movie and (c) sms, and (d) no bound is below the test "
        "error of what it bounds"
    ),
    source="Lotfi et al., NeurIPS 2022; Arora et al., ICML 2018; Seeger, JMLR 2002",
    notebook="17_generalisation_bound",
    revised=(
        "the best of three tasks was judged, together with the test errors; every task is now a "
        "part. Random labels were trained on trec6 alone. With that control (b) held and (c) "
        "failed at the first judging; it is not theirs, so that they lack one"
    ),
    predict=_predict,
    parts=(
        *(_part(number) for number in range(3)),
        Part(
            "d",
            "no bound below its test error",
            Threshold("<", 1.0, "largest test error over bound"),
            _kept,
            _unpaid,
            _fixed_before,
            "real fine-tuning",
        ),
    ),
    runs=_runs,
)
