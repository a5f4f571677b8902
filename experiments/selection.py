"""Which layers, sites and ranks the convex program of linearised tuning picks on a real model.

Around a frozen model with a fitted head, the logits are linearised in the weights of every
attention and MLP map of every block, z_i(ΔW) = z_i + Σ_g ⟨G_ig, ΔW_g⟩, and two convex programs are
solved along a path of weights λ:

    min 1/N Σ_i CE(z_i(ΔW); y_i) + λ Σ_g w_g ‖ΔW_g‖_F     picks maps (layers × sites)
    min 1/N Σ_i CE(z_i(ΔW); y_i) + λ ‖ΔW_g‖_*             picks a rank, for the first map picked

Each solution comes with its duality gap. The changes are also put into the real model, and LoRA is
really trained on the picked maps and on as many maps that the program proves to be unused.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from experiments import models, tasks
from experiments.experiment import Digests, Experiment, Outcome, Workspace
from theory.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from deltas.sites import Site
    from experiments.frozen_classifier import FrozenClassifier
    from theory.convex import ConvexSolution, OuterProducts

SITES = ("query", "key", "value", "output", "up", "down")
_SEMANTIC = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.output",
    "up": "mlp.up",
    "down": "mlp.down",
}
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Selection(Experiment):
    """Solve the two programs along a path, and train LoRA on what they pick.

    Attributes:
        model: a BERT.
        task: a classification task.
        num_examples: training rows, drawn with the seed.
        num_heldout: validation rows; they choose λ.
        num_test: test rows; only the really trained models see them.
        max_length: tokens of a row at most.
        num_weights: points of a path.
        smallest: the last λ of a path over its first.
        num_sites: how many maps LoRA is trained on: those of the path's first point with so many.
        draws: how many sets of unused maps are drawn to compare with.
        rank: of LoRA.
        steps: AdamW steps of LoRA.
        batch_size: of LoRA's steps.
        learning_rate: its peak rate.
        seed: of the rows, the draws and LoRA.
    """

    model: str = "minilm-l6"
    task: str = "movie"
    num_examples: int = 160
    num_heldout: int = 256
    num_test: int = 500
    max_length: int = 20
    num_weights: int = 12
    smallest: float = 0.1
    num_sites: int = 4
    draws: int = 2
    rank: int = 4
    steps: int = 60
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0

    kind: ClassVar[str] = "selection"

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.num_weights < 2 or not 0 < self.smallest < 1:
            raise InputError(
                f"num_weights is {self.num_weights} and smallest {self.smallest}; expected at "
                "least 2 weights and a ratio between 0 and 1"
            )

    def to_config(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def digests(self) -> Digests:
        """Digests of model and task."""
        return Digests(models.digest(self.model), tasks.digest(self.task))

    @property
    def label(self) -> str:
        """Model, task and seed."""
        return f"selection {self.model} {self.task} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Fit the head, linearise, solve both paths, and compare with real training."""
        import pandas as pd
        from tqdm.auto import tqdm

        from experiments.frozen_classifier import FrozenClassifier, loss_and_accuracy

        frozen = FrozenClassifier.load(
            self.model,
            self.task,
            num_examples=self.num_examples,
            num_heldout=self.num_heldout,
            num_test=self.num_test,
            max_length=self.max_length,
            seed=self.seed,
        )
        real = frozen.single()
        head = loss_and_accuracy(real.logits(real.test), real.test["labels"])
        with tqdm(total=4, disable=not workspace.progress, unit="part") as bar:
            bar.set_description("group lasso")
            sites = _sites(frozen)
            rows, chosen, features = _group_path(self, frozen, real, sites)
            bar.update()
            bar.set_description("nuclear norm")
            first = max(sites, key=lambda name: rows[1][f"norm.{name}"])
            ranked, chosen_rank = _rank_path(self, frozen, real, sites[first], features[first])
            bar.update()
            bar.set_description("real tuning")
            budget, selected, unused = _picked(self, rows, list(sites))
            sets = _sets(self, sites, selected, unused)
            bar.update()
            trained = [_tuned(self, real, sites, kind, names) for kind, names in sets]
            bar.update()
        result = {
            "names": list(sites),
            "num_groups": len(sites),
            "chosen": chosen,
            "chosen_rank": chosen_rank,
            "rank_site": first,
            "budget": budget,
            "selected": selected,
            "num_unused": len(unused),
            "head_weight": frozen.head_weight,
            "head_gap": frozen.head_gap,
            "head_test_loss": head[0],
            "head_test_accuracy": head[1],
            "linearisation_error": _linearisation_error(frozen, sites, features),
            "tolerance": TOLERANCE,
            "trained": trained,
        }
        return Outcome("completed", result, pd.DataFrame([*rows, *ranked]))


