"""The control of one task, tried on others: what its features hold, and what it is as a start.

A delta is trained for the source task. On a target task its control u_A is then

- *evaluated*: the control stays, and a linear head alone is fitted to the pooled features of the
  target's training rows (logistic regression with an ℓ² penalty that validation rows choose), so
  that classes of other names and numbers are no obstacle;
- *a start*: control and a new head are trained for a few updates, as they are from the start that
  the method draws.

Without a source both are those of the model as it was pre-trained. How near the controls of two
tasks are is the cosine of their weight updates ΔW, of which the result keeps a sketch

    sketch(ΔW)_j = Σ_{k: h(k) = j} s(k) ΔW_k,        h and s drawn once for all,

whose inner products are those of the updates, without bias and with a standard deviation of at
most √(2/m) ‖ΔW‖ ‖ΔW'‖ for m buckets.

Sources: Ding et al., Nature Machine Intelligence 5, 2023, "Task-level transferability evaluation";
Charikar, Chen & Farach-Colton, *Finding frequent items in data streams*, Theoretical Computer
Science 312(1), 2004 (the sketch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.settings import check_count
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

    from deltacontrol.deltas import DeltaModel

BUCKETS = 2048  # m
PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0)  # C of the logistic regression


@dataclass(frozen=True)
class Transfer(Experiment):
    """Train a control for one task and try it on others.

    Attributes:
        source: the task that the control is trained for; empty for no control.
        targets: classification tasks that it is tried on.
        delta: the delta, which must be one that can be merged into the weights.
        model: the model.
        seed: of the control's start, the head and the batches.
        steps: updates of the training for the source.
        tune_steps: updates of the training for a target from there.
        learning_rate: peak rate of all trainings.
        batch_size: rows of an update.
        max_length: tokens of a text at most; a pair may have twice as many.
        rows: training rows of a target at most.
        test_rows: test and validation rows of a target at most.
    """

    source: str = ""
    targets: tuple[str, ...] = ()
    delta: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    model: str = "minilm-l3"
    seed: int = 0
    steps: int = 80
    tune_steps: int = 20
    learning_rate: float = 3e-3
    batch_size: int = 8
    max_length: int = 24
    rows: int = 240
    test_rows: int = 240

    kind: ClassVar[str] = "transfer"
    in_full: ClassVar[tuple[str, ...]] = ("delta",)

    def __post_init__(self) -> None:
        """Check the fields, and make a tuple of a record's list."""
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise InputError("a control is tried on no task; give targets, such as ('movie', 'rt')")
        for name in ("steps", "tune_steps", "batch_size", "max_length", "rows", "test_rows"):
            check_count(self, name, least=1)
        check_count(self, "seed", least=0)

    @property
    def label(self) -> str:
        """Source and seed."""
        return f"transfer {self.model} from {self.source or 'no task'} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train for the source, then try every target.

        The result holds, by target, probe (accuracy of the fitted head), tuned (accuracy after a
        few updates), tuned_loss, and majority_share, all on test rows; own, the accuracy on test
        rows of the source; norm and sketch of ΔW.

        Raises:
            InputError: from loading and training, because a target is no classification, or because
                the delta cannot be merged.
        """
        import pandas as pd
        from tqdm.auto import tqdm

        control, own = self._trained(workspace)
        found = {}
        for target in tqdm(self.targets, disable=not workspace.progress, unit="task"):
            setting = self._setting(target)
            _start_from(setting.controlled, control)
            found[target] = {**_probed(setting), **self._tuned(target, setting)}
        result: dict[str, Any] = {"targets": found, "own": own}
        if self.source:
            result |= self._update(control)
        curve = pd.DataFrame([{"target": name, **row} for name, row in found.items()])
        return Outcome("completed", result, curve)

    def _trained(self, workspace: Workspace) -> tuple[dict[str, Tensor], float | None]:
        """The control, without the head, and the accuracy on the source's test rows."""
        from deltacontrol.experiments.heads import head_controls

        if not self.source:
            return {}, None
        trained = self._training(self.source, self.steps).execute(workspace)
        if trained.controls is None or trained.status != "completed":
            raise InputError(f"the training for {self.source} failed: {trained.message}")
        heads = set(head_controls(self._setting(self.source).controlled))
        kept = {name: value for name, value in trained.controls.items() if name not in heads}
        return kept, trained.result["accuracy"]

    def _training(self, task: str, steps: int) -> FineTuning:
        return FineTuning(
            model=self.model,
            task=task,
            deltas=(dict(self.delta),),
            seed=self.seed,
            learning_rate=self.learning_rate,
            steps=steps,
            batch_size=self.batch_size,
            max_length=self._length(task),
            train_limit=self.steps * self.batch_size if task == self.source else self.rows,
            eval_limit=self.test_rows,
            precision="fp32",
        )

    def _length(self, task: str) -> int:
        from deltacontrol.experiments import tasks

        is_pair = "text_pair" in tasks.load(task).train.columns
        return self.max_length * (2 if is_pair else 1)

    def _setting(self, task: str) -> Setting:
        return Setting(
            self.model,
            task,
            deltas=(dict(self.delta),),
            train_rows=self.rows,
            validation_rows=self.test_rows,
            test_rows=self.test_rows,
            expects="classification",
            max_length=self._length(task),
            seed=self.seed,
        )

    def _tuned(self, target: str, setting: Setting) -> dict[str, float | None]:
        """Accuracy and loss after a few updates of control and head."""
        from deltacontrol.experiments.training import loop
        from deltacontrol.experiments.training.execution import (
            TrainingBatches,
            metrics_on,
            training_settings,
        )

        model = setting.controlled
        options = self._training(target, self.tune_steps)
        batches = TrainingBatches(setting.encoded, self.seed, self.batch_size)
        settings = training_settings(options, "classification", float("inf"))
        trained = loop.train(model, batches, settings, progress=False)
        if trained.status == "diverged":
            return {"tuned": None, "tuned_loss": None}
        metrics = metrics_on(setting, "test", 64, model)
        return {"tuned": metrics["accuracy"], "tuned_loss": metrics["loss"]}

    def _update(self, control: Mapping[str, Tensor]) -> dict[str, Any]:
        """The norm of ΔW, and its sketch."""
        import torch

        setting = replace(self._setting(self.source), add_head=False)
        before = {name: value.detach().clone() for name, value in _weights(setting.base)}
        model = setting.controlled
        model.load(control)
        after = dict(_weights(model.merge()))
        update = torch.cat([(after[n].detach() - w).flatten() for n, w in before.items()])
        return {"norm": float(update.norm()), "sketch": sketch(update.double()).tolist()}


