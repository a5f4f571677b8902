"""Fine-tuning end to end on a tiny random model and a small file; killed sweeps that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from deltacontrol.deltas import LoRA, Subspace
from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run, run_all
from deltacontrol.experiments.training import rates
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError
from tests import tiny_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("good", "bad", "fine", "poor", "the", "film", "was", "a", "very", "so")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny random model in a folder, and a task in a file."""
    folder = tmp_path_factory.mktemp("places")
    tiny_model.bert(folder / "tiny-bert", WORDS, initializer_range=0.02)
    generator = np.random.default_rng(0)
    rows = []
    for index in range(300):
        words = generator.choice(WORDS[4:], 6).tolist()
        words.insert(3, WORDS[index % 4])
        rows.append({"text": " ".join(words) + f" {index}", "label": ("yes", "no")[index % 2]})
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "task.csv", index=False)
    numbers = generator.normal(size=len(frame))
    frame.assign(label=numbers).to_csv(folder / "numbers.csv", index=False)
    return folder


def tiny(places, **options) -> FineTuning:
    defaults = {"steps": 20, "batch_size": 8, "max_length": 12, "learning_rate": 5e-3}
    names = {"model": str(places / "tiny-bert"), "task": str(places / "task.csv")}
    return FineTuning(**(names | defaults | {"device": "cpu", "precision": "fp32"} | options))


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


def test_classification_record(places, store):
    experiment = tiny(places, deltas=("full",), steps=100, eval_every=50, learning_rate=1e-2)
    record = run(experiment, store, progress=False)
    result, curve = record.result, record.curve()
    assert result["accuracy"] > 0.9 > result["majority_share"] == 0.5
    assert result["num_trainable"] == result["num_total"]
    assert result["num_head"] == 16 * 2 + 2 and result["num_labels"] == 2
    assert result["trainable_share_with_head"] == 1.0 > result["trainable_share"]
    assert len(curve) == 100 and curve["validation_accuracy"].notna().sum() == 2
    assert result["best_validation_accuracy"] == curve["validation_accuracy"].max()
    assert record.status == "completed"
    for name in ("seconds_per_step", "peak_memory_bytes", "tokens_per_second", "macro_f1", "loss"):
        assert result[name] > 0
    assert record.provenance["digests"]["model"] and record.provenance["digests"]["data"]
    assert FineTuning.from_config(record.config) == experiment


def test_head_is_added_where_no_delta_trains_it(places, store):
    record = run(tiny(places, deltas=("lora:rank=2",)), store, progress=False)
    result = record.result
    assert result["num_head"] == 34 and result["num_trainable"] == 34 + 2 * 2 * 2 * 32
    assert result["trainable_share"] == pytest.approx(256 / result["num_total"])
    assert {name.split(".")[0] for name in record.controls()} == {"lora", "head"}


def test_regression_and_language_model(places, store):
    record = run(tiny(places, task=str(places / "numbers.csv")), store, progress=False)
    assert set(record.result) >= {"pearson", "mse"} and record.result["majority_share"] is None


def test_divergence_is_recorded(places, store):
    experiment = tiny(places, deltas=("full",), learning_rate=1e30, max_grad_norm=None)
    record = run(experiment, store, progress=False)
    assert record.status == "diverged" and record.result["accuracy"] is None
    assert "learning rate" in record.message and len(record.curve()) < 20
    json.loads((record.folder / "run.json").read_text(), parse_constant=pytest.fail)


def test_equal_configurations_are_equal(places, store):
    written = [
        tiny(places, deltas=given)
        for given in ("lora", ["lora"], ({"name": "lora"},), (LoRA(),), ("lora:rank=8,alpha=16",))
    ]
    assert len({store.path(e) for e in written}) == 1 and all(e == written[0] for e in written)
    assert written[0].to_config()["deltas"][0]["rank"] == 8
    assert tiny(places, weight_decay=0) == tiny(places, weight_decay=0.0)
    assert store.path(tiny(places, weight_decay=0)) == store.path(tiny(places, weight_decay=0.0))


def test_the_configuration_names_the_rate(monkeypatch):
    monkeypatch.setattr(rates, "recorded_rates", lambda: {"m/t/lora": 0.5, "m/t/bitfit+lora": 0.25})
    assert FineTuning(model="m", task="t").learning_rate == 0.5
    assert FineTuning(model="m", task="t", deltas=("lora", "bitfit")).learning_rate == 0.25
    assert FineTuning(model="m", task="u").learning_rate == LoRA.default_rate
    mixed = FineTuning(model="m", task="u", deltas=("lora", "prompt"))
    assert mixed.learning_rate == LoRA.default_rate


