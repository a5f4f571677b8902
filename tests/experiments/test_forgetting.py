"""The study of forgetting: KL and losses against their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.studies.forgetting.measurement import Forgetting, _Look
from tests.experiments import model_folders
from tests.experiments.word_models import WORDS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Forgetting:
    folder = tmp_path_factory.mktemp("forgetting")
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS[:14], 6)) for _ in range(80)]
    (folder / "task.txt").write_text("\n".join(lines), encoding="utf-8")
    held = [{"text": " ".join(reversed(line.split())), "label": i % 2} for i, line in
            enumerate(lines)]  # fmt: skip
    pd.DataFrame(held).to_csv(folder / "held.csv", index=False)
    sizes = {"steps": 6, "every": 3, "rows": 8, "held_rows": 6, "max_length": 12}
    return Forgetting(
        model=model_folders.causal(folder / "model", WORDS),
        task=str(folder / "task.txt"),
        held=str(folder / "held.csv"),
        learning_rate=3e-2,
        **sizes,
    )


def test_kl_is_zero_at_the_start_and_as_torch_has_it_later(tiny: Forgetting) -> None:
    setting = tiny._setting()
    model, look = setting.controlled, _Look(setting, tiny)
    assert look(model)["kl"] == pytest.approx(0.0, abs=1e-7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    found = look(model)
    divergence, loss, tokens = 0.0, 0.0, 0
    for batch in look.held:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        known = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            now = model(**inputs).logits[:, :-1][known]
            with model.disable():
                base = model(**inputs).logits[:, :-1][known]
        logs = (now.log_softmax(-1), base.log_softmax(-1))
        divergence += float(kl_div(*logs, reduction="sum", log_target=True))
        loss += float(cross_entropy(now, batch["labels"][:, 1:][known], reduction="sum"))
        tokens += int(known.sum())
    assert found["kl"] == pytest.approx(divergence / tokens, rel=1e-4) and found["kl"] > 0.01
    assert found["held_loss"] == pytest.approx(loss / tokens, rel=1e-5)


def test_a_run_looks_on_the_way_and_ends_where_it_says(tiny: Forgetting, tmp_path: Path) -> None:
    outcome = tiny.execute(Workspace(tmp_path, progress=False))
    seen = outcome.curve.dropna(subset=["validation_kl"])
    assert seen["step"].tolist() == [3, 6]
    assert outcome.result["start"]["kl"] == pytest.approx(0.0, abs=1e-7)
    end = outcome.result["end"]
    assert end["kl"] == pytest.approx(seen["validation_kl"].iloc[-1], rel=1e-5)
    assert end["loss"] != outcome.result["start"]["loss"] and end["kl"] > 1e-4


@pytest.fixture(scope="module")
def curvatures(tiny: Forgetting) -> tuple:
    """G and F of bias terms of the tiny model, and F's problem."""
    from deltacontrol.deltas.dynamics.transformer import control_problem
    from deltacontrol.experiments import tasks
    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature

    setting = Setting(
        tiny.model, tiny.task, deltas=("ia3",), train_rows=6, validation_rows=0, test_rows=0,
        expects="causal-lm", max_length=12, dtype="float64",
    )  # fmt: skip
    model = setting.controlled.eval()
    texts = tasks.load(tiny.held).test[["text"]].head(6)
    found = []
    for batch in (setting.batch(), setting.encode(texts).batch()):
        problem = control_problem(model, batch)
        found.append(GaussNewtonCurvature(problem, problem.initial_controls()))
    return tuple(found)


def test_the_fisher_matrix_is_the_curvature_of_kl(curvatures: tuple) -> None:
    """u'Fu/2 is KL to second order, and the task's loss falls as the model says."""
    from deltacontrol.theory.linear.operator import unflatten

    generator = torch.Generator().manual_seed(0)
    for curvature in curvatures:
        problem, start = curvature.problem, curvature.controls
        base = problem.rollout(start)[-1]
        v = torch.randn(curvature.shape[0], generator=generator, dtype=torch.float64)
        labels = problem.cost.labels
        errors = []
        for size in (1e-2, 1e-3):
            step = unflatten(size * v, start)
            ahead = tuple(a + b for a, b in zip(start, step, strict=True))
            now = problem.rollout(ahead)[-1]
            known = labels != -100
            logs = (now[known].log_softmax(-1), base[known].log_softmax(-1))
            kl = float(kl_div(*logs, reduction="sum", log_target=True) / known.sum())
            errors.append(abs(0.5 * size**2 * float(v @ (curvature @ v)) / kl - 1))
        assert errors[1] < 0.05 and errors[1] < errors[0]


def test_a_whole_subspace_gives_the_dense_front_and_a_part_is_not_above_it(
    curvatures: tuple,
) -> None:
    from deltacontrol.experiments.studies.forgetting.front import front

    G, F = curvatures
    g, n = G.gradient, G.shape[0]
    whole, part = (front(g, G, F, size=size, points=9) for size in (n, 5))
    dense_g, dense_f = G.dense(), F.dense()
    damping = 1e-6 * float(torch.linalg.eigvalsh(dense_g)[-1])
    for point in whole:
        matrix = dense_g + point["mu"] * dense_f + damping * torch.eye(n, dtype=torch.float64)
        u = -torch.linalg.solve(matrix, g)
        assert point["gain"] == pytest.approx(-float(g @ u + 0.5 * u @ dense_g @ u), rel=0.02)
        assert point["kl"] == pytest.approx(float(0.5 * u @ dense_f @ u), rel=0.02, abs=1e-12)
    gains = [point["gain"] for point in whole]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    # At equal distance the part gains no more than the whole does.
    kl, gain = np.array([[p["kl"], p["gain"]] for p in reversed(whole)]).T
    inside = [point for point in part if kl[0] < point["kl"] < kl[-1]]
    assert len(inside) > 2
    for point in inside:
        assert point["gain"] <= np.interp(point["kl"], kl, gain) * 1.05 + 1e-9