SPLITS = ("train", "validation", "test")


def sketch(update: Tensor, buckets: int = BUCKETS) -> Tensor:
    """The count sketch (buckets,) of a vector (entries,); the same draws for all vectors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    place = torch.randint(buckets, (len(update),), generator=generator)
    sign = 2.0 * torch.randint(2, (len(update),), generator=generator) - 1.0
    return torch.zeros(buckets, dtype=update.dtype).index_add_(0, place, sign * update)


def _start_from(model: DeltaModel, control: Mapping[str, Tensor]) -> None:
    """Put a control in place; what it does not have, such as a head, stays."""
    model.load(model.state() | dict(control))


def _probed(setting: Setting) -> dict[str, float]:
    """Accuracy on test rows of a head that is fitted to the features under the control."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = {split: _features(setting, split) for split in SPLITS}
    scores = []
    for penalty in PENALTIES:
        head = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))
        head.fit(*features["train"])
        scores.append((head.score(*features["validation"]), -penalty, head))
    best = max(scores, key=lambda score: score[:2])[2]
    majority = setting.split("test").majority_share
    return {"probe": float(best.score(*features["test"])), "majority_share": majority}


def _features(setting: Setting, split: str) -> tuple[np.ndarray, np.ndarray]:
    """What enters the head (rows, d), and the labels (rows,)."""
    import torch

    from deltacontrol.experiments.heads import head_inputs

    batches = list(setting.split(split).batches(64))
    labels = torch.cat([batch["labels"] for batch in batches])
    model = setting.controlled.eval().model
    return head_inputs(model, batches).double().numpy(), labels.numpy()


def _weights(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Of the body, by name: the same for every task."""
    return sorted(model.base_model.named_parameters())
