"""What fine-tuning adds to the weights: its spectrum, and how much of it LoRA finds.

Full fine-tuning moves the weight of a linear map from W_0 to W_T. Of D = W_T - W_0, everywhere,

    singular values s_1 >= s_2 >= ...,   stable rank Σ s_i² / s_1²,
    tail(r) = Σ_{i > r} s_i²,            the least ‖D - M‖_F² over rank(M) <= r,

and of LoRA s·B A, trained from the same start on the same batches at rank r, the overlaps

    left: range(B) with the r leading left singular vectors of D,   right: range(Aᵀ) with the right.

A random subspace has the overlap r/n in expectation. Losses are means over the training rows, and
each is the least over a few learning rates: what a parametrisation can reach in so many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.studies.reachability.measurement import SITES
from deltacontrol.experiments.studies.spectra.decompositions import (
    decomposed,
    overlaps_with,
    tail_share,
)
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from deltacontrol.deltas import Delta, DeltaModel
    from deltacontrol.deltas.editing.sites import Site
    from deltacontrol.experiments.studies.spectra.decompositions import (
        Changes,
        Decompositions,
        Factors,
    )

MORE_RATES = 5  # tried at most beyond those that are given


@dataclass(frozen=True)
class UpdateSpectra(Experiment):
    """Full fine-tuning, the head alone, and LoRA at several ranks, on one set of rows.

    Attributes:
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification task.
        sites: the linear maps whose update is looked at, and where LoRA acts.
        ranks: of LoRA, increasing.
        steps: updates of every training.
        snapshots: how often a training is looked at, at equal distances, the end included.
        batch_size: examples per update.
        max_length: tokens of a text at most.
        train_rows: the first so many training rows; the losses are means over them.
        full_rates, lora_rates, head_rates: peak learning rates; the one of least loss counts. While
            that is the first or the last of several, one more follows beyond it.
        scale: s = scale/√r, which keeps the size of LoRA's change from depending on the rank.
        seed: of the head, of A, and of the batches.
    """

    model: str = "minilm-l3"
    task: str = "movie"
    sites: Sequence[str] = SITES
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    steps: int = 60
    snapshots: int = 4
    batch_size: int = 16
    max_length: int = 32
    train_rows: int = 512
    full_rates: Sequence[float] = (3e-4, 1e-3)
    lora_rates: Sequence[float] = (4e-3, 8e-3)
    head_rates: Sequence[float] = (1e-1, 3e-1)
    scale: float = 4.0
    seed: int = 0

    kind: ClassVar[str] = "update-spectra"

    def __post_init__(self) -> None:
        """Check sizes, ranks and rates."""
        ranks = list(self.ranks)
        if not ranks or ranks != sorted(set(ranks)) or ranks[0] < 1:
            raise InputError(f"ranks are {ranks}; expected increasing whole numbers >= 1")
        if min(self.steps, self.snapshots, self.train_rows, self.batch_size) < 1:
            raise InputError(
                f"steps is {self.steps}, snapshots {self.snapshots}, batch_size {self.batch_size}, "
                f"train_rows {self.train_rows}; expected whole numbers >= 1"
            )
        if self.steps % self.snapshots:
            raise InputError(
                f"{self.steps} steps have no {self.snapshots} equal parts, a snapshot at the end "
                "of each; choose a divisor of the steps"
            )
        for name in ("full_rates", "lora_rates", "head_rates"):
            rates = list(getattr(self, name))
            positive = all(0 < rate < math.inf for rate in rates)
            if not rates or not positive or rates != sorted(set(rates)):
                raise InputError(f"{name} are {rates}; expected increasing positive numbers")

    @property
    def label(self) -> str:
        """Model, task and seed."""
        return f"updates {self.model} {self.task} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train them all and compare.

        The result holds ``losses`` (before, full, head), one row per rank in ``ranks``, one per
        snapshot and module in ``modules``, one per snapshot and rank in ``overlaps``, all trainings
        in ``trials``, in ``at_the_end`` what was best at the last rate that was tried; the curve
        is the spectrum of each module's final update.

        Raises:
            InputError: no classification, too few rows, a site that is no linear map or narrower
                than a rank, or a parametrisation that diverges at all of its rates.
        """
        from tqdm.auto import tqdm

        from deltacontrol.deltas import FullFineTuning, HeadTuning, LoRA

        bench = _Bench(self)
        total = len(self.full_rates) + len(self.head_rates) + len(self.ranks) * len(self.lora_rates)
        with tqdm(total=total, disable=not workspace.progress, unit="training") as bar:
            full = bench.best("full", [FullFineTuning()], self.full_rates, bench.changes, bar)
            spectra = {step: decomposed(changes) for step, changes in full.seen.items()}
            last = spectra[self.steps]
            truncated = bench.truncated_losses(full.state, last, [0, *self.ranks])
            head = bench.best("head", [HeadTuning()], self.head_rates, lambda _: {}, bar)
            ranks, overlaps = [], []
            for rank in self.ranks:
                lora = LoRA(rank=rank, alpha=self.scale, scaling="rslora", sites=tuple(self.sites))
                tuned = [lora, HeadTuning()]
                best = bench.best(f"lora {rank}", tuned, self.lora_rates, bench.factors, bar)
                ranks.append(
                    {
                        "rank": rank,
                        "loss": best.loss,
                        "rate": best.rate,
                        "truncated_loss": truncated[rank],
                        "tail_share": tail_share(last, rank),
                    }
                )
                overlaps += [
                    {"step": step, "rank": rank, **overlaps_with(factors, last)}
                    for step, factors in best.seen.items()
                ]
        result = {
            "losses": {
                "before": bench.before,
                "head": head.loss,
                "full": full.loss,
                "full_without_update": truncated[0],
            },
            "full_rate": full.rate,
            "ranks": ranks,
            "modules": [
                {"step": step, **row}
                for step, decompositions in spectra.items()
                for row in bench.describe(decompositions)
            ],
            "overlaps": overlaps,
            "trials": bench.trials,
            "at_the_end": bench.at_the_end,
        }
        return Outcome("completed", result, bench.spectrum(last))


