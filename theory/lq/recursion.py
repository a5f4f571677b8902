"""The Riccati recursion; formulas in `deltacontrol.theory.lq`.

Two forms of the same step. The quick one needs ``P_{t+1} = S S'``, ``S`` lower triangular, and

    [H_uu  H_ux; H_xu  H_xx] = [R N'; N Q] + G'G,   G = S'[B A],

positive definite; its Cholesky factor ``[C 0; W' S_t]`` then holds all at once: ``H_uu = C C'``,
``W = C^{-1} H_ux`` and ``P_t = S_t S_t'``. That is three operations a step, by torch for a batch,
by LAPACK (`deltacontrol.theory.lq.single`) for one problem on the CPU, and by kernels of numba for
small ones, where it is installed (`deltacontrol.theory.lq.fused`, and `.compiled` for many). The
general form has the ``P_t``, which may be singular or indefinite, and takes a spectral
decomposition where ``H_uu`` is singular. The quick form runs as far as it goes; the general one
takes over where a pivot of ``H_uu`` drowns in rounding errors or the factorisation breaks down.

Source: the quick form is the factorised recursion of Frison & Jorgensen, *Efficient implementation
of the Riccati recursion for solving linear-quadratic control problems*, IEEE CCA, 2013.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import compiled, fused, single
from deltacontrol.theory.lq.policy import LQFactor, LQPolicy, UnboundedError, problem_number
from deltacontrol.theory.lq.terms import (
    QuadraticTerms,
    QuickSteps,
    Steps,
    Terms,
    are_dense,
    each,
    frobenius,
    gain,
    gather,
    inverse_root,
    require_finite,
    symmetric,
    unbind,
)

__all__ = ["factorise", "riccati"]


def riccati(
    A: Terms,
    B: Terms,
    Q: Terms,
    R: Terms,
    Qf: Tensor,
    N: Terms | None = None,
    c: Terms | None = None,
    q: Terms | None = None,
    r: Terms | None = None,
    qf: Tensor | None = None,
) -> LQPolicy:
    """The optimal law and the cost to go of a linear-quadratic problem.

    Args:
        A: ``(..., n_{t+1}, n_t)`` for each step, a sequence or one tensor ``(L, ..., n, n)``.
        B: ``(..., n_{t+1}, m_t)`` for each step.
        Q: ``(..., n_t, n_t)`` for each step; of ``Q``, ``R``, ``Qf`` the symmetric parts count.
        R: ``(..., m_t, m_t)`` for each step.
        Qf: ``(..., n_L, n_L)``.
        N: ``(..., n_t, m_t)`` for each step, or None.
        c: ``(..., n_{t+1})`` for each step, or None.
        q: ``(..., n_t)`` for each step, or None.
        r: ``(..., m_t)`` for each step, or None.
        qf: ``(..., n_L)``, or None.

    Raises:
        UnboundedError: if the cost has no minimum; the message names the step.
        InputError: if terms do not fit each other, or are not finite; the message names the term,
            the step and the member of a batch.

    Example:
        ``J(u) = 1/2 u^2 + 1/2 (x + u)^2``, one step, has the law ``u = -x/2`` and ``V = x^2/4``:

        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> policy = riccati(one, one, 0 * one, one, one[0])
        >>> round(policy.gains[0].item(), 12), round(policy.hessians[0].item(), 12)
        (-0.5, 0.5)
    """
    bare = c is None and q is None and r is None and qf is None
    if bare and (solved := fused.solve(A, B, Q, R, Qf, N)) is not None:
        return LQPolicy(solved)
    try:
        factor = factorise(A, B, Q, R, Qf, N)
    except UnboundedError:
        require_precision(A, B, Q, R, Qf, N)
        raise
    except InputError:
        given = (A, B, Q, R, [Qf], [] if N is None else N)
        if all(map(are_dense, given)):
            require_finite(2, A=A, B=B, Q=Q, R=R, N=N, Qf=[Qf])
        raise
    if factor.conflicts:
        t = factor.conflicts[0]
        require_precision(A, B, Q, R, Qf, N)
        raise UnboundedError(
            f"unbounded at step {t}: R + B'PB is singular, and N' + B'PA is not zero on its null "
            "space, along which the cost falls without end from almost every state; add a running "
            "cost of the controls",
            t,
        )
    policy = factor.policy(c, q, r, qf)
    if not policy.is_finite:
        require_finite(1, c=c, q=q, r=r, qf=None if qf is None else [qf])
    return policy


@torch.no_grad()
def factorise(
    A: Terms, B: Terms, Q: Terms, R: Terms, Qf: Tensor, N: Terms | None = None
) -> LQFactor:
    """Gains and Hessians of a linear-quadratic problem, whatever its affine terms.

    The arguments are those of `riccati`. Where the null space of a singular ``H_uu`` meets
    ``H_ux``, the step is named in ``conflicts`` and left to the caller.

    Raises:
        UnboundedError: if ``H_uu`` is indefinite at some step.
        InputError: if terms do not fit each other, or are not finite.
    """
    return _Sweep(QuadraticTerms.of(A, B, Q, R, Qf, N)).run()


@dataclass
class _Sweep:
    """What the backward sweep has found.

    Attributes:
        terms: the problem.
        hessians: ``P_t`` where the general form computed it, and ``P_L``.
        inverse: ``T_t`` with ``H_uu^{-1} = T_t T_t'`` from the general form.
        gains: ``K_t`` from the general form.
        null: projections onto the null space of a singular ``H_uu``.
        conflicts: steps at which ``H_ux`` meets that null space.
        quick: what the quick form found.
    """

    terms: QuadraticTerms
    hessians: dict[int, Tensor] = field(default_factory=dict)
    inverse: dict[int, Tensor] = field(default_factory=dict)
    gains: dict[int, Tensor] = field(default_factory=dict)
    null: dict[int, Tensor] = field(default_factory=dict)
    conflicts: list[int] = field(default_factory=list)
    quick: QuickSteps | None = None

    def run(self) -> LQFactor:
        """The quick form as far as it goes, after at most one general step; then the general."""
        step = len(self.terms.sizes)
        self.hessians[step] = symmetric(self.terms.Qf)
        root = _root(self.hessians[step])
        if step and root is None:
            step -= 1
            self._general(step)
            root = _root(self.hessians[step])
        if step and root is not None:
            self.quick = self._trusted(step, self._quick(step, root))
            step = self.quick.first
            if step and step not in self.hessians:
                self.hessians[step] = self.quick.roots[0] @ self.quick.roots[0].mT
        for t in reversed(range(step)):
            self._general(t)
        return self._factor()

    def _quick(self, stop: int, root: Tensor) -> QuickSteps:
        """The quick form from ``stop - 1`` on, as far as the factorisations succeed."""
        terms = self.terms
        if terms.lead.numel() == 1 and terms.Qf.device.type == "cpu":
            return (fused if fused.serves(terms) else single).sweep(terms, stop, root)
        if compiled.serves(terms):
            return compiled.sweep(terms, stop, root)
        A, B, Q, R = (unbind(part) for part in (terms.A, terms.B, terms.Q, terms.R))
        N = None if terms.N is None else unbind(terms.N)
        rooms = {size: self._workspace(*size) for size in set(terms.sizes)}
        L, codes = self._room(stop)
        S, norms = root, []
        for t in reversed(range(stop)):
            F, F_u, F_x, G, G_T, H, H_uu, H_xu, H_xx = rooms[terms.sizes[t]]
            norms.append(frobenius(S))
            F_u.copy_(B[t])
            F_x.copy_(A[t])
            torch.bmm(S.mT, F, out=G)
            torch.add(R[t], R[t].mT, out=H_uu)
            torch.add(Q[t], Q[t].mT, out=H_xx)
            H_xu.zero_() if N is None else torch.add(N[t], N[t], out=H_xu)
            torch.linalg.cholesky_ex(H.baddbmm_(G_T, G, beta=0.5), out=(L[t], codes[t]))
            m = terms.sizes[t][1]
            S = L[t][:, m:, m:].contiguous()
        failed = (codes != 0).any(-1).nonzero()
        first = int(failed[-1, 0]) + 1 if len(failed) else 0
        lower, W, roots = self._blocks(L[first:], first)
        norms_B = each(frobenius, terms.B[first:stop])
        if not isinstance(norms_B, Tensor):
            norms_B = torch.stack(norms_B) if norms_B else terms.Qf.new_empty(0, len(root))
        bounds = (torch.stack(norms).flip(0)[first:] * norms_B).square()
        return QuickSteps(first, lower, each(gain, lower, W), roots, bounds)

    def _room(self, stop: int) -> tuple[Steps, Tensor]:
        """Memory for the factors of ``H``, column by column as LAPACK writes, and their codes."""
        like, batch = self.terms.Qf, self.terms.lead.numel()
        shapes = [(batch, m + n, m + n) for _, m, n in self.terms.sizes[:stop]]
        codes = torch.empty((stop, batch), dtype=torch.int32, device=like.device)
        if self.terms.uniform:
            return like.new_empty((stop, *shapes[0])).mT, codes
        return [like.new_empty(shape).mT for shape in shapes], codes

    def _blocks(self, L: Steps, first: int) -> tuple[Steps, Steps, Steps]:
        """``C``, ``W`` and ``S`` of the factors from step ``first`` on."""
        if isinstance(L, Tensor):
            m = self.terms.sizes[0][1]
            return L[..., :m, :m], L[..., m:, :m].mT, L[..., m:, m:]
        sizes = self.terms.sizes[first : first + len(L)]
        cut = [
            (X[:, :m, :m], X[:, m:, :m].mT, X[:, m:, m:])
            for X, (_, m, _) in zip(L, sizes, strict=True)
        ]
        return [C for C, _, _ in cut], [W for _, W, _ in cut], [S for _, _, S in cut]

    def _workspace(self, after: int, m: int, n: int) -> tuple[Tensor, ...]:
        """Memory for ``F = [B A]``, ``G`` and ``H``, and views of their blocks."""
        like, batch = self.terms.Qf, self.terms.lead.numel()
        F, G = (like.new_empty((batch, after, m + n)) for _ in range(2))
        H = like.new_zeros((batch, m + n, m + n))
        blocks = H[:, :m, :m], H[:, m:, :m], H[:, m:, m:]
        return F, F[..., :m], F[..., m:], G, G.mT, H, *blocks

    def _trusted(self, stop: int, quick: QuickSteps) -> QuickSteps:
        """The steps since the pivots of ``H_uu`` last drowned in their rounding error."""
        first = quick.first
        if first == stop or quick.bounds is None:
            return quick
        R, B = self.terms.R[first:stop], self.terms.B[first:stop]
        pivots = each(_diagonal, quick.lower)
        pivots = pivots if isinstance(pivots, Tensor) else gather(pivots)
        good = each(_exceeds, pivots, R, B, quick.bounds)
        good = good if isinstance(good, Tensor) else torch.stack(good)
        good[0] &= torch.isfinite(quick.roots[0]).all()  # no later step would notice
        if bool(good.all()):
            return quick
        wrong = (~good).any(-1).nonzero()
        return quick.since(first + int(wrong[-1, 0]) + 1)

    def _general(self, t: int) -> None:
        """One step in the general form."""
        terms = self.terms
        A, B, R, P = terms.A[t], terms.B[t], symmetric(terms.R[t]), self.hessians[t + 1]
        PA = P @ A
        H_uu, H_ux = R + B.mT @ (P @ B), B.mT @ PA
        if terms.N is not None:
            H_ux = H_ux + terms.N[t].mT
        lower, code = torch.linalg.cholesky_ex(H_uu)
        bound = torch.linalg.matrix_norm(P) * torch.linalg.matrix_norm(B).square()
        if bool(((code == 0) & _exceeds(_diagonal(lower), R, B, bound)).all()):
            root = inverse_root(lower)
        else:
            root = self._spectral_root(t, H_uu, H_ux, _errors(R, bound[:, None] * _shares(B)))
        W = root.mT @ H_ux
        self.inverse[t], self.gains[t] = root, (root @ W).neg_()
        self.hessians[t] = symmetric(terms.Q[t] + A.mT @ PA - W.mT @ W)
        if t == 0 and not bool(torch.isfinite(self.hessians[0]).all()):
            raise InputError("P_0 is not finite: check Q and N of step 0 for NaN")

    def _spectral_root(self, t: int, H_uu: Tensor, H_ux: Tensor, errors: Tensor) -> Tensor:
        """A root of the pseudo-inverse; notes the null space and the conflicts.

        Signs are told with each control in units in which its own rounding error is about one, so
        that the size of one control hides the curvature of no other.
        """
        terms = self.terms
        if not bool(torch.isfinite(H_uu).all() & torch.isfinite(H_ux).all()):
            raise InputError(
                f"R + B'PB or N' + B'PA of step {t} is not finite: check the terms for NaN; "
                "without any, an unstable A made the cost to go overflow: shorten the horizon"
            )
        units = _units(_diagonal(errors))[..., None]
        values, vectors = torch.linalg.eigh(symmetric(units * H_uu * units.mT))
        noise = (units * errors * units.mT).sum(-1).amax(-1, keepdim=True)
        vectors = units * vectors
        if bool((values < -noise).any()):
            where = int((values < -noise).any(-1).nonzero()[0, 0])
            direction = torch.nn.functional.normalize(vectors[where, :, 0], dim=0)
            curvature = float(direction @ H_uu[where] @ direction)
            raise UnboundedError(
                f"unbounded at step {t}{problem_number(where, terms.lead)}: R + B'PB has the "
                f"negative curvature {curvature:.3g} along a direction of the control, in which "
                "the cost falls without end; add or raise the running cost of the controls (if Q, "
                "R and Qf have no negative eigenvalue this is a rounding error: rescale the terms)",
                t,
                direction,
            )
        null = vectors * (values <= noise)[:, None]
        norm = torch.linalg.matrix_norm
        scale = norm(terms.B[t] * units.mT) * norm(self.hessians[t + 1]) * norm(terms.A[t])
        if terms.N is not None:
            scale += norm(terms.N[t] * units.mT)
        if bool((norm(null.mT @ H_ux) > torch.finfo(H_ux.dtype).eps ** 0.5 * scale).any()):
            self.conflicts.append(t)
        null = torch.nn.functional.normalize(null, dim=-2)
        self.null[t] = symmetric(null @ torch.linalg.pinv(null))
        root = vectors * torch.where(values > noise, values.rsqrt(), 0.0)[:, None]
        return root - self.null[t] @ root  # the control of least norm

    def _factor(self) -> LQFactor:
        terms, quick, gains = self.terms, self.quick, self.gains
        if quick is not None:
            K = quick.gains
            gains = gains | dict(enumerate(unbind(K), quick.first)) if gains else K
        if isinstance(gains, dict):
            gains = gather([gains[t] for t in range(len(terms.sizes))])
        return LQFactor(
            lead=terms.lead,
            sizes=terms.sizes,
            A=terms.A,
            B=terms.B,
            gains=gains,
            null=self.null,
            conflicts=tuple(self.conflicts),
            _hessians=self.hessians,
            _inverse=self.inverse,
            _quick=quick,
        )


def require_precision(
    A: Terms, B: Terms, Q: Terms, R: Terms, Qf: Tensor, N: Terms | None = None
) -> None:
    """Raise `InputError` where only the rounding of float32 makes a problem unbounded."""
    if Qf.dtype != torch.float32:
        return
    A, B, Q, R = (_doubled(terms) for terms in (A, B, Q, R))
    try:
        factor = factorise(A, B, Q, R, Qf.double(), None if N is None else _doubled(N))
    except InputError:
        return
    if not factor.conflicts:
        raise InputError(
            "in float32 R + B'PB drowns in rounding errors, and the problem looks unbounded; in "
            "float64 it has a minimum: give the terms in float64, or rescale them"
        )


def _doubled(terms: Terms) -> Terms:
    return terms.double() if isinstance(terms, Tensor) else [term.double() for term in terms]


def _root(P: Tensor) -> Tensor | None:
    """The Cholesky factor, or None where one of the matrices is not positive definite."""
    root, code = torch.linalg.cholesky_ex(P)
    return None if bool((code != 0).any()) else root


def _noise(R: Tensor, curvature: Tensor) -> Tensor:
    """A bound on the rounding error of the diagonal of ``H_uu``, and so of its pivots.

    ``curvature`` bounds ``|B'PB|``, as a number or for each column of ``B``.
    """
    return (4 + R.shape[-1]) * torch.finfo(R.dtype).eps * (_diagonal(R).abs() + curvature)


def _errors(R: Tensor, curvature: Tensor) -> Tensor:
    """A bound on the rounding error of each entry of ``H_uu``; its diagonal is `_noise`."""
    roots = curvature.sqrt()[..., None]
    return (4 + R.shape[-1]) * torch.finfo(R.dtype).eps * (R.abs() + roots * roots.mT)


def _units(noise: Tensor) -> Tensor:
    """Powers of two, which round nothing, near ``noise^(-1/2)``."""
    info = torch.finfo(noise.dtype)
    least = (info.eps**2 * noise.amax(-1, keepdim=True)).clamp_min(info.tiny)
    return torch.exp2(-(0.5 * torch.maximum(noise, least).log2()).round())


def _shares(B: Tensor) -> Tensor:
    """The share of each column in ``||B||^2``."""
    columns = B.square().sum(-2)
    return columns / columns.sum(-1, keepdim=True).clamp_min(torch.finfo(B.dtype).tiny)


def _exceeds(pivots: Tensor, R: Tensor, B: Tensor, bound: Tensor) -> Tensor:
    """Whether all squared ``pivots`` exceed the rounding error; False for NaN.

    ``bound`` is one of ``|B'PB|``, which the columns share.
    """
    squares = pivots.square()
    rough = (squares > _noise(R, bound[..., None])).all(-1)
    if bool(rough.all()):
        return rough
    return (squares > _noise(R, bound[..., None] * _shares(B))).all(-1)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