def test_the_rate_of_a_subspace_is_that_of_its_dimension(monkeypatch):
    monkeypatch.setattr(rates, "recorded_rates", lambda: {"m/t/subspace/50": 0.5})
    found = [
        FineTuning(model="m", task="t", deltas=(f"subspace:dimension={d}",)).learning_rate
        for d in (50, 60)
    ]
    assert found == [0.5, Subspace.default_rate]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a finite number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"steps": 0}, "steps is 0; expected a whole number >= 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"warmup": 2.0}, "warmup is 2.0; expected a fraction"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; expected a finite number >= 0"),
        ({"schedule": "cosin"}, "nearest: cosine"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"device": "cud"}, "nearest: cuda"),
        ({"evaluate_on": "tests"}, "nearest: test"),
        ({"deltas": ("lara",)}, "nearest: lora"),
        ({"deltas": ()}, "at least one delta"),
        ({"patience": 2}, "set eval_every too"),
        ({"grad_accumulation": 17}, "at most batch_size slices"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        FineTuning(**options)


def test_too_long_texts_and_unknown_names(places, store):
    with pytest.raises(InputError, match="choose max_length <= 16"):
        run(tiny(places, max_length=64), store, progress=False)
    with pytest.raises(InputError, match="nearest: movie"):
        run(FineTuning(task="moive"), store, progress=False)


# A training that has written a checkpoint waits for its end, so that no kill comes too late.
SWEEP = """
    import signal
    import sys
    from deltacontrol.experiments.training import checkpoints
    from deltacontrol.experiments.training.finetune import FineTuning
    from deltacontrol.experiments.runs.store import RunStore
    from deltacontrol.experiments.runs.sweep import run_all

    save = checkpoints.save

    def save_and_wait(folder, progress, *rest):
        save(folder, progress, *rest)
        if progress.step > 3:
            signal.pause()

    checkpoints.save = save_and_wait
    if __name__ == "__main__":
        import json
        configs = json.loads(sys.argv[2])
        experiments = [FineTuning.from_config(config) for config in configs]
        run_all(experiments, RunStore(sys.argv[1]), 1, False, checkpoint_seconds=0.05)
"""


@pytest.mark.slow
def test_killed_sweep_goes_on_and_gives_the_same_numbers(places, store, tmp_path):
    quick = tiny(places, steps=3)
    slow = tiny(places, deltas=("lora", "bitfit"), steps=200, dropout=True, eval_every=50)
    script = tmp_path / "sweep.py"
    script.write_text(textwrap.dedent(SWEEP))
    configs = json.dumps([quick.to_config(), slow.to_config()])
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    sweep = subprocess.Popen(
        [sys.executable, str(script), str(store.root), configs], env=environment
    )
    checkpoint = store.partial(slow) / "checkpoint.safetensors"
    end = time.monotonic() + 300
    while not checkpoint.exists() and sweep.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait(60)
    assert checkpoint.exists() and store.find(quick) and store.find(slow) is None
    finished = {p: p.stat().st_mtime_ns for p in store.path(quick).iterdir()}

    resumed = run_all([quick, slow], store, workers=2, progress=False)[1]
    assert {p: p.stat().st_mtime_ns for p in store.path(quick).iterdir()} == finished
    assert not store.partial(slow).exists()

    whole = run(slow, RunStore(tmp_path / "other"), progress=False)
    assert whole.id == resumed.id
    pd.testing.assert_frame_equal(
        whole.curve().drop(columns="seconds"),
        resumed.curve().drop(columns="seconds"),
        check_exact=True,
    )
    ours, theirs = whole.controls(), resumed.controls()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name in ("accuracy", "macro_f1", "loss", "final_train_loss", "best_validation_accuracy"):
        assert whole.result[name] == resumed.result[name]


def test_deltas_in_turn_train_what_came_before_no_further(places, store, tmp_path):
    """The first stage of two is a run of its own, and its controls stay as it left them."""
    both = tiny(places, steps=3, deltas=("lora:rank=2", "bitfit"), sequential=True)
    assert both.to_config()["sequential"] is True
    assert "sequential" not in tiny(places).to_config()
    folder = tmp_path / "work"
    outcome = both.execute(Workspace(folder, progress=False))
    assert list(outcome.curve["stage"]) == 3 * ["lora"] + 3 * ["bitfit"]
    assert list(outcome.curve["step"]) == list(range(1, 7))
    again = both.execute(Workspace(folder, progress=False))  # both stages are in the folder
    for name, value in outcome.controls.items():
        assert torch.equal(again.controls[name], value), name
    saved = safetensors.torch.load_file(folder / "stage-1" / "checkpoint.safetensors")
    for name, value in outcome.controls.items():
        same = torch.equal(saved[f"control/{name}"], value)
        assert same == name.startswith("lora."), name


def test_caching_frozen_states_is_part_of_a_run_only_where_it_is_used():
    plain = FineTuning(deltas=("head",), learning_rate=1e-3)
    cached = FineTuning(deltas=("head",), learning_rate=1e-3, cache_frozen=True)
    assert "cache_frozen" not in plain.to_config() and cached.to_config()["cache_frozen"] is True
    for experiment in (plain, cached):
        assert FineTuning.from_config(experiment.to_config()) == experiment


def test_a_run_gives_back_its_model_and_its_control_problem(places, store):
    """In float64 the problem's objective is the trained model's loss on the same rows."""
    from deltacontrol.experiments.tasks.encoding import without_labels

    record = run(tiny(places, deltas=("lora",), train_limit=40), store, progress=False)
    model, controls = record.model(), record.controls()
    assert all(torch.equal(p, controls[n]) for n, p in model.trainable().items())
    assert any(p.abs().max() > 0 for n, p in model.trainable().items() if n.endswith(".B"))
    setting = record.setting(dtype="float64")
    problem = setting.control_problem([3, 0, 11])
    J = float(problem.objective(problem.dynamics.controls()))
    batch = setting.batch("train", [3, 0, 11])
    with torch.no_grad():
        logits = model.eval()(**without_labels(batch)).logits
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
    assert J == pytest.approx(float(loss), rel=1e-5)
    with torch.no_grad():
        before = model.detach()(**without_labels(batch)).logits
    assert (before - logits).abs().max() > 1e-3


def test_few_shots_are_drawn_by_the_seed(places, store):
    """Each class gives as many rows; runs that differ in seed share no pass, for their rows do."""
    plain = tiny(places, deltas=("bitfit",), shots=4)
    setting = plain.setting()
    assert setting.data.labels and len(setting.split("train")) == 4 * len(setting.data.labels)
    assert plain.company() is None and "shots" in plain.to_config()
    assert "shots" not in tiny(places, deltas=("bitfit",)).to_config()
    assert run(plain, store, progress=False).status == "completed"
    with pytest.raises(InputError, match="give one"):
        tiny(places, shots=4, train_limit=8)