@dataclass(frozen=True, eq=False)
class _Trained:
    """A training of one parametrisation.

    Attributes:
        loss: over the training rows, at the end.
        rate: its learning rate.
        state: its controls.
        seen: what was seen of it, by step.
    """

    loss: float = math.inf
    rate: float = math.nan
    state: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[int, Any] = field(default_factory=dict)


class _Bench:
    """One model and one set of rows, on which everything is trained from the same start."""

    def __init__(self, experiment: UpdateSpectra) -> None:
        from deltacontrol.deltas.editing.sites import SiteMap
        from deltacontrol.experiments.setting import Setting

        setting = Setting(
            experiment.model,
            experiment.task,
            train_rows=experiment.train_rows,
            validation_rows=1,
            test_rows=1,
            strict_rows=True,
            expects="classification",
            max_length=experiment.max_length,
            seed=experiment.seed,
        )
        self.experiment = experiment
        self.encoded, self.base = setting.encoded, setting.base
        found = SiteMap(self.base)
        self.places = {
            site.key: (site.layer, name)
            for name in experiment.sites
            for site in found.resolve((name,))
        }
        self.sites = {site.key: site for site in found.resolve(tuple(experiment.sites))}
        for site in self.sites.values():
            site.in_features  # noqa: B018 - refuses what is no linear map
        self.start = {key: _map(site).clone() for key, site in self.sites.items()}
        self.trials: list[dict[str, Any]] = []
        self.at_the_end: list[str] = []
        self.before = self.loss(self.base)

    def batch(self, step: int) -> dict[str, Any]:
        e = self.experiment
        return self.encoded.training_batch(step, seed=e.seed, batch_size=e.batch_size)

    def loss(self, module: Any) -> float:
        """Mean loss over all training rows."""
        from deltacontrol.experiments.training.evaluation import evaluate

        return evaluate(module, self.encoded.eval_batches("train", 64), "classification")["loss"]

    def best(
        self,
        name: str,
        deltas: Sequence[Delta],
        rates: Sequence[float],
        look: Callable[[DeltaModel], Any],
        bar: Any,
    ) -> _Trained:
        """Train at every rate; of least loss, with what ``look`` saw at the snapshots."""
        found = {rate: self.trained(name, deltas, rate, look) for rate in rates}
        bar.update(len(found))

        def best() -> float:
            return min(found, key=lambda rate: found[rate].loss)

        ratio = rates[-1] / rates[-2] if len(rates) > 1 else 1.0
        for _ in range(MORE_RATES):
            at = best()
            if len(found) == 1 or min(found) < at < max(found):
                break
            rate = float(f"{at * ratio if at == max(found) else at / ratio:.3g}")
            found[rate] = self.trained(name, deltas, rate, look)
            bar.total += 1
            bar.update()
        if not found[best()].seen:
            raise InputError(f"{name} diverged at every rate of {sorted(found)}; give smaller ones")
        if len(found) > 1 and best() in (min(found), max(found)):
            self.at_the_end.append(name)
        return found[best()]

    def trained(
        self, name: str, deltas: Sequence[Delta], rate: float, look: Callable[[DeltaModel], Any]
    ) -> _Trained:
        """Train at one rate; without anything seen after a divergence."""
        from deltacontrol.deltas import attach
        from deltacontrol.experiments.training.loop import train
        from deltacontrol.experiments.training.settings import Settings

        e = self.experiment
        every = e.steps // e.snapshots
        settings = Settings(
            steps=e.steps,
            learning_rate=rate,
            seed=e.seed,
            precision="fp32",
            eval_every=every,
            monitor="snapshots",
        )
        seen: dict[int, Any] = {}
        controlled = attach(self.base, *deltas, seed=e.seed)

        def note(_: Any) -> Any:
            seen[every * (len(seen) + 1)] = look(controlled)
            return {"snapshots": float(len(seen))}

        try:
            trained = train(controlled, self, settings, evaluate=note, progress=False)
            loss = self.loss(controlled) if trained.status == "completed" else math.inf
        finally:
            controlled.detach()
        self.trials.append({"trained": name, "rate": rate, "loss": loss})
        if not math.isfinite(loss):
            return _Trained(rate=rate)
        return _Trained(loss, rate, trained.controls, seen)

    def changes(self, controlled: DeltaModel) -> Changes:
        """D of every site, where the weights themselves are trained."""
        return {key: _map(site) - self.start[key] for key, site in self.sites.items()}

    def factors(self, controlled: DeltaModel) -> Factors:
        """LoRA's B and Aᵀ of every site."""
        trained = {name: value.detach().clone() for name, value in controlled.trainable().items()}
        return {k: (trained[f"lora.{k}.B"], trained[f"lora.{k}.A"].T) for k in self.sites}

    def truncated_losses(
        self, state: Mapping[str, Tensor], last: Decompositions, ranks: Sequence[int]
    ) -> dict[int, float]:
        """Losses of full fine-tuning's end with every D cut down to its nearest of rank r."""
        import torch

        from deltacontrol.deltas import FullFineTuning, attach
        from deltacontrol.deltas.editing.sites import add_change

        paths = {site.path for site in self.sites.values()}
        start = {p: self.base.get_parameter(f"{p}.weight").detach().double() for p in paths}
        losses = {}
        controlled = attach(self.base, FullFineTuning(), seed=self.experiment.seed)
        try:
            controlled.load(state)
            for rank in ranks:
                for path, weight in start.items():
                    for key, site in self.sites.items():
                        if site.path == path:
                            left, values, right = last[key]
                            cut = (left[:, :rank] * values[:rank]) @ right[:, :rank].mT
                            weight = add_change(site, lambda c=cut: c, weight)
                    with torch.no_grad():
                        self.base.get_parameter(f"{path}.weight").copy_(weight)
                losses[rank] = self.loss(controlled)
        finally:
            controlled.detach()
        return losses

    def describe(self, decompositions: Decompositions) -> list[dict[str, Any]]:
        """Of every module: shape, norm, norm over that of W_0, stable rank, participation ratio."""
        from deltacontrol.theory.rank.low_rank import participation_ratio, stable_rank

        rows = []
        for key, (left, values, right) in decompositions.items():
            layer, site = self.places[key]
            rows.append(
                {
                    "layer": layer,
                    "site": site,
                    "shape": [len(left), len(right)],
                    "norm": float(values.norm()),
                    "relative_norm": float(values.norm() / self.start[key].norm()),
                    "stable_rank": stable_rank(values),
                    "participation_ratio": participation_ratio(values),
                }
            )
        return rows

    def spectrum(self, decompositions: Decompositions) -> pd.DataFrame:
        """Singular values, one row each."""
        import pandas as pd

        frames = [
            pd.DataFrame(
                {
                    "layer": self.places[key][0],
                    "site": self.places[key][1],
                    "index": range(1, len(values) + 1),
                    "value": values.float().numpy(),
                }
            )
            for key, (_, values, _) in decompositions.items()
        ]
        return pd.concat(frames, ignore_index=True)


def _map(site: Site) -> Tensor:
    """The site's present weight (out, in)."""
    weight: Any = site.module.weight
    return site.rows(weight.detach())
