"""Fine-tuning: deltas on a frozen model, trained for a task and evaluated, as a configuration.

What it does stands in `deltacontrol.experiments.training.execution`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import tyro

from deltacontrol.experiments import tracking
from deltacontrol.experiments.runs.experiment import (
    Experiment,
    Outcome,
    PausedError,
    SeparatelyError,
    Workspace,
)
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.tasks.templates import EXAMPLE, Template, texts_of
from deltacontrol.experiments.training.rates import default_rate
from deltacontrol.experiments.training.settings import (
    ADAMW,
    METRICS,
    Options,
    check_count,
)
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError, unknown

# On the command line, deltas are texts: --delta lora:rank=16 bitfit.
_TEXTS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="NAME[:FIELD=VALUE,...]",
    instance_from_str=tuple,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [str(item) for item in value],
)


@dataclass(frozen=True)
class Subject(Experiment):
    """What is trained: a model and its task, with deltas."""

    in_full: ClassVar[tuple[str, ...]] = ("deltas",)

    model: str = "minilm-l6"
    """A packaged model's name, one of the family (family/encoder-192, see `deltacontrol pretrain`),
    a local folder, or an id on the hub."""
    task: str = "movie"
    """A packaged task's name, or the path of a file (CSV, TSV, JSON Lines, Parquet, text)."""
    deltas: Annotated[tuple[Any, ...], _TEXTS, tyro.conf.arg(name="delta")] = ("lora",)
    """The deltas: texts such as lora:rank=16, or dictionaries. The head is added where needed."""
    seed: int = 0
    """Seed of the head and the controls."""
    max_length: int = 64
    """Longest text in tokens; longer ones are cut."""
    pretrained: bool = True
    """False starts from a random model of the same architecture."""
    text_column: str = "text"
    """Column of the texts in a task file."""
    label_column: str = "label"
    """Column of the labels in a task file."""
    task_kind: Literal["classification", "regression", "causal-lm"] | None = None
    """What the labels of a task file are; inferred by default."""

    def __post_init__(self) -> None:
        """Expand the deltas' defaults."""
        deltas = self.deltas if isinstance(self.deltas, list | tuple) else (self.deltas,)
        if not deltas:
            raise InputError("fine-tuning needs at least one delta, such as lora or full")
        object.__setattr__(self, "deltas", tuple(_expanded(delta) for delta in deltas))
        check_count(self, "max_length", least=1)
        check_count(self, "seed", least=0)

    @property
    def label(self) -> str:
        """Model, task, deltas and seed."""
        names = "+".join(delta["name"] for delta in self.deltas)
        return f"{self.model} {self.task} {names} seed {self.seed}"

    def setting(self, **rows: Any) -> Setting:
        """The model with its deltas before training, and the rows; made anew at every call.

        Args:
            rows: further fields of the setting, such as ``train_rows``.
        """
        return Setting(
            self.model,
            self.task,
            deltas=self.deltas,
            max_length=self.max_length,
            pretrained=self.pretrained,
            seed=self.seed,
            text_column=self.text_column,
            label_column=self.label_column,
            task_kind=self.task_kind,
            **rows,
        )


LARGEST_RATE = 1e30
WEIGHTS = ("float32", "bfloat16", "nf4", "int8")


