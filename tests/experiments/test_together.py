"""Copies trained together get what each of them gets alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from deltacontrol.deltas import (
    IA3,
    AdaLoRA,
    BitFit,
    HeadTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    StateBasedTuning,
    Subspace,
)
from deltacontrol.experiments.training.settings import Settings
from deltacontrol.experiments.training.together import copies as together
from deltacontrol.experiments.training.together import train_many
from deltacontrol.experiments.training.together.loop import join
from deltacontrol.theory.errors import InputError

VOCABULARY, WIDTH, STEPS = 50, 16, 6
SETTINGS = Settings(steps=STEPS, learning_rate=1e-3, weight_decay=0.05, precision="fp32")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32,
}  # fmt: skip


def bert(**overrides: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, **overrides)).double().eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0)).eval()


class Texts:
    """Batches of other texts, and of another length, at each step and for each seed."""

    def __init__(self, seed: int, kind: str = "classification") -> None:
        self.seed, self.kind = seed, kind

    def batch(self, step: int) -> dict[str, Any]:
        generator = np.random.default_rng([self.seed, step])
        ids = torch.from_numpy(generator.integers(2, VOCABULARY, (4, 4 + (self.seed + step) % 4)))
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        labels = ids[:, 0] % 2
        if self.kind == "causal-lm":
            labels = ids.masked_fill(mask == 0, -100)
        if self.kind == "regression":
            labels = ids[:, 0] / VOCABULARY
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def copies(**overrides: Any) -> list[Settings]:
    """Three seeds, two learning rates."""
    rates = (1e-3, 1e-2, 1e-3)
    return [
        replace(SETTINGS, seed=seed, learning_rate=rate, **overrides)
        for seed, rate in zip((3, 0, 5), rates, strict=True)
    ]


@pytest.mark.parametrize(
    "group", [2, *(pytest.param(g, marks=pytest.mark.slow) for g in (1, 3, None))]
)
@pytest.mark.parametrize(
    "deltas",
    [
        (LoRA(rank=2), HeadTuning()),
        (LoRA(rank=2, step_ratio=4.0), BitFit(), HeadTuning()),
        (PrefixTuning(length=2), IA3()),
        (PromptTuning(length=2), HeadTuning()),
    ],
    ids=lambda deltas: "+".join(d.name for d in deltas),
)
@pytest.mark.one_in(2)
def test_equals_separate_training(deltas, group) -> None:
    model, settings = bert(), copies()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = [Texts(own.seed) for own in settings]
    found = train_many(model, deltas, data, settings, group=group, progress=False)
    assert not found.reason and found.group == (group or found.group)
    alone = together._one_after_another(model, deltas, data, settings, False)
    for mine, own in zip(found.results, alone, strict=True):
        assert mine.status == own.status == "completed"
        assert mine.controls.keys() == own.controls.keys()
        for name, value in own.controls.items():
            torch.testing.assert_close(mine.controls[name], value, rtol=1e-7, atol=1e-9)
        assert list(mine.curve.columns) == list(own.curve.columns)
        columns = ["step", "loss", "learning_rate", "grad_norm", "tokens"]
        for column in columns:
            np.testing.assert_allclose(mine.curve[column], own.curve[column], rtol=2e-6)
        assert mine.measures.keys() == own.measures.keys()
    first, _, last = found.results
    assert any(not torch.equal(v, last.controls[k]) for k, v in first.controls.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["causal-lm", "regression"])
@pytest.mark.one_in(2)
def test_other_losses(kind: str) -> None:
    model = llama() if kind == "causal-lm" else bert(num_labels=1)
    settings = copies(kind=kind)
    data = [Texts(own.seed, kind) for own in settings]
    found = train_many(model, (LoRA(rank=2),), data, settings, group=3, progress=False)
    alone = together._one_after_another(model, (LoRA(rank=2),), data, settings, False)
    for mine, own in zip(found.results, alone, strict=True):
        np.testing.assert_allclose(mine.curve["loss"], own.curve["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    ("deltas", "overrides", "reason"),
    [
        pytest.param(
            (Subspace(dimension=5),), {}, "functions of a control", marks=pytest.mark.slow
        ),
        ((AdaLoRA(rank=2, target_rank=1),), {}, "more of the training than gradients"),
        pytest.param(
            (StateBasedTuning(rank=2, around="mlp"),),
            {},
            "another module left behind",
            marks=pytest.mark.slow,
        ),
        ((LoRA(rank=2, dropout=0.5), HeadTuning()), {}, "draw random numbers"),
        pytest.param(
            (LoRA(rank=2),),
            {"grad_accumulation": 2},
            "grad_accumulation is set",
            marks=pytest.mark.slow,
        ),
        pytest.param((LoRA(rank=2),), {"dropout": True}, "dropout is set", marks=pytest.mark.slow),
    ],
    ids=lambda value: "",
)
@pytest.mark.slow
def test_what_cannot_be_shared_is_trained_one_after_another(deltas, overrides, reason) -> None:
    model, settings = bert(), copies(**overrides)
    data = [Texts(own.seed) for own in settings]
    found = train_many(model, deltas, data, settings, progress=False)
    assert reason in found.reason and found.group == 1
    alone = together._one_after_another(model, deltas, data, settings, False)
    for mine, own in zip(found.results, alone, strict=True):
        assert all(torch.equal(own.controls[k], v) for k, v in mine.controls.items())


def test_a_copy_that_diverges_does_not_disturb_the_others() -> None:
    model, settings = bert(), copies(max_grad_norm=None, warmup=0.0)
    settings[1] = replace(settings[1], learning_rate=1e200)
    data = [Texts(own.seed) for own in settings]
    deltas = (LoRA(rank=2), HeadTuning())
    found = train_many(model, deltas, data, settings, group=3, progress=False).results
    assert [result.status for result in found] == ["completed", "diverged", "completed"]
    assert "lower learning rate" in found[1].message and len(found[1].curve) < STEPS
    assert all(v.isfinite().all() for v in found[1].controls.values())
    alone = together._one_after_another(model, deltas, data, settings, False)
    assert alone[1].message[:20] == found[1].message[:20]
    for k in (0, 2):
        for name, value in alone[k].controls.items():
            torch.testing.assert_close(found[k].controls[name], value, rtol=1e-7, atol=1e-9)


def test_mistakes_are_named() -> None:
    model, settings = bert(), copies()
    data = [Texts(own.seed) for own in settings]
    with pytest.raises(InputError, match="3 copies and settings for 2"):
        train_many(model, (LoRA(rank=2),), data, settings[:2])
    with pytest.raises(InputError, match="one steps; they may differ in learning_rate and seed"):
        train_many(model, (LoRA(rank=2),), data[:2], [settings[0], replace(settings[1], steps=3)])
    with pytest.raises(InputError, match="group is 4; expected 1 to 3"):
        train_many(model, (LoRA(rank=2),), data, settings, group=4)
    with pytest.raises(InputError, match="rank 17 is above"):
        train_many(model, (LoRA(rank=17, init="svd"),), data, settings)
    with pytest.raises(InputError, match="4 examples.*and 2 with"):
        join([data[0].batch(0), {k: v[:2] for k, v in data[0].batch(0).items()}], 0)