def _sites(frozen: FrozenClassifier) -> dict[str, Site]:
    """The linear maps by the name "layer.site"."""
    from deltas.sites import SiteMap

    found = SiteMap(frozen.model)
    named = {}
    for short in SITES:
        for site in found.resolve([_SEMANTIC[short]]):
            named[f"{site.layer}.{short}"] = site
    return dict(sorted(named.items(), key=lambda item: (item[1].layer, SITES.index(item[0][2:]))))


def _group_path(
    run: Selection, frozen: FrozenClassifier, real: FrozenClassifier, sites: Mapping[str, Site]
) -> tuple[list[dict[str, Any]], int, dict[str, OuterProducts]]:
    """Rows of the path of the group lasso, the chosen one, and the training features."""
    import numpy as np

    from deltas.weight_features import weight_features
    from theory.convex import ConvexTuning, GroupLasso

    paths = [site.path for site in sites.values()]
    begun = time.perf_counter()
    offset, found = weight_features(frozen.model, paths, frozen.train)
    features = {name: found[site.path] for name, site in sites.items()}
    tuning = ConvexTuning(
        features, frozen.train["labels"], offset=offset, penalty=GroupLasso(), tolerance=TOLERANCE
    )
    prepared = time.perf_counter() - begun
    solutions = tuning.path(tuning.grid(run.num_weights, run.smallest))
    changes = [_changes(solution) for solution in solutions]
    used = sorted({name for change in changes for name in change})
    heldout = _heldout(frozen, {name: sites[name] for name in used})
    rows = []
    for solution, change in zip(solutions, changes, strict=True):
        row = _row("group lasso", solution, solutions[0].weight)
        row |= _heldout_row(real, sites, heldout, change)
        row |= {f"norm.{n}": v for n, v in zip(solution.names, solution.norms, strict=True)}
        row |= {f"bound.{n}": b for n, b in zip(solution.names, solution.rank_bounds, strict=True)}
        rows.append(row | {"prepare_seconds": prepared})
    chosen = int(np.argmin([row["heldout_loss"] for row in rows]))
    return rows, chosen, features


def _rank_path(
    run: Selection,
    frozen: FrozenClassifier,
    real: FrozenClassifier,
    site: Site,
    features: OuterProducts,
) -> tuple[list[dict[str, Any]], int]:
    """Rows of the path of the nuclear norm of one map, and the chosen one."""
    import numpy as np

    from theory.convex import ConvexTuning, NuclearNorm

    offset = frozen.logits(frozen.train)
    tuning = ConvexTuning(
        {"map": features},
        frozen.train["labels"],
        offset=offset,
        penalty=NuclearNorm(),
        tolerance=TOLERANCE,
    )
    solutions = tuning.path(tuning.grid(run.num_weights, run.smallest))
    heldout = _heldout(frozen, {"map": site})
    rows = []
    for solution in solutions:
        row = _row("nuclear norm", solution, solutions[0].weight)
        rows.append(row | _heldout_row(real, {"map": site}, heldout, _changes(solution)))
    return rows, int(np.argmin([row["heldout_loss"] for row in rows]))


def _row(program: str, solution: ConvexSolution, first: float) -> dict[str, Any]:
    return {
        "program": program,
        "weight": solution.weight,
        "share": solution.weight / first,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "train_loss": solution.loss,
        "num_active": len(solution.active),
        "rank": sum(solution.ranks),
        "rank_bound": sum(solution.rank_bounds),
        "rounds": solution.rounds,
        "status": str(solution.status),
        "seconds": solution.seconds,
    }


def _changes(solution: ConvexSolution) -> dict[str, Tensor]:
    pairs = zip(solution.names, solution.controls, strict=True)
    return {name: control for name, control in pairs if bool(control.any())}


def _heldout(
    frozen: FrozenClassifier, sites: Mapping[str, Site]
) -> tuple[np.ndarray, dict[str, OuterProducts]]:
    from deltas.weight_features import weight_features

    if not sites:
        return frozen.logits(frozen.heldout).numpy(), {}
    paths = [site.path for site in sites.values()]
    offset, found = weight_features(frozen.model, paths, frozen.heldout)
    return offset.numpy(), {name: found[site.path] for name, site in sites.items()}


def _heldout_row(
    real: FrozenClassifier,
    sites: Mapping[str, Site],
    heldout: tuple[np.ndarray, dict[str, OuterProducts]],
    change: Mapping[str, Tensor],
) -> dict[str, float]:
    """Loss and accuracy on held-out rows: of the linear model, and of the real one."""
    import torch

    from experiments.frozen_classifier import loss_and_accuracy

    offset, features = heldout
    labels = real.heldout["labels"]
    linear = offset + sum(features[name].apply(W.numpy()) for name, W in change.items())
    loss, accuracy = loss_and_accuracy(torch.from_numpy(linear), labels)
    with real.changed({sites[name].path: W for name, W in change.items()}):
        real_loss, real_accuracy = loss_and_accuracy(real.logits(real.heldout), labels)
    return {
        "heldout_loss": loss,
        "heldout_accuracy": accuracy,
        "heldout_loss_real": real_loss,
        "heldout_accuracy_real": real_accuracy,
    }


