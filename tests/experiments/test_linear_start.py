"""What is taken from a delta's start, against dense Jacobians and exact optima."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltacontrol.deltas import DeltaModel, HeadTuning, attach, parse
from deltacontrol.experiments.heads import fit_head, head_inputs, linear_head
from deltacontrol.experiments.predicting import example_gradients
from deltacontrol.experiments.predicting.fitted_head import fit_head_by_descent
from deltacontrol.experiments.predicting.linear_start import (
    EPSILON,
    LinearStart,
    _entries,
    _sums,
    linear_start,
)
from deltacontrol.experiments.predicting.rates import rate_estimate
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.tasks.encoding import Batch, without_labels
from deltacontrol.theory.convex import ConvexTuning, OuterProducts
from deltacontrol.theory.convex.features import contrasts
from deltacontrol.theory.linear.linear_descent import linear_descent
from deltacontrol.theory.linear.model_curvature import ModelCurvature
from tests import tiny_model

TRAIN, HELDOUT, BATCH, DRAWS = 10, 6, 4, 7
DELTAS = ("lora:rank=2", "bitfit", "houlsby:bottleneck=4", "prefix:length=2")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A tiny random model on a task of three classes, in float64."""
    places: dict[str, Any] = dict(tiny_model.write(tmp_path_factory.mktemp("places")))
    return Setting(
        **places, train_rows=TRAIN, validation_rows=HELDOUT, max_length=10, dtype="float64"
    )


def passes(setting: Setting):
    def found(split: str, size: int) -> Iterator[tuple[np.ndarray, Batch]]:
        rows = setting.split(split)
        order = np.argsort(rows.lengths, kind="stable")
        for first in range(0, len(order), size):
            yield order[first : first + size], rows.batch(order[first : first + size])

    return found


def labels(setting: Setting) -> Tensor:
    parts = [setting.batch(split)["labels"] for split in ("train", "validation")]
    return torch.cat(parts)


def started(setting: Setting, *deltas: str) -> tuple[LinearStart, Dense]:
    """The start of deltas with the head, and the same from a dense Jacobian."""
    C = torch.from_numpy(contrasts(3))
    draws = np.random.default_rng(0).multinomial(TRAIN, np.full(TRAIN, 1 / TRAIN), DRAWS)
    made = [parse(text) for text in deltas]
    if not any(delta.trains_head for delta in made):
        made.append(HeadTuning())
    controlled = attach(setting.base, *made).eval()
    try:
        dense = Dense(controlled, setting, C, hessian=not deltas)
        start = linear_start(
            controlled, passes(setting), labels(setting), C,
            torch.from_numpy(draws.astype(np.float64)), batch_size=BATCH,
        )  # fmt: skip
        return start, dense
    finally:
        controlled.detach()


class Dense:
    """Dense Jacobians of the contrasts of all rows by all controls, and what follows."""

    def __init__(
        self, controlled: DeltaModel, setting: Setting, C: Tensor, *, hessian: bool
    ) -> None:
        parts, values = [], []
        for split in ("train", "validation"):
            batch = setting.batch(split)

            def outputs(at: dict[str, Tensor], batch: Batch = batch) -> Tensor:
                moved = {f"controls.{name}": p for name, p in at.items()}
                inputs = without_labels(batch)
                logits = torch.func.functional_call(controlled, moved, (), inputs).logits
                return logits @ C

            def loss(f: Tensor, batch: Batch = batch) -> Tensor:
                return torch.nn.functional.cross_entropy(f @ C.mT, batch["labels"])

            found = ModelCurvature(outputs, loss, controlled.trainable())
            rows = torch.eye(found.num_outputs, dtype=torch.float64)
            parts.append(rows @ found.jacobian)
            values.append(found.value)
            if split == "train":
                self.curvature = found
        self.J, self.outputs = torch.cat(parts), torch.cat(values)
        self.n = parts[0].shape[0]
        self.gradient = self.curvature.gradient
        J = self.J[: self.n]
        self.gauss_newton = J.mT @ self.curvature.output_hessian.dense() @ J
        # By a forward and a backward pass; these need the deltas, which are gone afterwards.
        self.v = torch.randn(J.shape[1], dtype=torch.float64)
        self.product = self.v @ self.curvature.gauss_newton
        self.hessian = self.curvature.hessian.dense() if hessian else None
        own = self.curvature.residual.view(TRAIN, -1, 1) * self.J[: self.n].view(TRAIN, 2, -1)
        second = self.gradient.square() + (TRAIN * own.sum(1)).var(0, correction=0) / BATCH
        self.metric = torch.where(second > 0, 1 / (second.sqrt() + EPSILON), 0.0)


