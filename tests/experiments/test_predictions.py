"""Predictions from the initial point: the kernel, the dimension, the ranks, and their errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from deltacontrol.deltas import parse
from deltacontrol.experiments.measures.initial_model import InitialModel
from deltacontrol.experiments.measures.tangent_kernel import tangent_kernel
from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.studies.threshold.measurement import (
    ModelThreshold,
    QuadraticThreshold,
)
from deltacontrol.experiments.studies.threshold.predictions import (
    _Subspaces,
    dimension_of,
    predict_dimension,
    predict_ranks,
)
from deltacontrol.experiments.tasks.encoding import without_labels
from deltacontrol.theory.dimension.random_subspaces import falls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.model_curvature import ModelCurvature
from tests import tiny_model

ROWS, HELDOUT = 24, 12


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random model in a folder, and a task of three classes in a file."""
    return tiny_model.write(tmp_path_factory.mktemp("places"))


def made(places: dict[str, str], *deltas: str, **options) -> InitialModel:
    rows = {"train_rows": ROWS, "validation_rows": HELDOUT}
    options = rows | {"max_length": 12, "dtype": "float64"} | options
    return InitialModel(Setting(places["model"], places["task"], deltas=deltas, **options))


@pytest.fixture(scope="module")
def full(places: dict[str, str]) -> InitialModel:
    return made(places)


def curvature(initial: InitialModel, batch) -> ModelCurvature:
    """The same model, differentiated as a whole."""

    def outputs(at):
        moved = {f"controls.{name}": p for name, p in at.items()}
        inputs = without_labels(batch)
        logits = torch.func.functional_call(initial.controlled, moved, (), inputs).logits
        return logits @ initial.contrasts

    loss = lambda f: torch.nn.functional.cross_entropy(f @ initial.contrasts.mT, batch["labels"])  # noqa: E731
    return ModelCurvature(outputs, loss, initial.controlled.trainable())


