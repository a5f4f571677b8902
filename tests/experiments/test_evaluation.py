"""Metrics against their definitions, and states that training keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deltacontrol.deltas import HeadTuning, LoRA, attach
from deltacontrol.experiments.training.evaluation import evaluate
from deltacontrol.experiments.training.loop import train
from deltacontrol.theory.errors import InputError
from tests.experiments.training_models import ParityBatches, bert, llama, lora_model, settings


def test_metrics_against_their_definitions():
    model = lora_model()
    batches = [ParityBatches(seed=9).batch(step) for step in range(3)]
    metrics = evaluate(model, batches, "classification")
    labels = torch.cat([b["labels"] for b in batches])
    with torch.no_grad():
        inputs = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
        logits = torch.cat([model(**i).logits for i in inputs])
    guess = logits.argmax(-1)
    f1 = []
    for c in (0, 1):
        hits = ((guess == c) & (labels == c)).sum()
        f1.append(float(2 * hits / ((guess == c).sum() + (labels == c).sum())))
    assert metrics["accuracy"] == pytest.approx(float((guess == labels).float().mean()))
    assert metrics["macro_f1"] == pytest.approx(sum(f1) / 2)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_language_model_metrics_weigh_by_tokens():
    model = attach(llama(), LoRA(rank=2))
    batches = [ParityBatches(rows=r, kind="causal-lm").batch(r) for r in (2, 6)]
    metrics = evaluate(model, batches, "causal-lm")
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * tokens
        count += tokens
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_regression_metrics():
    model = attach(bert(num_labels=1, problem_type="regression"), HeadTuning())
    metrics = evaluate(model, [ParityBatches(kind="regression").batch(0)], "regression")
    assert -1 <= metrics["pearson"] <= 1 and metrics["mse"] > 0


class NumberedTexts:
    """A small training set, shuffled in each epoch; `fixed` keeps the batches, in another order."""

    def __init__(self, fixed: bool) -> None:
        self.fixed = fixed
        self.rows = [ParityBatches(rows=1).batch(row) for row in range(12)]

    def examples(self, step: int) -> torch.Tensor:
        epoch, position = divmod(step, 3)
        generator = np.random.default_rng(epoch)
        order = np.arange(12).reshape(3, 4)
        order = generator.permutation(order if self.fixed else generator.permutation(12))
        return torch.from_numpy(order.reshape(3, 4)[position])

    def batch(self, step: int) -> dict:
        rows = [self.rows[int(row)] for row in self.examples(step)]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.one_in(2)
def test_cached_frozen_states_change_nothing(fixed, slices):
    found = {}
    data = NumberedTexts(fixed)
    calls = []
    for cached in (False, True):
        model = attach(bert().double(), LoRA(rank=2, layers=(1,)), HeadTuning())
        model.host.sites.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        chosen = settings(steps=9, cache_frozen=cached, grad_accumulation=slices)
        found[cached] = train(model, data, chosen, progress=False)
        # One epoch, and the look at what depends on the controls.
        assert len(calls) == (3 * slices + 1 if cached else 9 * slices)
    same = torch.equal if fixed else lambda a, b: torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    for name, value in found[False].controls.items():
        assert same(found[True].controls[name], value), name
    assert list(found[True].curve["tokens"]) == list(found[False].curve["tokens"])


def test_what_cannot_be_cached_is_refused():
    model = attach(bert(), LoRA(rank=2, layers=(1,)), HeadTuning())
    with pytest.raises(InputError, match="other ones each time"):
        train(model, NumberedTexts(True), settings(cache_frozen=True, dropout=True))
    with pytest.raises(InputError, match="ParityBatches has no method examples"):
        train(model, ParityBatches(), settings(cache_frozen=True))
    with pytest.raises(InputError, match="first block or before it"):
        whole = attach(bert(), LoRA(rank=2), HeadTuning())
        train(whole, NumberedTexts(True), settings(cache_frozen=True), progress=False)
