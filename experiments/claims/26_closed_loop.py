"""Claim 26: projecting hidden states onto clean subspaces restores accuracy under an attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Records, Threshold

if TYPE_CHECKING:
    import pandas as pd

SEEDS = (0, 1, 2)
LEAST_RESTORED = 0.25
LEAST_LOST = 0.1  # an attack that costs less accuracy than this leaves nothing to restore
MOST_CLEAN_LOSS = 0.01
WIDTH, RANK = 64, 16  # of the exact problem of the passing control

Means = Mapping[str, float]  # accuracies by condition


def _predict(records: Records) -> dict[str, Any]:
    """What the sources report and the scoreboard asks for, before anything is measured."""
    return {"recovered_at_least": LEAST_RESTORED, "clean_loss_at_most": MOST_CLEAN_LOSS}


def _runs() -> list[Any]:
    """One classifier, calibration, choice and measurement for each seed."""
    from deltacontrol.experiments.measures.robustness import Robustness

    return [Robustness(seed=seed) for seed in SEEDS]


def _tables(records: Records) -> list[pd.DataFrame]:
    """Of every seed, which test examples are right, one column for each condition."""
    return [records(experiment).curve().astype(float) for experiment in _runs()]


def _restored(after: str) -> Callable[[Means], float]:
    """The share of the lost accuracy that is there again in a condition."""
    return lambda a: (a[after] - a["attacked"]) / (a["clean"] - a["attacked"])


def _cost(after: str) -> Callable[[Means], float]:
    """Accuracy that the correction costs where nobody attacks."""
    return lambda a: a["clean"] - a[after]


def _evidence(
    tables: Sequence[pd.DataFrame],
    number: Callable[[Means], float],
    note: str,
    *,
    attacked: bool = True,
    details: Mapping[str, Any] | None = None,
) -> Evidence:
    """Mean over the seeds, with Student's interval: three are few, and it says so."""
    means = [_means(table) for table in tables]
    by_seed = [number(a) for a in means]
    lost = [a["clean"] - a["attacked"] for a in means]
    name = f"the attack costs {LEAST_LOST:g} or more of accuracy in every seed"
    return Evidence.mean(
        by_seed,
        "seed",
        note=note,
        assumptions={name: min(lost) >= LEAST_LOST} if attacked else {},
        details={
            "by seed": by_seed,
            "accuracy lost by seed": lost,
            "accuracies": {name: sum(a[name] for a in means) / len(means) for name in means[0]},
            **(details or {}),
        },
    )


def _means(table: pd.DataFrame) -> dict[str, float]:
    means = table.to_numpy().mean(0)
    return dict(zip(table.columns, means.tolist(), strict=True))


