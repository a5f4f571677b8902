"""Problems, and the dense curvatures that products are held against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.linear.curvature import Curvature, GaussNewtonCurvature
from tests.theory.dense import flat, hessian, unflatten
from tests.theory.problems import CASES, Case, embedding_problem, forgetful_problem

F64 = torch.float64
PROBLEMS = (*CASES, Case("embedding", embedding_problem), Case("forgetful", forgetful_problem))
cases = pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)


def dense_gauss_newton(problem: ControlProblem, at: Controls) -> Tensor:
    """``J'CJ`` with the Jacobian of (states, controls) and the Hessian of the cost in them."""
    states = problem.rollout(at)[1:]
    sizes = [x.numel() for x in states]

    def outputs(z: Tensor) -> Tensor:
        found = problem.rollout(unflatten(z, at))[1:]
        return torch.cat([*(x.reshape(-1) for x in found), z])

    def cost(y: Tensor) -> Tensor:
        *parts, z = y.split([*sizes, len(y) - sum(sizes)])
        found = [x.reshape(like.shape) for x, like in zip(parts, states, strict=True)]
        return problem.total_cost([problem.x0, *found], unflatten(z, at))

    z = flat(at)
    J, C = torch.func.jacrev(outputs)(z), torch.func.hessian(cost)(outputs(z))
    return J.mT @ C @ J


def dense(kind: type[Curvature], problem: ControlProblem, at: Controls) -> Tensor:
    return dense_gauss_newton(problem, at) if kind is GaussNewtonCurvature else hessian(problem, at)


def matrix(curvature: Curvature) -> Tensor:
    return curvature.dense()
