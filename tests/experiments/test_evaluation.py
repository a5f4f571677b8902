"""Metrics against their definitions, and states that training keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltacontrol.deltas import HeadTuning, LoRA, attach
from deltacontrol.experiments.runs.experiment import PausedError
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
        # One epoch, the look at what depends on the controls, and that at two losses.
        assert len(calls) == (3 * slices + 3 if cached else 9 * slices)
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


def test_states_are_kept_by_default_where_the_examples_come_again():
    found = {}
    for name, steps, cached in (("once", 4, None), ("often", 9, None), ("never", 9, False)):
        model = attach(bert().double(), LoRA(rank=2, layers=(1,)), HeadTuning())
        chosen = settings(steps=steps, cache_frozen=cached)
        found[name] = train(model, NumberedTexts(False), chosen, progress=False)
    assert "kept_blocks" not in found["once"].measures  # 4 steps show 12 examples 16 times
    assert "kept_blocks" not in found["never"].measures
    assert found["often"].measures["kept_blocks"] == 1
    for name, value in found["never"].controls.items():
        torch.testing.assert_close(found["often"].controls[name], value, rtol=1e-9, atol=1e-12)
    below = attach(bert(), LoRA(rank=2), HeadTuning())
    plain = train(below, NumberedTexts(True), settings(steps=9), progress=False)
    assert "kept_blocks" not in plain.measures  # a control acts in the first block


@pytest.mark.parametrize("slices", [1, 2])
def test_a_training_with_kept_states_goes_on_to_the_last_bit(tmp_path, slices):
    found = []
    for pause in (None, 5):
        model = attach(bert(), LoRA(rank=2, layers=(1,)), HeadTuning())
        chosen = settings(steps=9, cache_frozen=True, grad_accumulation=slices)
        more = {
            "progress": False,
            "evaluate": lambda _: {},
            "checkpoint_dir": tmp_path / f"{pause}",
        }
        if pause is not None:
            with pytest.raises(PausedError):
                train(model, NumberedTexts(False), chosen, pause_after=pause, **more)
            model = attach(bert(), LoRA(rank=2, layers=(1,)), HeadTuning())
        found.append(train(model, NumberedTexts(False), chosen, **more))
    whole, resumed = found
    assert list(whole.curve["loss"]) == list(resumed.curve["loss"])
    assert all(torch.equal(v, resumed.controls[n]) for n, v in whole.controls.items())


class PaddedInFront(NumberedTexts):
    """The same texts behind two rows of padding."""

    def batch(self, step: int) -> dict:
        given = super().batch(step)
        rows = len(given["labels"])
        for name, value in given.items():
            if name != "labels":
                given[name] = torch.cat([torch.zeros(rows, 2, dtype=value.dtype), value], 1)
        return given


def test_padding_in_front_passes_all_blocks_by_default():
    found = []
    for cached in (None, False):
        model = attach(bert(), LoRA(rank=2, layers=(1,)), HeadTuning())
        chosen = settings(steps=9, cache_frozen=cached)
        found.append(train(model, PaddedInFront(True), chosen, progress=False))
    assert list(found[0].curve["loss"]) == list(found[1].curve["loss"])


def test_a_loss_that_uses_lower_states_keeps_none():
    """The pooler reads the state between the blocks too, which a pass from kept states lacks."""

    def built():
        model = attach(bert(), LoRA(rank=2, layers=(1,)), HeadTuning())
        blocks, seen = model.host.sites.blocks, []
        blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(_first(out)))
        pooler = model.model.bert.pooler
        pooler.register_forward_hook(lambda _m, _i, out: out + seen.pop()[:, 0] if seen else out)
        return model

    chosen = settings(steps=9, cache_frozen=True)
    with pytest.raises(InputError, match="uses more than the last state"):
        train(built(), NumberedTexts(True), chosen, progress=False)
    found = train(built(), NumberedTexts(True), settings(steps=9), progress=False)
    assert "kept_blocks" not in found.measures


def _first(output):
    return output[0] if isinstance(output, tuple) else output


class WithoutTargets(NumberedTexts):
    """Texts of which nothing is to be predicted."""

    def __init__(self) -> None:
        super().__init__(True)
        self.rows = [ParityBatches(rows=1, kind="causal-lm").batch(row) for row in range(12)]
        for row in self.rows:
            row["labels"] = torch.full_like(row["labels"], -100)


def test_a_first_batch_without_a_target_keeps_no_states():
    model = attach(llama(), LoRA(rank=2, layers=(1,)))
    chosen = settings(steps=9, kind="causal-lm", monitor="loss", larger_is_better=False)
    found = train(model, WithoutTargets(), chosen, progress=False)
    assert found.status == "completed" and "kept_blocks" not in found.measures
    asked = replace(chosen, cache_frozen=True)
    with pytest.raises(InputError, match="first batch has no target"):
        train(attach(llama(), LoRA(rank=2, layers=(1,))), WithoutTargets(), asked, progress=False)
