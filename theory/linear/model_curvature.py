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
from deltacontrol.theory.linear.step_graph import differentiable_attention

__all__ = ["ModelCurvature", "softmax_factor"]

Parameters = Mapping[str, Tensor]


class ModelCurvature:
    """Products with the matrices above; all take and give rows, ``(k, D)`` or ``(k, n)``.

    Args:
        outputs: ``f``: parameters by name to a tensor of any shape, pure and differentiable.
        loss: ``l``: that tensor to a scalar.
        parameters: ``theta``, where the curvature is taken.

    Attributes:
        num_parameters: ``D``.
        value: ``f(theta)``.
        gradient: ``g``, ``(D,)``.
        residual: ``r``, ``(n,)``.
    """

    def __init__(
        self,
        outputs: Callable[[dict[str, Tensor]], Tensor],
        loss: Callable[[Tensor], Tensor],
        parameters: Parameters,
    ) -> None:
        if not parameters:
            raise InputError("no parameters were given; there is no curvature over nothing")
        self._at = {name: p.detach() for name, p in parameters.items()}
        self._outputs, self._loss = outputs, loss
        self.num_parameters = sum(p.numel() for p in self._at.values())
        with differentiable_attention():
            self.value, self._pull = torch.func.vjp(outputs, self._at)[:2]
        self.value = self.value.detach()
        self.residual = torch.func.grad(loss)(self.value).flatten()
        self.gradient = self.pull(self.residual[None])[0]

    @property
    def num_outputs(self) -> int:
        """The number ``n`` of outputs."""
        return self.value.numel()

    def push(self, v: Tensor) -> Tensor:
        """``J v_i``, from ``(k, D)`` to ``(k, n)``, by forward mode."""
        with differentiable_attention(), torch.no_grad():
            return torch.stack(
                [
                    torch.func.jvp(self._outputs, (self._at,), (self._split(row),))[1].flatten()
                    for row in v
                ]
            )

    def pull(self, w: Tensor) -> Tensor:
        """``J'w_i``, from ``(k, n)`` to ``(k, D)``, by reverse mode."""
        with torch.no_grad():
            return torch.stack([self._flat(self._pull(row.view_as(self.value))[0]) for row in w])

    def output_hessian(self, w: Tensor) -> Tensor:
        """``B w_i``, from ``(k, n)`` to ``(k, n)``."""
        slope = torch.func.grad(self._loss)
        return torch.stack(
            [
                torch.func.jvp(slope, (self.value,), (row.view_as(self.value),))[1].flatten()
                for row in w
            ]
        )

    def gauss_newton(self, v: Tensor) -> Tensor:
        """``G v_i``."""
        return self.pull(self.output_hessian(self.push(v)))

    def hessian(self, v: Tensor) -> Tensor:
        """The Hessian's product, by forward over reverse mode."""
        slope = torch.func.grad(lambda at: self._loss(self._outputs(at)))
        with differentiable_attention():
            found = [torch.func.jvp(slope, (self._at,), (self._split(row),))[1] for row in v]
        return torch.stack([self._flat(row) for row in found])

    def kernel(self, w: Tensor) -> Tensor:
        """``J J'w_i``."""
        return torch.cat([self.push(self.pull(row[None])) for row in w])

    def _split(self, v: Tensor) -> dict[str, Tensor]:
        parts = v.split([p.numel() for p in self._at.values()])
        return {n: part.view_as(p) for (n, p), part in zip(self._at.items(), parts, strict=True)}

    def _flat(self, parts: Parameters) -> Tensor:
        return torch.cat([parts[name].reshape(-1) for name in self._at])


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
