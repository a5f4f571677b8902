"""The derivatives of one step, by products with vectors, from one kept graph.

For a step ``f`` and a running cost ``l`` at a fixed ``(x, u, p)`` reverse mode gives

    g_x = grad_x l + A'p,   g_u = grad_u l + B'p,   A = df/dx,  B = df/du,

themselves functions of ``(x, u, p)`` that can be differentiated again. As they are linear in ``p``,
the backward pass of ``<g_x, dx> + <g_u, du>`` gives, at no further evaluation of the step,

    in p:       A dx + B du                              (forward mode, two backward passes)
    in (x, u):  the Hessian of ``l + <p, f>`` times ``(dx, du)``.

Source: Pearlmutter, *Fast exact multiplication by the Hessian*, Neural Computation 6(1), 1994.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["SecondDerivative", "StepGraph", "differentiable_attention"]


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Compute attention from elementary operations.

    The fused kernels of `torch.nn.functional.scaled_dot_product_attention` have neither
    forward-mode nor second derivatives; without attention this changes nothing.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


class SecondDerivative:
    """The Hessian of a scalar function of tensors, as products.

    Args:
        function: gives a scalar.
        at: its arguments; one that holds integers counts as a constant.
    """

    def __init__(self, function: Callable[..., Tensor], at: Sequence[Tensor]) -> None:
        self.at = [_leaf(x) for x in at]
        with torch.enable_grad():
            self._gradients = _gradients(function(*self.at), self.at)

    def curve(self, along: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian times ``along``, one tensor of the shape of each argument."""
        return _backward(self._gradients, self.at, along)


class StepGraph:
    """The graph of ``x_next = f(x, u)`` and of its adjoint.

    Args:
        step: ``f``.
        x: the state; one that holds integers has no derivative, its perturbation is zero.
        u: the control.
        p: the costate of the next state; zero by default, where only first derivatives are wanted.
        running: ``l``, or None for zero.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        u: Tensor,
        p: Tensor | None = None,
        running: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.at = [_leaf(x), _leaf(u)]
        with torch.enable_grad(), differentiable_attention():
            self.next = step(*self.at)
            self.cost = None if running is None else running(*self.at)
        self.p = _leaf(torch.zeros_like(self.next) if p is None else p)

    @cached_property
    def gradients(self) -> list[Tensor | None]:
        """``g_x`` and ``g_u`` with their graph, made when a product first needs it."""
        with torch.enable_grad():
            value = (self.p * self.next).sum()
            return _gradients(value if self.cost is None else value + self.cost, self.at)

    def tangent(self, dx: Tensor, du: Tensor) -> Tensor:
        """``A dx + B du``."""
        return _backward(self.gradients, [self.p], [dx, du])[0]

    def adjoint(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``A'q`` and ``B'q``."""
        a, b = _backward([self.next], self.at, [q])
        return a, b

    def curve(self, dx: Tensor, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``A dx + B du``, and the Hessian of ``l + <p, f>`` times ``(dx, du)``, in x and in u."""
        dx_next, cx, cu = _backward(self.gradients, [self.p, *self.at], [dx, du])
        return dx_next, cx, cu


def _leaf(x: Tensor) -> Tensor:
    # A Parameter, because `requires_grad_` is refused inside `torch.func.vmap`, where a batch of
    # products may be what first asks for the graph.
    return torch.nn.Parameter(x.detach()) if x.is_floating_point() else x


def _gradients(value: Tensor, at: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients that can be differentiated again; None where there is none."""
    wanted = [x for x in at if x.requires_grad]
    if not (value.requires_grad and wanted):
        return [None] * len(at)
    found = iter(torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in at]


def _backward(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], along: Sequence[Tensor]
) -> list[Tensor]:
    """The vector-Jacobian products; zero where an output does not depend on an input."""
    pairs = [
        (y, v)
        for y, v in zip(outputs, along, strict=True)
        if y is not None and y.requires_grad and y.numel()
    ]
    wanted = [x for x in inputs if x.requires_grad]
    found: Iterator[Tensor | None] = iter([None] * len(wanted))
    if pairs and wanted:
        ys, vs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, wanted, vs, retain_graph=True, allow_unused=True))
    result = []
    for x in inputs:
        g = next(found) if x.requires_grad else None
        result.append(_zeros_like(x, along) if g is None else g.detach())
    return result


def _zeros_like(x: Tensor, along: Sequence[Tensor]) -> Tensor:
    dtypes = [v.dtype for v in along if v.is_floating_point()]
    return torch.zeros_like(x, dtype=x.dtype if x.is_floating_point() else dtypes[0])