def _restores(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The correction chosen on validation examples, on test examples, three trainings."""
    results = [records(experiment).result for experiment in _runs()]
    more = ("recovered_same_random", "recovered_typos", "outside", "relative_time", "choice")
    return _evidence(
        _tables(records),
        _restored("attacked_corrected"),
        "MiniLM-L6 with LoRA on movie, an adversary who does not know the correction",
        details={name: [r[name] for r in results] for name in more},
    )


def _costs(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Accuracy on the same test examples without an attack, with and without the correction."""
    note = "the same correction where nobody attacks"
    return _evidence(_tables(records), _cost("clean_corrected"), note, attacked=False)


def _adaptive(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """The same correction against an attack by gradients through it."""
    note = "the adversary's gradients pass through the correction"
    return _evidence(_tables(records), _restored("adaptive_corrected"), note)


NOTE = "random subspaces around the same means, rank and gain chosen in the same way"


def _random_restores(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Not the subspaces of clean states: random ones, chosen by the same procedure."""
    return _evidence(_tables(records), _restored("attacked_random"), NOTE)


def _random_costs(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """What random subspaces cost where nobody attacks."""
    return _evidence(_tables(records), _cost("clean_random"), NOTE, attacked=False)


def _random_adaptive(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Random subspaces, against an adversary who does *not* know them: the milder attack.

    The records have no attack through random subspaces, which would hardly leave more.
    """
    note = NOTE + "; the adversary does not know them, which is the milder attack"
    return _evidence(_tables(records), _restored("attacked_random"), note)


def _made_tables() -> list[pd.DataFrame]:
    """An exact problem in which random subspaces do as well as any.

    The label is the sign of one direction q of the state, read wrongly by a model that is misled by
    long states: the answer turns round where |x| > 3. Clean states are ±2q; the attack adds a
    vector of length 4 across q. A projection on any subspace shortens what it is given, and keeps
    of ±2q a part that points the right way.
    """
    import pandas as pd
    import torch

    tables = []
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, random: Any = random) -> Any:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        basis = torch.linalg.qr(normal(WIDTH, RANK))[0]
        q = torch.nn.functional.normalize(normal(WIDTH), dim=0)
        labels = normal(256).sign()
        clean = 2 * labels[:, None] * q
        across = normal(256, WIDTH)
        across = across - (across @ q)[:, None] * q
        attacked = clean + 4 * torch.nn.functional.normalize(across, dim=1)

        def right(states: Any, q: Any = q, labels: Any = labels) -> Any:
            turned = torch.where(states.norm(dim=1) > 3, -1.0, 1.0)
            return ((states @ q).sign() * turned == labels).double().numpy()

        columns = {
            "clean": right(clean),
            "attacked": right(attacked),
            "clean_random": right(clean @ basis @ basis.mT),
            "attacked_random": right(attacked @ basis @ basis.mT),
        }
        tables.append(pd.DataFrame(columns))
    return tables


def _passing_restores(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Random subspaces where the model is misled by the length of the state alone."""
    note = f"random subspaces of rank {RANK} of {WIDTH}, a model misled by long states"
    return _evidence(_made_tables(), _restored("attacked_random"), note)


def _passing_costs(prediction: Mapping[str, Any], records: Records) -> Evidence:
    """Their cost there."""
    note = f"random subspaces of rank {RANK} of {WIDTH}, clean states on one line"
    return _evidence(_made_tables(), _cost("clean_random"), note, attacked=False)


RESTORED = "share of the lost accuracy that is restored, mean over seeds"

CLAIM = Claim(
    id=26,
    name="closed-loop",
    title="Projection at test time restores accuracy",
    statement=(
        "correcting hidden states towards the principal subspaces of clean ones (a) restores at "
        "least a quarter of the accuracy that an attack on the embeddings cost, by an adversary "
        "who does not know the correction, (b) costs at most one point of clean accuracy, and (c) "
        "restores a quarter against an adversary who knows it"
    ),
    source=(
        "Chen, Li & Zhang, ICLR 2021 and JMLR 23(319), 2022; Yang & Liu, ICLR 2022; Chen et al., "
        "TMLR 2024"
    ),
    notebook="26_closed_loop",
    revised=(
        "one row joined the restored share and its cost, the latter without an interval; the "
        "control was written as 0 where it costs clean accuracy, and the adversary who knows the "
        "correction was told beside it. A bootstrap of seeds and rows, tried first, gave (a) holds "
        "(0.39 [0.27, 0.49]), (b) inconclusive and (c) fails; over three seeds it is too narrow, "
        "and gave way to Student's interval. More seeds need new trainings"
    ),
    predict=_predict,
    parts=(
        Part(
            "a",
            "restored from an attack",
            Threshold(">=", LEAST_RESTORED, RESTORED),
            _restores,
            _random_restores,
            _passing_restores,
            "real fine-tuning",
        ),
        Part(
            "b",
            "clean accuracy lost",
            Threshold("<=", MOST_CLEAN_LOSS, "clean accuracy that it costs, mean over seeds"),
            _costs,
            _random_costs,
            _passing_costs,
            "real fine-tuning",
        ),
        Part(
            "c",
            "restored from an adversary who knows",
            Threshold(">=", LEAST_RESTORED, RESTORED + ", adaptive attack"),
            _adaptive,
            _random_adaptive,
            _passing_restores,
            "real fine-tuning",
        ),
    ),
    runs=_runs,
)
