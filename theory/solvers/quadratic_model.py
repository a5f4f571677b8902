"""The second-order model of ``J`` along a trajectory, and the Riccati sweep that minimises it.

Around ``x_{t+1} = f_t(x_t, u_t)`` with costates ``p_t``, a small change of the controls changes
``J`` by ``sum_t g_t'du_t + 1/2 (dx_t, du_t)' W_t (dx_t, du_t) + 1/2 dx_L' Phi_xx dx_L``, where
``dx_{t+1} = A_t dx_t + B_t du_t``, ``g_t = grad_u H_t``, and

    W_t = Hessian of H_t(x, u, p_{t+1}) in (x, u)     (the exact second variation of J), or
    W_t = Hessian of l_t(x, u)                        (Gauss-Newton in the dynamics).

`sweep` minimises that model by dynamic programming. With ``V_L = Phi_xx`` and backward in ``t``,

    Q_xx = W_xx + A'V'A,   Q_ux = W_ux + B'V'A,   Q_uu = W_uu + B'V'B,   Q_u = g + B'v',
    k = -Q_uu^-1 Q_u,      K = -Q_uu^-1 Q_ux,
    v = A'v' + K'Q_uu k + K'Q_u + Q_ux'k,         V = Q_xx + K'Q_uu K + K'Q_ux + Q_ux'K,

a prime on ``V`` and ``v`` meaning step ``t + 1``; ``v_t`` is the gradient of the value function
less the costate, so ``v_L = 0``. Differential dynamic programming in its first form (Mayne 1966)
contracts the second derivatives of ``f_t`` with ``p + v`` instead of ``p``. The two differ by
``O(||k||)``; with the costate the undamped step is Newton's step on ``J`` (Pantoja 1988), and
``W_t`` need not be computed anew when the damping changes.

Groups. Everything has a leading axis of ``G`` groups that do not interact. Controls shared by the
batch give one group whose state is the whole batch, flattened; controls ``(batch, m_t)`` give one
group per example. States may have any shape and change it from step to step; a state of integers
counts as one of no entries.

Source: Tassa, Erez & Todorov, IROS 2012, equations (5), (10) and (11); Tassa, Mansard & Todorov,
ICRA 2014 (boxes); Pantoja, Int. J. Control 47(5), 1988.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import differentiable_attention
from deltacontrol.theory.quadratic.alike import alike_at_once
from deltacontrol.theory.quadratic.box_qp import box_qp, positive_cholesky
from deltacontrol.theory.quadratic.derivatives import Along, hessian, num_groups
from deltacontrol.theory.quadratic.quick_sweep import IndefiniteError, expected_of_one, sweep_of_one

__all__ = ["IndefiniteError", "Policy", "QuadraticModel", "sweep"]

MAX_STATE = 4096
"""Largest state of one group; its Hessian then takes 128 MiB in float64."""


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """Derivatives along a trajectory, each with a leading axis of groups.

    Attributes:
        A: ``(G, n_{t+1}, n_t)`` for each step.
        B: ``(G, n_{t+1}, m_t)`` for each step.
        W: ``(G, n_t + m_t, n_t + m_t)`` for each step, states first.
        terminal: the Hessian of the terminal cost, ``(G, n_L, n_L)``.
        gradient: ``g_t = grad_u H_t``, ``(G, m_t)`` for each step.
        stacked: ``[A B]`` and ``W``, ``(L, G, ., .)``, where all steps have one size.
    """

    A: list[Tensor]
    B: list[Tensor]
    W: list[Tensor]
    terminal: Tensor
    gradient: list[Tensor]
    stacked: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        problem: ControlProblem,
        u: Controls,
        now: Evaluation,
        *,
        second_order: bool,
        along: Along | None = None,
    ) -> QuadraticModel:
        """Differentiate every step where ``u`` leads.

        Jacobians take one vectorised reverse sweep a step, Hessians one of the gradient; where the
        dynamics and the cost offer all steps at once (`Dynamics.all_steps`), one for all steps, and
        where small steps are alike (`Dynamics.alike`), one for all of these.

        Args:
            problem: the problem.
            u: the controls.
            now: what ``problem.evaluate(u)`` gives.
            second_order: take the Hessian of ``H_t`` rather than that of ``l_t``.
            along: the Jacobians of all steps, where they are known.

        Raises:
            InputError: if a state is too large, or if controls are given per example and the
                examples interact.
        """
        groups = num_groups(u)
        for t, x in enumerate(now.states):
            if x.is_floating_point() and x.numel() // groups > MAX_STATE:
                raise InputError(
                    f"the state x_{t} of shape {tuple(x.shape)} has {x.numel() // groups} entries "
                    f"that share a control; dense Hessians are formed up to {MAX_STATE}. Take "
                    "fewer examples, or GaussNewton, which never forms a matrix"
                )
        with differentiable_attention():
            along = along or Along.of(problem, u, now.states)
            whole = None if along is None else along.model(problem, now, second_order)
            A, B, W = whole or alike_at_once(problem, u, now, second_order)
            last = now.states[-1].detach()
            terminal = hessian(
                lambda x, _: problem.cost.terminal(x), last, last.new_zeros(groups, 0), groups
            )
        gradient = [g.reshape(groups, -1) for g in now.gradient]
        if whole is None:
            return cls(list(A), list(B), list(W), terminal, gradient)
        F = torch.cat([whole[0], whole[1]], -1)
        n = whole[0].shape[-1]
        return cls(list(F[..., :n]), list(F[..., n:]), list(W), terminal, gradient, (F, whole[2]))

    @cached_property
    def concave(self) -> list[Tensor]:
        """What, added twice, replaces each ``W_t`` (last ``Phi_xx``) by its absolute value."""
        W = self.W if self.stacked is None else _negative_part(self.stacked[1])
        steps = W if isinstance(W, Tensor) else [_negative_part(matrix) for matrix in W]
        return [*steps, _negative_part(self.terminal)]

    @property
    def is_finite(self) -> bool:
        """Whether every derivative is a finite number."""
        steps = self.stacked or (*self.A, *self.B, *self.W)
        parts = (*steps, self.terminal, *self.gradient)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    @cached_property
    def is_convex(self) -> bool:
        """Whether every ``W_t`` and ``Phi_xx`` is positive semidefinite."""
        return not any(bool(part.any()) for part in self.concave)


@dataclass(frozen=True, eq=False)
class Policy:
    """The law ``u_t + a k_t + K_t (x - x_t)`` and what the model expects of it.

    Attributes:
        k: ``(G, m_t)`` for each step.
        K: ``(G, m_t, n_t)`` for each step.
        V: the Hessian of the value function, ``(G, n_t, n_t)``, for ``t = 0..L``.
        slope: the derivative of ``J`` by the step size ``a`` at ``a = 0``.
        curvature: the second derivative in the model, without convexification and damping.
    """

    k: list[Tensor]
    K: list[Tensor]
    V: list[Tensor]
    slope: float
    curvature: float


def sweep(
    model: QuadraticModel,
    *,
    convexity: float = 0.0,
    damping: float = 0.0,
    bounds: list[tuple[Tensor, Tensor]] | None = None,
    cross: bool = True,
    step_size: float | None = None,
) -> Policy:
    """Minimise the model by one backward sweep.

    Args:
        model: the derivatives.
        convexity: ``s`` in ``[0, 1]``; ``W_t`` and ``Phi_xx`` are replaced by
            ``(1 - s) W + s |W|``, the absolute value taken of the eigenvalues. With ``s = 1`` the
            model is convex.
        damping: ``mu``; ``Q_uu + mu c I`` replaces ``Q_uu``, with ``c`` the largest mean magnitude
            of the diagonal of ``Q_uu`` over the steps swept so far. The model minimised is that
            with ``mu c/2 ||du_t||^2`` added.
        bounds: lowest and highest ``k_t``, ``(G, m_t)`` each, for each step. The step is then the
            minimum in that box, and controls at a bound have no feedback.
        cross: False sets ``Q_ux = 0``: no step reacts to another, ``K = 0`` and ``k_t`` is Newton's
            step of ``u_t`` alone (Liu, Chen & Theodorou, ICLR 2021, proposition 2).
        step_size: ``eta``; sets ``Q_uu = I/eta``. With ``cross=False`` the step is that of gradient
            descent.

    Raises:
        IndefiniteError: if ``Q_uu`` so changed is not positive definite (on the free controls).
    """
    quick = bounds is None and cross and step_size is None
    if quick and model.stacked is not None and model.terminal.device.type == "cpu":
        if len(model.terminal) == 1 and model.gradient[0].numel():
            return _sweep_of_one(model, *model.stacked, convexity, damping)
    V = model.terminal
    if convexity:
        V = V + 2 * convexity * model.concave[-1]
    v = V.new_zeros(V.shape[:2])
    ks, Ks, Vs = [], [], [V]
    unit = 0.0
    for t in reversed(range(len(model.A))):
        A, B, W, n = model.A[t], model.B[t], model.W[t], model.A[t].shape[-1]
        if convexity:
            W = W + 2 * convexity * model.concave[t]
        VA = V @ A
        Qxx = W[:, :n, :n] + A.mT @ VA
        Qux = W[:, n:, :n] + B.mT @ VA
        Quu = _symmetric(W[:, n:, n:] + B.mT @ (V @ B))
        Qu = model.gradient[t] + _apply(B.mT, v)
        eye = torch.eye(Quu.shape[-1], dtype=Quu.dtype, device=Quu.device)
        if step_size is not None:
            Quu = (eye / step_size).expand_as(Quu)
        if not cross:
            Qux = torch.zeros_like(Qux)
        if Quu.numel():
            unit = max(unit, float(Quu.diagonal(dim1=-2, dim2=-1).abs().mean()))
        Quu = Quu + damping * (unit or 1.0) * eye
        solved = _minimise(Quu, Qu, Qux, None if bounds is None else bounds[t])
        if solved is None:
            raise IndefiniteError(f"Q_uu is not positive definite at step {t}")
        k, K = solved
        v = _apply(A.mT, v) + _apply(K.mT, _apply(Quu, k) + Qu) + _apply(Qux.mT, k)
        V = _symmetric(Qxx + K.mT @ (Quu @ K) + 2 * (K.mT @ Qux))
        ks.append(k)
        Ks.append(K)
        Vs.append(V)
    k, K, V = ks[::-1], Ks[::-1], Vs[::-1]
    return Policy(k, K, V, *_expected(model, k, K))


def _sweep_of_one(
    model: QuadraticModel, F: Tensor, W: Tensor, convexity: float, damping: float
) -> Policy:
    """The same for one group whose steps have one size, by NumPy."""
    F, W, terminal, g = F[:, 0], W[:, 0], model.terminal[0], torch.cat(model.gradient)
    bent, end = W, terminal
    if convexity:
        bent = W + 2 * convexity * torch.cat(model.concave[:-1])
        end = terminal + 2 * convexity * model.concave[-1][0]
    k, K, V = sweep_of_one(F, bent, end, g, damping)
    slope, curvature = expected_of_one(F, W, terminal, g, k, K)
    steps = [list(part.unsqueeze(1)) for part in (k, K, V)]
    return Policy(steps[0], steps[1], steps[2], slope, curvature)


def _expected(model: QuadraticModel, k: list[Tensor], K: list[Tensor]) -> tuple[float, float]:
    """The first and second derivative of ``J`` along the law, in the unchanged model."""
    dx = model.terminal.new_zeros(model.W[0].shape[0], model.A[0].shape[-1]) if k else None
    slope, curvature = 0.0, 0.0
    for t in range(len(k)):
        assert dx is not None
        du = k[t] + _apply(K[t], dx)
        z = torch.cat([dx, du], -1)
        slope += float((model.gradient[t] * du).sum())
        curvature += float((z * _apply(model.W[t], z)).sum())
        dx = _apply(model.A[t], dx) + _apply(model.B[t], du)
    if dx is not None:
        curvature += float((dx * _apply(model.terminal, dx)).sum())
    return slope, curvature


def _minimise(
    Quu: Tensor, Qu: Tensor, Qux: Tensor, bounds: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | None:
    """``k`` and ``K``, or None if ``Q_uu`` is not positive definite (on the free controls)."""
    if bounds is None:
        factor = positive_cholesky(Quu)
        if factor is None:
            return None
        solved = -torch.cholesky_solve(torch.cat([Qu.unsqueeze(-1), Qux], -1), factor)
        return solved[..., 0], solved[..., 1:]
    found = box_qp(Quu, Qu, *bounds)
    if found is None:
        return None
    free = found.free.unsqueeze(-1)
    return found.x, -torch.cholesky_solve(Qux * free, found.factor) * free


def _negative_part(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    eps = torch.finfo(matrix.dtype).eps * matrix.shape[-1]
    rounding = eps * values.abs().amax(-1, keepdim=True) if matrix.numel() else values
    negative = torch.where(values < -rounding, -values, 0.0)
    return (vectors * negative.unsqueeze(-2)) @ vectors.mT


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
