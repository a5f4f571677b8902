"""LoRA's minima: the linear model against a convex solver and its dual, and the real model."""

from __future__ import annotations

import cvxpy
import pytest
import torch
from torch import Tensor

from deltacontrol.experiments.measures.low_rank_minima import (
    LinearLoRA,
    Loss,
    RealLoRA,
    needed_rank,
)
from deltacontrol.experiments.measures.margins import MarginData
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError

F64 = torch.float64
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=F64)
LOSSES: tuple[Loss, ...] = ("logistic", "squared")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(loss: Loss, share: float = 0.2) -> LinearLoRA:
    return LinearLoRA.of(normal(5, 6, 4, seed=1), normal(5, seed=2), SIGNS, loss, share)


@pytest.fixture(scope="module")
def data(minilm_l6: str) -> MarginData:
    setting = Setting(
        minilm_l6, "movie", train_rows=3, test_rows=0, order="shuffled", max_length=8,
        head="ridge", head_rows=64, dtype="float64",
    )  # fmt: skip
    return MarginData.of(setting)


def test_the_rank_that_is_needed() -> None:
    assert [needed_rank(n) for n in (1, 2, 3, 12, 14, 15)] == [2, 2, 3, 5, 5, 6]
    assert needed_rank(5, outputs=3) == needed_rank(15)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_minimum_is_that_of_a_convex_solver(loss: Loss) -> None:
    found = problem(loss)
    X = cvxpy.Variable(found.rows.shape[1:])
    z = found.margins.numpy() + cvxpy.hstack(
        [cvxpy.sum(cvxpy.multiply(G, X)) for G in found.rows.numpy()]
    )
    if loss == "logistic":
        losses = cvxpy.logistic(-cvxpy.multiply(SIGNS.numpy(), z))
    else:
        losses = 0.5 * cvxpy.square(z - SIGNS.numpy())
    value = cvxpy.sum(losses) / 5 + found.penalty * cvxpy.normNuc(X)
    exact = cvxpy.Problem(cvxpy.Minimize(value)).solve(
        solver=cvxpy.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9
    )
    end = found.minimise(4, seed=0, size=1.0)
    assert end.objective == pytest.approx(exact, rel=1e-6)
    assert 0 <= end.objective - end.bound + 1e-12 <= 1e-7 * end.objective


@pytest.mark.parametrize("loss", LOSSES)
def test_any_slopes_bound_the_minimum_from_below(loss: Loss) -> None:
    found = problem(loss)
    least = found.minimise(4, seed=0, size=1.0).objective
    for seed in range(20):
        bound = found.bound(3 * normal(5, seed=seed))
        assert bound <= least + 1e-12
    assert found.bound(normal(5)) < least - 1e-3


def test_cutting_the_coordinates_changes_nothing() -> None:
    """Rows of rank-one parts in large matrices: the gradient lies in what they span."""
    left, right = normal(5, 40, seed=3), normal(5, 30, seed=4)
    G = left[:, :, None] * right[:, None, :]
    small = LinearLoRA.of(G, normal(5, seed=2), SIGNS, "logistic", 0.1)
    assert small.rows.shape == (5, 5, 5)
    large = LinearLoRA(G, small.margins, SIGNS, "logistic", small.penalty)
    one, other = (p.minimise(3, seed=0, size=0.5).objective for p in (small, large))
    assert one == pytest.approx(other, rel=1e-9)


def test_a_penalty_of_one_leaves_zero_optimal() -> None:
    found = problem("squared", 0.999999)
    assert found.minimise(2, seed=0, size=0.0).objective == pytest.approx(found.start, rel=1e-9)
    assert found.bound(found.margins) == pytest.approx(found.start, rel=1e-5)


def test_rows_are_derivatives_of_the_real_margins(data: MarginData) -> None:
    real = RealLoRA(data, "attention.value", 2)
    rows, margins = real.rows()
    weight = data.model.get_parameter("bert.encoder.layer.2.attention.self.value.weight")
    direction = normal(*weight.shape, seed=5) / weight.numel() ** 0.5
    batch = data.batch(data.examples)
    errors = []
    for h in (1e-1, 1e-2):
        with torch.no_grad():
            weight += h * direction
            moved = data.margins(data.model(**batch).logits, batch["attention_mask"])
            weight -= h * direction
        errors.append(float((moved - margins - h * (rows * direction).sum((1, 2))).norm()))
    # The remainder is of second order: a tenth of the step leaves a hundredth of it.
    assert errors[1] < 0.03 * errors[0]


@pytest.mark.slow
def test_the_real_model_is_trained_and_left_as_it_was(data: MarginData) -> None:
    real = RealLoRA(data, "attention.value", 2)
    rows, margins = real.rows()
    linear = LinearLoRA.of(rows, margins, data.signs, "logistic", 0.5)
    before = {n: p.detach().clone() for n, p in data.model.named_parameters()}
    ends = [real.minimise(2, seed=0, penalty=linear.penalty, steps=n) for n in (2, 25)]
    assert ends[1].objective < min(ends[0].objective, linear.start)
    assert all(torch.equal(p, before[n]) for n, p in data.model.named_parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: problem("squared", 1.5), "zero is optimal"),
        (lambda: LinearLoRA.of(normal(5, 6), normal(5), SIGNS, "squared", 0.1), "rows have shape"),
    ],
)
def test_what_cannot_be_is_refused(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
