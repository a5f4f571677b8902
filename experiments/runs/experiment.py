"""What can be run and recorded: a configuration with an `execute`.

run id = first 16 hexadecimal digits of sha256(canonical JSON of
         {kind, config, model digest, data digest, and the digest of users' code if there is any})
"""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from deltacontrol.experiments.setting import Setting


@dataclass(frozen=True)
class Digests:
    """What an experiment read: SHA-256 digests of the model's and the data's files.

    Attributes:
        model: None for a model of the hub.
        data: None where there are no data.
        code: of users' own classes; None, and absent from records, where only this project's ran.
    """

    model: str | None = None
    data: str | None = None
    code: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """As a record keeps them."""
        code = {} if self.code is None else {"code": self.code}
        return {"model": self.model, "data": self.data, **code}


@dataclass(frozen=True)
class Workspace:
    """What a run may use.

    Attributes:
        folder: For checkpoints; what is there is continued from.
        progress: Whether to draw a progress bar.
        checkpoint_seconds: Time between checkpoints: what a killed run loses at most.
        store: The folder of the records, where a run that consists of runs records these too.
        pause_after: A step of a training behind which it is saved and paused (`PausedError`).
    """

    folder: Path
    progress: bool = True
    checkpoint_seconds: float = 30.0
    store: Path | None = None
    pause_after: int | None = None


class PausedError(Exception):
    """A training stands still where its workspace says, saved, and is no failure.

    Attributes:
        metrics: of its model on validation rows.
    """

    def __init__(self, metrics: Mapping[str, float]) -> None:
        super().__init__("the training is paused")
        self.metrics = dict(metrics)


class SeparatelyError(Exception):
    """Experiments cannot share a pass; the text is the reason."""


@dataclass(frozen=True)
class Outcome:
    """What a run hands back.

    Attributes:
        status: "completed", "early_stopped", "diverged", or another word of the experiment.
        result: JSON-compatible numbers and words; a non-finite number is stored as null.
        curve: One row per step.
        controls: Named tensors to keep, or None.
        message: What happened, in a sentence, where the status alone does not say it.
        earlier_seconds: Time spent by earlier, interrupted attempts at this run.
    """

    status: str
    result: dict[str, Any]
    curve: pd.DataFrame
    controls: dict[str, torch.Tensor] | None = None
    message: str = ""
    earlier_seconds: float = 0.0


class Experiment(ABC):
    """A frozen dataclass that can be run and recorded; its fields are its configuration.

    Attributes:
        kind: names the class in its records.
        younger: fields that records of before they existed lack: left out of the configuration
            while they have their default, so that such a run keeps its identity.
        in_full: fields that hold a delta, as text, dictionary or object; the configuration has
            them with all of their own fields.
    """

    kind: ClassVar[str]
    younger: ClassVar[tuple[str, ...]] = ()
    in_full: ClassVar[tuple[str, ...]] = ()

    def to_config(self) -> dict[str, Any]:
        """The fields as JSON-compatible values; equal experiments give equal values."""
        config = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if not (f.name in self.younger and value == f.default):
                config[f.name] = _in_full(value) if f.name in self.in_full else _plain(value)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The experiment of a record's configuration.

        Raises:
            InputError: an entry is no field of this kind, or has a value that is refused.
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in config:
            if name not in known:
                raise unknown(f"field of the experiment {cls.kind}", name, known)
        return cls(**{name: _frozen(value) for name, value in config.items()})

    @abstractmethod
    def execute(self, workspace: Workspace) -> Outcome:
        """Run, using `workspace.folder` for anything a later attempt may continue from."""

    def company(self) -> Mapping[str, Any] | None:
        """What experiments have to share so that one pass may serve them; None is alone."""
        return None

    @classmethod
    def execute_together(
        cls, experiments: Sequence[Self], workspaces: Sequence[Workspace]
    ) -> list[Outcome | PausedError]:
        """Run several of one `company` in one pass, each in its workspace.

        Raises:
            SeparatelyError: that is not possible after all; run them one after another.
        """
        raise SeparatelyError(f"{cls.kind} runs share nothing")

    def digests(self) -> Digests:
        """Digests of the fields ``model`` and ``task``, where there are such, without fetching."""
        from deltacontrol.experiments import models, tasks

        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        model, task = given.get("model"), given.get("task")
        columns = {name: given[name] for name in ("text_column", "label_column") if name in given}
        return Digests(
            None if model is None else models.digest(model),
            None if task is None else tasks.digest(task, kind=given.get("task_kind"), **columns),
        )

    def code(self) -> str | None:
        """Digest of the users' own classes: the experiment's, and deltas and solvers that it names.

        None where there are none.
        """
        kinds: set[type] = {type(self)}
        if "torch" in sys.modules:  # else no class of a delta has been defined
            from deltacontrol.deltas import registry
            from deltacontrol.theory.solvers import registry as solver_registry

            kinds |= registry.users_own(self.to_config())
            kinds |= solver_registry.users_own(self.to_config())
        return code_digest(kinds)

    @property
    def label(self) -> str:
        """A few words that name the run to a person: what it is of, and its seed."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        words = [self.kind.replace("-", " ")]
        for name in ("solver", "optimiser", "model", "task", "delta", "deltas", "seed"):
            value = given.get(name)
            if value is not None:
                words.append(f"seed {value}" if name == "seed" else _short(value))
        return " ".join(words)

    @classmethod
    def digests_now(cls, config: Mapping[str, Any]) -> Digests:
        """Digests, as they are today, of what a recorded configuration rests on."""
        return digests_of(cls.from_config(config))

    @classmethod
    def setting_of(cls, config: Mapping[str, Any], result: Mapping[str, Any]) -> Setting:
        """The setting of a recorded run, its controls at their start.

        Raises:
            InputError: a run of this kind leaves no model.
        """
        raise InputError(
            f"a run of kind {cls.kind!r} leaves no model; a fine-tuning, a solve and an imported "
            "adapter do"
        )


def _plain(value: Any) -> Any:
    """As JSON has it: tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    """As a frozen dataclass has it: lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _in_full(value: Any) -> Any:
    from deltacontrol.deltas.registry import delta_of  # imports torch

    if isinstance(value, list | tuple):
        return [_in_full(item) for item in value]
    return _plain(delta_of(value).to_dict())


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_short, value))
    return str(value["name"]) if isinstance(value, Mapping) else str(value)


def code_digest(kinds: Iterable[type]) -> str | None:
    """One digest of the texts of those classes that are users' own; None where none is.

    Raises:
        InputError: from `plugins.digest`.
    """
    found = sorted({digest for kind in kinds if (digest := plugins.digest(kind)) is not None})
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if found else None


def digests_of(experiment: Experiment) -> Digests:
    """Everything beside its configuration that decides an experiment's result."""
    return replace(experiment.digests(), code=experiment.code())


def canonical_json(value: Any) -> str:
    """One text per value: keys sorted, no spaces, tuples as lists, no NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"a configuration must be finite JSON values: {error}") from error


def run_id(kind: str, config: Mapping[str, Any], digests: Digests) -> str:
    """First 16 hexadecimal digits of the SHA-256 of everything that decides the result."""
    identity = {"kind": kind, "config": dict(config), **digests.to_dict()}
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
