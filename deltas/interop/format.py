"""What a peft format has to say: which deltas it is, and which tensor of the file is which control.

One `Plan` serves both directions. Import makes it from the file's configuration, attaches its
deltas and fills their controls through its slots; export makes it from the configuration that it is
about to write and reads the same slots backwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.fields import Fields
from deltacontrol.theory.errors import InputError


def _one(value: Tensor) -> tuple[Tensor, ...]:
    return (value,)


def _only(values: Sequence[Tensor]) -> Tensor:
    (value,) = values
    return value


@dataclass(frozen=True)
class Slot:
    """One tensor of the file, and the controls that it holds.

    Attributes:
        key: its key in the file.
        shape: its shape in the file.
        controls: names of the controls, without the delta's namespace.
        split: from the tensor to the controls.
        join: from the controls to the tensor.
    """

    key: str
    shape: tuple[int, ...]
    controls: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = _one
    join: Callable[[Sequence[Tensor]], Tensor] = _only


@dataclass
class Plan:
    """Deltas, and how the file fills them.

    Attributes:
        deltas: what to attach.
        slots: the tensors of the file.
        paths: modules that the format's own controllers act at.
        constants: tensors that the file may hold, and what they must be.
        required: the constants that the file must hold.
        copies: tensors that the file may hold once more, and the key of the first.
        unused: tensors that the file may hold and that neither library uses.
        values: controls that follow from the configuration alone.
    """

    deltas: list[Delta]
    slots: list[Slot]
    paths: list[str]
    constants: dict[str, Tensor] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Attached:
    """A delta on a model, as export sees it.

    Attributes:
        delta: the configuration.
        controls: its state, without the namespace.
        tree: its controllers, without the namespace.
    """

    delta: Any
    controls: Mapping[str, Tensor]
    tree: nn.Module


@dataclass
class Description:
    """Deltas in peft's words.

    Attributes:
        config: fields of the configuration; those at their default may be left out.
        controls: what the slots of this configuration's plan read.
        paths: modules that the format's own controllers act at.
    """

    config: dict[str, Any]
    controls: dict[str, Tensor]
    paths: list[str] = field(default_factory=list)


class Format(ABC):
    """One peft_type.

    Class attributes:
        peft_type: its name in the file.
        fields: what its configuration may hold.
        writes: the deltas that it can hold.
        root: what stands before a module's path in the file.
        bias_word: the value of ``bias`` for the biases of the targeted modules; None without bias.
    """

    peft_type: ClassVar[str]
    fields: ClassVar[Fields]
    writes: ClassVar[tuple[type[Delta], ...]]
    root: ClassVar[str] = "base_model.model."
    bias_word: ClassVar[str | None] = None

    @abstractmethod
    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """The plan of a checked configuration; raises InputError where it cannot be reproduced."""

    @abstractmethod
    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """Deltas of the types ``writes`` in peft's words; InputError where it has none."""


def shared(attached: Sequence[Attached], name: str) -> Any:
    """The value of a field that peft has once for all modules.

    Raises:
        InputError: it differs between the deltas.
    """
    values = list(dict.fromkeys(getattr(item.delta, name) for item in attached))
    if len(values) > 1:
        raise InputError(
            f"the deltas have {name} {' and '.join(map(repr, values))}, but peft has one for all; "
            "export them one at a time."
        )
    return values[0]
