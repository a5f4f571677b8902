"""Claim 34 on a tiny language model, and updates of which it is false."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltacontrol.experiments.measures.tuning.low_and_full import LowAndFull, Tuned, steady_rate
from deltacontrol.experiments.measures.tuning.top_layers import Leading, TopLayers
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.judging import judge

SITES = ("self_attn.q_proj", "mlp.up_proj")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (rows, 6), generator=random)
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens[:, 0] % 2}


def test_the_last_layers_alone_give_the_states_of_the_whole(model: LlamaForCausalLM) -> None:
    top = TopLayers.of(model, 2, SITES)
    batch = top.entered(_batch(3, 0))
    whole = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(
        top.states(batch, top.weights)[attended], whole.last_hidden_state[attended]
    )
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**asked).logits.detach()
    last = logits[torch.arange(3), batch["attention_mask"].sum(1) - 1]
    margins = top.margins(batch, top.weights, (3, 5))
    torch.testing.assert_close(margins, last[:, 5] - last[:, 3])
    losses = -logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    expected = losses[attended[:, 1:]].mean()
    assert top.text_loss(batch, top.weights) == pytest.approx(float(expected), rel=1e-5)
    other = {name: W + 0.1 for name, W in top.weights.items()}
    assert not torch.allclose(top.states(batch, other), top.states(batch, top.weights))
    assert len(model.model.layers) == 3 and model.config.num_hidden_layers == 3


def test_an_intruder_is_found_and_scaled() -> None:
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64))
    new = torch.ones(6, dtype=torch.float64) / 6**0.5
    tuned = W + 50.0 * torch.outer(new, new)
    found = Leading.of(tuned, torch.eye(6, dtype=torch.float64), 3, 0.6)
    assert found.intruders.tolist()[0] and not found.intruders.all()
    gone = found.scaled(tuned, found.intruders, 0.0)
    assert torch.linalg.matrix_norm(gone, 2) < 4 < torch.linalg.matrix_norm(tuned, 2)
    torch.testing.assert_close(found.scaled(tuned, found.intruders, 1.0), tuned)
    others = found.first(1, intruders=False)
    assert int(others.sum()) == 1 and not (others & found.intruders).any()


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    return {"W": torch.randn(6, 5, generator=torch.Generator().manual_seed(0))}


def _loss(weights: Any) -> torch.Tensor:
    """Of a least-squares problem in the one matrix."""
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 9, generator=random), torch.randn(6, 9, generator=random)
    return (weights["W"] @ x - y).square().mean()


def test_low_rank_and_full_reach_one_loss(base: dict[str, torch.Tensor]) -> None:
    start = float(_loss(base))
    low, full = Tuned.low(base, rank=2, scaling=2.0, seed=0), Tuned.full(base)
    found = LowAndFull.of(_loss, low, full, (1e-2, 1e-2), steps=90, until=0.9 * start)
    assert found.before == pytest.approx(start)
    assert 0.8 * start < found.low_loss <= 0.9 * start  # it ends where its loss is small enough
    assert found.low_loss - 0.05 < found.full_loss <= found.low_loss
    assert all(1 < steps < 90 for steps in found.steps)
    ranks = [
        torch.linalg.matrix_rank(w["W"] - base["W"], rtol=1e-4) for w in (found.low, found.full)
    ]
    assert [int(r) for r in ranks] == [2, 5]
    assert found.low_loss == pytest.approx(float(_loss(found.low)))
    few = LowAndFull.of(_loss, low, Tuned.full(base), (1e-2, 1e-2), steps=3, until=0.0)
    assert few.steps[0] == 3


def test_the_rate_is_the_largest_at_which_the_loss_falls_steadily(
    base: dict[str, torch.Tensor],
) -> None:
    until = 0.6 * float(_loss(base))

    def losses(rate: float) -> list[float]:
        return [*Tuned.full(base).descent(_loss, rate, steps=80, until=until)]

    def rate(*rates: float) -> float:
        return steady_rate(_loss, lambda: Tuned.full(base), rates, steps=80, until=until)

    assert rate(1e-2, 2e-2, 5.0) == 2e-2
    assert losses(2e-2)[-1] <= until and max(losses(5.0)) > 1.1 * losses(5.0)[0]
    with pytest.raises(InputError, match="smaller rates"):
        rate(5.0, 1e-5)  # too large, and too small for so many steps
    with pytest.raises(InputError, match="smaller rates"):
        steady_rate(lambda w: _loss(w) * float("nan"), lambda: Tuned.full(base), [1e-2], steps=3,
                    until=until)  # fmt: skip


@pytest.fixture
def intruders(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The claim's module on the tiny model, with rows of two tasks that are made up."""
    module = import_module("deltacontrol.experiments.claims.34_intruder_dimensions")
    top = TopLayers.of(model, 2, SITES)
    held, rows = top.entered(_batch(4, 1)), module._Rows(top.entered(_batch(8, 2)), (3, 5))
    cached = [f for f in vars(module).values() if hasattr(f, "cache_clear")]
    for function in cached:
        function.cache_clear()
    for name, value in {
        "_top": lambda: top, "_held": lambda: held, "_rows": lambda task, seed: rows,
        "TASKS": ("one", "two"), "LEADING": 3, "COSINE": 0.8, "STEPS": 40, "UNTIL": 0.5,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    yield module
    for function in cached:
        function.cache_clear()


def test_claim_34_finds_low_rank_updates_and_no_others(
    intruders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = intruders._top().weights

    def made(low: bool) -> LowAndFull:
        random = torch.Generator().manual_seed(0)
        full = {n: W + 1e-3 * torch.randn(W.shape, generator=random) for n, W in base.items()}
        pairs = {n: [torch.randn(k, generator=random) for k in W.shape] for n, W in base.items()}
        lora = {n: W + 2.0 * torch.outer(*pairs[n]) for n, W in base.items()}
        return LowAndFull(lora if low else full, full, 0.9, 0.5, 0.5, (1, 1))

    monkeypatch.setattr(intruders, "_tuned", lambda task: made(low=True))
    assert intruders._more().value >= intruders.MORE
    for part in intruders._after("removed", intruders=True).details.values():
        if isinstance(part, dict):
            assert part["intruders"] > 0 and part["scaled"] != part["tuned"]
    assert not any(x.intruders.any() for x in intruders._own().values())
    # Where the leading directions are what has changed, scaling them takes all of it back.
    back = intruders._after("removed", intruders=False, doubled=True)
    share = "share of the mean rise that is removed"
    assert back.details[share] == pytest.approx(1.0, abs=1e-3)
    gentle = intruders._after("cost", intruders=False, scale=1.0)
    same = intruders._after("cost", intruders=True, scale=1.0)
    assert gentle.value == pytest.approx(same.value)
    gone = intruders._after("cost", intruders=True, scale=0.0, whole=True)
    parts = [part for name, part in gone.details.items() if name != share]
    assert all(part["scaled"] == part["base"] for part in parts)
    removed = intruders._after("removed", intruders=True)
    values = [
        part["tuned"] - part["scaled"] - intruders.REMOVED * (part["tuned"] - part["base"])
        for name, part in removed.details.items()
        if name != share
    ]
    assert removed.value == pytest.approx(sum(values) / len(values), rel=1e-9)
    # The mutated system: LoRA's update is one of full rank.
    monkeypatch.setattr(intruders, "_tuned", lambda task: made(low=False))
    for name in ("_of_lora", "_of_full", "_scaled"):
        getattr(intruders, name).cache_clear()
    assert intruders._more().value < intruders.MORE
    assert not intruders._after("removed", intruders=True).assumption_met


def test_claim_34_trains_both(intruders: Any) -> None:
    found, base = intruders._tuned("one"), intruders._top().weights
    assert found.low_loss < found.before and set(found.low) == set(base)
    for name, W in found.low.items():
        rank = int(torch.linalg.matrix_rank(W - base[name], rtol=1e-4))
        assert rank <= intruders.RANK
    outcome = judge(replace(intruders.CLAIM, parts=intruders.CLAIM.parts[:1]))
    told = outcome.part("a").evidence.details["training losses: before, LoRA, full"]
    assert told["one"][1] <= intruders.UNTIL < told["one"][0]
    assert told["one"][2] <= told["one"][1]
