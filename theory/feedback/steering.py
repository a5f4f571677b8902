"""Steering a few outputs to a target: the exact feedback law of low rank.

The states of a layered system take an additive control, ``x_{t+1} = f_t(x_t + u_t)``, and ``k``
outputs ``z = g(x_L)`` shall reach a target at the least effort,

    J = 1/2 (z - target)' W (z - target) + r/2 sum_t ||S_t u_t||^2,

where ``S_t`` selects the entries (say, the tokens) that the control may move. Linearised along a
trajectory ``(x_t, v_t)`` with the outputs ``z``, the cost to go has rank ``k``. With the adjoints

    a_L = (dg/dx)',   a_t = A_t' a_{t+1}        (n_t, k), one reverse sweep for each output,

it is, before the control of step ``t`` is chosen,

    V_t(x) = 1/2 (a_t'(x - x_t) + d_t)' M_t^{-1} (a_t'(x - x_t) + d_t),
    M_t = M_{t+1} + a_t' S_t a_t / r,   M_L = W^{-1},
    d_t = z - target - sum_{s>=t} a_s' v_s,

and the optimal law is ``u_t(x) = -1/r S_t a_t M_t^{-1} (a_t'(x - x_t) + d_t)``. It follows from the
Riccati recursion by the formula of Sherman, Morrison and Woodbury; ``M_t - W^{-1}`` is the output
controllability Gramian of the remaining layers over ``r``. No matrix is larger than ``k x k``.
``W = inf`` asks for the target exactly, at minimum energy. The trajectory's own control ``v_t``
enters ``d_t``, so that steering may be repeated around a steered trajectory (Gauss-Newton). Far
from the target that may cycle; a damping ``h`` in [0, 1) adds ``1/2 r h/(1-h) ||u_t - v_t||^2``
for each step to ``J``, which leaves the fixed points where they are. In the formulas ``r`` becomes
``r/(1-h)``, the last term of ``d_t`` gets the factor ``1-h``, and ``h v_t`` is added to the law.

Source: Bryson & Ho, *Applied Optimal Control*, 1975, sections 5.2 to 5.4; the rank statement as in
Liu, Chen & Theodorou, ICLR 2021, proposition 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.correction import AdditiveControl, StateFeedback
from deltacontrol.theory.linear.linearisation import Linearisation

__all__ = ["OutputSteering", "steer_output"]


@dataclass(frozen=True, eq=False)
class OutputSteering(StateFeedback):
    """The law ``u_t(x) = -1/r S_t a_t M_t^{-1} (a_t'(x - x_t) + d_t)``, per example.

    Attributes:
        adjoints: ``S_t a_t`` and None where the law does not act: ``(batch, k, *state)``, the state
            without its batch axis.
        full_adjoints: ``a_t``, of the same shapes; where ``S_t = I`` they are the same tensors.
        information: ``M_t``, ``(batch, k, k)``.
        response: ``M_t^{-1}``, a pseudo-inverse where too few controls are left for all outputs.
        miss: ``d_t``, ``(batch, k)``.
        states: the trajectory, ``x_t``, ``(batch, *state)``.
        control_cost: ``r``, or with damping ``r/(1-h)``.
        anchors: ``h v_t``, of the states' shapes, or None for zero.
        predicted: the outputs that the linear model predicts under the law, ``(batch, k)``.
        initial: the outputs of the trajectory, ``(batch, k)``.
    """

    adjoints: Sequence[Tensor | None]
    full_adjoints: Sequence[Tensor | None]
    information: Sequence[Tensor]
    response: Sequence[Tensor]
    miss: Sequence[Tensor]
    states: Sequence[Tensor]
    control_cost: float
    anchors: Sequence[Tensor | None]
    predicted: Tensor
    initial: Tensor

    @classmethod
    def of(
        cls,
        adjoints: Sequence[Tensor | None],
        states: Sequence[Tensor],
        outputs: Tensor,
        target: Tensor,
        *,
        weight: float | Tensor = math.inf,
        control_cost: float = 1.0,
        masks: Sequence[Tensor | None] | None = None,
        controls: Sequence[Tensor | None] | None = None,
        damping: float = 0.0,
    ) -> OutputSteering:
        """Accumulate ``M_t`` and ``d_t`` backward from the adjoints of a trajectory.

        Args:
            adjoints: ``a_t`` for each step, ``(batch, k, *state)``; None where no control acts.
            states: ``x_t`` before their control is added, ``(batch, *state)``.
            outputs: ``z`` of the trajectory, ``(batch, k)``.
            target: ``(batch, k)`` or ``(k,)``.
            weight: ``W``: a positive number, or a positive definite ``(k, k)``; ``inf`` is exact.
            control_cost: ``r > 0``.
            masks: the diagonal of ``S_t``, broadcast to ``x_t``, such as ``(batch, tokens, 1)``;
                None is I.
            controls: ``v_t`` of the trajectory, of the states' shapes; None is zero.
            damping: ``h``, how much of ``v_t`` is kept.

        Raises:
            InputError: for shapes that do not fit, a weight or control cost that is not positive,
                and outputs that no control can reach where the target must be met exactly.
        """
        if outputs.ndim != 2:
            raise InputError(
                f"the outputs have shape {tuple(outputs.shape)}; expected (batch, k), a row each"
            )
        batch, k = outputs.shape
        if target.shape not in ((batch, k), (k,)):
            raise InputError(
                f"the target has shape {tuple(target.shape)}; expected {(batch, k)} or {(k,)}"
            )
        if not control_cost > 0:
            raise InputError(f"control_cost is {control_cost}; expected a positive number")
        if not 0 <= damping < 1:
            raise InputError(f"damping is {damping}; expected a number in [0, 1)")
        control_cost = control_cost / (1 - damping)
        inverse = _inverse_weight(weight, outputs)
        M = inverse.expand(batch, k, k)
        goal = target.expand(batch, k)
        d = outputs - goal
        steps = range(len(adjoints))
        selected: list[Tensor | None] = []
        for t in steps:
            a, mask = adjoints[t], None if masks is None else masks[t]
            if a is not None and a.shape != (batch, k, *states[t].shape[1:]):
                raise InputError(
                    f"the adjoint of step {t} has shape {tuple(a.shape)}; expected "
                    f"{(batch, k, *states[t].shape[1:])}"
                )
            if a is not None and mask is not None:
                a = a * mask.to(a).expand(states[t].shape).unsqueeze(1)
            selected.append(a)
        information, miss = [M] * len(steps), [d] * len(steps)
        for t in reversed(steps):
            a, chosen = adjoints[t], selected[t]
            if a is not None and chosen is not None:
                M = M + chosen.flatten(2) @ a.flatten(2).mT / control_cost
                v = None if controls is None else controls[t]
                if v is not None:
                    d = d - (1 - damping) * _apply(a, v)
            information[t], miss[t] = M, d
        if len(steps) and not _positive(information[0]):
            raise InputError(
                "some combination of the outputs does not react to any control, so that its "
                "target cannot be met exactly; give a finite weight, or let more sites act"
            )
        first = (information[0], miss[0]) if len(steps) else (M, d)
        # d_L = W^{-1} M_0^{-1} d_0: what the linear model leaves of the miss
        left = (inverse @ torch.linalg.solve(first[0], first[1].unsqueeze(-1))).squeeze(-1)
        return cls(
            adjoints=selected,
            full_adjoints=adjoints,
            information=information,
            response=[torch.linalg.pinv(M, hermitian=True) for M in information],
            miss=miss,
            states=states,
            control_cost=control_cost,
            anchors=[None if v is None or not damping else damping * v for v in controls or ()]
            or [None] * len(steps),
            predicted=goal + left,
            initial=outputs,
        )

    @property
    def horizon(self) -> int:
        """The number of steps."""
        return len(self.adjoints)

    def correction(self, t: int, x: Tensor) -> Tensor | None:
        """``-1/r S_t a_t M_t^{-1} (a_t'(x - x_t) + d_t)``, and ``h v_t`` with damping.

        Raises:
            InputError: if the state has not the shape of the trajectory's.
        """
        a, chosen = self.full_adjoints[t], self.adjoints[t]
        if a is None or chosen is None:
            return None
        if x.shape != self.states[t].shape:
            raise InputError(
                f"the state at step {t} has shape {tuple(x.shape)}; the law was made around one of "
                f"{tuple(self.states[t].shape)}: it steers the examples that it was made for"
            )
        expected = _apply(a, x - self.states[t]) + self.miss[t]
        multiplier = (self.response[t] @ expected.unsqueeze(-1)).squeeze(-1)
        u = -torch.einsum("bk,bk...->b...", multiplier, chosen) / self.control_cost
        anchor = self.anchors[t]
        return u if anchor is None else u + anchor


@typed
def steer_output(
    dynamics: AdditiveControl,
    x0: Tensor,
    output: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    weight: float | Tensor = math.inf,
    control_cost: float = 1.0,
    masks: Sequence[Tensor | None] | None = None,
    controls: Controls | None = None,
    damping: float = 0.0,
) -> OutputSteering:
    """The steering law of a layered system around its trajectory from ``x0``.

    Args:
        dynamics: the system with additive controls, over a batch of examples.
        x0: ``(batch, ...)``.
        output: the outputs ``(batch, k)`` of the last state.
        target: as in `OutputSteering.of`.
        weight: as in `OutputSteering.of`.
        control_cost: as in `OutputSteering.of`.
        masks: as in `OutputSteering.of`.
        controls: the controls ``(batch, m_t)`` to linearise at; zero by default.
        damping: as in `OutputSteering.of`.

    Raises:
        InputError: the state holds whole numbers that a control would be added to, or is of
            another dtype than the controls; the output is no tensor of this shape.
    """
    moved = [c.dtype for c in dynamics.controls]
    whole = not x0.is_floating_point()
    # Tokens are a state as well where nothing is added to them.
    if dynamics.control_sizes[0] if whole else any(dtype != x0.dtype for dtype in moved):
        raise InputError(
            f"x0 is {x0.dtype}; expected a float state, of the dtype of the controls"
            + "".join(sorted({f" ({dtype})" for dtype in moved}))
        )
    base, states = dynamics.base, [x0]
    shifted: list[Tensor] = []
    with torch.no_grad():
        for t in range(dynamics.horizon):
            x = states[-1]
            if controls is not None and dynamics.control_sizes[t]:
                x = x + controls[t].reshape(x.shape)
            shifted.append(x)
            states.append(base.step(t, x, dynamics.controls[t]))
        tried = output(states[-1])
        if not isinstance(tried, Tensor) or tried.ndim != 2 or len(tried) != len(states[-1]):
            told = tuple(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
            raise InputError(
                f"output gives {told}; expected a tensor (batch, k) of the outputs of "
                f"{len(states[-1])} examples"
            )
        z, pull = torch.func.vjp(output, states[-1])[:2]
    linear = Linearisation(base, [*shifted, states[-1]], dynamics.controls, keep=z.shape[1] > 1)
    sweeps = []
    for j in range(z.shape[1]):
        direction = torch.zeros_like(z)
        direction[:, j] = 1.0
        sweeps.append(linear.adjoint(pull(direction)[0])[0])
    adjoints = [
        torch.stack([sweep[t] for sweep in sweeps], dim=1) if dynamics.control_sizes[t] else None
        for t in range(dynamics.horizon)
    ]
    applied = None
    if controls is not None:
        pairs = zip(controls, states, strict=False)
        applied = [u.reshape(x.shape) if u.shape[-1] else None for u, x in pairs]
    return OutputSteering.of(
        adjoints,
        states[:-1],
        z,
        target,
        weight=weight,
        control_cost=control_cost,
        masks=masks,
        controls=applied,
        damping=damping,
    )


def _apply(a: Tensor, x: Tensor) -> Tensor:
    """``a'x`` for each example: ``(batch, k)``."""
    return torch.einsum("bkn,bn->bk", a.flatten(2), x.flatten(1))


def _inverse_weight(weight: float | Tensor, like: Tensor) -> Tensor:
    k = like.shape[1]
    if not isinstance(weight, Tensor):
        if not weight > 0:
            raise InputError(f"the weight is {weight}; expected a positive number, or infinity")
        return torch.eye(k, dtype=like.dtype, device=like.device) / weight
    if weight.shape != (k, k) or not _positive(weight):
        raise InputError(
            f"the weight has shape {tuple(weight.shape)}; expected a positive definite ({k}, {k})"
        )
    return torch.linalg.inv(weight.to(like))


def _positive(matrix: Tensor) -> bool:
    """Whether every matrix is positive definite beyond rounding."""
    scale = torch.linalg.matrix_norm(matrix, ord=2)
    lowest = torch.linalg.eigvalsh(matrix)[..., 0]
    return bool((lowest > scale * matrix.shape[-1] * torch.finfo(matrix.dtype).eps).all())
