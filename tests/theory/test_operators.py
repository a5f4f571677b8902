"""Every linear operator of the project in one suite, against matrices that autograd gives."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltacontrol import theory
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.convex import DenseFeatures, OuterProducts
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.conjugate_gradients import conjugate_gradients
from deltacontrol.theory.linear.curvature import GaussNewtonCurvature, HessianCurvature
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.model_curvature import ModelCurvature
from deltacontrol.theory.linear.operator import (
    Congruence,
    Diagonal,
    LinearOperator,
    Shifted,
    SymmetricMatrix,
    by_rows,
    mapped,
)
from deltacontrol.theory.linear.output_map import OutputMap
from deltacontrol.theory.linear.reachability import Reachability
from tests.theory.curvatures import dense_gauss_newton
from tests.theory.dense import flat, hessian, unflatten
from tests.theory.operators import OperatorSuite, normal
from tests.theory.problems import CASES, embedding_problem, residual_network

F64 = torch.float64
Pair = tuple[LinearOperator, Tensor]


def spd(n: int) -> Tensor:
    root = normal(n, n, seed=1)
    return root @ root.mT


class TestSymmetricMatrix(OperatorSuite):
    def pair(self) -> Pair:
        return SymmetricMatrix(spd(5)), spd(5)


class TestDiagonal(OperatorSuite):
    def pair(self) -> Pair:
        d = normal(5, seed=3)
        return Diagonal(d), torch.diag(d)


class TestShifted(OperatorSuite):
    def pair(self) -> Pair:
        return Shifted(SymmetricMatrix(spd(5)), 0.3), spd(5) + 0.3 * torch.eye(5, dtype=F64)


class Rectangle(LinearOperator):
    """A stored matrix, for its transpose and its congruences."""

    def __init__(self, matrix: Tensor) -> None:
        m, n = matrix.shape
        super().__init__((m, n), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _product(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def _transpose_product(self, y: Tensor) -> Tensor:
        return y @ self.matrix


class TestRectangle(OperatorSuite):
    def pair(self) -> Pair:
        M = normal(4, 7, seed=5)
        return Rectangle(M), M


class TestTall(OperatorSuite):
    def pair(self) -> Pair:
        M = normal(7, 4, seed=5)
        return Rectangle(M), M


class TestCongruence(OperatorSuite):
    def pair(self) -> Pair:
        M = normal(4, 5, seed=5)
        return Congruence(Rectangle(M), SymmetricMatrix(spd(5))), M @ spd(5) @ M.mT


class TestCongruenceOfTranspose(OperatorSuite):
    def pair(self) -> Pair:
        M = normal(5, 4, seed=5)
        return Congruence(Rectangle(M).T, SymmetricMatrix(spd(5))), M.mT @ spd(5) @ M


# Rollouts


def own(problem: ControlProblem) -> Controls:
    """Controls of each example."""
    zeros = problem.zero_controls(per_example=True, dtype=F64)
    return tuple(normal(*u.shape, seed=t) for t, u in enumerate(zeros))


def shared(problem: ControlProblem) -> Controls:
    zeros = problem.zero_controls(dtype=F64)
    return tuple(normal(*u.shape, seed=t) for t, u in enumerate(zeros))


def states(problem: ControlProblem, u: Controls, stage: int) -> Tensor:
    """``dx_stage/du``, by automatic differentiation of the rollout."""

    def state(z: Tensor) -> Tensor:
        return problem.rollout(unflatten(z, u))[stage].reshape(-1)

    return torch.func.jacrev(state)(flat(u))


class TestLinearisation(OperatorSuite):
    """Residual layers, a shared control; each product evaluates the steps anew."""

    keep = False
    controls: Callable[[ControlProblem], Controls] = staticmethod(shared)
    problem: Callable[[], ControlProblem] = staticmethod(residual_network)

    def pair(self) -> Pair:
        problem = self.problem()
        u = self.controls(problem)
        return Linearisation.of(problem, u, keep=self.keep), states(problem, u, -1)


class TestKeptLinearisation(TestLinearisation):
    """The steps' graphs are kept."""

    keep = True


class TestLinearisationOfOwnControls(TestLinearisation):
    """Each example has a control of its own."""

    keep = True
    controls = staticmethod(own)


class TestLinearisationOfTokens(TestLinearisation):
    """The first state holds integers."""

    keep = True
    problem = staticmethod(embedding_problem)


