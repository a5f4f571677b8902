"""A delta: the configuration of a control law, and how it is laid on a frozen model.

A delta is a frozen dataclass. ``build(host)`` creates its controllers at the sites that it targets.
Everything it may do to a model goes through :class:`deltacontrol.deltas.editing.host.Host`, which
records how to undo it. A new method is one file in ``deltas/methods``; it is found by itself.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, get_args, get_type_hints

from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.deltas.editing.host import Host

Category = Literal["addition", "specification", "reparametrisation", "combined"]


class Delta(ABC):
    """A delta method (Ding et al. 2023, Section "Delta tuning").

    Class attributes:
        name: name on the command line.
        category: its class in the taxonomy of Ding et al.: addition, specification,
            reparametrisation; combined, where it is several at once.
        law: the control law, h the state at the site.
        reference: the paper, with the equation.
        bibtex: the same papers as BibTeX entries, for `deltacontrol.experiments.runs.citing`; may
        be empty.
        num_parameters_formula: the number of parameters as a formula.
        identity_at_start: the model's output is unchanged right after attaching.
        trains_head: it already controls the task head.
        unmergeable: why the controls cannot become part of the base weights; empty where they can.
    """

    name: ClassVar[str]
    category: ClassVar[Category]
    law: ClassVar[str]
    reference: ClassVar[str]
    bibtex: ClassVar[str] = ""
    num_parameters_formula: ClassVar[str]
    identity_at_start: ClassVar[bool] = True
    trains_head: ClassVar[bool] = False
    unmergeable: ClassVar[str] = ""

    @abstractmethod
    def build(self, host: Host) -> None:
        """Create the controllers on the model of ``host``; raises InputError before any change."""

    @abstractmethod
    def num_parameters(self, host: Host) -> int:
        """Number of parameters by the method's formula, from the model's dimensions alone."""

    @classmethod
    def example(cls) -> Delta:
        """An instance that fits any small model, for tests; by default with all defaults."""
        return cls()

    def _positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value < 1:
                raise InputError(f"{self.name}: {field} is {value}; expected at least 1.")

    def _one_of(self, *fields: str) -> None:
        hints = get_type_hints(type(self))
        for field in fields:
            value, allowed = getattr(self, field), get_args(hints[field])
            if value not in allowed:
                raise unknown(f"{field} of the delta {self.name}", str(value), allowed)

    def to_dict(self) -> dict:
        """Name and all fields, as plain JSON values."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
        return {"name": self.name, **plain}
