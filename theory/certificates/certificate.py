"""What a certificate says, what of it is proved, and how it prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from deltacontrol.theory.control.problem import Controls
from deltacontrol.theory.display import html_table, text_table

__all__ = ["Certificate", "Kind", "Remainder", "Tightness"]

# A bound that is this close to nothing, relative to max(1, |J|), is as good as zero.
_NOTHING = 1e-9
_EXACT = 1e-6


class Kind(StrEnum):
    """What the bounds are of.

    ``QUADRATIC`` and ``CONVEX`` are the problem itself, and its bounds are proved.
    ``LINEARISED`` is the linearisation of its outputs, of which they are proved.
    """

    QUADRATIC = "quadratic"
    CONVEX = "convex"
    LINEARISED = "linearised"


class Tightness(StrEnum):
    """How far the upper bound is from the lower one.

    ``EXACT`` is within a millionth of it, ``TIGHT`` within a factor of 2.
    """

    EXACT = "exact"
    TIGHT = "tight"
    LOOSE = "loose"
    VACUOUS = "vacuous"


@dataclass(frozen=True)
class Remainder:
    """An estimate of what a linearisation leaves out. It is no bound.

    Attributes:
        found: the largest remainder at any point of the ball that was looked at. What is nowhere
            seen may be larger.
        bent: ``1/2 kappa r^2`` of the remainder's strongest curvature at the controls, estimated by
            Lanczos steps; elsewhere in the ball the curvature may be stronger.
        curvature: ``kappa``.
        points: how many points of the ball were looked at.
    """

    found: float
    bent: float
    curvature: float
    points: int

    @property
    def value(self) -> float:
        """The larger of the two estimates."""
        return max(self.found, self.bent)


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """What controls within a radius can still gain: ``J(u) - min J`` over the ball.

    Attributes:
        kind: what `upper` and `lower` are of: the problem, or its linearisation.
        objective: ``J(u)`` of the controls that are certified.
        upper: no controls in the ball gain more; proved, whatever the inner solver did.
        lower: so much is gained by a point of the ball, which the inner solver found.
        attained: so much `controls` gain in the problem itself; equal to `lower` where that is of
            the problem itself.
        controls: controls in the ball; those given where none was found that gain.
        radius: of the ball, in the Euclidean norm of all controls.
        multiplier: ``lambda`` of the ball: the upper bound grows like ``lambda r`` with the radius.
        curvature: ``sigma``, which the second derivative along any line is not below.
        dual: ``a``, where the problem or its linearisation is a loss of affine outputs, of their
            shape; with it the bound can be computed anew.
        remainder: of the linearisation, where `upper` is of that.
        ceiling: where `upper` is of a linearisation, what controls in the ball can gain at most in
            the problem itself, proved by the loss alone, which is never negative.
    """

    kind: Kind
    objective: float
    upper: float
    lower: float
    attained: float
    controls: Controls
    radius: float
    multiplier: float
    curvature: float
    dual: Tensor | None = None
    remainder: Remainder | None = None
    ceiling: float = math.inf

    @property
    def proved(self) -> bool:
        """Whether `upper` is proved of the problem itself."""
        return self.kind is not Kind.LINEARISED

    @property
    def estimate(self) -> float:
        """What controls can gain in the problem itself: `upper`, proved, where that is of it.

        Else `upper` and the estimated remainder, or the `ceiling` where that is lower.
        """
        if self.remainder is None:
            return self.upper
        return min(self.upper + self.remainder.value, self.ceiling)

    @property
    def tightness(self) -> Tightness:
        """How `upper` compares with `lower`."""
        if math.isinf(self.upper):
            return Tightness.VACUOUS
        nothing = _NOTHING * max(1.0, abs(self.objective))
        if self.upper <= self.lower * (1 + _EXACT) + 1e-3 * nothing:
            return Tightness.EXACT
        return Tightness.TIGHT if self.upper <= 2 * self.lower + nothing else Tightness.LOOSE

    def _rows(self) -> dict[str, str]:
        close = (
            f"{self.tightness}: "
            + {
                Tightness.EXACT: "both are equal",
                Tightness.TIGHT: "within a factor of 2",
                Tightness.LOOSE: "more than a factor of 2 apart",
                Tightness.VACUOUS: "no bound; take a finite radius",
            }[self.tightness]
        )
        rows = {
            "of": {
                Kind.QUADRATIC: "the problem, which is quadratic",
                Kind.CONVEX: "the problem, a convex loss of affine outputs",
                Kind.LINEARISED: "the linearised problem, a convex loss of affine outputs",
            }[self.kind],
            "J": f"{self.objective:.6g}",
            "radius": f"{self.radius:.6g}",
            "can gain": f"at most {self.upper:.6g}, proved",
            "gained": f"{self.lower:.6g}, by a control that was found",
            "tightness": close,
        }
        if self.remainder is None:
            return rows
        remainder = self.remainder
        return rows | {
            "remainder": f"{remainder.value:.6g}, an estimate and not a bound: "
            f"{remainder.found:.3g} at the worst of {remainder.points} points, "
            f"{remainder.bent:.3g} by the curvature",
            "problem, proved": f"at most {self.ceiling:.6g}, as its loss is not negative",
            "problem, estimate": f"at most {self.estimate:.6g}, if the remainder is nowhere larger",
            "problem, gained": f"{self.attained:.6g}, by a control that was found",
        }

    def __repr__(self) -> str:
        """The bounds, what is proved of what, and the remainder, one a line."""
        return text_table("Certificate", self._rows())

    def _repr_html_(self) -> str:
        """The same as a table."""
        return html_table("Certificate", self._rows())
