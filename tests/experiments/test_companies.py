"""Fine-tunings that share a pass are what each of them is alone, and can part at any step."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltacontrol.experiments.runs import running
from deltacontrol.experiments.runs.running import MOST, advance, companies, run_together
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run, run_all
from deltacontrol.experiments.training import checkpoints
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.together import runs as of_runs
from deltacontrol.theory.errors import InputError
from tests import tiny_model

COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens")


@pytest.fixture(scope="module")
def tunings(tmp_path_factory):
    """Makes fine-tunings of a tiny model that differ in seed and rate."""
    places = tiny_model.write(tmp_path_factory.mktemp("companies"))

    def make(*pairs: tuple[int, float], **fields) -> list[FineTuning]:
        given = {"steps": 8, "batch_size": 4, "max_length": 8, "deltas": ("lora:rank=2",)}
        given |= {"learning_rate": 1e-2, "precision": "fp32"}
        one = FineTuning(**places, **(given | fields))
        return [replace(one, seed=seed, learning_rate=rate) for seed, rate in pairs]

    return make


def same(mine, own) -> None:
    assert mine.id == own.id and mine.status == own.status
    for column in COLUMNS:
        np.testing.assert_allclose(mine.curve()[column], own.curve()[column], rtol=2e-4)
    ours, theirs = mine.controls(), own.controls()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("key.bias"):
            continue  # softmax does not feel it: its gradient is rounding, which Adam makes large
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    for name in ("accuracy", "loss", "final_train_loss"):
        assert mine.result[name] == pytest.approx(own.result[name], rel=1e-4)
    for name in ("num_trainable", "num_head", "num_evaluated", "num_steps", "majority_share"):
        assert mine.result[name] == own.result[name]


@pytest.mark.parametrize("deltas", [("lora:rank=2",), ("bitfit",), ("vera:rank=4",)])
def test_records_are_those_of_separate_runs(tunings, tmp_path, deltas) -> None:
    runs = tunings((0, 1e-2), (1, 1e-2), (1, 3e-2), deltas=deltas, eval_every=4)
    store, alone = RunStore(tmp_path / "together"), RunStore(tmp_path / "alone")
    found = run_together(runs, store, progress=False)
    for mine, one in zip(found, runs, strict=True):
        own = run(one, alone, progress=False)
        same(mine, own)
        assert mine.result["copies_trained_together"] == 3
        assert mine.result["best_validation_step"] == own.result["best_validation_step"]
        assert list(mine.curve().columns) == list(own.curve().columns)
    assert not list((store.root / ".partial").iterdir())
    seeds = [mine.controls() for mine in found[:2]]
    assert any(not torch.equal(value, seeds[1][name]) for name, value in seeds[0].items())


@pytest.mark.parametrize("later", ["alone", "together", "one alone"])
def test_a_pass_of_several_goes_on_as_anybody(tunings, tmp_path, later) -> None:
    runs = tunings((0, 1e-2), (3, 1e-2))
    store, alone = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    looked = advance(runs, store, 5)
    assert all(found is not None and "accuracy" in found for found in looked)
    assert all((store.partial(one) / checkpoints.FILE).is_file() for one in runs)
    if later == "one alone":
        run(runs[1], store, progress=False)
    done = (
        [run(r, store, progress=False) for r in runs]
        if later == "alone"
        else run_together(runs, store, progress=False)
    )
    for mine, one in zip(done, runs, strict=True):
        same(mine, run(one, alone, progress=False))


def test_one_that_began_alone_goes_on_with_others(tunings, tmp_path) -> None:
    runs = tunings((0, 1e-2), (3, 1e-2))
    store, alone = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    for one in runs:
        advance([one], store, 3)
    for mine, one in zip(run_together(runs, store, progress=False), runs, strict=True):
        same(mine, run(one, alone, progress=False))
        assert mine.result["copies_trained_together"] == 2


def test_checkpoints_at_different_steps_part(tunings, tmp_path) -> None:
    runs = tunings((0, 1e-2), (3, 1e-2))
    store, alone = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    advance(runs[:1], store, 3)
    for mine, one in zip(run_together(runs, store, progress=False), runs, strict=True):
        same(mine, run(one, alone, progress=False))


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({}, [3]),
        ({"dropout": True}, [1, 1, 1]),
        ({"eval_every": 2, "patience": 2}, [1, 1, 1]),
        ({"pretrained": False}, [1, 1, 1]),
        ({"optimiser": "sgd"}, [1, 1, 1]),
        ({"grad_accumulation": 2}, [1, 1, 1]),
        ({"deltas": ("full",)}, [1, 1, 1]),
        ({"deltas": ("subspace:dimension=4",)}, [1, 1, 1]),
        ({"deltas": ("bitfit", "said:dimension=9,of=lora")}, [1, 1, 1]),
        ({"weights": "bfloat16", "precision": "bf16"}, [1, 1, 1]),
    ],
)
def test_who_shares_a_pass(tunings, fields, groups) -> None:
    runs = tunings((0, 1e-2), (1, 1e-2), (0, 3e-2), **fields)
    assert [len(group) for group in companies(runs)] == groups


def test_other_steps_and_too_many_make_other_groups(tunings) -> None:
    runs = tunings((0, 1e-2), (1, 1e-2)) + tunings((2, 1e-2), steps=9) + tunings((3, 1e-2))
    assert [[r.seed for r in group] for group in companies(runs)] == [[0, 1, 3], [2]]
    many = tunings(*((seed, 1e-2) for seed in range(MOST + 2)))
    assert [len(group) for group in companies(many)] == [MOST, 2]


@pytest.mark.parametrize("delta", ["random-mask", "lora:rank=2,dropout=0.5"])
def test_what_cannot_be_stacked_is_run_alone(tunings, tmp_path, delta) -> None:
    runs = tunings((0, 1e-2), (1, 1e-2), deltas=(delta,))
    for mine in run_together(runs, RunStore(tmp_path / "a"), progress=False):
        assert mine.status == "completed" and "copies_trained_together" not in mine.result


def test_copies_that_are_too_large_together_are_run_alone(tunings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(of_runs, "MEMORY", 1e-9)
    found = run_together(tunings((0, 1e-2), (1, 1e-2)), RunStore(tmp_path / "a"), progress=False)
    assert all("copies_trained_together" not in record.result for record in found)


def test_a_copy_that_diverges_leaves_the_others_alone(tunings, tmp_path) -> None:
    runs = tunings((0, 1e-2), (0, 1e25))
    store = RunStore(tmp_path / "a")
    good, bad = run_together(runs, store, progress=False)
    assert (good.status, bad.status) == ("completed", "diverged")
    assert bad.result["accuracy"] is None
    same(good, run(runs[0], RunStore(tmp_path / "b"), progress=False))


@pytest.mark.slow
def test_a_sweep_groups_what_it_can(tunings, tmp_path) -> None:
    runs = tunings((0, 1e-2), (1, 1e-2), (2, 1e-2), (3, 1e-2)) + tunings((0, 1e-2), dropout=True)
    found = run_all(runs, RunStore(tmp_path / "a"), workers=2, progress=False)
    shared = [r.result.get("copies_trained_together", 1) for r in found]
    assert sorted(shared) == [1, 1, 3, 3, 3] or sorted(shared) == [1, 2, 2, 2, 2]
    for mine, one in zip(found, runs, strict=True):
        same(mine, run(one, RunStore(tmp_path / "b"), progress=False))


def test_locks_of_others_are_respected(tunings, tmp_path) -> None:
    runs = tunings((0, 1e-2), (1, 1e-2), (2, 1e-2))
    store = RunStore(tmp_path / "a")
    with running.locked(store, store.partial(runs[1]).name, block=False):
        found = run_together(runs, store, progress=False, block=False)
    assert found[1] is None and found[0] is not None and found[2] is not None


def test_a_checkpoint_of_other_controls_is_named(tunings, tmp_path) -> None:
    runs, store = tunings((0, 1e-2), (1, 1e-2)), RunStore(tmp_path / "a")
    others = tunings((0, 1e-2), (1, 1e-2), deltas=("lora:rank=3",))
    advance(others, store, 3)
    for one, other in zip(runs, others, strict=True):
        shutil.copytree(store.partial(other), store.partial(one))
    with pytest.raises(InputError, match="cannot be used: .*delete the folder"):
        run_together(runs, store, progress=False)


def test_copies_whose_files_changed_meanwhile_are_not_recorded(tmp_path, monkeypatch) -> None:
    places, store = tiny_model.write(tmp_path), RunStore(tmp_path / "a")
    given = {"steps": 3, "batch_size": 4, "max_length": 8, "deltas": ("bitfit",)}
    one = FineTuning(**places, learning_rate=1e-2, **given)
    together = FineTuning.execute_together

    def then_changed(experiments, workspaces):
        ends = together(experiments, workspaces)
        for space in workspaces:
            space.folder.mkdir(parents=True, exist_ok=True)
        with open(places["task"], "a") as file:
            file.write("one more row,yes\n")
        return ends

    monkeypatch.setattr(FineTuning, "execute_together", staticmethod(then_changed))
    with pytest.raises(InputError, match="the files of its data changed while .* ran"):
        run_together([one, replace(one, seed=1)], store, progress=False)
    assert store.records() == [] and not list((store.root / ".partial").iterdir())


def test_no_pause_behind_the_end(tunings, tmp_path) -> None:
    runs, store = tunings((0, 1e-2), (1, 1e-2)), RunStore(tmp_path / "a")
    assert advance(runs, store, 8) == advance(runs[:1], store, 99) * 2 == [None, None]
