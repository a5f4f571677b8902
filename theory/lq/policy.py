"""Law and cost to go of a linear-quadratic problem; formulas in `deltacontrol.theory.lq`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.laws import FeedbackLaw, Trajectory
from deltacontrol.theory.lq import fused, single
from deltacontrol.theory.lq.terms import (
    Layout,
    QuickSteps,
    Steps,
    Terms,
    broadcast,
    check_vectors,
    each,
    gather,
    inverse_root,
    unbind,
)

__all__ = ["LQFactor", "LQPolicy", "UnboundedError"]


class UnboundedError(InputError):
    """A linear-quadratic problem without a minimum.

    Attributes:
        step: the last step at which the cost to go is unbounded below.
        direction: of that step's control, ``(m_t,)``, of length one, with ``d'(R + B'PB) d < 0``;
            None where that matrix is singular and the cost falls along its null space.
    """

    def __init__(self, message: str, step: int, direction: Tensor | None = None) -> None:
        super().__init__(message)
        self.step, self.direction = step, direction


@dataclass(frozen=True, eq=False)
class LQFactor:
    """The part of the recursion that does not know the affine terms.

    Attributes:
        lead: the batch axes.
        sizes: ``(n_{t+1}, m_t, n_t)`` for each step.
        A: ``(L, batch, n, n)``, or a list where sizes change; so are the others.
        B: ``(L, batch, n, m)``.
        gains: ``K_t``.
        null: at each singular step the projection onto the null space of ``H_uu``.
        conflicts: the singular steps at which ``H_ux`` meets that null space, so that the cost to
            go is bounded below at some states only.
    """

    lead: torch.Size
    sizes: list[tuple[int, int, int]]
    A: Steps
    B: Steps
    gains: Steps
    null: dict[int, Tensor]
    conflicts: tuple[int, ...]
    _hessians: dict[int, Tensor]
    _inverse: dict[int, Tensor]
    _quick: QuickSteps | None

    @classmethod
    def of(cls, solved: fused.Solved) -> LQFactor:
        """That of one problem that the kernel solved."""
        (horizon, n, m), quick = solved.B.shape, solved.quick
        return cls(
            lead=torch.Size(),
            sizes=[(n, m, n)] * horizon,
            A=torch.from_numpy(solved.A).unsqueeze(1),
            B=torch.from_numpy(solved.B).unsqueeze(1),
            gains=quick.gains,
            null={},
            conflicts=(),
            _hessians={horizon: torch.from_numpy(solved.final).unsqueeze(0)},
            _inverse={},
            _quick=quick,
        )

    @property
    def final_hessian(self) -> Tensor:
        """``P_L``, ``(batch, n_L, n_L)``."""
        return self._hessians[len(self.sizes)]

    @property
    def state_sizes(self) -> list[int]:
        """``n_0..n_L``."""
        return [n for _, _, n in self.sizes] + [self.final_hessian.shape[-1]]

    @property
    def control_sizes(self) -> list[int]:
        """``m_0..m_{L-1}``."""
        return [m for _, m, _ in self.sizes]

    @cached_property
    def hessians(self) -> Sequence[Tensor]:
        """``P_0..P_L``, each ``(batch, n_t, n_t)``; formed when first asked for."""
        known, quick = dict(self._hessians), self._quick
        if quick is not None and len(known) <= len(self.sizes):
            for t, P in enumerate(unbind(each(lambda S: S @ S.mT, quick.roots)), quick.first):
                known.setdefault(t, P)
        return [known[t] for t in range(len(known))]

    @cached_property
    def inverse_roots(self) -> Steps:
        """``T_t`` with ``H_uu^{-1} = T_t T_t'``, or the pseudo-inverse where it is singular."""
        quick = self._quick
        roots = [] if quick is None else each(inverse_root, quick.lower)
        if not self._inverse:
            return roots
        known = self._inverse if quick is None else dict(enumerate(unbind(roots), quick.first))
        known = known | self._inverse
        return gather([known[t] for t in range(len(self.sizes))])

    @torch.no_grad()
    def policy(
        self,
        c: Terms | None = None,
        q: Terms | None = None,
        r: Terms | None = None,
        qf: Tensor | None = None,
    ) -> LQPolicy:
        """The optimal law for these affine terms.

        Args:
            c: ``(..., n_{t+1})`` for each step, or None for zero.
            q: ``(..., n_t)`` for each step, or None.
            r: ``(..., m_t)`` for each step, or None.
            qf: ``(..., n_L)``, or None.

        Raises:
            UnboundedError: if ``r_t + B'g`` meets the null space of a singular ``H_uu``.
            InputError: if a term does not fit.
        """
        if c is None and q is None and r is None and qf is None:
            return LQPolicy(self, Layout(self.lead, self.lead))
        states, controls, like = self.state_sizes, self.control_sizes, self.final_hessian
        sizes = {"c": states[1:], "q": states[:-1], "r": controls, "qf": states[-1:]}
        ends = None if qf is None else [qf]
        given = {"c": c, "q": q, "r": r, "qf": ends}
        given = {name: terms for name, terms in given.items() if terms is not None}
        leads = [check_vectors(name, terms, sizes[name], like) for name, terms in given.items()]
        try:
            full = broadcast([self.lead, *leads])
        except RuntimeError as error:
            raise InputError(
                f"the batch axes of {', '.join(given)}, {[tuple(lead) for lead in leads]}, do not "
                f"broadcast against those of the matrices, {tuple(self.lead)}"
            ) from error
        layout = Layout(self.lead, full)
        arranged = {name: layout.arrange(terms) for name, terms in given.items()}
        return LQPolicy(self, layout, arranged.get("c"), *self._solve(layout, arranged))

    def _solve(
        self, layout: Layout, terms: dict[str, Sequence[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """``k_t``, ``s_t`` and ``v_t`` of all steps, arranged."""
        A, B, K, roots = map(layout.matrices, (self.A, self.B, self.gains, self.inverse_roots))
        P = layout.matrices(list(self.hessians)) if "c" in terms else []
        like = next(iter(terms.values()))[0]
        s = like.new_zeros((like.shape[0], self.state_sizes[-1], like.shape[-1]))
        s = terms["qf"][0] if "qf" in terms else s
        v = like.new_zeros((like.shape[0], like.shape[-1]))
        k, slopes, constants = [], [s], [v]
        for t in reversed(range(len(K))):
            g = s
            if "c" in terms:
                shift = torch.bmm(P[t + 1], terms["c"][t])
                v = v + ((s + 0.5 * shift) * terms["c"][t]).sum(-2)
                g = s + shift
            h = torch.bmm(B[t].mT, g)
            if "r" in terms:
                h = h + terms["r"][t]
            if t in self.null:
                self._check_null(t, layout, h, B[t], g)
            w = torch.bmm(roots[t].mT, h)
            s = torch.bmm(A[t].mT, g).baddbmm_(K[t].mT, h)
            if "q" in terms:
                s += terms["q"][t]
            v = v - 0.5 * w.square().sum(-2)
            k.append(torch.bmm(roots[t], w).neg_())
            slopes.append(s)
            constants.append(v)
        return k[::-1], slopes[::-1], constants[::-1]

    def _check_null(self, t: int, layout: Layout, h: Tensor, B: Tensor, g: Tensor) -> None:
        (null,) = layout.matrices([self.null[t]])
        slope = torch.linalg.vector_norm(torch.bmm(null, h), dim=-2)
        scale = torch.linalg.vector_norm(h - torch.bmm(B.mT, g), dim=-2)
        scale += torch.linalg.matrix_norm(B)[:, None] * torch.linalg.vector_norm(g, dim=-2)
        over = slope > torch.finfo(h.dtype).eps ** 0.5 * scale
        if bool(over.any()):
            where = over.nonzero()[0].tolist()
            number = where[1] if layout.columns else where[0]
            raise UnboundedError(
                f"unbounded at step {t}{problem_number(number, layout.full)}: R + B'PB is singular "
                f"and the cost falls with slope {float(slope[tuple(where)]):.3g} along its null "
                "space; add a running cost of the controls",
                t,
            )


@dataclass(frozen=True, eq=False)
class LQPolicy(FeedbackLaw):
    """The optimal law ``u_t = K_t x + k_t`` and the cost to go ``1/2 x'P_t x + s_t'x + v_t``."""

    _found: LQFactor | fused.Solved
    _layout: Layout = Layout(torch.Size(), torch.Size())
    _c: Sequence[Tensor] | None = None
    _k: Sequence[Tensor] | None = None
    _s: Sequence[Tensor] | None = None
    _v: Sequence[Tensor] | None = None

    @cached_property
    def _factor(self) -> LQFactor:
        """The recursion's matrices; of a solved problem they become tensors when first needed."""
        found = self._found
        return found if isinstance(found, LQFactor) else LQFactor.of(found)

    @cached_property
    def gains(self) -> tuple[Tensor, ...]:
        """``K_t`` for each step, ``(..., m_t, n_t)``."""
        if isinstance(self._found, fused.Solved):
            return torch.from_numpy(self._found.K).unbind()
        return matrices(self._factor.gains, self._factor.lead)

    def gain(self, t: int) -> Tensor:
        """``K_t`` alone, ``(..., m_t, n_t)``, without a tensor for each of the others."""
        if isinstance(self._found, fused.Solved):
            return torch.from_numpy(self._found.K[t])
        return self.gains[t]

    @cached_property
    def feedforward(self) -> tuple[Tensor, ...]:
        """``k_t`` for each step, ``(..., m_t)``."""
        return self._vectors(self._k, self._factor.control_sizes)

    @cached_property
    def hessians(self) -> tuple[Tensor, ...]:
        """``P_0..P_L``, ``(..., n_t, n_t)``."""
        return matrices(list(self._factor.hessians), self._factor.lead)

    @cached_property
    def slopes(self) -> tuple[Tensor, ...]:
        """``s_0..s_L``, ``(..., n_t)``."""
        return self._vectors(self._s, self._factor.state_sizes)

    @cached_property
    def constants(self) -> Tensor:
        """``v_0..v_L``, ``(L + 1, ...)``."""
        shape = len(self._factor.state_sizes), *self._layout.full
        if self._v is None:
            return self._factor.final_hessian.new_zeros(shape)
        return torch.stack(list(self._v)).reshape(shape)

    @property
    def is_finite(self) -> bool:
        """Whether ``s_0`` and ``v_0`` are finite, in which every affine term has its part."""
        if self._s is None or self._v is None:
            return True
        return bool(torch.isfinite(self._s[0]).all() & torch.isfinite(self._v[0]).all())

    @property
    def singular(self) -> tuple[int, ...]:
        """The steps at which ``H_uu`` is singular and the control of least norm is taken."""
        return tuple(sorted(self._factor.null))

    def _vectors(self, parts: Sequence[Tensor] | None, sizes: list[int]) -> tuple[Tensor, ...]:
        if parts is not None:
            return self._layout.restore_all(parts)
        like = self._factor.final_hessian
        return tuple(like.new_zeros((*self._layout.full, size)) for size in sizes)

    def control(self, t: int, x: Tensor) -> Tensor:
        """``K_t x + k_t`` at a state ``(..., n_t)``."""
        return _times(self.gain(t), x) + self.feedforward[t]

    def cost_to_go(self, t: int, x: Tensor) -> Tensor:
        """``V_t(x) = 1/2 x'P_t x + s_t'x + v_t`` of a state ``(..., n_t)``, one for each."""
        linear = 0.5 * _times(self.hessians[t], x) + self.slopes[t]
        return (x * linear).sum(-1) + self.constants[t]

    @torch.no_grad()
    def simulate(self, x0: Tensor) -> Trajectory:
        """The optimal states and controls from ``x0``, ``(..., n_0)``.

        Raises:
            InputError: if the state does not fit.
        """
        if isinstance(self._found, fused.Solved):
            simulated = fused.simulate(self._found, x0)
            if simulated is not None:
                return Trajectory(list(simulated[0].unbind()), simulated[1].unbind())
        factor, like = self._factor, self._factor.final_hessian
        n = factor.state_sizes[0]
        check_vectors("x0", [x0], [n], like)
        try:
            full = broadcast([self._layout.full, x0.shape[:-1]])
        except RuntimeError as error:
            raise InputError(
                f"x0 has shape {tuple(x0.shape)}; expected ({n},), or batch axes before it that "
                f"broadcast against {tuple(self._layout.full)}"
            ) from error
        layout = Layout(factor.lead, full)
        k, c = (
            self._layout.rearrange(terms, layout) if terms is not None else None
            for terms in (self._k, self._c)
        )
        (x,) = layout.arrange([x0])
        if layout.columns and x.shape[-1] == 1 and x.device.type == "cpu":
            states, controls = single.simulate(factor.A, factor.B, factor.gains, c, k, x)
            return Trajectory(list(layout.restore_all(states)), layout.restore_all(controls))
        A, B, K = map(layout.matrices, (factor.A, factor.B, factor.gains))
        states, controls = [x], []
        for t in range(len(A)):
            u = torch.bmm(K[t], x) if k is None else torch.baddbmm(k[t], K[t], x)
            x = torch.bmm(A[t], x) if c is None else torch.baddbmm(c[t], A[t], x)
            x.baddbmm_(B[t], u)
            states.append(x)
            controls.append(u)
        return Trajectory(list(layout.restore_all(states)), layout.restore_all(controls))


def matrices(terms: Steps, lead: torch.Size) -> tuple[Tensor, ...]:
    """The matrices of each step with their batch axes."""
    if isinstance(terms, Tensor):
        return terms.unflatten(1, lead or (1,)).unbind(0) if lead else terms[:, 0].unbind(0)
    return tuple(term.unflatten(0, lead) if lead else term[0] for term in terms)


def problem_number(number: int, lead: torch.Size) -> str:
    """Which problem of a batch is meant; ``number`` counts through all batch axes."""
    if not lead:
        return ""
    index = torch.unravel_index(torch.tensor(number), lead)
    return f" of problem {tuple(int(i) for i in index)}"


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
