"""How much controls could still gain within a radius: an upper bound that is computed.

For controls ``u`` of a problem and a ball around a centre, by default ``u``, the *gap* is ``J(u) -
min J`` over the ball. `gap_bound` bounds it from above by duality, and from below by a point.

- *Linear dynamics with a quadratic cost*, negative curvature included. The bound is proved and
  equal to the gap: the trust-region problem (`deltacontrol.theory.certificates.quadratics`).
- *A convex loss of outputs that are affine in the controls*. The bound is proved and equal to the
  gap: Fenchel's dual at the point that was found (`deltacontrol.theory.certificates.affine`).
- *A convex loss of any network*. The bound is that of the network linearised at ``u``, and proved
  of that. For the network an estimate of the remainder is added, which is no proof
  (`deltacontrol.theory.certificates.remainder`). Proved of the network is what the loss alone says,
  which is never negative, and often little more: ``J(u)`` less the weight decay that is left.

Every upper bound is the least value of a paraboloid below ``J``
(`deltacontrol.theory.certificates.tangent`): it holds whatever the inner solver did, and its
distance to the lower bound tells how well that did.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.certificates.affine import AffineLoss
from deltacontrol.theory.certificates.certificate import Certificate, Kind
from deltacontrol.theory.certificates.quadratics import DenseQuadratic, ProductQuadratic
from deltacontrol.theory.certificates.remainder import DualRemainder
from deltacontrol.theory.certificates.tangent import Ball, Least, Model
from deltacontrol.theory.control.costs import (
    BinaryCrossEntropyCost,
    CrossEntropyCost,
    QuadraticCost,
    SquaredErrorCost,
)
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.convex.linearised import logit_jacobians
from deltacontrol.theory.convex.quadratic import condensed
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import SymmetricOperator, flatten, unflatten

__all__ = ["gap_bound", "quadratic_gap"]

MEMORY = 2**31
"""The largest features in bytes."""
_AFFINE = 1e-9
_SHORTEST = 12


@typed
def gap_bound(
    problem: ControlProblem,
    controls: Controls,
    radius: float,
    *,
    centre: Controls | None = None,
    affine: bool = False,
    starts: int = 2,
    steps: int = 8,
    seed: int = 0,
) -> Certificate:
    """What controls within the radius can still gain over those given.

    Args:
        problem: in float64, without a box; of one of the kinds above.
        controls: ``u``, trained, solved or neither.
        radius: of the ball, in the Euclidean norm of all controls. It may be infinite where ``J``
            has positive curvature: a definite quadratic, or a convex loss with a weight decay.
        centre: of the ball; ``u`` by default. The ball has to hold ``u``.
        affine: say that the last state is affine in the controls, as that of a head on frozen
            features is; it is checked at one point. Linear dynamics need not be told.
        starts: random starts of the search for the remainder of a network.
        steps: of each of its searches.
        seed: of its starts.

    Raises:
        InputError: for another kind of problem, a box, another dtype, a radius that is not
            positive, a ball without ``u``, and features that are too large.

    Example:
        ``J(u) = 1/2 (1 + u)^2 + 1/2 u^2`` has its minimum, 1/4, at ``u = -1/2``:

        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=one)
        >>> problem = ControlProblem(LinearDynamics.constant(1, one, one), cost, one[0])
        >>> print(gap_bound(problem, problem.zero_controls(), 2.0))
        Certificate
          of         the problem, which is quadratic
          J          0.5
          radius     2
          can gain   at most 0.25, proved
          gained     0.25, by a control that was found
          tightness  exact: both are equal
    """
    if starts < 0 or steps < 0:
        raise InputError(f"starts is {starts} and steps is {steps}; expected 0 or more")
    u = tuple(control.detach() for control in controls)
    ball = _ball(problem, u, radius, centre)
    with torch.no_grad():
        objective = float(problem.objective(u))
    linear = isinstance(problem.dynamics, LinearDynamics)
    if linear and isinstance(problem.cost, QuadraticCost | SquaredErrorCost):
        _, gradient, hessian = condensed(problem, u)
        model = DenseQuadratic(gradient, hessian)
        return _certificate(model, ball, Kind.QUADRATIC, objective, u)
    model = _affine_loss(problem, u)
    if linear or affine:
        if not linear:
            _require_affine(problem, u, model, ball)
        return _certificate(model, ball, Kind.CONVEX, objective, u)
    if math.isinf(radius):
        raise InputError(
            "the radius is infinite, and far away a network is not what its linearisation says; "
            "give a finite one, such as the distance that training went"
        )
    found = _Found.on(model, ball)
    remainder = DualRemainder(problem, u, model.dual(found.touching))
    told = remainder.estimate(ball, found.witness, starts=starts, steps=steps, seed=seed)
    reached, attained = _reached(problem, u, found.witness, objective)
    return Certificate(
        kind=Kind.LINEARISED,
        objective=objective,
        upper=found.upper,
        lower=found.lower,
        attained=attained,
        controls=reached,
        radius=radius,
        multiplier=found.least.multiplier,
        curvature=model.curvature,
        dual=model.dual(found.touching),
        remainder=told,
        ceiling=objective - _least_conceivable(problem, u, ball),
    )


@typed
def quadratic_gap(
    gradient: Tensor,
    hessian: Tensor | SymmetricOperator,
    radius: float,
    *,
    floor: float | None = None,
    max_products: int = 250,
) -> Certificate:
    """What a step of length at most ``radius`` can gain in ``g'd + 1/2 d'Hd``.

    Args:
        gradient: ``g``, ``(n,)``.
        hessian: ``H``: a matrix ``(n, n)``, of any sign, or an operator.
        radius: of the ball around zero.
        floor: for an operator, a number that is certainly not above its least eigenvalue, such as 0
            for a Gauss-Newton matrix of convex costs. Estimates of that eigenvalue lie above it,
            and a bound that is made from one is no proof.
        max_products: with an operator, in each of some thirty inner solves. With few the bound is
            valid and not tight.

    Raises:
        InputError: for shapes that do not fit, a radius that is not positive, an operator without a
            floor, and a matrix with one.

    Example:
        >>> g = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> found = quadratic_gap(g, torch.zeros(2, 2, dtype=torch.float64), 2.0)
        >>> round(found.upper, 9), round(found.lower, 9)  # r ||g||
        (10.0, 10.0)
    """
    if gradient.ndim != 1 or tuple(hessian.shape) != (len(gradient), len(gradient)):
        raise InputError(
            f"the gradient has shape {tuple(gradient.shape)} and the matrix "
            f"{tuple(hessian.shape)}; expected (n,) and (n, n)"
        )
    if hessian.dtype != gradient.dtype:
        raise InputError(
            f"the gradient is {gradient.dtype} and the matrix {hessian.dtype}; give both in float64"
        )
    _require_numbers(gradient)
    _require_radius(radius)
    if max_products < 1 or not (floor is None or math.isfinite(floor)):
        raise InputError(
            f"floor is {floor} and max_products {max_products}; expected a finite number and at "
            "least 1"
        )
    if isinstance(hessian, Tensor) == (floor is not None):
        raise InputError(
            "a floor of the eigenvalues goes with an operator, which shows them to nobody; those "
            "of a matrix are computed"
        )
    if isinstance(hessian, Tensor):
        model: Model = DenseQuadratic(gradient, hessian)
    else:
        assert floor is not None
        model = ProductQuadratic(gradient, hessian, floor, max_products)
    zero = torch.zeros_like(gradient)
    return _certificate(model, Ball(zero, radius), Kind.QUADRATIC, 0.0, (zero,))


class _Found:
    """Both bounds of a model on a ball that holds zero.

    Attributes:
        witness: the point that gains most.
        touching: the point whose bound is highest.
        least: that bound.
        lower: what the witness gains.
        upper: what no point gains more than.
    """

    def __init__(self, model: Model, ball: Ball, points: list[Tensor]) -> None:
        changes = [model.change(d) for d in points]
        leasts = [model.least(d, ball) for d in points]
        best = min(range(len(points)), key=changes.__getitem__)
        tight = max(range(len(points)), key=lambda i: leasts[i].bound)
        self.witness, self.touching = points[best], points[tight]
        self.least: Least = leasts[tight]
        self.lower = max(-changes[best], 0.0)
        self.upper = max(-self.least.bound, self.lower)

    @classmethod
    def on(cls, model: Model, ball: Ball) -> _Found:
        found = ball.project(model.minimiser(ball))
        zero = torch.zeros_like(found)
        finite = bool(torch.isfinite(found).all())
        return cls(model, ball, [found, zero] if finite else [zero])


def _certificate(
    model: Model, ball: Ball, kind: Kind, objective: float, u: Controls
) -> Certificate:
    found = _Found.on(model, ball)
    moved = tuple(a + d for a, d in zip(u, unflatten(found.witness, u), strict=True))
    return Certificate(
        kind=kind,
        objective=objective,
        upper=found.upper,
        lower=found.lower,
        attained=found.lower,
        controls=moved,
        radius=ball.radius,
        multiplier=found.least.multiplier,
        curvature=model.curvature,
        dual=model.dual(found.touching) if isinstance(model, AffineLoss) else None,
    )


def _ball(problem: ControlProblem, u: Controls, radius: float, centre: Controls | None) -> Ball:
    """The ball of steps from ``u``."""
    problem.check_controls(u)
    _require_radius(radius)
    if problem.box is not None:
        raise InputError(
            "the problem has a box; the bound of the same problem without it, "
            "dataclasses.replace(problem, box=None), holds for controls in the box as well"
        )
    flat = flatten(u)
    if not flat.numel():
        raise InputError("the problem has no controls, so nothing can be gained; attach a delta")
    _require_numbers(flat)
    if centre is None:
        return Ball(torch.zeros_like(flat), radius)
    problem.check_controls(centre)
    if [c.shape for c in centre] != [control.shape for control in u]:
        raise InputError("the centre has other shapes than the controls; give it theirs")
    middle = flatten(centre) - flat
    _require_numbers(middle)
    distance = float(middle.norm())
    if distance > radius * (1 + 1e-12):
        raise InputError(
            f"the controls are {distance:.6g} away from the centre, and the radius is "
            f"{radius:.6g}; give a ball that holds them"
        )
    return Ball(middle, radius)


def _affine_loss(problem: ControlProblem, u: Controls) -> AffineLoss:
    """The loss of the outputs, linearised at ``u``."""
    cost = problem.cost
    if not isinstance(cost, CrossEntropyCost | BinaryCrossEntropyCost | SquaredErrorCost):
        raise InputError(
            f"a certificate is for linear dynamics with a QuadraticCost, and for any dynamics with "
            f"a cross-entropy or a squared error, not for {type(problem.dynamics).__name__} with "
            f"{type(cost).__name__}; bound its quadratic model by quadratic_gap"
        )
    with torch.no_grad():
        outputs = problem.rollout(u)[-1]
    size = sum(control.numel() for control in u)
    if 8 * outputs.numel() * size > MEMORY:
        raise InputError(
            f"the derivatives of {outputs.numel()} outputs in {size} controls take "
            f"{8 * outputs.numel() * size / 2**30:.1f} GiB, and at most {MEMORY / 2**30:.1f} are "
            "allowed; take fewer rows, or a smaller delta"
        )
    rows = [jacobian.flatten(0, 1) for jacobian in logit_jacobians(problem, u)]
    return AffineLoss(
        cost.terminal, outputs, torch.cat(rows, 1), flatten(u), float(cost.weight_decay)
    )


def _require_affine(problem: ControlProblem, u: Controls, model: AffineLoss, ball: Ball) -> None:
    draw = torch.Generator().manual_seed(0)
    ray = torch.randn(len(ball.centre), generator=draw, dtype=torch.float64).to(ball.centre)
    d = min(ball.radius, 1.0) / ray.norm() * ray
    with torch.no_grad():
        moved = tuple(a + e for a, e in zip(u, unflatten(d, u), strict=True))
        there, affine = problem.rollout(moved)[-1], model.outputs_at(d)
    error, size = float((there - affine).norm()), float(there.norm() + model.outputs.norm())
    if not error <= _AFFINE * size:
        raise InputError(
            f"the last state is not affine in the controls: at a distance of {float(d.norm()):.2g} "
            f"it differs by {error:.2g} from its linearisation; leave affine=True out, and the "
            "bound is of the linearisation"
        )


def _least_conceivable(problem: ControlProblem, u: Controls, ball: Ball) -> float:
    """What ``J`` is not below in the ball: the losses are not negative, nor is the weight decay."""
    cost = problem.cost
    assert isinstance(cost, CrossEntropyCost | BinaryCrossEntropyCost | SquaredErrorCost)
    nearest = max(0.0, float((flatten(u) + ball.centre).norm()) - ball.radius)
    return 0.5 * float(cost.weight_decay) * nearest**2


def _reached(
    problem: ControlProblem, u: Controls, witness: Tensor, objective: float
) -> tuple[Controls, float]:
    """The best of some parts of a step in the problem itself, and what it gains."""
    best, gained = u, 0.0
    for halvings in range(_SHORTEST):
        steps = unflatten(0.5**halvings * witness, u)
        moved = tuple(a + d for a, d in zip(u, steps, strict=True))
        with torch.no_grad():
            gain = objective - float(problem.objective(moved))
        if gain > gained:
            best, gained = moved, gain
    return best, gained


def _require_radius(radius: float) -> None:
    if not radius > 0:
        raise InputError(f"the radius is {radius}; expected a positive length")


def _require_numbers(flat: Tensor) -> None:
    if flat.dtype != torch.float64 or not bool(torch.isfinite(flat).all()):
        told = f"are {flat.dtype}" if flat.dtype != torch.float64 else "are not all finite"
        raise InputError(
            f"the numbers {told}; a certificate needs finite ones in float64, where its rounding "
            "errors are small beside the gap"
        )