@dataclass(frozen=True)
class FineTuning(Options, Subject):
    """Train deltas on a frozen model for a task, then evaluate on rows that training never saw.

    An optimiser of torch trains on small batches. A solver of the full-batch control problem takes
    all training rows at once (`train_limit` of them), in float64 unless the precision is fp32, and
    at most `steps` iterations; J is then the mean loss with the running cost weight_decay/2 ‖u‖².
    """

    kind: ClassVar[str] = "fine-tuning"
    younger: ClassVar[tuple[str, ...]] = (
        *("cache_frozen", "sequential", "optimiser", "weights", "shots", "compile"),
        *("template", "verbaliser"),
    )

    batch_size: int = 16
    """Examples per update, over all processes and slices."""
    train_limit: int | None = None
    """Use only so many training rows."""
    shots: int | None = None
    """Train on so many rows of each class and validate on as many, drawn by the seed (few-shot)."""
    template: str | None = None
    """A sentence around each text in which a word tells its class, without a head: for a masked
    language model "{text} It was [MASK].", for a causal one "{text} It was"; pairs have {text_pair}
    too."""
    verbaliser: tuple[str, ...] = ()
    """The word of each class, of one token, such as negative=terrible positive=great."""
    eval_limit: int | None = None
    """Evaluate on at most so many rows."""
    evaluate_on: Literal["test", "validation"] = "test"
    """The rows of the final result. Choose models and rates by validation, never by test."""
    sequential: bool = False
    """Train the deltas one after another, each for all steps, the earlier ones frozen."""
    weights: Literal["float32", "bfloat16", "nf4", "int8"] = "float32"
    """How the frozen weights are kept: nf4 (QLoRA) and int8 (LLM.int8) quantise the linear maps.
    Beside weights in bfloat16 the controls are trained in float32 and rounded at the end."""

    def __post_init__(self) -> None:
        """Check every field, expand the deltas' defaults and settle the learning rate."""
        super().__post_init__()
        if self.learning_rate is None and self.optimiser == ADAMW:
            rate = default_rate(self.model, self.task, self.deltas).value
            object.__setattr__(self, "learning_rate", rate)
        self.check()
        for name in ("batch_size", "train_limit", "eval_limit", "shots"):
            check_count(self, name, least=1)
        if self.shots is not None and self.train_limit is not None:
            raise InputError(
                "shots and train_limit both say how many rows are trained on; give one"
            )
        if self.template is not None or self.verbaliser:
            object.__setattr__(self, "verbaliser", self._template().verbaliser)
        if self.evaluate_on not in ("test", "validation"):
            raise unknown("split", str(self.evaluate_on), ("test", "validation"))
        if self.weights not in WEIGHTS:
            raise unknown("kind of weights", str(self.weights), WEIGHTS)
        if self.weights == "bfloat16" and self.precision != "bf16":
            raise InputError(
                f"weights in bfloat16 are computed with in bfloat16, got precision {self.precision}"
                "; give precision bf16 too"
            )
        for name in ("batch_size", "grad_accumulation", "steps", "seed", "max_length"):
            if getattr(self, name) is None:
                raise InputError(f"{name} is None; expected a whole number")
        if (self.learning_rate or 0.0) > LARGEST_RATE:
            raise InputError(
                f"learning_rate is {self.learning_rate:g}, with which float32 cannot make a step; "
                f"expected at most {LARGEST_RATE:g}, and mostly less than 1"
            )
        if self.grad_accumulation > self.batch_size:
            raise InputError(
                f"grad_accumulation is {self.grad_accumulation}, but a batch has only "
                f"{self.batch_size} examples; choose at most batch_size slices"
            )
        if self.solver() is not None:
            self._check_full_batch()
        elif self.learning_rate is None:
            raise InputError(
                f"the known learning rates are those of {ADAMW}; give a learning_rate for "
                f"{self.optimiser}"
            )

    def _template(self) -> Template:
        """The template with its verbaliser; raises where one of them is missing or wrong."""
        if self.template is None or not self.verbaliser:
            lacking, other = "template", "verbaliser"
            if self.template is not None:
                lacking, other = other, lacking
            raise InputError(
                f"there is a {other} and no {lacking}; give both, such as template "
                f"{EXAMPLE[0]!r} and verbaliser {EXAMPLE[1]}"
            )
        return Template(self.template, texts_of(self.verbaliser))

    def _check_full_batch(self) -> None:
        """Refuse what would not be looked at."""
        batches = set(_DEFAULTS) - {"seed", "optimiser", "steps", "weight_decay", "precision"}
        wrong = sorted(n for n in batches if getattr(self, n) != _DEFAULTS[n] and n != "device")
        wrong += ["sequential"] * self.sequential
        wrong += ["weights"] * (self.weights != "float32")
        if wrong:
            raise InputError(
                f"{self.optimiser} solves the problem of all training rows at once, without "
                f"{', '.join(wrong)}; leave those as they are, or take {ADAMW}"
            )
        if self.precision == "bf16" or self.device == "cuda":
            raise InputError(
                f"{self.optimiser} computes on the CPU, in float64 (precision auto) or fp32; got "
                f"device {self.device} and precision {self.precision}"
            )

    @property
    def label(self) -> str:
        """Model, task, deltas and seed; the optimiser where it is not AdamW."""
        other = "" if self.optimiser == ADAMW else f" {self.optimiser}"
        return super().label + other

    def execute(self, workspace: Workspace) -> Outcome:
        """Train and evaluate.

        The result holds the metrics on `evaluate_on` (None after a divergence), majority_share,
        num_trainable, num_total, num_head, trainable_share (controls without the head's, over
        num_total), trainable_share_with_head, the measures of `TrainingResult`, and
        best_validation_<metric> with best_validation_step where `eval_every` is set. That of a
        solver has its status, J and the residual instead of the validation's.

        Raises:
            InputError: From loading the model or the task, from attaching the deltas, because the
                solver cannot serve, or because the memory is too small.
        """
        import torch

        from deltacontrol.experiments.training.execution import fine_tune

        run = workspace.folder.name
        try:
            with tracking.following(run, self.label, self.to_config(), workspace.store) as trackers:
                return fine_tune(
                    self.setting(),
                    self,
                    workspace,
                    batch_size=self.batch_size,
                    evaluate_on=self.evaluate_on,
                    sequential=self.sequential,
                    trackers=trackers,
                )
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the GPU's memory is too small for {self.label}; try a larger grad_accumulation, "
                "gradient_checkpointing, a smaller max_length or a smaller batch_size"
            ) from error

    def company(self) -> Mapping[str, Any] | None:
        """All but seed and learning rate, where copies can be trained in one pass."""
        from deltacontrol.experiments.training.together.runs import company

        return company(self)

    @classmethod
    def execute_together(
        cls, experiments: Sequence[FineTuning], workspaces: Sequence[Workspace]
    ) -> list[Outcome | PausedError]:
        """Train and evaluate copies that differ in seed and learning rate."""
        from deltacontrol.deltas.ensemble.stack import UnstackableError
        from deltacontrol.experiments.training.together.runs import fine_tune_together

        try:
            return fine_tune_together(experiments, workspaces)
        except UnstackableError as error:
            raise SeparatelyError(str(error)) from error

    def setting(self, **rows: Any) -> Setting:
        """The model with its deltas before training, and the rows; made anew at every call."""
        exact = self.solver() is not None and self.precision == "auto"
        given = {
            "train_rows": self.train_limit,
            "validation_rows": None if self.shots else self.eval_limit,
            "test_rows": self.eval_limit,
            "shots": self.shots,
            "template": None if self.template is None else self._template(),
            "dtype": "float64" if exact else self.weights,
        }
        return super().setting(**(given | rows))

    @classmethod
    def setting_of(cls, config: Mapping[str, Any], result: Mapping[str, Any]) -> Setting:
        """The setting of a recorded run, its controls at their start.

        Raises:
            InputError: the result has no metric, so that the model's head is not known.
        """
        kind = next((k for k, names in METRICS.items() if names[0] in result), None)
        if kind is None:
            raise InputError("the run has no metric, so its kind of task is not known.")
        made: Any = {"model_kind": kind, "num_labels": result.get("num_labels")}
        return replace(cls.from_config(config).setting(), **made)


_DEFAULTS = {f.name: f.default for f in fields(Options)}


def _expanded(delta: Any) -> dict[str, Any]:
    from deltacontrol.deltas import Delta, registry

    if isinstance(delta, Delta):
        plugins.adopt(type(delta))
        delta = delta.to_dict()  # known by its name from here on
    return registry.delta_of(delta).to_dict()
