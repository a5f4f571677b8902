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
    assert model.training is False or not any(m.training for m in model.modules())


def test_a_run_looks_on_the_way_and_ends_where_it_says(tiny: Forgetting, tmp_path: Path) -> None:
    outcome = tiny.execute(Workspace(tmp_path, progress=False))
    seen = outcome.curve.dropna(subset=["validation_kl"])
    assert seen["step"].tolist() == [3, 6]
    assert outcome.result["start"]["kl"] == pytest.approx(0.0, abs=1e-7)
    end = outcome.result["end"]
    assert end["kl"] == pytest.approx(seen["validation_kl"].iloc[-1], rel=1e-5)
    assert end["loss"] != outcome.result["start"]["loss"] and end["kl"] > 1e-4