@pytest.mark.slow
def test_the_kernel_is_that_of_the_whole_batch(full: InitialModel) -> None:
    (batch,) = full.batches(ROWS)
    dense = curvature(full, batch)
    size = ROWS * 2
    kernel = dense.kernel.dense()
    # Padding moves the outputs of an example by rounding alone.
    torch.testing.assert_close(full.kernel.total()[:size, :size], kernel, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(full.kernel.outputs[:ROWS], dense.value, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_a_small_capacity_gives_the_same_kernel(full: InitialModel) -> None:
    examples = full.batches(1)[:5]
    read = lambda out, _: out.logits[0] @ full.contrasts  # noqa: E731
    trainable = full.controlled.trainable()
    few = tangent_kernel(full.controlled, trainable, examples, read, capacity=1)
    for name, part in few.parts.items():
        whole = full.kernel.parts[name][:10, :10]
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-14)


def test_the_linearised_loss_has_the_gradient_and_curvature_of_the_model(
    full: InitialModel,
) -> None:
    (batch,) = full.batches(ROWS)
    dense = curvature(full, batch)
    problem = full.linearised()
    g, size = dense.gradient, ROWS * 3
    assert float(problem.loss.gradient_weights.sum()) == pytest.approx(float(g @ g), rel=1e-8)
    form = float(g @ (dense.gauss_newton @ g))
    weights, values = problem.loss.gradient_weights, problem.loss.gradient_values
    assert float((weights * values).sum()) == pytest.approx(form, rel=1e-8)
    assert len(problem.residual) == size


@pytest.mark.slow
def test_a_free_head_is_taken_out(places: dict[str, str]) -> None:
    """After it, the fall in random directions of LoRA is that of both together."""
    initial = made(places, "lora:rank=2")
    assert [n.partition(".")[0] for n in initial.free] == ["head", "head"]
    (batch,) = initial.batches(ROWS)
    both = curvature(initial, batch)
    g = both.gradient
    sizes = {n: p.numel() for n, p in initial.controlled.trainable().items()}
    in_head = torch.cat([torch.full((s,), n in initial.free) for n, s in sizes.items()])
    count = int((~in_head).sum())
    P = torch.zeros(len(g), 6 + int(in_head.sum()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    P[~in_head, :6] = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    P[in_head, 6:] = torch.eye(int(in_head.sum()), dtype=torch.float64)
    b, H = P.mT @ g, P.mT @ (both.gauss_newton @ P)
    whole = float(0.5 * b @ torch.linalg.lstsq(H, b[:, None], driver="gelsd").solution[:, 0])
    prediction = dimension_of(initial, 0.9 * initial.loss(torch.arange(ROWS)), "loss")
    problem = initial.linearised()
    by_head = initial.loss(torch.arange(ROWS)) - float(prediction.curve["loss"][0])
    # The mean of LoRA's own part over draws, against the one draw that was solved with the head.
    kept = problem.loss.values > 1e-9 * problem.loss.values.max()
    values = problem.loss.values[kept]
    gradient = problem.loss.gradient_weights[kept].sqrt()
    drawn = torch.stack([falls(values, gradient, 6, seed)[-1] for seed in range(200)])
    assert by_head < whole
    assert abs(whole - by_head - float(drawn.mean())) < 4 * float(drawn.std())


@pytest.mark.parametrize("share", [0.95, 0.9])
def test_d_star_is_where_half_of_exact_solves_succeed(full: InitialModel, share: float) -> None:
    start = full.loss(torch.arange(ROWS))
    found = dimension_of(full, share * start, "loss")
    loss = full.linearised().loss
    kept = loss.values > 1e-9 * loss.values.max()
    values, gradient = loss.values[kept], loss.gradient_weights[kept].sqrt()
    d = max(1, math.ceil(found.dimension))
    drawn = torch.stack([falls(values, gradient, d, seed)[-1] for seed in range(300)])
    hits = float((drawn >= (1 - share) * start).double().mean())
    spread = found.high - found.low
    # One dimension, half of it rounding, is a sizeable part of the width here.
    assert abs(hits - 0.5) < 4 * math.sqrt(0.25 / 300) + 3.3 / spread
    assert 0 < found.standard_error and found.low <= found.dimension <= found.high
    assert str(found.text).startswith("d* = ")
    assert found.curve["loss"].is_monotonic_decreasing


def test_accuracies_are_those_of_solved_subspaces(full: InitialModel) -> None:
    """Mean accuracy over subspaces of the linearised model, solved with explicit rows."""
    every = list(range(ROWS))
    problem = full.linearised()
    examples = full.batches(1)
    (batch,) = full.batches(ROWS)
    held = full._validation.batch()
    rows = torch.eye(2 * ROWS, dtype=torch.float64) @ curvature(full, batch).jacobian
    others = torch.eye(2 * HELDOUT, dtype=torch.float64) @ curvature(full, held).jacobian
    assert len(examples) == len(every)
    from deltacontrol.theory.linear.model_curvature import softmax_factor

    factor, s = softmax_factor(full.logits(torch.arange(ROWS)), full.labels)
    left = torch.block_diag(*torch.einsum("nka,kc->nac", factor, full.contrasts))
    Z, d, found = left @ rows, 12, []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        P = torch.randn(Z.shape[1], d, generator=generator, dtype=torch.float64)
        ZP = Z @ P
        z = -torch.linalg.solve(ZP.mT @ ZP, ZP.mT @ s.flatten())
        outputs = problem.outputs + others @ P @ z
        logits = outputs.view(HELDOUT, 2) @ full.contrasts.mT
        found.append(float((logits.argmax(1) == full.heldout_labels).double().mean()))
    predicted = full.accuracies(problem, problem.loss.kappa(d), torch.arange(HELDOUT))
    error = 4 * np.std(found) / math.sqrt(300) + 4 * float(predicted.std()) / math.sqrt(400)
    assert abs(np.mean(found) - float(predicted.mean())) < error + 0.02
    assert float(predicted.std()) == pytest.approx(float(np.std(found)), rel=0.25)


@pytest.mark.slow
def test_the_ends_of_the_scale(full: InitialModel, places: dict[str, str]) -> None:
    start = full.loss(torch.arange(ROWS))
    assert dimension_of(full, 2 * start, "loss").dimension == 0
    # From indifferent logits the quadratic model ends above zero; the loss itself would not.
    mild = made(places, pretrained=False)
    with torch.no_grad():
        for name, p in mild.controlled.trainable().items():
            if "classifier.weight" in name:
                p.mul_(0.01)
    beyond = dimension_of(mild, 0.01, "loss")
    assert math.isnan(beyond.dimension) and "no lower" in beyond.text
    assert dimension_of(full, 0.01, "accuracy").dimension == 0
    wanted = dimension_of(full, 0.999, "accuracy")
    assert math.isnan(wanted.dimension) and "rank" in wanted.text
    text = predict_dimension(
        places["model"], places["task"], (parse("bitfit"),), target=0.2, rows=12, heldout=6,
        max_length=12,
    ).text  # fmt: skip
    assert text.startswith("d* = 0") or text.startswith("no d*")


@pytest.mark.parametrize("middle", [0.4, 1.0, 7.0, 20.0])
def test_a_share_is_found_between_the_dimensions_of_the_curve(
    full: InitialModel, monkeypatch: pytest.MonkeyPatch, middle: float
) -> None:
    subspaces = _Subspaces(full, torch.arange(ROWS), torch.arange(HELDOUT), 0.5, "accuracy")
    monkeypatch.setattr(subspaces, "probability", lambda d: min(1.0, 0.5 * d / middle))
    assert subspaces.quantile(0.5) == pytest.approx(middle, rel=0.01)
    assert subspaces.quantile(0.0) == 0


def test_ranks_are_those_of_the_gradient_and_of_the_linear_step(full: InitialModel) -> None:
    table = predict_ranks(full).set_index("name")
    (batch,) = full.batches(ROWS)
    dense = curvature(full, batch)
    names = list(full.controlled.trainable())
    parts = dict(
        zip(
            names,
            dense.gradient.split([p.numel() for p in full.controlled.trainable().values()]),
            strict=True,
        )
    )
    name = next(n for n in table.index if "layer.1.intermediate" in n)
    values = torch.linalg.svdvals(parts[name].view(32, 16))
    stable = float(values.square().sum() / values[0] ** 2)
    found = table["gradient_stable_rank"].to_dict()[name]
    assert found == pytest.approx(stable, rel=1e-8)
    assert min(table["step_stable_rank"]) >= 1
    assert max(table["step_rank90"]) <= 16


@pytest.mark.slow
def test_records_of_thresholds(places: dict[str, str], tmp_path: Path) -> None:
    tuned = ModelThreshold(
        model=places["model"],
        task=places["task"],
        deltas=("head",),
        rows=16,
        max_length=12,
        targets=(0.95, 0.8),
        draws=40,
        dimensions=(1, 8, 40),
        subspaces=3,
        steps=60,
    ).execute(Workspace(tmp_path))
    cases = pd.DataFrame(tuned.result["cases"]).set_index(["kind", "target"])
    linear = cases.loc["linearised"]
    error = (linear["measured"] - linear["predicted"]).abs().to_numpy()
    assert (error <= 1 + linear["width"].to_numpy()).all()
    by_cone = [case for case in tuned.result["cases"] if case["kind"] == "fine-tuned"]
    # A subspace of the head has 51 directions; the cross-entropy wants fewer than its quadratic.
    assert [0 < case["cone"] < case["predicted"] + 3 for case in by_cone] == [True, True]
    # In the head's own directions the model is linear, and the loss the better the more there are.
    losses = tuned.curve.dropna(subset=["loss"]).groupby("dimension")["loss"].mean()
    assert losses.is_monotonic_decreasing and float(losses.iloc[-1]) < tuned.result["start"]
    assert tuned.result["num_parameters"] == 16 * 3 + 3
    exact = QuadraticThreshold(size=60, draws=40, steps=30).execute(Workspace(tmp_path))
    for case in exact.result["cases"]:
        assert abs(case["measured"] - case["predicted"]) < 2 + case["width"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: made(p, train_rows=3), "allows 10 to"),
        (lambda p: made(p, "subspace:dimension=5"), "subspace itself"),
        (lambda p: dimension_of(made(p, validation_rows=0), 0.5, "accuracy"), "heldout is 0"),
        (lambda p: dimension_of(made(p, validation_rows=2), 1.5, "accuracy"), "between 0 and 1"),
        (lambda p: dimension_of(made(p, validation_rows=2), -1.0, "loss"), "positive loss"),
        (lambda p: predict_ranks(made(p, "bitfit", train_rows=12)), "without deltas"),
        (lambda p: ModelThreshold(targets=(1.5,)), "targets are"),
        (lambda p: ModelThreshold(dimensions=(4, 2)), "increasing"),
        (lambda p: QuadraticThreshold(draws=3), "draws is 3"),
        (
            lambda p: ModelThreshold(
                model=p["model"], task=p["task"], deltas=("bitfit",), rows=12, max_length=12
            ).execute(Workspace(Path("."))),
            "add 'head'",
        ),
    ],
)
def test_what_cannot_be_is_refused(places: dict[str, str], call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(places)