class TestStateTransition(OperatorSuite):
    def pair(self) -> Pair:
        problem = residual_network()
        u = shared(problem)

        def last(x0: Tensor) -> Tensor:
            x0 = x0.reshape(problem.x0.shape)
            return ControlProblem(problem.dynamics, problem.cost, x0).rollout(u)[-1].reshape(-1)

        M = torch.func.jacrev(last)(problem.x0.reshape(-1))
        return Linearisation.of(problem, u, keep=True).transition, M


class TestReachability(OperatorSuite):
    """The state of a stage before the last; two rows of a block at once."""

    def reach(self) -> tuple[Reachability, Tensor, Sequence[Tensor]]:
        problem = residual_network()
        u = shared(problem)
        access = [normal(*c.shape, seed=50 + t).square() for t, c in enumerate(u)]
        lin = Linearisation.of(problem, u, keep=True)
        return Reachability(lin, 3, access, chunk=2), states(problem, u, 3), access

    def pair(self) -> Pair:
        return self.reach()[:2]


class TestGramian(TestReachability):
    def pair(self) -> Pair:
        reach, C, access = self.reach()
        return reach.gramian, C * flat(access) @ C.mT


class TestOutputMap(TestReachability):
    def pair(self) -> Pair:
        reach, C, _ = self.reach()
        found = reach.output_map()
        assert isinstance(found, OutputMap)
        return found, C


class TestGaussNewtonCurvature(OperatorSuite):
    def pair(self) -> Pair:
        problem = residual_network()
        u = shared(problem)
        return GaussNewtonCurvature(problem, u), dense_gauss_newton(problem, u)


class TestHessianCurvature(OperatorSuite):
    def pair(self) -> Pair:
        problem = residual_network()
        u = shared(problem)
        return HessianCurvature(problem, u), hessian(problem, u)


# Models


X, LABELS = normal(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
AT = {"w": normal(3, 3, seed=2), "v": normal(3, 3, seed=4)}
THETA = flat(tuple(AT.values()))


def outputs(at: dict[str, Tensor]) -> Tensor:
    return torch.tanh(X @ at["w"].T) @ at["v"]


def of_theta(theta: Tensor) -> Tensor:
    w, v = theta.split(9)
    return outputs({"w": w.view(3, 3), "v": v.view(3, 3)})


def loss(f: Tensor) -> Tensor:
    return cross_entropy(f, LABELS)


class ModelSuite(OperatorSuite):
    """An operator of `ModelCurvature`, by name, and its matrix from ``J``, ``B`` and ``H``."""

    name: str

    def matrix(self, J: Tensor, B: Tensor) -> Tensor:
        raise AssertionError("a subclass has the formula")

    def pair(self) -> Pair:
        J = torch.func.jacrev(of_theta)(THETA).reshape(12, 18)
        B = torch.func.hessian(loss)(of_theta(THETA)).reshape(12, 12)
        return getattr(ModelCurvature(outputs, loss, AT), self.name), self.matrix(J, B)


class TestJacobian(ModelSuite):
    name = "jacobian"

    def matrix(self, J: Tensor, B: Tensor) -> Tensor:
        return J


class TestOutputHessian(ModelSuite):
    name = "output_hessian"

    def matrix(self, J: Tensor, B: Tensor) -> Tensor:
        return B


class TestGaussNewtonOfAModel(ModelSuite):
    name = "gauss_newton"

    def matrix(self, J: Tensor, B: Tensor) -> Tensor:
        return J.mT @ B @ J


class TestHessianOfAModel(ModelSuite):
    name = "hessian"

    def matrix(self, J: Tensor, B: Tensor) -> Tensor:
        return torch.func.hessian(lambda theta: loss(of_theta(theta)))(THETA)


class TestTangentKernel(ModelSuite):
    name = "kernel"

    def matrix(self, J: Tensor, B: Tensor) -> Tensor:
        return J @ J.mT


# Features


class TestDenseFeatures(OperatorSuite):
    def pair(self) -> Pair:
        G = normal(3, 2, 4, 5, seed=1)
        return DenseFeatures(G.numpy()), G.reshape(6, 20)


class TestOuterProducts(OperatorSuite):
    def pair(self) -> Pair:
        left, right = normal(3, 2, 4, 5, seed=1), normal(3, 4, 6, seed=2)
        G = torch.einsum("nktp,ntq->nkpq", left, right)
        return OuterProducts(left.numpy(), right.numpy()), G.reshape(6, 30)


# What is no law of each of them


def members(kind: type) -> set[type]:
    found = {kind}
    for sub in kind.__subclasses__():
        found |= members(sub)
    return found


def test_every_operator_is_a_member() -> None:
    """Of whatever the packages define, found by import and not by a list."""
    import tests.theory.test_fastfood
    import tests.theory.test_layered_projections
    import tests.theory.test_projections  # noqa: F401

    for module in pkgutil.walk_packages(theory.__path__, "deltacontrol.theory."):
        importlib.import_module(module.name)
    packages = ("deltacontrol.",)
    concrete = {
        kind
        for kind in members(LinearOperator)
        if kind.__module__.startswith(packages) and not kind.__abstractmethods__
    }
    made: set[type] = set()
    for suite in members(OperatorSuite):
        if suite.__name__.startswith("Test"):
            operator = suite().pair()[0]
            made |= {type(operator), type(operator.T)}
    assert concrete - made == set()
    assert len(concrete) > 20


def test_scipy_solves_with_an_operator_by_one_call() -> None:
    problem = residual_network()
    u = shared(problem)
    G = Shifted(GaussNewtonCurvature(problem, u), 0.1)
    dense = G.dense()
    top = scipy.sparse.linalg.eigsh(G.to_scipy(), k=1, return_eigenvectors=False)[0]
    assert float(top) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-10)
    g = normal(len(dense), seed=1)
    x, info = scipy.sparse.linalg.cg(G.to_scipy(), g.numpy(), rtol=1e-12)
    assert info == 0
    ours = conjugate_gradients(G, -g, rtol=1e-12, max_products=500).step
    np.testing.assert_allclose(x, ours, rtol=1e-8, atol=1e-10 * float(ours.norm()))
    lin = Linearisation.of(problem, u, keep=True)
    y = lin @ normal(lin.shape[1], seed=2)
    found = scipy.sparse.linalg.lsqr(lin.to_scipy(), y.numpy(), atol=1e-13, btol=1e-13)[0]
    exact = torch.linalg.lstsq(lin.dense(), y[:, None], driver="gelsd").solution[:, 0]
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-7)


