"""The losses of the linearised problem, their conjugates, and the dual points that they give.

A loss is a mean over ``N`` examples of a convex function of the ``K`` logits,

    L(z) = 1/N sum_i l(z_i; y_i).

Its Fenchel conjugate ``l*(a; y) = sup_z <a, z> - l(z; y)`` makes the lower bound of
`deltacontrol.theory.convex.tuning`; the gradient ``a_i = grad l(z_i; y_i)`` at any ``z`` is a point
of its domain, and there ``l(z) + l*(a) = <a, z>`` (Fenchel's equality).

``smoothness`` is a constant ``S`` with ``||grad l(z) - grad l(z')|| <= S ||z - z'||``; then ``l*``
is ``1/S``-strongly convex.

Source: Boyd & Vandenberghe, *Convex Optimization*, 2004, section 3.3 and example 3.25.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import log_softmax, softmax, xlogy
from torch import Tensor

from deltacontrol.theory.errors import InputError, unknown

__all__ = ["CrossEntropy", "Loss", "SquaredError", "named"]

# How far below zero rounding may push a probability of a scaled dual point.
_ROUNDING = 1e-14


class Loss(ABC):
    """A loss of logits ``z`` and targets ``y``, both ``(N, K)``."""

    name: ClassVar[str]
    smoothness: ClassVar[float]
    quadratic: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False

    @abstractmethod
    def targets(self, labels: Tensor, shape: tuple[int, int]) -> np.ndarray:
        """The labels as ``(N, K)`` numbers.

        Raises:
            InputError: if they do not fit logits of that shape.
        """

    @abstractmethod
    def value(self, z: np.ndarray, y: np.ndarray) -> float:
        """``L(z)``."""

    @abstractmethod
    def gradient(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``a``, ``(N, K)``, with rows ``grad l(z_i; y_i)``; note that ``grad L = a/N``."""

    @abstractmethod
    def conjugate(self, a: np.ndarray, y: np.ndarray) -> float:
        """``1/N sum_i l*(a_i; y_i)``, infinite outside the domain."""

    def nearest(self, a: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``a`` moved by rounding into the domain of the conjugate."""
        return a

    @abstractmethod
    def expression(self, z: Any) -> Any:
        """``N L(z) + <y, z>`` up to a constant, for a cvxpy expression ``z``.

        Both losses are ``-<y, z>`` plus a function without ``y``, so that targets can be a
        parameter of a linear term.
        """


class CrossEntropy(Loss):
    """``l(z; y) = log sum_c exp z_c - z_y``.

    With ``p = a + e_y`` the conjugate is the negative entropy ``sum_c p_c log p_c`` where ``p`` is
    in the simplex, else infinite: maximising ``<a, z> - log sum exp z + z_y`` over ``z`` asks for
    ``softmax(z) = a + e_y``. The gradient is ``a = softmax(z) - e_y``. A multiple ``s a`` with
    ``0 <= s <= 1`` belongs to ``s p + (1 - s) e_y``, which is in the simplex again.

    The Hessian ``diag(p) - p p'`` has eigenvalues of at most 1/2. The loss does not see a constant
    added to all logits of an example.
    """

    name = "cross-entropy"
    smoothness = 0.5
    shift_invariant = True

    def targets(self, labels: Tensor, shape: tuple[int, int]) -> np.ndarray:
        """One-hot rows."""
        num_examples, num_classes = shape
        numbered = not labels.is_floating_point() and labels.dtype != torch.bool
        if not numbered or tuple(labels.shape) != (num_examples,):
            raise InputError(
                f"the labels are {labels.dtype} of shape {tuple(labels.shape)}; cross-entropy "
                f"expects {num_examples} class numbers, one per example (or take "
                "loss='squared-error')"
            )
        classes = labels.detach().cpu().numpy()
        if num_classes < 2 or classes.min() < 0 or classes.max() >= num_classes:
            raise InputError(
                f"the labels are in [{classes.min()}, {classes.max()}] and there are {num_classes} "
                "logits; expected at least 2 logits and labels from 0 to one less than their number"
            )
        return np.eye(num_classes)[classes]

    def value(self, z: np.ndarray, y: np.ndarray) -> float:
        """Mean cross-entropy."""
        return float(-(y * log_softmax(z, axis=1)).sum() / len(z))

    def gradient(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``softmax(z) - e_y``."""
        return softmax(z, axis=1) - y

    def conjugate(self, a: np.ndarray, y: np.ndarray) -> float:
        """Mean negative entropy of ``a + e_y``."""
        p = a + y
        off_simplex = np.abs(p.sum(1) - 1.0).max()
        if p.min() < -_ROUNDING or off_simplex > _ROUNDING * p.shape[1]:
            return np.inf
        return float(xlogy(np.maximum(p, 0.0), np.maximum(p, 0.0)).sum() / len(p))

    def nearest(self, a: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``a + e_y`` clipped and scaled to sum 1."""
        p = np.maximum(a + y, 0.0)
        return p / p.sum(1, keepdims=True) - y

    def expression(self, z: Any) -> Any:
        """``sum_i log sum exp z_i``."""
        import cvxpy as cp

        return cp.sum(cp.log_sum_exp(z, axis=1))


class SquaredError(Loss):
    """``l(z; y) = 1/2 ||z - y||^2``, ``l*(a; y) = 1/2 ||a||^2 + <a, y>``, ``a = z - y``."""

    name = "squared-error"
    smoothness = 1.0
    quadratic = True

    def targets(self, labels: Tensor, shape: tuple[int, int]) -> np.ndarray:
        """The labels themselves; ``(N,)`` is accepted for one logit."""
        wanted = [shape] + ([shape[:1]] if shape[1] == 1 else [])
        finite = bool(torch.isfinite(labels).all())
        if not (labels.is_floating_point() and finite and tuple(labels.shape) in wanted):
            raise InputError(
                f"the labels are {labels.dtype} of shape {tuple(labels.shape)}; the squared error "
                f"expects finite real targets of the logits' shape {shape}"
            )
        return labels.detach().cpu().double().numpy().reshape(shape)

    def value(self, z: np.ndarray, y: np.ndarray) -> float:
        """Half the mean squared distance."""
        return float(0.5 * np.square(z - y).sum() / len(z))

    def gradient(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``z - y``."""
        return z - y

    def conjugate(self, a: np.ndarray, y: np.ndarray) -> float:
        """``1/N sum_i 1/2 ||a_i||^2 + <a_i, y_i>``."""
        return float((0.5 * np.square(a) + a * y).sum() / len(a))

    def expression(self, z: Any) -> Any:
        """``1/2 ||z||^2``."""
        import cvxpy as cp

        return 0.5 * cp.sum_squares(z)


_LOSSES = {loss.name: loss for loss in (CrossEntropy(), SquaredError())}


def named(name: str) -> Loss:
    """The loss of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in _LOSSES:
        raise unknown("loss", name, _LOSSES)
    return _LOSSES[name]
