"""The experiment behind the selection figure: heads, sets, and one small run on a real model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from deltacontrol.experiments.heads import loss_and_accuracy
from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.studies.selection.frozen_model import FrozenModel, changed, logits
from deltacontrol.experiments.studies.selection.measurement import Selection, _picked, _sets
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class FakeSite:
    out_features: int


def test_unused_sets_have_the_shapes_of_the_picked_ones() -> None:
    sites: Any = {
        f"{layer}.{name}": FakeSite(16 if name == "up" else 4)
        for layer in range(4)
        for name in ("query", "value", "up")
    }
    selected = ["3.up", "3.value"]
    unused = [name for name in sites if not name.startswith("3")]
    sets = _sets(Selection(draws=3), sites, selected, unused)
    assert sets[0] == ("selected", selected)
    assert [kind for kind, _ in sets[1:]] == ["unused"] * 3 + ["all"]
    assert sets[-1][1] == list(sites)
    for _, names in sets[1:-1]:
        assert len(set(names)) == 2 and set(names) <= set(unused)
        assert [name.endswith("up") for name in names] == [True, False]
    assert len({tuple(names) for _, names in sets}) > 2
    assert sets == _sets(Selection(draws=3), sites, selected, unused)
    # Where fewer are unused than picked there is nothing to compare with.
    assert _sets(Selection(), sites, selected, unused[:1]) == [
        ("selected", selected),
        ("all", list(sites)),
    ]


def test_the_picked_maps_are_those_of_the_first_point_with_enough() -> None:
    def row(norms: list[float], bounds: list[int]) -> dict[str, Any]:
        found = {f"norm.{n}": v for n, v in zip("abcd", norms, strict=True)}
        found |= {f"bound.{n}": b for n, b in zip("abcd", bounds, strict=True)}
        return found | {"num_active": sum(v > 0 for v in norms)}

    rows = [
        row([0.0, 0.0, 0.0, 0.0], [0, 0, 1, 0]),
        row([0.1, 0.0, 0.3, 0.2], [1, 0, 1, 1]),
        row([0.5, 0.4, 0.3, 0.2], [1, 1, 1, 1]),
    ]
    assert _picked(Selection(num_sites=2), rows, list("abcd")) == (1, ["c", "d"], ["b"])
    assert _picked(Selection(num_sites=9), rows[:2], list("abcd")) == (1, ["c", "d", "a"], ["b"])


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="num_weights is 1"):
        Selection(num_weights=1)
    with pytest.raises(InputError, match="smallest 1"):
        Selection(smallest=1)


@pytest.mark.slow
def test_a_small_run(minilm_l6: str, tmp_path: Path) -> None:
    run = Selection(
        model=minilm_l6,
        num_examples=12,
        num_heldout=12,
        num_test=10,
        max_length=10,
        num_weights=3,
        smallest=0.5,
        num_sites=2,
        draws=1,
        steps=2,
        batch_size=4,
    )
    outcome = run.execute(Workspace(tmp_path, progress=False))
    curve, result = outcome.curve, outcome.result
    assert len(curve) == 6 and set(curve["status"]) == {"optimal"}
    assert (curve["gap"] <= result["tolerance"]).all() and result["head_gap"] < 1e-7
    assert result["linearisation_error"] < 1e-10
    assert len(result["names"]) == 30
    lasso = curve[curve["program"] == "group lasso"]
    assert lasso["num_active"].iloc[0] == 0 and lasso["num_active"].iloc[1] >= 1
    for name in result["names"]:  # what is proved to be unused is zero
        assert not ((lasso[f"bound.{name}"] == 0) & (lasso[f"norm.{name}"] > 0)).any()
    for trained in result["trained"]:
        assert 0 <= trained["test_accuracy"] <= 1 and trained["num_trainable"] > 0


@pytest.mark.slow
def test_the_frozen_model_is_left_as_it_was(minilm_l6: str) -> None:
    sizes = {"num_examples": 8, "num_heldout": 8, "num_test": 6, "max_length": 8}
    setting = Selection(model=minilm_l6, seed=1, **sizes).setting()
    frozen = FrozenModel.of(setting)
    assert setting.head_fit is not None and setting.head_fit.gap < 1e-7
    before = logits(frozen.model, frozen.train)
    name = "bert.encoder.layer.5.output.dense.weight"
    change = 1e-2 * torch.randn(384, 1536, dtype=torch.float64)
    with changed(frozen.model, {name: change}):
        assert not torch.allclose(logits(frozen.model, frozen.train), before)
    assert torch.equal(logits(frozen.model, frozen.train), before)
    assert next(frozen.real.parameters()).dtype is torch.float32
    assert next(frozen.model.parameters()).dtype is torch.float64
    single = logits(frozen.real, frozen.train).double()
    torch.testing.assert_close(single, before, rtol=1e-4, atol=1e-5)
    loss, accuracy = loss_and_accuracy(before, frozen.train["labels"])
    uniform = torch.log(torch.tensor(2.0))
    assert loss < uniform and 0 <= accuracy <= 1
    with pytest.raises(InputError, match="9999999 test rows"):
        Selection(model=minilm_l6, seed=1, **sizes | {"num_test": 9999999}).setting().batch("test")