def test_single_precision_goes_to_scipy_and_half_does_not() -> None:
    D = Diagonal(torch.tensor([1.0, 2.0]))
    found = D.to_scipy() @ np.ones(2)  # float64 in, what the operator has out
    assert found.dtype == np.float32 and found.tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match="bfloat16.*float32 or float64"):
        Diagonal(torch.ones(2, dtype=torch.bfloat16)).to_scipy()


def test_operators_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="as many columns of A as M has"):
        Congruence(Rectangle(normal(3, 2, seed=1)), SymmetricMatrix(spd(3)))
    with pytest.raises(InputError, match=r"\(2, 3\) is not symmetric"):
        SymmetricMatrix(normal(2, 3, seed=1))
    with pytest.raises(InputError, match=r"expected \(n,\)"):
        Diagonal(normal(2, 2, seed=1))
    with pytest.raises(InputError, match="int64, which cannot be perturbed"):
        problem = embedding_problem()
        Linearisation.of(problem, problem.zero_controls(dtype=F64)).transition  # noqa: B018


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("keep", [False, True])
def test_a_block_of_a_rollout_is_its_vectors(case, keep: bool) -> None:
    """All rows at once, where the first product may be what makes the graphs, and one by one."""
    problem = case.make()
    lin = Linearisation.of(problem, case.start(problem, 0.5), keep=keep)
    Y, X = normal(3, lin.shape[0], seed=1), normal(lin.shape[1], 3, seed=2)
    for found, single in ((Y @ lin, [y @ lin for y in Y]), ((lin @ X).mT, [lin @ x for x in X.mT])):
        torch.testing.assert_close(found, torch.stack(single), rtol=1e-12, atol=1e-13)


def test_rows_one_by_one_and_at_once() -> None:
    rows = normal(2, 3, 4, seed=1)
    for chunk in (None, 1, 4):
        assert torch.equal(mapped(lambda x: x.cumsum(0), rows, 4, chunk), rows.cumsum(-1))
    assert torch.equal(by_rows(lambda x: x.cumsum(0), rows, 4), rows.cumsum(-1))
