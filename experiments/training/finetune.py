"""Fine-tuning: train deltas on a frozen model for a task, and evaluate them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from deltacontrol.experiments.runs.experiment import Digests, Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.rates import default_rate
from deltacontrol.experiments.training.schedules import SCHEDULES
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.deltas import DeltaModel
    from deltacontrol.experiments.tasks.encoding import Encoded

METRICS = {
    "classification": ("accuracy", "macro_f1", "loss"),
    "regression": ("pearson", "mse"),
    "causal-lm": ("loss", "perplexity"),
}
# Fields that the training loop has under the same name.
_SHARED = (
    "steps",
    "learning_rate",
    "seed",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "grad_accumulation",
    "gradient_checkpointing",
    "cache_frozen",
    "precision",
    "device",
    "dropout",
    "eval_every",
    "patience",
)


# On the command line, deltas are texts: --delta lora:rank=16 bitfit.
_TEXTS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="NAME[:FIELD=VALUE,...]",
    instance_from_str=tuple,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [str(item) for item in value],
)


@dataclass(frozen=True)
class FineTuning(Experiment):
    """Train deltas on a frozen model for a task, then evaluate on rows that training never saw."""

    kind: ClassVar[str] = "fine-tuning"

    model: str = "minilm-l6"
    """A packaged model's name, a local folder, or an id on the hub."""
    task: str = "movie"
    """A packaged task's name, or the path of a CSV, JSON Lines or Parquet file."""
    deltas: Annotated[tuple[Any, ...], _TEXTS, tyro.conf.arg(name="delta")] = ("lora",)
    """The deltas: texts such as lora:rank=16, or dictionaries. The head is added where needed."""
    seed: int = 0
    """Seed of the head, the controls, the batches and the dropout."""
    learning_rate: float | None = None
    """Peak learning rate; by default the recorded search's, the delta's or its category's."""
    steps: int = 300
    """Number of updates."""
    batch_size: int = 16
    """Examples per update, over all processes and slices."""
    max_length: int = 64
    """Longest text in tokens; longer ones are cut."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises."""
    schedule: str = "linear"
    """What the learning rate does after that: linear, cosine (both down to zero) or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay on the controls."""
    max_grad_norm: float | None = 1.0
    """The gradient is scaled down to this norm; none leaves it."""
    grad_accumulation: int = 1
    """Slices in which a batch is processed: less memory, the same update."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    cache_frozen: bool = False
    """Keep the hidden states below the lowest control after the first epoch: less time."""
    precision: str = "auto"
    """auto (bf16 where the hardware computes in it), fp32 or bf16."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dropout: bool = False
    """Whether the base model's own dropout acts during training."""
    pretrained: bool = True
    """False starts from a random model of the same architecture."""
    eval_every: int | None = None
    """Evaluate on validation rows after every so many steps."""
    patience: int | None = None
    """Stop after so many evaluations without a better one, and keep the best controls."""
    train_limit: int | None = None
    """Use only so many training rows."""
    eval_limit: int | None = None
    """Evaluate on at most so many rows."""
    evaluate_on: Literal["test", "validation"] = "test"
    """The rows of the final result. Choose models and rates by validation, never by test."""
    text_column: str = "text"
    """Column of the texts in a task file."""
    label_column: str = "label"
    """Column of the labels in a task file."""
    task_kind: Literal["classification", "regression", "causal-lm"] | None = None
    """What the labels of a task file are; inferred by default."""
    sequential: bool = False
    """Train the deltas one after another, each for all steps, the earlier ones frozen."""

    def __post_init__(self) -> None:
        """Check every field, expand the deltas' defaults and settle the learning rate."""
        deltas = self.deltas if isinstance(self.deltas, list | tuple) else (self.deltas,)
        if not deltas:
            raise InputError("fine-tuning needs at least one delta, such as lora or full")
        set_field = object.__setattr__
        set_field(self, "deltas", tuple(_expanded(delta) for delta in deltas))
        if self.learning_rate is None:
            set_field(self, "learning_rate", default_rate(self.model, self.task, self.deltas).value)
        for name in ("learning_rate", "max_grad_norm"):
            self._number(name, above=0.0)
        for name in ("warmup", "weight_decay"):
            self._number(name, least=0.0)
        if self.warmup > 1:
            raise InputError(f"warmup is {self.warmup}; expected a fraction of the steps, 0 to 1")
        counts = ("steps", "batch_size", "max_length", "grad_accumulation", "eval_every")
        for name in (*counts, "patience", "train_limit", "eval_limit"):
            self._count(name, least=1)
        self._count("seed", least=0)
        for name, value, options in (
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, ("auto", "fp32", "bf16")),
            ("device", self.device, ("auto", "cpu", "cuda")),
            ("split", self.evaluate_on, ("test", "validation")),
        ):
            if value not in options:
                raise unknown(name, str(value), options)
        if self.patience is not None and self.eval_every is None:
            raise InputError("patience counts evaluations: set eval_every too, for example to 50")
        if self.grad_accumulation > self.batch_size:
            raise InputError(
                f"grad_accumulation is {self.grad_accumulation}, but a batch has only "
                f"{self.batch_size} examples; choose at most batch_size slices"
            )

    def _number(self, name: str, above: float | None = None, least: float | None = None) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not number
            or not (value > above if above is not None else value >= (least or 0.0))
            or value == float("inf")
        ):
            bound = f"> {above:g}" if above is not None else f">= {least:g}"
            raise InputError(f"{name} is {value!r}; expected a finite number {bound}")
        object.__setattr__(self, name, float(value))

    def _count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}; expected a whole number >= {least}")

    def to_config(self) -> dict[str, Any]:
        """All fields as JSON values; the deltas with all their fields."""
        config = {f.name: getattr(self, f.name) for f in fields(self)}
        if not self.cache_frozen:  # a saving of time: a run without it keeps its identity
            del config["cache_frozen"]
        if not self.sequential:  # as in records from before there were stages
            del config["sequential"]
        return config | {"deltas": [dict(delta) for delta in self.deltas]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FineTuning:
        """The experiment of a record's configuration."""
        return cls(**config)

    @property
    def label(self) -> str:
        """Model, task, deltas and seed."""
        names = "+".join(delta["name"] for delta in self.deltas)
        return f"{self.model} {self.task} {names} seed {self.seed}"

    def digests(self) -> Digests:
        """Digests of the model and the task, without fetching them."""
        from deltacontrol.experiments import models, tasks

        columns = {"text_column": self.text_column, "label_column": self.label_column}
        task = tasks.digest(self.task, kind=self.task_kind, **columns)
        return Digests(models.digest(self.model), task)

    def execute(self, workspace: Workspace) -> Outcome:
        """Train and evaluate.

        The result holds the metrics on `evaluate_on` (None after a divergence), majority_share,
        num_trainable, num_total, num_head, trainable_share (controls without the head's, over
        num_total), trainable_share_with_head, the measures of `TrainingResult`, and
        best_validation_<metric> with best_validation_step where `eval_every` is set.

        Raises:
            InputError: From loading the model or the task, from attaching the deltas, or because
                the GPU's memory is too small.
        """
        import torch

        try:
            return self._execute(workspace)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the GPU's memory is too small for {self.label}; try a larger grad_accumulation, "
                "gradient_checkpointing, a smaller max_length or a smaller batch_size"
            ) from error

    def _execute(self, workspace: Workspace) -> Outcome:
        from deltacontrol.experiments.training import loop as training
        from deltacontrol.experiments.training import sequential as stages
        from deltacontrol.experiments.training.devices import autocast
        from deltacontrol.experiments.training.evaluation import MONITORED, evaluate

        setting = self.setting()
        task, encoded, model = setting.data, setting.encoded, setting.controlled

        def metrics(module: Any, split: str) -> dict[str, float]:
            return evaluate(module, encoded.eval_batches(split, self.batch_size), task.kind)

        monitor, larger_is_better = MONITORED[task.kind]
        train = stages.train_in_turn if self.sequential else training.train
        trained = train(
            model,
            _TrainingBatches(encoded, self.seed, self.batch_size),
            training.Settings(
                kind=task.kind,
                monitor=monitor,
                larger_is_better=larger_is_better,
                checkpoint_seconds=workspace.checkpoint_seconds,
                **{name: getattr(self, name) for name in _SHARED},
            ),
            evaluate=lambda module: metrics(module, "validation"),
            checkpoint_dir=workspace.folder,
            progress=workspace.progress,
        )
        measures = trained.measures
        if trained.status == "diverged":
            final = dict.fromkeys(METRICS[task.kind])
        else:
            with autocast(measures["precision"], measures["device"]):
                final = metrics(model, self.evaluate_on)
        best = {}
        if trained.best is not None:
            best[f"best_validation_{monitor}"] = trained.best["value"]
            best["best_validation_step"] = int(trained.best["step"])
        evaluated = encoded.split(self.evaluate_on)
        return Outcome(
            status=trained.status,
            result={
                **final,
                "majority_share": evaluated.majority_share if task.labels else None,
                "num_evaluated": len(evaluated),
                "num_labels": len(task.labels),
                **sizes(model),
                **best,
                "num_steps": len(trained.curve),
                **measures,
            },
            curve=trained.curve,
            controls=trained.controls,
            message=trained.message,
            earlier_seconds=trained.earlier_seconds,
        )

    def setting(self) -> Setting:
        """The model with its deltas before training, and the rows; made anew at every call."""
        return Setting(
            self.model,
            self.task,
            deltas=self.deltas,
            train_rows=self.train_limit,
            validation_rows=self.eval_limit,
            test_rows=self.eval_limit,
            max_length=self.max_length,
            pretrained=self.pretrained,
            seed=self.seed,
            text_column=self.text_column,
            label_column=self.label_column,
            task_kind=self.task_kind,
        )