@pytest.mark.parametrize("delta", DELTAS)
def test_kernels_slope_and_curvature_are_the_dense_ones(setting: Setting, delta: str) -> None:
    start, dense = started(setting, delta)
    J, n = dense.J, dense.n
    # Padding moves the outputs of an example by rounding alone.
    close: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(start.outputs, dense.outputs, **close)
    torch.testing.assert_close(start.kernel, J[:n] @ J[:n].mT, **close)
    torch.testing.assert_close(start.adam, (J * dense.metric) @ J[:n].mT, rtol=1e-6, atol=1e-6)
    assert start.slope == pytest.approx(float(dense.gradient.abs().sum()), rel=1e-9)
    G = dense.gauss_newton
    torch.testing.assert_close(dense.product, dense.v @ G, **close)
    s = dense.gradient.sign() * (dense.gradient.abs() > 1e-14)
    assert start.sign_curvature[0] == pytest.approx(float(s @ G @ s), rel=1e-6)
    root = dense.metric.sqrt()
    top = torch.linalg.eigvalsh(root[:, None] * G * root)[-1]
    assert start.largest[0] == pytest.approx(float(top), rel=1e-6)
    plain = torch.linalg.eigvalsh(start.whitened(start.kernel))[-1]
    assert float(plain) == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-8)
    assert sum(start.energies.values()) == pytest.approx(float(dense.gradient.square().sum()))
    assert start.num_kept == start.num_controls == J.shape[1]


def test_a_draw_is_a_start_with_weighted_rows(setting: Setting) -> None:
    start, dense = started(setting, "lora:rank=2")
    J, draw = dense.J[: dense.n], 3
    weights = start.draws[draw].repeat_interleave(2)
    g = J.mT @ (weights * dense.curvature.residual)
    assert float(start.drawn_slopes[draw]) == pytest.approx(float(g.abs().sum()), rel=1e-9)
    H = torch.block_diag(*(start.hessian_roots @ start.hessian_roots)) * weights
    torch.testing.assert_close(
        torch.block_diag(*(start.hessian_roots @ start.hessian_roots)),
        dense.curvature.output_hessian.dense(), rtol=1e-9, atol=1e-10,
    )  # fmt: skip
    s = g.sign() * (g.abs() > 1e-14)
    assert float(start.sign_curvature[1][draw]) == pytest.approx(
        float(s @ J.mT @ H @ J @ s), rel=1e-6
    )
    root = dense.metric.sqrt()
    top = torch.linalg.eigvalsh((J * root).mT @ H @ (J * root))[-1]
    assert float(start.largest[1][draw]) == pytest.approx(float(top), rel=1e-5)


