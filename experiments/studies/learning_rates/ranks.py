"""Losses of LoRA over learning rates, ranks, multipliers and step ratios, as one record of a task.

The multiplier s of W + s·B A follows a power of the rank r,

    s = s₀ (r/r₀)^-γ,        γ = 1: Hu et al.'s α/r,  γ = 0: the same at every rank.

The head is fitted to the frozen features h beforehand and stays, so that A and B alone move: a
head that moved too would have the same rate, and a best one of its own. It is

    min_W  1/N Σ_i CE(W [h_i; 1]; y_i) + λ/2 ‖W‖².

Rates are constant and gradients are not scaled down, so that a step of Adam is one of the rate's
size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.training.settings import check_count, check_number
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from deltacontrol.experiments.setting import Setting

Cell = tuple[int, float, float]  # a rank, its multiplier, and the rate of B over that of A


@dataclass(frozen=True)
class RankRates(Experiment):
    """Train LoRA at every rank, multiplier, step ratio and rate.

    Attributes:
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification task.
        ranks: r.
        exponents: γ, one multiplier of each rank for each of them.
        multiplier: s₀.
        reference: r₀.
        rates: of Adam, for A.
        step_ratios: the rate of B over that of A.
        sites: where LoRA acts; its own sites if empty.
        rows: training rows, drawn by the seed.
        head_rows: rows to which the head is fitted, the training rows first.
        head_ridge: λ of that fit.
        max_length: tokens of a text at most.
        batch_size: rows of an update.
        steps: updates.
        seed: of the rows, of A and of the batches.
    """

    model: str = "minilm-l3"
    task: str = "rt"
    ranks: Sequence[int] = (1, 4, 16, 64)
    exponents: Sequence[float] = (1.0, 0.0)
    multiplier: float = 4.0
    reference: int = 4
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
    step_ratios: Sequence[float] = (1.0,)
    sites: Sequence[str] = ()
    rows: int = 64
    head_rows: int = 256
    head_ridge: float = 1e-2
    max_length: int = 16
    batch_size: int = 8
    steps: int = 32
    seed: int = 0

    kind: ClassVar[str] = "rank-rates"
    younger: ClassVar[tuple[str, ...]] = ("step_ratios", "sites")

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("reference", "rows", "batch_size", "steps"):
            check_count(self, name, least=1)
        for name in ("ranks", "rates", "step_ratios"):
            values = list(getattr(self, name))
            if not values or values != sorted(set(values)) or not 0 < values[0] <= values[-1] < 1e9:
                raise InputError(f"{name} are {values}; expected increasing numbers above 0")
        if not self.exponents or not all(map(math.isfinite, self.exponents)):
            raise InputError(f"exponents are {list(self.exponents)}; expected finite numbers")
        for name in ("multiplier", "head_ridge"):
            check_number(self, name, above=0.0)
        if not self.batch_size <= self.rows <= self.head_rows:
            raise InputError(
                f"batch_size is {self.batch_size}, rows {self.rows}, head_rows {self.head_rows}; "
                "expected each of them to be at most the next"
            )

    @property
    def label(self) -> str:
        """Model, task and seed."""
        return f"rates of LoRA's ranks {self.model} {self.task} seed {self.seed}"

    def scaled(self, rank: int, exponent: float) -> float:
        """The multiplier s of a rank."""
        return self.multiplier * (rank / self.reference) ** -exponent

    def execute(self, workspace: Workspace) -> Outcome:
        """Train.

        The curve has a row for each step of each training: rank, multiplier, step_ratio, rate,
        step, and the loss before the update; a training whose loss is not finite ends there. The
        result holds their number, and head_loss, that of the fitted head over its rows.

        Raises:
            InputError: there are fewer rows than asked for, or no classification.
        """
        import pandas as pd
        from tqdm.auto import tqdm

        setting, head_loss = self._fitted()
        done = _Done(workspace.folder)
        cells: dict[Cell, None] = dict.fromkeys(
            (rank, self.scaled(rank, exponent), ratio)
            for exponent in self.exponents
            for rank in self.ranks
            for ratio in self.step_ratios
        )
        count, frames = len(cells) * len(self.rates), []
        with tqdm(total=count, disable=not workspace.progress, unit="training") as bar:
            for cell in cells:
                if cell not in done:
                    done.keep(cell, [self._losses(setting, cell, rate) for rate in self.rates])
                bar.update(len(self.rates))
                of_cell = dict(zip(("rank", "multiplier", "step_ratio"), cell, strict=True))
                for rate, losses in zip(self.rates, done[cell], strict=True):
                    steps = range(1, len(losses) + 1)
                    rows = of_cell | {"rate": rate, "step": steps, "loss": losses}
                    frames.append(pd.DataFrame(rows))
        result = {"num_trainings": count, "head_loss": head_loss}
        return Outcome("completed", result, pd.concat(frames, ignore_index=True))

    def _setting(self, rows: int) -> Setting:
        from deltacontrol.experiments.setting import Setting

        return Setting(
            self.model,
            self.task,
            train_rows=rows,
            validation_rows=0,
            test_rows=0,
            order="shuffled",
            strict_rows=True,
            expects="classification",
            max_length=self.max_length,
            seed=self.seed,
        )

    def _fitted(self) -> tuple[Setting, float]:
        """The training rows with the model whose head is fitted, and the loss of that fit."""
        import torch
        from torch.nn.functional import cross_entropy

        from deltacontrol.experiments.heads import head_inputs, linear_head
        from deltacontrol.theory.solvers.lbfgs import differentiated, minimise_lbfgs

        setting, rows = self._setting(self.rows), self._setting(self.head_rows).split("train")
        h = head_inputs(setting.base, rows.batches(64)).double()
        h, labels = torch.cat([h, torch.ones_like(h[:, :1])], 1), torch.from_numpy(rows.labels)
        head = linear_head(setting.base)

        def objective(w: Tensor) -> Tensor:
            logits = h @ w.view(head.out_features, -1).mT
            return cross_entropy(logits, labels) + 0.5 * self.head_ridge * w.square().sum()

        start = torch.zeros(head.out_features * h.shape[1], dtype=h.dtype)
        found = minimise_lbfgs(differentiated(objective), start, gradient_tolerance=1e-8).x
        W = found.view(head.out_features, -1)
        with torch.no_grad():
            head.weight.copy_(W[:, :-1])
            head.bias.copy_(W[:, -1])
        return setting, float(cross_entropy(h @ W.mT, labels))

    def _losses(self, setting: Setting, cell: Cell, rate: float) -> list[float]:
        """Of one training, one a step."""
        from deltacontrol.deltas import LoRA, attach
        from deltacontrol.experiments.training.execution import TrainingBatches
        from deltacontrol.experiments.training.loop import train
        from deltacontrol.experiments.training.settings import Settings

        rank, multiplier, ratio = cell
        base: PreTrainedModel = setting.base
        where: dict[str, Any] = {"sites": tuple(self.sites)} if self.sites else {}
        delta = LoRA(rank=rank, alpha=multiplier * rank, step_ratio=ratio, **where)
        controlled = attach(base, delta, seed=self.seed)
        try:
            trained = train(
                controlled,
                TrainingBatches(setting.encoded, self.seed, self.batch_size),
                Settings(
                    learning_rate=rate,
                    steps=self.steps,
                    warmup=0.0,
                    schedule="constant",
                    max_grad_norm=None,
                    seed=self.seed,
                    cache_frozen=False,
                    precision="fp32",
                    device="cpu",
                    compile="never",
                ),
                progress=False,
            )
        finally:
            controlled.detach()
        return trained.curve["loss"].tolist()


class _Done(dict[Cell, list[list[float]]]):
    """The losses of each cell's rates, kept in a file of an interrupted run."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "losses.json"
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else []
        super().__init__({(rank, *more): losses for rank, *more, losses in known})

    def keep(self, cell: Cell, losses: list[list[float]]) -> None:
        """Add those of a cell, and write all of them down."""
        self[cell] = losses
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".partial")
        beside.write_text(json.dumps([[*c, found] for c, found in self.items()]), encoding="utf-8")
        os.replace(beside, self.file)
