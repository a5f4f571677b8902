"""Which layers, sites and ranks the convex program of linearised tuning picks on a real model.

Around a frozen model with a fitted head, two convex programs are solved along a path of weights λ:

    min_b 1/N Σ_i CE(z_i + Σ_g G_ig b_g; y_i) + λ Σ_g √m_g ‖b_g‖    picks maps (layers × sites)
    min_W 1/N Σ_i CE(z_i + ⟨G_i, W⟩; y_i) + λ ‖W‖_*                 picks a rank

b_g is the change of the bias of linear map g (BitFit), W the change of the weight of the map that
the first program picks first. Key biases are left out: they add the same number to all scores of a
query, which softmax does not see, so they would only flatter the comparison below.

Each solution comes with its duality gap. The changes are also put into the real model, whose loss
on held-out rows chooses λ: the linear one overshoots, since it has no normalisation that bounds its
logits. BitFit is really trained on the maps picked first, and on as many that the program proves to
be unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

    from deltacontrol.deltas.editing.sites import Site
    from deltacontrol.experiments.studies.selection.frozen_model import FrozenModel
    from deltacontrol.theory.convex import ConvexSolution, Features

SITES = {
    "query": "attention.query",
    "value": "attention.value",
    "output": "attention.output",
    "up": "mlp.up",
    "down": "mlp.down",
}
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Selection(Experiment):
    """Solve the two programs along a path, and train BitFit on what the first one picks.

    Attributes:
        model: a BERT.
        task: a classification task.
        num_examples: training rows, drawn with the seed.
        num_heldout: validation rows; with the changes put into the real model they choose λ.
        num_test: test rows; only the really trained models see them.
        max_length: tokens of a row at most.
        num_weights: points of a path.
        smallest: the last λ of a path over its first.
        num_sites: how many maps BitFit is trained on: those of the path's first point with so many.
        draws: how many sets of unused maps are drawn to compare with.
        steps: AdamW steps of BitFit.
        batch_size: of its steps.
        learning_rate: its peak rate.
        seed: of the rows, the draws and the batches.
    """

    model: str = "minilm-l6"
    task: str = "movie"
    num_examples: int = 100
    num_heldout: int = 200
    num_test: int = 500
    max_length: int = 20
    num_weights: int = 12
    smallest: float = 0.05
    num_sites: int = 4
    draws: int = 2
    steps: int = 120
    batch_size: int = 16
    learning_rate: float = 3e-3
    seed: int = 0

    kind: ClassVar[str] = "selection"

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.num_weights < 2 or not 0 < self.smallest < 1:
            raise InputError(
                f"num_weights is {self.num_weights} and smallest {self.smallest}; expected at "
                "least 2 weights and a ratio between 0 and 1"
            )

    @property
    def label(self) -> str:
        """Model, task and seed."""
        return f"selection {self.model} {self.task} seed {self.seed}"

    def setting(self) -> Setting:
        """The frozen model with its fitted head, and the rows."""
        return Setting(
            self.model,
            self.task,
            train_rows=self.num_examples,
            validation_rows=self.num_heldout,
            test_rows=self.num_test,
            order="shuffled",
            order_seed=self.seed,
            strict_rows=True,
            expects="classification",
            max_length=self.max_length,
            head="fitted",
            dtype="float64",
        )

    def execute(self, workspace: Workspace) -> Outcome:
        """Fit the head, linearise, solve both paths, and compare with real training."""
        import numpy as np
        import pandas as pd
        from tqdm.auto import tqdm

        from deltacontrol.deltas.dynamics.logit_features import bias_features, weight_features
        from deltacontrol.experiments.heads import loss_and_accuracy
        from deltacontrol.experiments.studies.selection.frozen_model import FrozenModel, logits
        from deltacontrol.theory.convex import GroupLasso, NuclearNorm

        setting = self.setting()
        frozen = FrozenModel.of(setting)
        assert setting.head_fit is not None
        head = loss_and_accuracy(logits(frozen.real, frozen.test), frozen.test["labels"])
        sites = _sites(frozen.model)
        names = {name: f"{site.path}.bias" for name, site in sites.items()}
        with tqdm(total=3, disable=not workspace.progress, unit="part") as bar:
            bar.set_description("group lasso")
            rows, errors = _path(self, frozen, bias_features, names, GroupLasso(), "group lasso")
            first = max(sites, key=lambda name: rows[1][f"norm.{name}"])
            bar.update()
            bar.set_description("nuclear norm")
            weight = {first: f"{sites[first].path}.weight"}
            ranked, more = _path(
                self, frozen, weight_features, weight, NuclearNorm(), "nuclear norm"
            )
            bar.update()
            bar.set_description("real tuning")
            budget, selected, unused = _picked(self, rows, list(sites))
            sets = _sets(self, sites, selected, unused)
            trained = [_tuned(self, frozen, sites, kind, chosen) for kind, chosen in sets]
            bar.update()
        result = {
            "names": list(sites),
            "chosen": int(np.argmin([row["heldout_loss_real"] for row in rows])),
            "chosen_rank": int(np.argmin([row["heldout_loss_real"] for row in ranked])),
            "rank_site": first,
            "budget": budget,
            "selected": selected,
            "num_unused": len(unused),
            "head_weight": setting.head_fit.weight,
            "head_gap": setting.head_fit.gap,
            "head_test_loss": head[0],
            "head_test_accuracy": head[1],
            "linearisation_error": max(errors, more),
            "tolerance": TOLERANCE,
            "trained": trained,
        }
        return Outcome("completed", result, pd.DataFrame([*rows, *ranked]))


def _sites(model: PreTrainedModel) -> dict[str, Site]:
    """The linear maps by the name "layer.site", in the order of the layers."""
    from deltacontrol.deltas.editing.sites import SiteMap

    found = SiteMap(model)
    kinds = {short: found.resolve([semantic]) for short, semantic in SITES.items()}
    pairs = [(site.layer, short, site) for short, of_kind in kinds.items() for site in of_kind]
    pairs.sort(key=lambda pair: (pair[0], list(SITES).index(pair[1])))
    return {f"{layer}.{short}": site for layer, short, site in pairs}


def _path(
    run: Selection,
    frozen: FrozenModel,
    compute: Any,
    parameters: Mapping[str, str],
    penalty: Any,
    program: str,
) -> tuple[list[dict[str, Any]], float]:
    """One row for each λ of a path, and the error of the features.

    Args:
        run: the configuration.
        frozen: the model, in float64 for the features and in float32 for the changes.
        compute: `bias_features` or `weight_features`.
        parameters: the name of each group's parameter.
        penalty: of the program.
        program: its name.
    """
    from deltacontrol.theory.convex import ConvexTuning

    def features(batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Features]]:
        paths = {name: p.rpartition(".")[0] for name, p in parameters.items()}
        z, found = compute(frozen.model, list(paths.values()), batch)
        return z, {name: found[path] for name, path in paths.items()}

    offset, training = features(frozen.train)
    error = _linearisation_error(frozen, parameters, training)
    tuning = ConvexTuning(
        training, frozen.train["labels"], offset=offset, penalty=penalty, tolerance=TOLERANCE
    )
    solutions = tuning.path(tuning.grid(run.num_weights, run.smallest))
    z, heldout = features(frozen.heldout)
    rows = []
    for solution in solutions:
        pairs = zip(solution.names, solution.controls, strict=True)
        change = {name: control for name, control in pairs if bool(control.any())}
        row = _row(program, solution, solutions[0].weight)
        row |= _heldout_row(frozen, parameters, z.numpy(), heldout, change)
        row |= {f"norm.{n}": v for n, v in zip(solution.names, solution.norms, strict=True)}
        row |= {f"bound.{n}": b for n, b in zip(solution.names, solution.rank_bounds, strict=True)}
        rows.append(row)
    return rows, error


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


def _heldout_row(
    frozen: FrozenModel,
    parameters: Mapping[str, str],
    offset: np.ndarray,
    features: Mapping[str, Features],
    change: Mapping[str, Tensor],
) -> dict[str, float]:
    """Loss and accuracy on held-out rows: of the linear model, and of the real one."""
    import torch

    from deltacontrol.experiments.heads import loss_and_accuracy
    from deltacontrol.experiments.studies.selection.frozen_model import changed, logits

    labels = frozen.heldout["labels"]
    moved = sum((features[n] @ u.reshape(-1)).reshape(offset.shape) for n, u in change.items())
    loss, accuracy = loss_and_accuracy(torch.from_numpy(offset) + moved, labels)
    with changed(frozen.real, {parameters[name]: u for name, u in change.items()}):
        real_loss, real_accuracy = loss_and_accuracy(logits(frozen.real, frozen.heldout), labels)
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
    """The picked maps, as many unused ones, of the same widths where there are any, and all."""
    import numpy as np

    random = np.random.default_rng(run.seed)
    sets = [("selected", list(selected))]
    for _ in range(run.draws if len(unused) >= len(selected) else 0):
        left, drawn = list(unused), []
        for name in selected:
            width = sites[name].out_features
            like = [other for other in left if sites[other].out_features == width]
            drawn.append(str(random.choice(like or left)))
            left.remove(drawn[-1])
        sets.append(("unused", drawn))
    return [*sets, ("all", list(sites))]


def _tuned(
    run: Selection,
    frozen: FrozenModel,
    sites: Mapping[str, Site],
    kind: str,
    names: Sequence[str],
) -> dict[str, Any]:
    """Train BitFit on these maps, with the head and all else frozen; metrics on the test rows."""
    import numpy as np
    import torch

    from deltacontrol.deltas import BitFit, attach
    from deltacontrol.experiments.heads import loss_and_accuracy
    from deltacontrol.experiments.studies.selection.frozen_model import logits
    from deltacontrol.experiments.tasks.encoding import without_labels
    from deltacontrol.experiments.training.settings import learning_rate

    delta = BitFit(sites=tuple(f"^{sites[name].path}$" for name in names))
    controlled = attach(frozen.real, delta, seed=run.seed)
    controls = list(controlled.trainable().values())
    optimiser = torch.optim.AdamW(controls, lr=run.learning_rate, weight_decay=0.0)
    random = np.random.default_rng(run.seed)
    count, order = len(frozen.train["labels"]), np.zeros(0, dtype=int)
    for step in range(run.steps):
        while len(order) < run.batch_size:
            order = np.concatenate([order, random.permutation(count)])
        rows, order = torch.from_numpy(order[: run.batch_size]), order[run.batch_size :]
        batch = {name: value[rows] for name, value in frozen.train.items()}
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(
                step, peak=run.learning_rate, steps=run.steps, warmup=0.1, schedule="linear"
            )
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            controlled(**without_labels(batch)).logits, batch["labels"]
        )
        loss.backward()
        optimiser.step()
    metrics = {}
    for split in ("train", "test"):
        batch = getattr(frozen, split)
        value, accuracy = loss_and_accuracy(logits(frozen.real, batch), batch["labels"])
        metrics |= {f"{split}_loss": value, f"{split}_accuracy": accuracy}
    num_trainable = controlled.num_trainable
    controlled.detach()
    return {"set": kind, "names": list(names), "num_trainable": num_trainable, **metrics}


def _linearisation_error(
    frozen: FrozenModel, parameters: Mapping[str, str], features: Mapping[str, Features]
) -> float:
    """Features against forward-mode derivatives of the model, relative, on a few rows.

    The direction is random and of all groups together.
    """
    import torch
    from torch.func import functional_call, jvp

    from deltacontrol.theory.linear.linearisation import differentiable_attention

    generator = torch.Generator().manual_seed(0)
    along = {
        parameters[name]: torch.randn(f.control_shape, generator=generator, dtype=torch.float64)
        for name, f in features.items()
    }
    at = {name: frozen.model.get_parameter(name).detach() for name in along}
    count = min(4, len(frozen.train["labels"]))
    inputs = {n: v[:count] for n, v in frozen.train.items() if n != "labels"}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(frozen.model, values, (), dict(inputs)).logits

    with differentiable_attention(), torch.no_grad():
        exact = jvp(outputs, (at,), (along,))[1]
    products = (f @ along[parameters[n]].reshape(-1) for n, f in features.items())
    found = sum(p.reshape(-1, exact.shape[1])[:count] for p in products)
    return float((found - exact).norm() / exact.norm())
