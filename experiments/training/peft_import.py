"""Adapters of peft as runs: imported, evaluated and recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from deltacontrol.experiments.runs.experiment import Digests, Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.experiments.models import ModelKind

# The head that a model needs for what peft calls a task.
_KINDS: dict[str, ModelKind] = {
    "SEQ_CLS": "classification",
    "CAUSAL_LM": "causal-lm",
    "FEATURE_EXTRACTION": "backbone",
}
_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")


@dataclass(frozen=True)
class ImportedAdapter(Experiment):
    """Attach a peft adapter to its base model and, where a task is given, evaluate it."""

    kind: ClassVar[str] = "peft-import"

    adapter: Path
    """Folder with adapter_config.json and adapter_model.safetensors, or an id on the hub."""
    model: str | None = None
    """The base model; by default the one that the adapter names."""
    task: str | None = None
    """Evaluate on this task: a packaged one's name, or a file of texts and labels."""
    evaluate_on: Literal["test", "validation"] = "test"
    """The rows that are evaluated."""
    eval_limit: int | None = None
    """Evaluate on at most so many rows."""
    batch_size: int = 16
    """Rows in a batch."""
    max_length: int = 64
    """Longest text in tokens; longer ones are cut."""
    text_column: str = "text"
    """Column of the texts in a task file."""
    label_column: str = "label"
    """Column of the labels in a task file."""
    task_kind: Literal["classification", "regression", "causal-lm"] | None = None
    """What the labels of a task file are; inferred by default."""

    def to_config(self) -> dict[str, Any]:
        """All fields as JSON values, the adapter by its content: its place does not matter."""
        read = self._read()
        return super().to_config() | {
            "adapter": _digest(self._folder),
            "model": self._model(),
            "delta": {"name": f"peft {read.config.get('peft_type')}"},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Not possible: a record knows the adapter by its content, not by its place.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a record of an imported adapter does not say where the adapter lay; import it from "
            "its folder with ImportedAdapter(adapter=...)"
        )

    @classmethod
    def digests_now(cls, config: Mapping[str, Any]) -> Digests:
        """Of the base model and the task: the adapter itself is in the configuration."""
        known = {f.name for f in fields(cls)} - {"adapter"}
        rest = {name: value for name, value in config.items() if name in known}
        return cls(adapter=Path(), **rest).digests()

    @property
    def label(self) -> str:
        """Model, task and adapter."""
        return f"{self._model()} {self.task or ''} {self.adapter}"

    def digests(self) -> Digests:
        """Digests of the base model and the task."""
        from deltacontrol.experiments import models, tasks

        columns = {"text_column": self.text_column, "label_column": self.label_column}
        data = tasks.digest(self.task, kind=self.task_kind, **columns) if self.task else None
        return Digests(models.digest(self._model()), data)

    def execute(self, workspace: Workspace) -> Outcome:
        """Import, and evaluate in float32 on the CPU.

        The result holds the deltas that the adapter is, numbers of parameters and, with a task, its
        metrics, majority_share, num_evaluated and num_labels.

        Raises:
            InputError: as `deltacontrol.deltas.interop.import_peft`, or from loading the model or
            the task.
        """
        import pandas as pd

        from deltacontrol.deltas.interop import import_peft
        from deltacontrol.experiments.models import fit
        from deltacontrol.experiments.training.evaluation import evaluate
        from deltacontrol.experiments.training.execution import sizes

        del workspace
        for name in ("batch_size", "eval_limit"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(f"{name} is {count}; expected a whole number >= 1")
        setting = self.setting()
        model = import_peft(self._folder, setting.base)
        result: dict[str, Any] = {
            "deltas": [delta.to_dict() for delta in model.deltas],
            "model_kind": setting.kind,
            "num_labels": setting.classes,
            **sizes(model),
        }
        if self.task and setting.kind == "classification" and result["num_head"]:
            # The adapter's head was trained on the classes that the base model names.
            fit.class_order(setting.base, setting.model, setting.data.labels, head_is_kept=True)
        other = getattr(setting.base, "other_head", "")
        if self.task and other and not result["num_head"]:
            raise InputError(
                f"the adapter holds no head, and its base has {other}: nothing was trained to tell "
                f"the labels of {self.task} apart. Name a base whose head was, or import without "
                "a task"
            )
        if self.task:
            rows = setting.split(self.evaluate_on)
            batches = rows.eval_batches(self.batch_size)
            result |= evaluate(model, batches, setting.data.kind)
            result["num_evaluated"] = len(rows)
            result["majority_share"] = rows.majority_share if setting.data.labels else None
        return Outcome("completed", result, pd.DataFrame({"step": []}), model.state())

    def setting(self) -> Setting:
        """The base model with the head that the task or else the adapter needs, and the rows."""
        return Setting(
            self._model(),
            self.task or None,
            validation_rows=self.eval_limit,
            test_rows=self.eval_limit,
            max_length=self.max_length,
            model_kind=None if self.task else self._kind(),
            num_labels=None if self.task else self._classes(),
            text_column=self.text_column,
            label_column=self.label_column,
            task_kind=self.task_kind,
        )

    @classmethod
    def setting_of(cls, config: Mapping[str, Any], result: Mapping[str, Any]) -> Setting:
        """The setting of a recorded import, its controls at their start."""
        return Setting(
            config["model"],
            config["task"] or None,
            deltas=result["deltas"],
            add_head=False,
            max_length=config["max_length"],
            text_column=config["text_column"],
            label_column=config["label_column"],
            task_kind=config["task_kind"],
            model_kind=result["model_kind"],
            num_labels=result["num_labels"],
        )

    @cached_property
    def _folder(self) -> Path:
        """Where the files are here, also of an adapter on the hub."""
        from deltacontrol.deltas import hub
        from deltacontrol.deltas.interop.adapter import FILES

        return hub.folder(self.adapter, FILES)

    def _read(self) -> Any:
        from deltacontrol.deltas.interop.adapter import read

        return read(self._folder)

    def _model(self) -> str:
        name = self.model or self._read().config.get("base_model_name_or_path")
        if not name:
            raise InputError(f"the adapter {self.adapter} names no base model; give one, --model.")
        return str(name)

    def _kind(self) -> ModelKind:
        """The head of the model, by the adapter's task or the class that it names."""
        from deltacontrol.deltas.interop.targets import task_of

        config = self._read().config
        mapping = config.get("auto_mapping") or {}
        task = (
            config.get("task_type")
            or task_of(str(mapping.get("base_model_class", "")))
            or task_of(self._class_of_base())
        )
        if task not in _KINDS:
            raise InputError(
                f"the adapter is for the task {task!r}, which needs another head than "
                f"{', '.join(sorted(_KINDS.values()))}; give the task to evaluate it on, or import "
                "it in Python with deltacontrol.deltas.interop.import_peft."
            )
        if task == "SEQ_CLS" and self._num_labels() == 1:
            return "regression"  # a reward model, for example
        return _KINDS[task]

    def _class_of_base(self) -> str:
        """The class that the base model was saved with; empty where it does not say."""
        from transformers import AutoConfig

        from deltacontrol.experiments import models

        try:
            found = AutoConfig.from_pretrained(
                models.resolve(self._model()).location, trust_remote_code=False
            )
        except (OSError, ValueError):  # what is wrong with it is said where it is loaded
            return ""
        return next(iter(found.architectures or ()), "")

    def _classes(self) -> int | None:
        """Classes of the head; None where it tells no classes apart."""
        return self._num_labels() if self._kind() == "classification" else None

    def _num_labels(self) -> int:
        """Rows of the head that the adapter holds; 2, as transformers has it, where it has none."""
        tensors = self._read().tensors
        heads = [v for k, v in tensors.items() if k.endswith(_HEADS) and k.startswith("base_model")]
        return len(heads[0]) if heads else 2


def _digest(folder: Path) -> str:
    """SHA-256 of both files, shortened."""
    from deltacontrol.deltas.interop.adapter import CONFIG, WEIGHTS

    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((Path(folder).expanduser() / name).read_bytes())
    return digest.hexdigest()[:16]
