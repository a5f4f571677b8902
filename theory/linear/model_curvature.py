"""Curvature of a plain model's batch loss over chosen parameters, matrix-free.

Outputs ``f(theta)`` of a whole batch, ``n`` numbers, and a loss ``l(f)``; Jacobian ``J`` of ``f``,
``r = grad l`` and ``B = Hess l`` at ``f(theta)``. Then, with the ``D`` parameters as one vector,

    gradient             g = J'r,
    Gauss-Newton         G = J'B J,             positive semidefinite for a convex loss,
    Hessian              G + sum_i r_i Hess f_i,
    tangent kernel       J J',                  (n, n).

For a softmax with cross-entropy, and for squared error, ``G`` is the Fisher matrix of the model.
`deltacontrol.theory.linear.curvature` has the same matrices for a control problem, layer by layer.

The factor ``C C' = B`` moves Gauss-Newton into the small space of the outputs: ``C'J J'C`` has the
nonzero eigenvalues of ``G``, and with ``r = C s``

    g' (G + kappa I)^-1 g = s' K (K + kappa I)^-1 s,      K = C'J J'C.

Sources: Schraudolph, Neural Computation 14(7), 2002; Martens, JMLR 21(146), 2020, section 9
(Fisher and Gauss-Newton); Jacot, Gabriel & Hongler, NeurIPS 2018 (tangent kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import (
    Congruence,
    LinearOperator,
    SymmetricOperator,
    by_rows,
)
from deltacontrol.theory.linear.step_graph import differentiable_attention

__all__ = ["ModelCurvature", "softmax_factor"]

Parameters = Mapping[str, Tensor]


class ModelCurvature:
    """The operators above at given parameters; ``theta`` and ``f`` are flat, ``(D,)`` and ``(n,)``.

    Args:
        outputs: ``f``: parameters by name to a tensor of any shape, pure and differentiable.
        loss: ``l``: that tensor to a scalar.
        parameters: ``theta``, where the curvature is taken.

    Attributes:
        num_parameters: ``D``.
        value: ``f(theta)``.
        gradient: ``g``, ``(D,)``.
        residual: ``r``, ``(n,)``.
        jacobian: ``J``, ``(n, D)``: products by forward mode, those of its adjoint by reverse mode.
        output_hessian: ``B``, ``(n, n)``.
        gauss_newton: ``G``, ``(D, D)``.
        hessian: ``(D, D)``, by forward over reverse mode.
        kernel: ``J J'``, ``(n, n)``.
    """

    def __init__(
        self,
        outputs: Callable[[dict[str, Tensor]], Tensor],
        loss: Callable[[Tensor], Tensor],
        parameters: Parameters,
    ) -> None:
        if not parameters:
            raise InputError("no parameters were given; there is no curvature over nothing")
        at = {name: p.detach() for name, p in parameters.items()}
        self.jacobian = _Jacobian(outputs, at)
        self.num_outputs, self.num_parameters = self.jacobian.shape
        self.value = self.jacobian.value
        self.residual = torch.func.grad(loss)(self.value).flatten()
        self.gradient = self.residual @ self.jacobian
        self.output_hessian: SymmetricOperator = _Hessian(loss, self.value)
        self.gauss_newton: SymmetricOperator = Congruence(self.jacobian.T, self.output_hessian)
        self.hessian: SymmetricOperator = _Hessian(lambda theta: loss(outputs(theta)), at)
        self.kernel: SymmetricOperator = _Kernel(self.jacobian)


class _Jacobian(LinearOperator):
    """``J`` of a function of named tensors, one row of a block after the other."""

    def __init__(
        self, outputs: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]
    ) -> None:
        self._outputs, self._at = outputs, at
        with differentiable_attention():
            value, self._pull = torch.func.vjp(outputs, at)[:2]
        self.value = value.detach()
        size = sum(p.numel() for p in at.values())
        super().__init__((self.value.numel(), size), self.value.dtype, self.value.device)

    def _product(self, x: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            along = _split(v, self._at)
            return torch.func.jvp(self._outputs, (self._at,), (along,))[1].flatten()

        with differentiable_attention(), torch.no_grad():
            return by_rows(product, x, self.shape[0])

    def _transpose_product(self, y: Tensor) -> Tensor:
        def product(w: Tensor) -> Tensor:
            return _flat(self._pull(w.view_as(self.value))[0], self._at)

        with torch.no_grad():
            return by_rows(product, y, self.shape[1])


class _Hessian(SymmetricOperator):
    """The Hessian of a scalar function of a tensor, or of named tensors."""

    def __init__(self, function: Callable[..., Tensor], at: Tensor | dict[str, Tensor]) -> None:
        self._slope, self._at = torch.func.grad(function), at
        like = at if isinstance(at, Tensor) else next(iter(at.values()))
        size = at.numel() if isinstance(at, Tensor) else sum(p.numel() for p in at.values())
        super().__init__(size, like.dtype, like.device)

    def _product(self, x: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            at = self._at
            along = v.view_as(at) if isinstance(at, Tensor) else _split(v, at)
            found = torch.func.jvp(self._slope, (at,), (along,))[1]
            return found.flatten() if isinstance(at, Tensor) else _flat(found, at)

        with differentiable_attention():
            return by_rows(product, x, self.shape[0])


class _Kernel(SymmetricOperator):
    """``J J'``, row after row: no more than one row of parameters is held."""

    def __init__(self, jacobian: _Jacobian) -> None:
        super().__init__(jacobian.shape[0], jacobian.dtype, jacobian.device)
        self._jacobian = jacobian

    def _product(self, x: Tensor) -> Tensor:
        return by_rows(lambda w: self._jacobian @ (w @ self._jacobian), x, self.shape[0])


def _split(v: Tensor, at: Parameters) -> dict[str, Tensor]:
    parts = v.split([p.numel() for p in at.values()])
    return {n: part.view_as(p) for (n, p), part in zip(at.items(), parts, strict=True)}


def _flat(parts: Parameters, at: Parameters) -> Tensor:
    return torch.cat([parts[name].reshape(-1) for name in at])


def softmax_factor(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``C`` and ``s`` of the mean cross-entropy: ``C C' = Hess l`` and ``C s = grad l``.

    One block for each example, with ``p`` its probabilities and ``N`` the number of examples:
    ``C = (diag(sqrt p) - p sqrt(p)') / sqrt N`` and ``s = C^+ r``, ``r = (p - e_y)/N``.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)``.

    Returns:
        ``(N, K, K)`` and ``(N, K)``.
    """
    p = torch.softmax(logits, 1)
    count, roots = len(p), p.sqrt()
    factor = (torch.diag_embed(roots) - p[:, :, None] * roots[:, None, :]) / count**0.5
    residual = (p - torch.nn.functional.one_hot(labels, p.shape[1])) / count
    # C' maps w to sqrt(p) (w - p'w): its inverse on the range of C is division by sqrt p.
    s = residual / roots * count**0.5
    return factor, s
