"""The study of transfer: sketches keep angles, and a control is tried where it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.studies.transfer import grid
from deltacontrol.experiments.studies.transfer.measurement import BUCKETS, Transfer, sketch
from deltacontrol.theory.errors import InputError
from tests import tiny_model


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("transfer")
    found = tiny_model.write(folder)
    rows = pd.read_csv(found["task"])
    other = rows.assign(label=rows["label"].map({"yes": "a", "no": "b", "so": "b"}))
    other.to_csv(folder / "other.csv", index=False)
    rows.assign(label=np.linspace(0, 1, len(rows))).to_csv(folder / "numbers.csv", index=False)
    return found | {n: str(folder / f"{n}.csv") for n in ("other", "numbers")}


def tiny(places: dict[str, str], **options) -> Transfer:
    sizes = {"steps": 150, "tune_steps": 3, "rows": 60, "test_rows": 20, "max_length": 12}
    given = {"model": places["model"], "targets": (places["task"], places["other"])}
    return Transfer(**({**given, **sizes, "learning_rate": 3e-2} | options))


def test_a_sketch_keeps_lengths_and_angles() -> None:
    generator = torch.Generator().manual_seed(1)
    one, noise = torch.randn(2, 20_000, generator=generator, dtype=torch.float64)
    other = 0.6 * one + 0.8 * noise
    cosine = float(torch.cosine_similarity(one, other, dim=0))
    found = torch.cosine_similarity(sketch(one), sketch(other), dim=0)
    assert float(found) == pytest.approx(cosine, abs=4 / BUCKETS**0.5)
    assert float(sketch(one).norm()) == pytest.approx(float(one.norm()), rel=0.1)
    # Linear, and exact with as many buckets as nothing collides in.
    assert torch.allclose(sketch(2 * one - other), 2 * sketch(one) - sketch(other))


def test_without_a_source_the_model_is_as_it_was(places, tmp_path: Path) -> None:
    found = tiny(places).execute(Workspace(tmp_path, progress=False)).result
    assert found["own"] is None and "sketch" not in found
    assert set(found["targets"]) == {places["task"], places["other"]}
    with_control = tiny(places, source=places["task"])
    moved = with_control.execute(Workspace(tmp_path / "b", progress=False)).result
    assert moved["norm"] > 0 and len(moved["sketch"]) == BUCKETS
    # What the control was trained for is easier from it: the last word of a row is its class.
    assert moved["own"] > 0.5
    before, after = (r["targets"][places["task"]] for r in (found, moved))
    assert after["tuned_loss"] < before["tuned_loss"] and after["probe"] != before["probe"]


def test_the_norm_is_that_of_the_weights_that_moved(places, tmp_path: Path) -> None:
    """Against s·B A, multiplied out."""
    experiment = tiny(places, source=places["task"], targets=(places["other"],))
    control, _ = experiment._trained(Workspace(tmp_path, progress=False))
    setting = experiment._setting(places["task"])
    lora = setting.parsed_deltas[0]
    scaling = lora.alpha / lora.rank  # type: ignore[attr-defined]
    downs = {k: v for k, v in control.items() if k.endswith("A")}
    total = sum(
        float((scaling * control[k[:-1] + "B"] @ a).square().sum()) for k, a in downs.items()
    )
    assert downs and experiment._update(control)["norm"] == pytest.approx(total**0.5, rel=1e-4)


def test_what_cannot_be_tried_is_refused(places, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tried on no task"):
        Transfer()
    with pytest.raises(InputError, match="regression"):
        tiny(places, targets=(places["numbers"],)).execute(Workspace(tmp_path, progress=False))
    with pytest.raises(InputError, match="cannot be merged"):
        tiny(places, source=places["task"], delta={"name": "houlsby", "bottleneck": 4}).execute(
            Workspace(tmp_path / "b", progress=False)
        )


def test_the_grid_has_every_pair_and_the_model_alone() -> None:
    runs = grid.experiments("paper")
    assert len(runs) == grid.SEEDS * (len(grid.TASKS) + 1) and len(grid.TASKS) >= 12
    assert {run.source for run in runs} == {"", *grid.TASKS}
    assert all(run.targets == tuple(grid.TASKS) for run in runs)
