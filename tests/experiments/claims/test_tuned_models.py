"""Claims 32 and 34 on tiny models, and systems of which they are false."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltacontrol.deltas import attach
from deltacontrol.experiments.measures.kernel_regime import kernel_of
from deltacontrol.experiments.measures.language.top_layers import Leading, TopLayers
from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny

SITES = ("self_attn.q_proj", "mlp.up_proj")


# -- claim 32 ----------------------------------------------------------------------------------


@pytest.fixture
def kernels(tiny: Tiny, places: dict[str, str]) -> Callable[..., Any]:
    few = {"LAYER_SETS": ((0,), (1,), (0, 1)), "HEAD_ROWS": 64, "ROWS": 6, "STEPS": 2}
    few["TASKS"] = (places["task"],) * 5
    return lambda **constants: tiny("32_kernel_condition", **few | constants)


def test_claim_32_takes_the_kernel_of_what_is_trained(kernels: Callable[..., Any]) -> None:
    module = kernels()
    task = module.TASKS[0]
    data = module._data(task, True)
    controlled = attach(data.model, module._lora(), seed=module.SEED)
    try:
        assert set(module._chosen(controlled, (0, 1))) == set(controlled.trainable())
        assert len(module._chosen(controlled, (1,))) == len(controlled.trainable()) // 2
        expected = module._condition(kernel_of(data, controlled).total())
    finally:
        controlled.detach()
    assert module._conditions(task, True)[2] == pytest.approx(expected, rel=1e-9)
    # A layer that is not trained adds nothing: the losses of the choices differ.
    losses, counts = module._ends(task)
    assert len(set(losses)) == 3 and counts[2] == counts[0] + counts[1]


def test_claim_32_is_not_judged_where_nothing_is_learnt(kernels: Callable[..., Any]) -> None:
    outcome = judge(kernels(RATE=0.0).CLAIM)
    assert {part.verdict for part in outcome.parts} == {Verdict.ASSUMPTION_NOT_MET}


def test_claim_32_orders_known_kernels_and_sees_wrong_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("deltacontrol.experiments.claims.32_kernel_condition")
    module._known.cache_clear()
    assert module._ordered(module._designed()).value == pytest.approx(1.0)
    module._known.cache_clear()
    # An entry of a kernel is no condition number: other kernels of one spectrum have other ones.
    monkeypatch.setattr(module, "_condition", lambda K: float(K[0, 1]))
    assert not module._ordered(module._designed()).value >= module.ORDERED
    module._known.cache_clear()


# -- claim 34 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
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
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
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


@pytest.fixture
def intruders(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The claim's module on the tiny model, with fine-tunings of two tasks that are made up."""
    module = import_module("deltacontrol.experiments.claims.34_intruder_dimensions")
    top = TopLayers.of(model, 2, SITES)
    held = top.entered(_batch(4, 1))
    data = module._Data(top.entered(_batch(8, 2)), top.entered(_batch(8, 3)), (3, 5))
    for name, value in {
        "_top": lambda: top, "_held": lambda: held, "_data": lambda task: data,
        "TASKS": ("one", "two"), "LEADING": 3, "COSINE": 0.8, "STEPS": 4, "HELD_ROWS": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    cached = [f for f in vars(module).values() if hasattr(f, "cache_clear")]
    for function in cached:
        function.cache_clear()
    yield module
    for function in cached:
        function.cache_clear()


def test_claim_34_finds_low_rank_updates_and_no_others(
    intruders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = intruders._top().weights
    random = torch.Generator().manual_seed(0)

    def made(task: str, low: bool = True) -> Any:
        full = {n: W + 1e-3 * torch.randn(W.shape, generator=random) for n, W in base.items()}
        pairs = {n: [torch.randn(k, generator=random) for k in W.shape] for n, W in base.items()}
        lora = {n: W + 2.0 * torch.outer(*pairs[n]) for n, W in base.items()}
        return intruders._Tuned(lora if low else full, full, 0.5, 0.5)

    tuned = {task: made(task) for task in ("one", "two")}
    monkeypatch.setattr(intruders, "_tuned", tuned.__getitem__)
    assert intruders._more().value >= intruders.MORE
    for part in intruders._after("removed").details.values():
        assert part["intruders"] > 0 and part["scaled"] != part["tuned"]
    # The mutated system: LoRA's update is one of full rank.
    turned = {task: made(task, low=False) for task in ("one", "two")}
    monkeypatch.setattr(intruders, "_tuned", turned.__getitem__)
    assert intruders._more().value < intruders.MORE
    intruders._scaled.cache_clear()
    assert not intruders._after("removed").assumption_met


def test_claim_34_trains_both_to_one_loss(intruders: Any) -> None:
    found = intruders._tuned("one")
    base = float(intruders._loss(intruders._data("one"), intruders._top().weights))
    assert found.lora_loss < base and set(found.lora) == set(intruders._top().weights)
    for name, W in found.lora.items():
        change = W - intruders._top().weights[name]
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= intruders.RANK
    outcome = judge(replace(intruders.CLAIM, parts=intruders.CLAIM.parts[:1]))
    assert outcome.part("a").evidence.details["training losses, LoRA and full"]["one"][0] < base
