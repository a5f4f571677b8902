"""Products with Jacobian, Gauss-Newton, Hessian and kernel against dense derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.model_curvature import ModelCurvature, softmax_factor

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, LABELS = normal(5, 3, seed=1), torch.tensor([0, 2, 1, 1, 3])
AT = {"w": normal(4, 3, seed=2), "b": normal(4, seed=3), "v": normal(4, 4, seed=4)}


def outputs(at: dict[str, Tensor]) -> Tensor:
    return torch.tanh(X @ at["w"].T + at["b"]) @ at["v"]


def loss(f: Tensor) -> Tensor:
    return cross_entropy(f, LABELS)


def flat(theta: Tensor) -> Tensor:
    w, b, v = theta.split([12, 4, 16])
    return outputs({"w": w.view(4, 3), "b": b, "v": v.view(4, 4)})


THETA = torch.cat([p.flatten() for p in AT.values()])


@pytest.fixture(scope="module")
def curvature() -> ModelCurvature:
    return ModelCurvature(outputs, loss, AT)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_every_product_is_the_dense_one(curvature: ModelCurvature) -> None:
    J = torch.func.jacrev(flat)(THETA).reshape(20, 32)
    f = flat(THETA)
    B = torch.func.hessian(loss)(f).reshape(20, 20)
    H = torch.func.hessian(lambda t: loss(flat(t)))(THETA)
    v, w = normal(3, 32, seed=5), normal(3, 20, seed=6)
    assert (curvature.num_parameters, curvature.num_outputs) == (32, 20)
    close(v @ curvature.jacobian.T, v @ J.T)
    close(w @ curvature.jacobian, w @ J)
    close(w @ curvature.kernel, w @ (J @ J.T))
    close(v @ curvature.gauss_newton, v @ (J.T @ B @ J))
    close(v @ curvature.hessian, v @ H)
    close(curvature.gradient, torch.func.grad(lambda t: loss(flat(t)))(THETA))
    assert float((J.T @ B @ J - H).norm()) > 1e-3


def test_the_factor_of_the_softmax(curvature: ModelCurvature) -> None:
    factor, s = softmax_factor(curvature.value, LABELS)
    dense = torch.block_diag(*factor)
    close(dense @ dense.T, torch.func.hessian(loss)(curvature.value).reshape(20, 20))
    close(dense @ s.flatten(), curvature.residual)
    # s has no part that C annihilates, or it would be no pseudo-inverse.
    close(dense.T @ torch.linalg.pinv(dense.T) @ s.flatten(), s.flatten())


def test_gauss_newton_in_the_space_of_outputs(curvature: ModelCurvature) -> None:
    factor, s = softmax_factor(curvature.value, LABELS)
    C = torch.block_diag(*factor)
    K = C.T @ curvature.kernel.dense() @ C
    G = curvature.gauss_newton.dense()
    close(torch.linalg.eigvalsh(K)[-15:], torch.linalg.eigvalsh(G)[-15:])
    g = curvature.gradient
    one = g @ torch.linalg.solve(G + 0.1 * torch.eye(32, dtype=F64), g)
    other = s.flatten() @ torch.linalg.solve(K + 0.1 * torch.eye(20, dtype=F64), K @ s.flatten())
    close(one, other)


def test_nothing_has_no_curvature() -> None:
    with pytest.raises(InputError, match="no parameters"):
        ModelCurvature(outputs, loss, {})
