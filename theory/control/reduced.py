"""Systems made of another one: some of its steps with few controls, and its expansion.

`ReducedDynamics` takes the steps from one on, each with a control in a subspace of its own:

    x_{t+1} = f_{s+t}(x_t, o_t + P_t z_t),     z_t the new control.

`AffineDynamics` replaces each step by its first-order expansion along a trajectory:

    x_{t+1} = y_{t+1} + A_t (x_t - y_t) + B_t (u_t - v_t),

with the trajectory ``y`` of the controls ``v``. Its second derivatives are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltacontrol.theory.control.dynamics import Dynamics
from deltacontrol.theory.errors import InputError

__all__ = ["AffineDynamics", "ReducedDynamics"]


class ReducedDynamics(Dynamics):
    """The steps ``f_s, f_{s+1}, ...`` of a system with controls ``u_{s+t} = o_t + P_t z_t``.

    Args:
        dynamics: the system.
        first: ``s``.
        offsets: ``o_t``, ``(m_{s+t},)`` each.
        bases: ``P_t``, ``(m_{s+t}, k_t)`` each.

    Raises:
        InputError: the offsets or bases do not fit the steps from ``s`` on.
    """

    def __init__(
        self, dynamics: Dynamics, first: int, offsets: Sequence[Tensor], bases: Sequence[Tensor]
    ) -> None:
        sizes = list(dynamics.control_sizes[first:])
        given = [len(o) for o in offsets], [len(P) for P in bases]
        if not 0 <= first < dynamics.horizon or given != (sizes, sizes):
            raise InputError(
                f"offsets of sizes {given[0]} and bases of {given[1]} rows from step {first} on; "
                f"expected a step of 0 to {dynamics.horizon - 1} and the sizes {sizes}"
            )
        self.dynamics, self.first = dynamics, first
        self.offsets, self.bases = tuple(offsets), tuple(bases)
        self.horizon = len(sizes)
        self.control_sizes = tuple(P.shape[1] for P in bases)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``f_{s+t}(x, o_t + P_t u)``, ``u`` of shape ``(k_t,)``."""
        return self.dynamics.step(self.first + t, x, self.offsets[t] + self.bases[t] @ u)


class AffineDynamics(Dynamics):
    """Steps ``y_{t+1} + A_t (x - y_t) + B_t (u - v_t)``; states may have any shape.

    Args:
        states: ``y_0, ..., y_L``.
        controls: ``v_t``, ``(m_t,)`` each.
        A: ``(n_{t+1}, n_t)`` each, of the flattened states.
        B: ``(n_{t+1}, m_t)`` each.

    Raises:
        InputError: the shapes do not fit each other.
    """

    def __init__(
        self,
        states: Sequence[Tensor],
        controls: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
    ) -> None:
        sizes, self.control_sizes = [x.numel() for x in states], tuple(len(v) for v in controls)
        self.horizon = len(self.control_sizes)
        steps = list(zip(sizes[1:], sizes, self.control_sizes, strict=False))
        found = [tuple(a.shape) for a in A], [tuple(b.shape) for b in B]
        if len(sizes) != self.horizon + 1 or found != (
            [(new, old) for new, old, _ in steps],
            [(new, m) for new, _, m in steps],
        ):
            raise InputError(
                f"A of shapes {found[0]} and B of shapes {found[1]} for states of {sizes} entries "
                f"and controls of {list(self.control_sizes)}; expected one (next, present) and one "
                "(next, control) for each step"
            )
        self.states, self.controls = tuple(states), tuple(controls)
        self.A, self.B = tuple(A), tuple(B)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """The expansion of step ``t``; ``u`` of shape ``(m_t,)``."""
        old, new = self.states[t], self.states[t + 1]
        change = self.A[t] @ (x - old).reshape(-1) + self.B[t] @ (u - self.controls[t])
        return new + change.reshape(new.shape)
