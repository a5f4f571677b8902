"""The terms of a linear-quadratic problem, checked and brought into one layout.

Where all steps have equal sizes the matrices of all steps are one tensor ``(L, batch, ., .)``, so
that whatever need not wait for the step after it is one batched operation. Otherwise they are a
list of ``(batch, ., .)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError

__all__ = [
    "Layout",
    "QuadraticTerms",
    "QuickSteps",
    "Steps",
    "Terms",
    "are_dense",
    "broadcast",
    "check_vectors",
    "each",
    "frobenius",
    "gain",
    "gather",
    "inverse_root",
    "require_finite",
    "symmetric",
    "unbind",
]

Terms: TypeAlias = Sequence[Tensor] | Tensor
Steps: TypeAlias = Tensor | list[Tensor]

# From so many systems on, and up to this size, a call of LAPACK for each is slower than rows.
MANY, SMALL = 1000, 4


def each(function: Callable[..., Tensor], *terms: Steps) -> Steps:
    """``function`` of all steps at once, or of each in turn; it may look at the last axes only."""
    if all(isinstance(term, Tensor) for term in terms):
        return function(*terms)
    return [function(*step) for step in zip(*terms, strict=True)]


def gather(steps: list[Tensor]) -> Steps:
    """One tensor where all steps have equal sizes."""
    return torch.stack(steps) if len({step.shape for step in steps}) == 1 else steps


def broadcast(shapes: Iterable[torch.Size]) -> torch.Size:
    """`torch.broadcast_shapes`, at once where all are equal."""
    distinct = set(shapes)
    return distinct.pop() if len(distinct) == 1 else torch.broadcast_shapes(*distinct)


def inverse_root(lower: Tensor) -> Tensor:
    """``T = C^{-T}`` with ``(C C')^{-1} = T T'``."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.mT, eye.expand_as(lower), upper=True)


def gain(lower: Tensor, W: Tensor) -> Tensor:
    """``K = -C^{-T} W = -H_uu^{-1} H_ux``; of many small systems row by row, all at once."""
    m = lower.shape[-1]
    if not (m <= SMALL and lower.shape[:-2].numel() >= MANY):
        # K'C = -W': LAPACK reads C and W' of our layouts as they are.
        K_T = torch.linalg.solve_triangular(lower, W.mT, upper=False, left=False)
        return K_T.mT.neg_()
    scale = lower.diagonal(dim1=-2, dim2=-1).reciprocal().neg()
    K = torch.empty_like(W, memory_format=torch.contiguous_format)
    for i in reversed(range(m)):
        row = W[..., i, :]
        for j in range(i + 1, m):
            row = torch.addcmul(row, K[..., j, :], lower[..., j, i, None])
        torch.mul(row, scale[..., i, None], out=K[..., i, :])
    return K


def frobenius(matrix: Tensor) -> Tensor:
    """Frobenius norms; of many small matrices far quicker than `torch.linalg.matrix_norm`."""
    return torch.linalg.vector_norm(matrix.flatten(-2), dim=-1)


def symmetric(matrix: Tensor) -> Tensor:
    """``(M + M')/2``."""
    return 0.5 * (matrix + matrix.mT)


def unbind(terms: Steps) -> Sequence[Tensor]:
    """The terms as a sequence over the steps."""
    return terms.unbind(0) if isinstance(terms, Tensor) else terms


@dataclass(frozen=True, eq=False)
class QuadraticTerms:
    """``A, B, Q, R, N`` of each step and ``Qf``, with their batch axes flattened into one.

    Attributes:
        lead: the batch axes.
        uniform: whether all steps have equal sizes.
        sizes: ``(n_{t+1}, m_t, n_t)`` for each step.
    """

    lead: torch.Size
    uniform: bool
    sizes: list[tuple[int, int, int]]
    A: Steps
    B: Steps
    Q: Steps
    R: Steps
    N: Steps | None
    Qf: Tensor

    @classmethod
    def of(
        cls, A: Terms, B: Terms, Q: Terms, R: Terms, Qf: Tensor, N: Terms | None
    ) -> QuadraticTerms:
        """Check the terms against each other, broadcast and flatten their batch axes.

        Raises:
            InputError: naming the term and the step that do not fit.
        """
        given = {"A": A, "B": B, "Q": Q, "R": R} | ({} if N is None else {"N": N})
        for name, terms in {**given, "Qf": Qf}.items():
            require_tensors(name, terms)
        if not isinstance(Qf, Tensor):
            raise InputError(f"Qf is {type(Qf).__name__}; expected one tensor, of the last state")
        lengths = {name: len(terms) for name, terms in given.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"the terms are for different numbers of steps: {lengths}")
        stacked = _stack_all(given)
        uniform = all(isinstance(terms, Tensor) for terms in stacked.values())
        checked = range(1 if uniform else len(A))
        sizes = [_check_step(t, {name: term[t] for name, term in stacked.items()}) for t in checked]
        for t in range(1, len(sizes)):
            if sizes[t][2] != sizes[t - 1][0]:
                raise InputError(
                    f"A[{t}] takes {sizes[t][2]} entries but A[{t - 1}] gives {sizes[t - 1][0]}"
                )
        n = sizes[-1][0] if sizes else Qf.shape[-1]
        if Qf.shape[-2:] != (n, n):
            raise InputError(f"Qf has shape {tuple(Qf.shape)}; expected {(n, n)}")
        _check_dtypes(stacked, Qf)
        shapes = {"Qf": Qf.shape[:-2]}
        for name, terms in stacked.items():
            for t in checked:
                shapes[f"{name}[{t}]"] = terms[t].shape[:-2]
        try:
            lead = broadcast(shapes.values())
        except RuntimeError as error:
            raise InputError(f"the batch axes do not broadcast: {shapes}") from error
        if uniform:
            sizes = sizes * len(A)
        flat = {name: _flatten_all(terms, lead) for name, terms in stacked.items()}
        return cls(
            lead=lead,
            uniform=uniform,
            sizes=sizes,
            A=flat["A"],
            B=flat["B"],
            Q=flat["Q"],
            R=flat["R"],
            N=flat.get("N"),
            Qf=flatten(Qf[None], lead, 2)[0],
        )


@dataclass(frozen=True, eq=False)
class QuickSteps:
    """What the quick form of the recursion finds, for the steps from ``first`` on.

    Attributes:
        first: the last step, backward, that it did.
        lower: ``C_t`` with ``H_uu = C_t C_t'``.
        gains: ``K_t``.
        roots: ``S_t`` with ``P_t = S_t S_t'``; empty where all ``P_t`` are known.
        bounds: ``trace(P_{t+1}) ||B_t||^2``, which bounds ``|B'PB|``; ``(steps, batch)``. None
            where all pivots of ``H_uu`` are known to exceed their rounding errors.
    """

    first: int
    lower: Steps
    gains: Steps
    roots: Steps
    bounds: Tensor | None

    def since(self, first: int) -> QuickSteps:
        """The steps from a later one on."""
        skip = first - self.first
        bounds = None if self.bounds is None else self.bounds[skip:]
        return QuickSteps(first, self.lower[skip:], self.gains[skip:], self.roots[skip:], bounds)


@dataclass(frozen=True)
class Layout:
    """How vectors with batch axes ``full`` lie beside matrices with batch axes ``lead``.

    One problem for many vectors: they are the columns ``(1, n, number)`` of a matrix. Otherwise
    they are ``(number, n, 1)`` and the matrices are repeated where they have to be.

    Attributes:
        lead: the batch axes of the matrices.
        full: those of the vectors, to which ``lead`` broadcasts.
    """

    lead: torch.Size
    full: torch.Size

    @property
    def columns(self) -> bool:
        """Whether the vectors are columns."""
        return self.lead.numel() == 1

    def matrices(self, terms: Steps) -> Sequence[Tensor]:
        """The matrices ``(batch, ., .)`` of each step."""
        if self.columns or self.full == self.lead:
            return unbind(terms)
        return [flatten(term.unflatten(0, self.lead)[None], self.full, 2)[0] for term in terms]

    def arrange(self, vectors: Terms) -> Sequence[Tensor]:
        """``(..., n)`` of each step to ``(1, n, number)`` or ``(number, n, 1)``."""
        stacked = stack(vectors)
        if stacked is None:
            return [self.arrange(vector[None])[0] for vector in vectors]
        flat = flatten(stacked, self.full, 1)
        return (flat[:, None].mT if self.columns else flat[..., None]).unbind(0)

    def rearrange(self, arranged: Sequence[Tensor], other: Layout) -> Sequence[Tensor]:
        """Vectors of this layout in another one."""
        if self == other:
            return arranged
        return other.arrange([self.restore(vector) for vector in arranged])

    def restore(self, arranged: Tensor) -> Tensor:
        """``(..., 1, n, number)`` or ``(..., number, n, 1)`` to ``(..., full, n)``."""
        flat = arranged.squeeze(-3).mT if self.columns else arranged.squeeze(-1)
        return flat.reshape(*arranged.shape[:-3], *self.full, arranged.shape[-2])

    def restore_all(self, arranged: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
        """`restore` for each step."""
        if isinstance(arranged, Tensor):
            return self.restore(arranged).unbind(0)
        if len({vector.shape for vector in arranged}) == 1:
            return self.restore(torch.stack(list(arranged))).unbind(0)
        return tuple(self.restore(vector) for vector in arranged)


def flatten(terms: Tensor, lead: torch.Size, axes: int) -> Tensor:
    """``(L, ..., the last axes)`` with the axes between broadcast to ``lead`` and made one."""
    last = terms.shape[terms.ndim - axes :]
    if terms.shape[1 : terms.ndim - axes] == lead:
        return terms.detach().reshape(terms.shape[0], lead.numel(), *last)
    ones = (1,) * (len(lead) - (terms.ndim - 1 - axes))
    spread = terms.detach().reshape(terms.shape[0], *ones, *terms.shape[1:])
    return spread.expand(terms.shape[0], *lead, *last).reshape(terms.shape[0], lead.numel(), *last)


def _flatten_all(terms: Steps, lead: torch.Size) -> Steps:
    if isinstance(terms, Tensor):
        return flatten(terms, lead, 2)
    return [flatten(term[None], lead, 2)[0] for term in terms]


def _stack_all(given: dict[str, Terms]) -> dict[str, Steps]:
    """Each term as one tensor; all as lists where sizes change."""
    stacked: dict[str, Steps] = {}
    for name, terms in given.items():
        whole = stack(terms)
        square = whole is not None and whole.ndim >= 3 and whole.shape[-1] == whole.shape[-2]
        if whole is None or (name == "A" and not square):
            return {name: list(terms) for name, terms in given.items()}
        stacked[name] = whole
    return stacked


def stack(terms: Terms) -> Tensor | None:
    """All steps as one tensor, without a copy where they are the same; None if sizes differ."""
    if isinstance(terms, Tensor):
        return terms if len(terms) else None
    if len({term.shape for term in terms}) != 1:
        return None
    first = terms[0]
    if all(term is first for term in terms):
        return first.expand(len(terms), *first.shape)
    return torch.stack(list(terms))


def _check_step(t: int, terms: dict[str, Tensor]) -> tuple[int, int, int]:
    for name, term in terms.items():
        if term.ndim < 2:
            raise InputError(f"{name}[{t}] has shape {tuple(term.shape)}; expected a matrix")
    after, n = terms["A"].shape[-2:]
    m = terms["B"].shape[-1]
    expected = {"B": (after, m), "Q": (n, n), "R": (m, m), "N": (n, m)}
    for name, shape in expected.items():
        if name in terms and terms[name].shape[-2:] != shape:
            raise InputError(
                f"{name}[{t}] has shape {tuple(terms[name].shape)}; expected {shape} beside "
                f"A[{t}], {tuple(terms['A'].shape)}, and B[{t}], {tuple(terms['B'].shape)}"
            )
    return after, m, n


def _check_dtypes(stacked: dict[str, Steps], Qf: Tensor) -> None:
    found = {name: term.dtype for name, terms in stacked.items() for term in terms[:1]}
    found["Qf"] = Qf.dtype
    if len(set(found.values())) != 1 or Qf.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the terms have dtypes {found}; expected float32 or float64 for all")


def require_tensors(name: str, terms: object) -> None:
    """Refuse what is no tensor or list of tensors, and tensors without values.

    Raises:
        InputError: naming the term.
    """
    items = [terms] if isinstance(terms, Tensor) else terms
    if not isinstance(items, list | tuple) or not all(isinstance(item, Tensor) for item in items):
        raise InputError(
            f"{name} is {type(terms).__name__}; expected a tensor, or a list of tensors, one a step"
        )
    for item in items:
        if item.is_meta or item.layout is not torch.strided:
            kind = "on meta, without values" if item.is_meta else "sparse"
            raise InputError(f"{name} is {kind}; expected a dense tensor with values")


def are_dense(terms: object) -> bool:
    """Whether this is a dense tensor with values, or a list of such."""
    items = terms if isinstance(terms, list | tuple) else [terms]
    return all(isinstance(x, Tensor) and not x.is_meta and not x.is_sparse for x in items)


def require_finite(axes: int, **given: Terms | None) -> None:
    """Refuse terms with NaN or infinite entries.

    Args:
        axes: the last axes that are no batch axes.
        given: terms of each step, by name; ``Qf`` and ``qf`` are of one.

    Raises:
        InputError: naming the term, the step and the member of the batch.
    """
    for name, terms in given.items():
        if terms is None or (isinstance(terms, Tensor) and bool(torch.isfinite(terms).all())):
            continue
        for t, term in enumerate(terms):
            wrong = ~torch.isfinite(term)
            if bool(wrong.any()):
                place = tuple(wrong.nonzero()[0].tolist())
                batch, entry = place[: term.ndim - axes], place[term.ndim - axes :]
                of = f" of problem {batch[0] if len(batch) == 1 else batch}" if batch else ""
                step = "" if name in ("Qf", "qf") else f"[{t}]"
                raise InputError(
                    f"{name}{step}{of} has the entry {float(term[place])} at {entry}; expected "
                    "finite numbers"
                )


def check_vectors(name: str, vectors: Terms, sizes: Sequence[int], like: Tensor) -> torch.Size:
    """Check the number, sizes and dtype of vectors, one a step; returns their batch axes.

    Raises:
        InputError: naming the vector that does not fit.
    """
    require_tensors(name, vectors)
    if len(vectors) != len(sizes):
        raise InputError(f"{name} has {len(vectors)} entries; expected {len(sizes)}, one per step")
    if isinstance(vectors, Tensor) and len(set(sizes)) == 1:
        vectors, sizes = vectors[:1], sizes[:1]
    for t, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
        if vector.shape[-1:] != (size,) or vector.dtype != like.dtype:
            raise InputError(
                f"{name}[{t}] has shape {tuple(vector.shape)} and dtype {vector.dtype}; expected "
                f"(..., {size}) and {like.dtype}"
            )
    return broadcast(vector.shape[:-1] for vector in vectors)
