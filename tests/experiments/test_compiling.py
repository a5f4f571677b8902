"""Compiled trainings: equal to ordinary ones, compiled once, and the same when they go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deltacontrol.deltas import (
    AdaLoRA,
    BitFit,
    Delta,
    HeadTuning,
    HoulsbyAdapter,
    LoRA,
    PrefixTuning,
    attach,
)
from deltacontrol.experiments.training import compiling
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.loop import train
from deltacontrol.experiments.training.together.copies import obstacle
from deltacontrol.theory.errors import InputError
from tests.experiments.training_models import VOCABULARY, ParityBatches, bert, settings

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler"
)
DELTAS: dict[str, Delta] = {
    "lora": LoRA(rank=2, dropout=0.2),
    "houlsby": HoulsbyAdapter(bottleneck=4),
    "bitfit": BitFit(),
    "prefix": PrefixTuning(length=3),
}


class Lengths(ParityBatches):
    """Batches of 3 to 14 tokens, another number at each step, and of one row at the fifth."""

    lengths = (6, 9, 3, 14, 5, 8, 11, 4)

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng([self.seed, step])
        length, rows = self.lengths[step % 8], 1 if step == 4 else self.rows
        ids = torch.from_numpy(generator.integers(2, VOCABULARY, (rows, length)))
        mask = torch.ones_like(ids)
        mask[: rows // 2, length // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2}

    def examples(self, step: int) -> Tensor:
        return torch.arange(self.rows * step, self.rows * (step + 1))


@dataclass
class Counted:
    """A compiler that leaves the operations as they are and counts its graphs and their runs."""

    graphs: int = 0
    runs: int = 0

    def __call__(self, graph: nn.Module, _examples: list[Tensor], **_options: object):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    compiler = Counted()
    monkeypatch.setattr(compiling, "BACKEND", compiler)
    yield compiler
    torch._dynamo.reset()


def trained(delta: Delta, steps: int = 5, data=None, folder=None, **options):
    model = attach(bert(), delta, HeadTuning(), seed=0)
    chosen = settings(steps=steps, checkpoint_seconds=0.0, **options)
    result = train(model, data or Lengths(), chosen, progress=False, checkpoint_dir=folder)
    assert model.model._compiled_call_impl is None
    return result


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    assert found.controls.keys() == expected.controls.keys()
    for name, value in expected.controls.items():
        error = (found.controls[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert error <= tolerance, name


def test_the_pass_is_compiled_once_for_all_lengths(counted: Counted) -> None:
    lora = DELTAS["lora"]
    ordinary = trained(lora)
    assert not counted.graphs and "compiled" not in ordinary.measures
    compiled = trained(lora, compile="always")
    assert compiled.measures["compiled"] is True
    assert_close(compiled, ordinary)
    assert counted.graphs == 1
    assert counted.runs == 1 + 4  # the trial and the steps, but one row takes the ordinary pass


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", sorted(DELTAS))
def test_machine_code_trains_as_the_ordinary_pass(name: str) -> None:
    # The loss does not depend on a bias of the keys; Adam would divide its rounding by itself.
    options = {"optimiser": "sgd", "learning_rate": 0.1} if name == "bitfit" else {}
    compiled = trained(DELTAS[name], compile="always", **options)
    assert compiled.measures["compiled"] is True
    assert_close(compiled, trained(DELTAS[name], **options))


class Stop(Exception):
    pass


class Interrupted(Lengths):
    def batch(self, step: int) -> dict[str, Tensor]:
        if step == 3:
            raise Stop
        return super().batch(step)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_training_that_goes_on_is_the_uninterrupted_one(tmp_path) -> None:
    lora = DELTAS["lora"]
    whole = trained(lora, 6, compile="always")
    with pytest.raises(Stop):
        trained(lora, 6, Interrupted(), tmp_path, compile="always")
    went_on = trained(lora, 6, folder=tmp_path, compile="always")
    assert all(torch.equal(went_on.controls[k], v) for k, v in whole.controls.items())
    assert went_on.curve["loss"].tolist() == whole.curve["loss"].tolist()


class Ordinary(compiling.CompiledPass):
    """Compiles nothing."""

    @contextmanager
    def acting(self, *, first: bool = False) -> Iterator[None]:
        yield


class Failing(compiling.CompiledPass):
    @contextmanager
    def acting(self, *, first: bool = False) -> Iterator[None]:
        raise RuntimeError("no C++ compiler\nand more lines")
        yield


def test_auto_decides_by_the_work_alone(monkeypatch) -> None:
    model = attach(bert(), LoRA(rank=2))
    batch = Lengths().batch(1)
    weights, maps = compiling.sizes(model.model)
    embedded = sum(p.numel() for n, p in model.model.named_parameters() if "embeddings.weight" in n)
    assert weights == model.num_total - embedded and maps == 2 * 6 + 2  # pooler and classifier
    assert compiling.num_places(batch) == 8 * 9
    assert compiling.num_places({"pixels": torch.ones(2, 3, 4, 4)}) == 0
    monkeypatch.setattr(compiling, "WORK_THAT_PAYS", 10 * 72 * weights / maps)
    pays = compiling.pays
    assert pays(model, 10, batch, "fp32", "cpu") and not pays(model, 9, batch, "fp32", "cpu")
    assert not pays(model, 10, batch, "bf16", "cpu")
    assert not pays(model, 10, batch, "fp32", "cuda")
    monkeypatch.setattr(compiling, "CompiledPass", Ordinary)
    monkeypatch.setattr(compiling, "WORK_THAT_PAYS", 5 * 48 * weights / maps)
    assert "compiled" in trained(DELTAS["lora"], 5).measures
    assert "compiled" not in trained(DELTAS["lora"], 4).measures
    assert "compiled" not in trained(DELTAS["lora"], 5, compile="never").measures


def test_a_compiler_that_fails_is_told_of(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "CompiledPass", Failing)
    monkeypatch.setattr(compiling, "WORK_THAT_PAYS", 0.0)
    with pytest.warns(UserWarning, match="torch.compile failed on BertFor.*goes on") as told:
        found = trained(DELTAS["lora"], 2)
    assert sum("torch.compile failed" in str(w.message) for w in told) == 1
    assert "compiled" not in found.measures
    assert_close(found, trained(DELTAS["lora"], 2, compile="never"), 0.0)
    with pytest.raises(InputError, match=r"torch.compile failed.*C\+\+ compiler.*auto or never"):
        trained(DELTAS["lora"], 2, compile="always")


@pytest.mark.parametrize(
    ("delta", "options", "reason"),
    [
        (AdaLoRA(), {}, "adalora changes"),
        (BitFit(), {"cache_frozen": True}, "cache_frozen"),
        (BitFit(), {"gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_what_cannot_be_compiled_is_refused(delta, options, reason, counted) -> None:
    with pytest.raises(InputError, match=f"{reason}.*leave compile at auto"):
        trained(delta, 2, compile="always", **options)
    assert not counted.graphs


def test_the_choice_is_no_part_of_the_identity_of_an_ordinary_run() -> None:
    plain = FineTuning(deltas=("head",), learning_rate=1e-3)
    compiled = FineTuning(deltas=("head",), learning_rate=1e-3, compile="always")
    assert "compile" not in plain.to_config() and compiled.to_config()["compile"] == "always"
    with pytest.raises(InputError, match="compile"):
        FineTuning(deltas=("head",), learning_rate=1e-3, compile="sometimes")
    assert obstacle(settings(compile="always")) and not obstacle(settings(compile="never"))


def test_the_cache_lies_beside_the_models_unless_the_user_chose(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DELTACONTROL_CACHE", str(tmp_path))
    monkeypatch.delenv(compiling.FOLDER_VARIABLE, raising=False)
    compiling.CompiledPass(nn.Linear(2, 2))
    assert os.environ[compiling.FOLDER_VARIABLE] == str(tmp_path / "inductor")
    monkeypatch.setenv(compiling.FOLDER_VARIABLE, str(tmp_path / "mine"))
    compiling.CompiledPass(nn.Linear(2, 2))
    assert os.environ[compiling.FOLDER_VARIABLE] == str(tmp_path / "mine")
