"""Task loss and distance from the base model along a training of a language model.

With p the base model, p_u the tuned one, and tokens y of *held* text, which is of another kind than
what is trained on,

    KL(u) = mean over tokens of Σ_v p(v | y_<) log (p(v | y_<) / p_u(v | y_<))      nats a token,

and the held loss is that of p_u on these tokens. What is known is how far predictions move, and
which way: a KL without a higher loss is a change that costs nothing there.

Sources: Kirkpatrick et al., PNAS 114(13), 2017 (forgetting); Biderman et al., *LoRA learns less and
forgets less*, TMLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.settings import check_count

if TYPE_CHECKING:
    from torch import Tensor, nn

SIZE = 8  # rows of a pass


@dataclass(frozen=True)
class Forgetting(Experiment):
    """Tune a language model, and look at task and held text on the way.

    Attributes:
        delta: the delta, as a dictionary with its name.
        model: a causal language model.
        task: a language-model task, which is trained.
        held: a task whose texts are the held ones.
        learning_rate: peak rate.
        seed: of the control's start and the batches.
        steps: updates.
        every: updates between two looks.
        batch_size: rows of an update.
        max_length: tokens of a text at most.
        rows: validation rows of the task at a look.
        held_rows: held texts at a look.
    """

    delta: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    model: str = "smollm2-135m"
    task: str = "movie-lines"
    held: str = "bbc"
    learning_rate: float = 1e-3
    seed: int = 0
    steps: int = 32
    every: int = 4
    batch_size: int = 8
    max_length: int = 32
    rows: int = 48
    held_rows: int = 24

    kind: ClassVar[str] = "forgetting"
    in_full: ClassVar[tuple[str, ...]] = ("delta",)

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("steps", "every", "batch_size", "max_length", "rows", "held_rows"):
            check_count(self, name, least=1)
        check_count(self, "seed", least=0)

    @property
    def label(self) -> str:
        """Delta, rate and seed."""
        return f"forgetting {self.delta['name']} rate {self.learning_rate:g} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train, and look before the first and after every few updates.

        The curve has a row an update; where it is looked at, validation_loss (of the task),
        validation_held_loss and validation_kl. The result holds them at the start and at the end.
        """
        from deltacontrol.experiments.training import loop
        from deltacontrol.experiments.training.execution import (
            TrainingBatches,
            sizes,
            training_settings,
        )

        setting = self._setting()
        model, look = setting.controlled, _Look(setting, self)
        start = look(model)
        batches = TrainingBatches(setting.encoded, self.seed, self.batch_size)
        settings = training_settings(self._options(), "causal-lm", workspace.checkpoint_seconds)
        trained = loop.train(
            model,
            batches,
            settings,
            evaluate=look,
            checkpoint_dir=workspace.folder,
            progress=workspace.progress,
        )
        diverged = trained.status == "diverged"
        end = dict.fromkeys(start) if diverged else look(model)
        result: dict[str, Any] = {"start": start, "end": end, **sizes(model), **trained.measures}
        return Outcome(trained.status, result, trained.curve, message=trained.message)

    def _setting(self) -> Setting:
        return Setting(
            self.model,
            self.task,
            deltas=(dict(self.delta),),
            train_rows=self.steps * self.batch_size,
            validation_rows=self.rows,
            test_rows=self.rows,
            expects="causal-lm",
            max_length=self.max_length,
            seed=self.seed,
        )

    def _options(self) -> FineTuning:
        return FineTuning(
            model=self.model,
            task=self.task,
            deltas=(dict(self.delta),),
            seed=self.seed,
            learning_rate=self.learning_rate,
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            eval_every=self.every,
            precision="fp32",
        )


class _Look:
    """Measures a model on task rows and on held text, beside the base model's predictions."""

    def __init__(self, setting: Setting, experiment: Forgetting) -> None:
        import torch

        from deltacontrol.experiments import tasks

        self.task = setting.split("validation")
        texts = tasks.load(experiment.held).test[["text"]].head(experiment.held_rows)
        self.held = list(setting.encode(texts).batches(SIZE))
        self.base: list[Tensor] = []
        model = setting.controlled
        with torch.no_grad(), model.disable():
            for batch in self.held:
                self.base.append(_log_probabilities(model.eval(), batch))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Loss of the task, loss on held text, and KL, in nats a token."""
        import torch

        from deltacontrol.experiments.training.evaluation import evaluate

        found = evaluate(model, self.task.batches(SIZE), "causal-lm")
        mode, divergence, loss, tokens = model.training, 0.0, 0.0, 0
        model.eval()
        with torch.no_grad():
            for batch, base in zip(self.held, self.base, strict=True):
                now = _log_probabilities(model, batch)
                divergence += float((base.exp() * (base - now)).sum())
                targets = batch["labels"][:, 1:]
                known = targets[targets != -100]
                loss -= float(now.gather(1, known[:, None]).sum())
                tokens += len(known)
        model.train(mode)
        return {"loss": found["loss"], "held_loss": loss / tokens, "kl": divergence / tokens}


def _log_probabilities(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Log p(v | y_<) of the tokens that are predicted (tokens, vocabulary)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, -batch["labels"].shape[1] : -1]
    return logits[targets != -100].float().log_softmax(-1)