def test_examples_that_pass_alone_give_the_same(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = started(setting, "lora:rank=2")
    monkeypatch.setattr(example_gradients, "NUMBERS", 1)
    alone, _ = started(setting, "lora:rank=2")
    torch.testing.assert_close(alone.kernel, together.kernel, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(alone.outputs, together.outputs, rtol=1e-9, atol=1e-10)


def test_a_delta_whose_copies_share_no_pass_is_linearised(setting: Setting) -> None:
    start, dense = started(setting, "subspace:dimension=5")
    torch.testing.assert_close(
        start.kernel, dense.J[: dense.n] @ dense.J[: dense.n].mT, rtol=1e-7, atol=1e-8
    )


def test_a_linear_model_ends_in_the_exact_optimum(setting: Setting) -> None:
    """The head alone is linear in its controls, and its loss with a ridge is a convex program."""
    start, _ = started(setting)
    weight = 0.2
    batch = setting.batch("train")
    h = head_inputs(setting.base, [batch])
    h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
    ones = np.broadcast_to(np.eye(3).reshape(1, 3, 1, 3), (TRAIN, 3, 1, 3))
    with torch.no_grad():
        offset = setting.base(**without_labels(batch)).logits
    program = ConvexTuning(
        [OuterProducts(ones, h[:, None].numpy())], batch["labels"], offset=offset
    )
    exact = program.solve(weight)
    rate = 1.0 / (float(torch.linalg.eigvalsh(start.kernel)[-1]) / TRAIN + weight)
    rates = torch.full((1500, 1), rate, dtype=torch.float64)
    before = start.outputs[:TRAIN].flatten()
    found = linear_descent(before, start.kernel, start.slopes, rates, decay=weight)[0]
    change = found - before
    energy = 0.5 * weight * float(change @ torch.linalg.solve(start.kernel, change))
    outputs = torch.cat([found.view(TRAIN, 2), start.outputs[TRAIN:]])
    objective = float(start.losses(outputs)[:TRAIN].mean()) + energy
    assert exact.bound - 1e-9 <= objective <= exact.objective + 1e-9
    expected = (offset + h @ exact.controls[0].mT) @ start.contrasts
    torch.testing.assert_close(found.view(TRAIN, 2), expected, rtol=1e-3, atol=1e-3)


def test_of_a_linear_model_gauss_newton_is_the_hessian(setting: Setting) -> None:
    start, dense = started(setting)
    assert dense.hessian is not None
    exact = torch.linalg.eigvalsh(dense.hessian).flip(0)
    found = torch.linalg.eigvalsh(start.whitened(start.kernel)).flip(0)
    torch.testing.assert_close(found[:8], exact[:8], rtol=1e-7, atol=1e-9)


def test_the_sign_step_of_the_estimate_is_the_best_of_a_linear_model(setting: Setting) -> None:
    start, dense = started(setting)
    estimate = rate_estimate(start)
    g, G = dense.gradient, dense.gauss_newton
    s = -g.sign()

    def model(rate: float) -> float:
        return float(rate * (g @ s) + 0.5 * rate**2 * (s @ G @ s))

    assert model(estimate.sign) < min(model(0.99 * estimate.sign), model(1.01 * estimate.sign))
    assert estimate.value == pytest.approx((estimate.sign * estimate.curvature) ** 0.5)
    ends = sorted((estimate.sign, estimate.curvature))
    assert 0 < estimate.low < ends[0] < ends[1] < estimate.high


def test_drawn_entries_stand_for_all_with_an_error_that_halves(float64: None) -> None:
    """Four times as many entries: half the error, in the root mean square over draws."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 3000, "b": 5000}
    J = torch.randn(4, 1, 8000, generator=generator) * torch.rand(8000, generator=generator)
    residual, draws = torch.randn(4, 1, generator=generator), torch.ones(2, 4)
    exact = _sums(J, residual, draws, torch.ones(8000), torch.ones(8000), 4)

    def errors(most: int) -> dict[str, float]:
        found = {"kernel": [], "adam": [], "slopes": []}
        for seed in range(40):
            entries = _entries(sizes, most, seed)
            assert sum(entries.sizes.values()) == len(entries.stands_for) <= most + 1
            starts = {"a": 0, "b": 3000}
            chosen = torch.cat([starts[n] + c for n, c in entries.columns.items()])
            one = _sums(
                J[..., chosen], residual, draws, entries.stands_for.double(),
                torch.ones(len(chosen)), 4,
            )  # fmt: skip
            for name, values in found.items():
                difference = getattr(one, name) - getattr(exact, name)
                values.append(float(difference.square().sum()))
        return {name: float(np.sqrt(np.mean(values))) for name, values in found.items()}

    few, many = errors(500), errors(2000)
    for name in few:
        # Entries are drawn without replacement: the ratio is a little above two.
        assert 1.7 < few[name] / many[name] < 3.0


def test_the_head_by_descent_is_the_certified_one(setting: Setting) -> None:
    base = setting.base
    head = linear_head(base)
    drawn = [p.detach().clone() for p in head.parameters()]
    train, heldout = setting.batch("train"), setting.batch("validation")
    try:
        exact = fit_head(base, train, heldout)
        expected = [p.detach().clone() for p in head.parameters()]
        found = fit_head_by_descent(base, [train], [heldout])
        assert found == exact.weight
        for p, q in zip(head.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-3, atol=1e-3)
    finally:
        with torch.no_grad():
            for p, q in zip(head.parameters(), drawn, strict=True):
                p.copy_(q)
