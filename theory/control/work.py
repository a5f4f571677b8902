"""How much work a computation is, counted in steps of the dynamics.

The unit is one step ``f_t`` passed once: evaluated, or differentiated in one direction, forward or
backward. `ControlProblem` and `Linearisation` count what passes through them, so that methods as
different as gradient descent and Newton's can be compared without a clock:

    rollout 1 per step, backward sweep 1, tangent 1, adjoint 1, a dense Jacobian one per row,
    a product with the Hessian of ``J`` 3 (tangent, second derivative, adjoint).

A gradient of ``J`` is thus two sweeps over all steps, and so is a Gauss-Newton product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["Meter", "count", "metered"]


@dataclass
class Meter:
    """A running count.

    Attributes:
        steps: the number of steps that were passed since the meter began.
    """

    steps: int = 0


_running: ContextVar[tuple[Meter, ...]] = ContextVar("running", default=())


@contextmanager
def metered() -> Iterator[Meter]:
    """Count the work inside the block; meters may be nested, each counts all.

    Example:
        >>> with metered() as meter:
        ...     count(3)
        >>> meter.steps
        3
    """
    meter = Meter()
    token = _running.set((*_running.get(), meter))
    try:
        yield meter
    finally:
        _running.reset(token)


def count(steps: int) -> None:
    """Add to every meter that runs."""
    for meter in _running.get():
        meter.steps += steps
