"""A delta: the configuration of a control law, and how it is laid on a frozen model.

A delta is a frozen dataclass. ``build(host)`` creates its controllers at the sites that it targets.
Everything it may do to a model goes through :class:`deltacontrol.deltas.editing.host.Host`, which
records how to undo it. A new method is one file in ``deltas/methods``; it is found by itself.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_type_hints

from deltacontrol.theory import parsing
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.deltas.editing.host import Host

Category = Literal["addition", "specification", "reparametrisation", "combined"]
# The middle one of the rates of each category's methods when this was written.
CATEGORY_RATES: dict[Category, float] = {
    "addition": 1e-3,
    "specification": 2e-4,
    "reparametrisation": 3e-3,
    "combined": 1e-3,
}
# Of the numbers of a delta: those of a model in float32 are not larger.
LARGEST = 3.4e38


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
        unstackable: why copies cannot be trained in one pass, where that is so on every model; what
            depends on the model is found when the copies are made.
        default_rate: peak learning rate where no search is recorded for (model, task, delta): about
            a tenth of the least that was best in short runs of a small model, as longer runs and
            larger models want less. By default that of the category, `CATEGORY_RATES`.
        searched_rates: what the search of learning rates tries; by default 1, 3, 10 and 30 times
            the default rate.
        look: label, colour and marker in figures, and where it stands in their legends (1 is
            first). By default a spare colour and marker, after those that have a place.
        acts_on: where it acts, in a few words for a table, if it has no sites to choose.

    What figures read of these, they read from the text of the file, without importing it: write
    name, category, law, look and acts_on as literals.
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
    unstackable: ClassVar[str] = ""
    default_rate: ClassVar[float | None] = None
    searched_rates: ClassVar[tuple[float, ...]] = ()
    look: ClassVar[tuple[str, str, str] | tuple[str, str, str, int] | None] = None
    acts_on: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the types of the fields be checked before the class's own checks."""
        super().__init_subclass__(**options)
        own: Callable[[Delta], None] | None = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @wraps(own)
        def checked(self: Delta, *given: Any) -> None:  # with the values of InitVar fields
            self._check_types()
            own(self, *given)

        cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Check the types of the fields."""
        self._check_types()

    @abstractmethod
    def build(self, host: Host) -> None:
        """Create the controllers on the model of ``host``; raises InputError before any change."""

    @abstractmethod
    def num_parameters(self, host: Host) -> int:
        """Number of parameters by the method's formula, from the model's dimensions alone."""

    @property
    def num_positions(self) -> int:
        """Positions of the model that the delta takes from the text."""
        return 0

    @classmethod
    def example(cls) -> Delta:
        """An instance that fits any model, where all methods are compared; by default its defaults.

        Only a method that says nothing without its options gives another one.

        Raises:
            InputError: a field has no default.
        """
        known = parsing.fields_of(cls).items()
        needed = [name for name, (_, default) in known if default is dataclasses.MISSING]
        if needed:
            raise InputError(
                f"{cls.name}: {', '.join(needed)} has no default; give it one, or define the class "
                "method `example`, which makes the instance that is compared with other methods."
            )
        return cls()

    @classmethod
    def rate(cls) -> float:
        """The method's default learning rate, or that of its category."""
        return CATEGORY_RATES[cls.category] if cls.default_rate is None else cls.default_rate

    @classmethod
    def rates_to_search(cls) -> tuple[float, ...]:
        """What the search of learning rates tries, increasing."""
        return cls.searched_rates or tuple(float(f"{k * cls.rate():.3g}") for k in (1, 3, 10, 30))

    def _check_types(self) -> None:
        for field, kind in _field_types(type(self)).items():
            given = getattr(self, field)
            value = parsing.checked(self.name, field, given, kind)
            if isinstance(value, float) and abs(value) > LARGEST:
                raise InputError(
                    f"{self.name}: {field} is {value:g}; expected a number that float32 has, at "
                    f"most {LARGEST:g}."
                )
            if field == "seed" and isinstance(value, int) and not 0 <= value < 2**63:
                raise InputError(f"{self.name}: seed is {value}; expected 0 to 2^63 - 1.")
            if field.endswith("std") and isinstance(value, float) and value < 0:
                raise InputError(f"{self.name}: {field} is {value:g}; expected 0 or more.")
            if value is not given:
                object.__setattr__(self, field, value)

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


@cache
def _field_types(kind: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(kind):
        return {}
    try:
        hints = get_type_hints(kind)
    except NameError:  # a user's class, with a type that is imported for checkers alone
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
