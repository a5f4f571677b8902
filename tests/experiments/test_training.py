"""The training loop: exact resume, slices, modes, early stopping, divergence, metrics."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    OPTConfig,
    OPTForCausalLM,
)

from deltacontrol.deltas import (
    AdaLoRA,
    DiffPruning,
    FisherMask,
    FullFineTuning,
    HeadTuning,
    LoRA,
    LotteryTicket,
    attach,
)
from deltacontrol.experiments.training import checkpoints
from deltacontrol.experiments.training import devices as resources
from deltacontrol.experiments.training.evaluation import evaluate
from deltacontrol.experiments.training.gradients import step_seed
from deltacontrol.experiments.training.loop import train
from deltacontrol.experiments.training.settings import learning_rate
from deltacontrol.theory.errors import InputError
from tests.experiments.training_models import (
    VOCABULARY,
    WIDTH,
    ParityBatches,
    bert,
    llama,
    lora_model,
    settings,
)


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=16,
        dropout=0.5,
    )
    return OPTForCausalLM(config).eval()


def fit(model, batches=None, **options):
    keys = ("evaluate", "checkpoint_dir")
    extra = {key: options.pop(key) for key in keys if key in options}
    kind = options.get("kind", "classification")
    data = batches or ParityBatches(kind=kind)
    return train(model, data, settings(**options), progress=False, **extra)


def validate(model) -> dict[str, float]:
    return evaluate(model, [ParityBatches(seed=9).batch(0)], "classification")


class Stop(Exception):
    pass


class Interrupted(ParityBatches):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def batch(self, step: int) -> dict:
        if step == self.at:
            raise Stop
        return super().batch(step)


@pytest.mark.parametrize(
    "delta",
    [
        LoRA(rank=2, dropout=0.2, step_ratio=4.0),
        AdaLoRA(rank=3, target_rank=1, interval=2),
        *(
            pytest.param(delta, marks=pytest.mark.slow)
            for delta in (
                FullFineTuning(),
                LotteryTicket(density=0.1, rounds=2, search=0.5),
                DiffPruning(density=0.1, gate_step_ratio=2.0),
            )
        ),
    ],
    ids=lambda delta: delta.name,
)
@pytest.mark.one_in(2)
def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path, delta):
    def model():
        extra = () if delta.trains_head else (HeadTuning(),)
        return attach(bert(), delta, *extra, seed=0)

    options = {"eval_every": 3, "patience": 10, "dropout": True, "evaluate": validate}
    whole = fit(model(), **options)
    for at in (2, 7):
        with pytest.raises(Stop):
            fit(
                model(),
                Interrupted(at),
                checkpoint_dir=tmp_path,
                checkpoint_seconds=0.0,
                **options,
            )
    resumed = fit(model(), checkpoint_dir=tmp_path, checkpoint_seconds=0.0, **options)
    assert resumed.earlier_seconds > 0
    drop = ["seconds"]
    pd.testing.assert_frame_equal(
        whole.curve.drop(columns=drop), resumed.curve.drop(columns=drop), check_exact=True
    )
    assert whole.controls.keys() == resumed.controls.keys()
    assert all(torch.equal(whole.controls[k], resumed.controls[k]) for k in whole.controls)
    assert whole.best == resumed.best


def test_a_delta_sees_the_examples_of_the_first_batches_one_by_one(tmp_path):
    """And not again when a training is continued: the places are part of the checkpoint."""

    def model():
        return attach(bert(), FisherMask(density=0.02), HeadTuning(), seed=0)

    by_hand = attach(bert(), FisherMask(density=0.02), HeadTuning(), seed=0)

    def losses():
        for step in range(8):
            batch = ParityBatches().batch(step)
            for row in range(8):
                yield by_hand(**{k: v[row : row + 1] for k, v in batch.items()}).loss

    by_hand.prepare(losses)
    places = by_hand.state()["fisher-mask.change.places"]
    whole = fit(model())
    assert torch.equal(whole.controls["fisher-mask.change.places"], places)
    assert bool((whole.controls["fisher-mask.change.values"] != 0).any())
    with pytest.raises(Stop):
        fit(model(), Interrupted(10), checkpoint_dir=tmp_path, checkpoint_seconds=0.0)
    resumed = fit(model(), checkpoint_dir=tmp_path, checkpoint_seconds=0.0)
    assert all(torch.equal(whole.controls[k], resumed.controls[k]) for k in whole.controls)


def test_the_optimiser_starts_afresh_where_a_delta_rewinds():
    """After pruning in step 6 of 12, the first update of Adam is one of the rate in each entry."""
    delta = LotteryTicket(density=0.1, search=0.5)
    model = attach(bert(), delta, seed=0)
    after: dict[int, dict] = {}
    act = model.after_step

    def watch(step: int, num_steps: int) -> bool:
        after[step] = {k: v.detach().clone() for k, v in model.trainable().items()}
        return act(step, num_steps)

    model.after_step = watch  # type: ignore[method-assign]
    result = fit(
        model, weight_decay=0.0, max_grad_norm=None, eval_every=1, patience=12, evaluate=validate
    )
    rate = float(result.curve["learning_rate"].iloc[6])
    moved = torch.cat([v.flatten() for v in after[7].values()])
    moved = moved[moved != 0].abs()
    assert len(moved) > 10
    # |m̂|/(√v̂ + ε) is one, less ε over the gradient.
    assert rate * 0.99 < float(moved.median()) < float(moved.max()) <= rate * (1 + 1e-5)
    # The best evaluation is one of the ticket, not of the dense model before.
    assert result.best is not None and result.best["step"] >= 6
    mask = torch.cat([v.flatten() for k, v in result.controls.items() if k.endswith("mask")])
    assert int(mask.sum()) == round(0.1 * len(mask))


def test_same_seed_same_numbers_other_seed_other_numbers():
    first, second = fit(lora_model()), fit(lora_model())
    assert first.curve["loss"].equals(second.curve["loss"])
    assert not first.curve["loss"].equals(fit(lora_model(), seed=1).curve["loss"])


def test_damaged_or_foreign_checkpoint_is_reported(tmp_path):
    with pytest.raises(Stop):
        fit(lora_model(), Interrupted(3), checkpoint_dir=tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(InputError, match="cannot be used.*delete the folder"):
        fit(attach(bert(), HeadTuning(), LoRA(rank=4)), checkpoint_dir=tmp_path)
    path = tmp_path / checkpoints.FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be used.*delete the folder"):
        fit(lora_model(), checkpoint_dir=tmp_path)


def test_training_learns_only_the_controls():
    model = attach(bert(dropout=0.0), FullFineTuning(), seed=0)
    base = {k: v.clone() for k, v in bert(dropout=0.0).state_dict().items()}
    result = fit(model, ParityBatches(rows=32), steps=60, learning_rate=1e-2)
    assert result.status == "completed" and result.measures["final_train_loss"] < 0.4
    assert result.curve["step"].tolist() == list(range(1, 61))
    assert all(torch.equal(v, base[k]) for k, v in model.detach().state_dict().items())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (bert, "classification"),
        (lambda: bert(num_labels=1, problem_type="regression"), "regression"),
        (llama, "causal-lm"),
    ],
)
def test_slices_give_the_same_update(make, kind):
    def run(slices):
        model = attach(make(), FullFineTuning(), seed=0)
        return fit(model, kind=kind, grad_accumulation=slices, steps=3)

    whole, sliced = run(1), run(4)
    np.testing.assert_allclose(whole.curve["loss"], sliced.curve["loss"], rtol=1e-4)
    np.testing.assert_allclose(whole.curve["grad_norm"], sliced.curve["grad_norm"], rtol=1e-3)


def test_too_many_slices():
    with pytest.raises(InputError, match="choose batch_size >= 9"):
        fit(lora_model(), grad_accumulation=9)


@pytest.mark.parametrize("make", [bert, opt])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.one_in(2)
def test_gradient_checkpointing_changes_nothing(make, dropout):
    kind = "causal-lm" if make is opt else "classification"

    def run(on):
        base, calls = make(), []
        next(m for m in base.modules() if "Attention" in type(m).__name__).register_forward_hook(
            lambda *_: calls.append(1)
        )
        model = attach(base, LoRA(rank=2), seed=0)
        result = fit(model, kind=kind, gradient_checkpointing=on, dropout=dropout, steps=3)
        assert len(calls) == (6 if on else 3)
        assert not any(m.training for m in model.model.modules())
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.model.modules())
        return result

    np.testing.assert_allclose(run(False).curve["loss"], run(True).curve["loss"], rtol=1e-6)


def test_dropout_acts_only_when_asked():
    without, zero, with_ = (
        fit(attach(bert(dropout=p), HeadTuning()), dropout=flag, steps=2).curve["loss"]
        for p, flag in ((0.5, False), (0.0, True), (0.5, True))
    )
    assert without.equals(zero) and not without.equals(with_)


def test_early_stopping_keeps_the_best_controls():
    values = iter([0.5, 0.7, 0.6, 0.6, 0.9])
    seen = []

    def scripted(model):
        seen.append(model.state())
        return {"accuracy": next(values)}

    result = fit(lora_model(), eval_every=2, patience=2, evaluate=scripted)
    assert (
        result.status == "early_stopped" and "has not improved on 0.7 of step 4" in result.message
    )
    assert result.best == {"step": 4.0, "value": 0.7}
    assert all(torch.equal(v, result.controls[k]) for k, v in seen[1].items())
    assert result.curve["validation_accuracy"].dropna().tolist() == [0.5, 0.7, 0.6, 0.6]


def test_divergence_stops_with_finite_controls_and_advice():
    class Poisoned(ParityBatches):
        def batch(self, step):
            batch = super().batch(step)
            return batch | ({"labels": batch["labels"] * math.inf} if step == 4 else {})

    model = attach(bert(num_labels=1, problem_type="regression"), HeadTuning())
    result = fit(model, Poisoned(kind="regression"), kind="regression")
    assert result.status == "diverged" and len(result.curve) == 5
    for word in ("step 5", "loss", "learning rate", "try a lower learning rate"):
        assert word in result.message
    assert all(v.isfinite().all() for v in result.controls.values())


def test_measures():
    result = fit(lora_model())
    measures = result.measures
    timed = result.curve["seconds"][5:]
    assert measures["seconds_per_step"] == pytest.approx(timed.median())
    assert measures["peak_memory_bytes"] >= measures["baseline_memory_bytes"] > 10**7
    assert measures["tokens_per_second"] == pytest.approx(40 * len(timed) / timed.sum())
    assert measures["final_train_loss"] == pytest.approx(result.curve["loss"][-10:].mean())


def test_peak_memory_sees_what_fits_into_freed_memory():
    """Blocks too small for pages of their own: the allocator would fill those that it holds."""
    size, block = 200_000_000, 100_000

    def blocks() -> list[torch.Tensor]:
        return [torch.ones(block // 4) for _ in range(size // block)]

    held = blocks()
    pin = torch.ones(block // 4)  # above the others, so that freeing them does not shrink the heap
    del held
    memory = resources.PeakMemory("cpu")
    if "freed memory returned" not in memory.method:
        pytest.skip(f"the peak is no measure of one allocation here: {memory.method}")
    allocated = blocks()
    assert memory.peak() - memory.baseline == pytest.approx(size, rel=0.1)
    del allocated, pin
    assert memory.peak() - memory.baseline == pytest.approx(size, rel=0.1)


def test_short_sequences_take_elementary_attention_on_the_cpu():
    def is_fused(length: int, precision: str, device: str = "cpu") -> bool:
        inputs = {"input_ids": torch.zeros(2, length), "labels": torch.zeros(2)}
        with resources.attention(inputs, precision, device):
            return torch.backends.cuda.flash_sdp_enabled()

    assert [is_fused(n, "bf16") for n in (16, 128, 129)] == [False, False, True]
    assert [is_fused(n, "fp32") for n in (16, 17)] == [False, True]
    assert is_fused(16, "bf16", "cuda")
    assert is_fused(129, "bf16")  # and after the context
    with resources.attention({"pixel_values": torch.zeros(2, 3, 8, 8)}, "bf16", "cpu"):
        assert torch.backends.cuda.flash_sdp_enabled()


def test_the_kernel_of_attention_changes_nothing_but_rounding(monkeypatch):
    used = []

    def seen(*arguments):
        used.append(not isinstance(resources.attention(*arguments), nullcontext))
        return resources.attention(*arguments)

    monkeypatch.setattr("deltacontrol.experiments.training.gradients.attention", seen)
    found = fit(lora_model())
    assert used and all(used)
    monkeypatch.setattr(
        "deltacontrol.experiments.training.gradients.attention", lambda *_: nullcontext()
    )
    fused = fit(lora_model())
    assert found.curve["loss"].to_numpy() == pytest.approx(fused.curve["loss"].to_numpy(), rel=1e-5)


def test_devices_and_precisions():
    assert resources.choose_precision("bf16", "cpu") == "bf16"
    expected = "bf16" if resources.cpu_computes_bf16() else "fp32"
    assert resources.choose_precision("auto", "cpu") == expected
    with pytest.raises(InputError, match="nearest: bf16"):
        resources.choose_precision("bf61", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU"):
            resources.choose_device("cuda")
    exact, half = fit(lora_model()), fit(lora_model(), precision="bf16")
    assert half.measures["precision"] == "bf16"
    np.testing.assert_allclose(exact.curve["loss"], half.curve["loss"], rtol=0.05)
    assert not exact.curve["loss"].equals(half.curve["loss"])


def test_schedules():
    def rates(schedule):
        options = {"peak": 2.0, "steps": 10, "warmup": 0.2, "schedule": schedule}
        return [learning_rate(t, **options) for t in range(10)]

    for schedule in ("linear", "cosine", "constant"):
        assert rates(schedule)[:3] == [1.0, 2.0, 2.0]
    assert rates("linear")[-1] == pytest.approx(2.0 / 8)
    assert rates("cosine")[6] == pytest.approx(1.0)
    assert rates("constant")[-1] == 2.0
    with pytest.raises(InputError, match="nearest: linear"):
        rates("liner")


def test_step_seeds_differ():
    seeds = {step_seed(s, t, r, p) for s in (0, 1) for t in (0, 1) for r in (0, 1) for p in (0, 1)}
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)