def _expanded(delta: Any) -> dict[str, Any]:
    from deltacontrol.deltas import Delta, registry

    if isinstance(delta, str):
        return registry.parse(delta).to_dict()
    if isinstance(delta, Delta):
        plugins.adopt(type(delta))
        return registry.from_dict(delta.to_dict()).to_dict()  # known by its name from here on
    return registry.from_dict(delta).to_dict()


@dataclass(frozen=True)
class _TrainingBatches:
    encoded: Encoded
    seed: int
    batch_size: int

    def batch(self, step: int) -> dict[str, Any]:
        return self.encoded.training_batch(step, seed=self.seed, batch_size=self.batch_size)

    def examples(self, step: int) -> Any:
        import torch

        rows = self.encoded.training_rows(step, seed=self.seed, batch_size=self.batch_size)
        return torch.from_numpy(rows)


def sizes(model: DeltaModel) -> dict[str, Any]:
    """Numbers of parameters; a control belongs to the head where it replaces one of its own."""
    from deltacontrol.experiments.heads import head_controls

    trained = model.trainable()
    head = sum(trained[name].numel() for name in head_controls(model))
    trainable, total = model.num_trainable, model.num_total
    return {
        "num_trainable": trainable,
        "num_total": total,
        "num_head": head,
        "trainable_share": (trainable - head) / total,
        "trainable_share_with_head": trainable / total,
    }