def _picked(
    run: Selection, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[int, list[str], list[str]]:
    """Where the path first has `num_sites` maps, the largest of them, and those proved unused.

    A path that never has so many is taken at its end.
    """
    enough = [i for i, row in enumerate(rows) if row["num_active"] >= run.num_sites]
    index = enough[0] if enough else len(rows) - 1
    row = rows[index]
    order = sorted(names, key=lambda name: -row[f"norm.{name}"])
    selected = [name for name in order[: run.num_sites] if row[f"norm.{name}"] > 0]
    return index, selected, [name for name in names if row[f"bound.{name}"] == 0]


def _sets(
    run: Selection, sites: Mapping[str, Site], selected: Sequence[str], unused: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """The picked maps, and as many unused ones, of the same shapes where there are any."""
    import numpy as np

    random = np.random.default_rng(run.seed)
    sets = [("selected", list(selected))]
    for _ in range(run.draws if len(unused) >= len(selected) else 0):
        left, drawn = list(unused), []
        for name in selected:
            size = sites[name].in_features + sites[name].out_features
            like = [n for n in left if sites[n].in_features + sites[n].out_features == size]
            drawn.append(str(random.choice(like or left)))
            left.remove(drawn[-1])
        sets.append(("unused", drawn))
    return sets


def _tuned(
    run: Selection,
    real: FrozenClassifier,
    sites: Mapping[str, Site],
    kind: str,
    names: Sequence[str],
) -> dict[str, Any]:
    """Train LoRA on these maps, with the head and all else frozen; metrics on the test rows."""
    import numpy as np
    import torch

    from deltas import LoRA, attach
    from experiments.frozen_classifier import loss_and_accuracy
    from experiments.schedules import learning_rate

    delta = LoRA(rank=run.rank, sites=tuple(f"^{sites[n].path}$" for n in names))
    controlled = attach(real.model, delta, seed=run.seed)
    controls = list(controlled.trainable().values())
    optimiser = torch.optim.AdamW(controls, lr=run.learning_rate, weight_decay=0.0)
    random = np.random.default_rng(run.seed)
    count, order = len(real.train["labels"]), np.zeros(0, dtype=int)
    for step in range(run.steps):
        if len(order) < run.batch_size:
            order = np.concatenate([order, random.permutation(count)])
        rows, order = torch.from_numpy(order[: run.batch_size]), order[run.batch_size :]
        batch = {name: value[rows] for name, value in real.train.items()}
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(
                step, peak=run.learning_rate, steps=run.steps, warmup=0.1, schedule="linear"
            )
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            controlled(**{n: v for n, v in batch.items() if n != "labels"}).logits, batch["labels"]
        )
        loss.backward()
        optimiser.step()
    metrics = {}
    for split in ("train", "test"):
        batch = getattr(real, split)
        value, accuracy = loss_and_accuracy(real.logits(batch), batch["labels"])
        metrics |= {f"{split}_loss": value, f"{split}_accuracy": accuracy}
    num_trainable = controlled.num_trainable
    controlled.detach()
    return {"set": kind, "names": list(names), "num_trainable": num_trainable, **metrics}


def _linearisation_error(
    frozen: FrozenClassifier, sites: Mapping[str, Site], features: Mapping[str, OuterProducts]
) -> float:
    """Features against forward-mode derivatives of the model, relative, on a few rows.

    The direction is random and of all maps together.
    """
    import torch
    from torch.func import functional_call, jvp

    from theory.linearisation import differentiable_attention

    model = frozen.model
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(f.shape, generator=generator, dtype=torch.float64)
        for name, f in features.items()
    }
    count = min(4, len(frozen.train["labels"]))
    inputs = {n: v[:count] for n, v in frozen.train.items() if n != "labels"}
    parameters = {f"{sites[n].path}.weight" for n in directions}
    weights = {n: p.detach() for n, p in model.named_parameters() if n in parameters}
    along = {f"{sites[n].path}.weight": d for n, d in directions.items()}

    def logits(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (), dict(inputs)).logits

    with differentiable_attention(), torch.no_grad():
        exact = jvp(logits, (weights,), ({n: along[n] for n in weights},))[1]
    found = sum(f.apply(directions[n].numpy())[:count] for n, f in features.items())
    difference = torch.as_tensor(found) - exact
    return float(difference.norm() / exact.norm())
