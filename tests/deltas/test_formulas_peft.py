"""What peft has and papers leave open: paths at embeddings, prompts that stay, later positions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call, jvp, vmap
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, PrefixTuning, PromptTuning, attach
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, V, batch_of, d, gradients, move, out

Build = Callable[..., PreTrainedModel]
EMBEDDING = LoRA(rank=3, alpha=5.0, sites=("embedding",))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3"])
class TestEmbedding:
    def test_costs_and_starts_as_any_path(self, build: Build, family):
        model = build(family)
        batch = batch_of(model)
        with torch.no_grad():
            before = out(model, batch)
            controlled = attach(model, EMBEDDING)
            assert controlled.num_trainable == 3 * (V + d)
            assert torch.equal(out(controlled, batch), before)
        controlled.detach()

    def test_is_a_table_with_a_change_of_low_rank(self, build: Build, family):
        """E + s·(B A)' in the place of E, by hand and by merging."""
        model = build(family)
        batch = batch_of(model)
        dense = copy.deepcopy(model)
        controlled = move(attach(model, EMBEDDING))
        down, up = (v for k, v in controlled.trainable().items() if k[-1] in "AB")
        with torch.no_grad():
            dense.get_input_embeddings().weight.add_((up @ down).T, alpha=5.0 / 3)  # type: ignore[operator,union-attr]
            found, expected = out(controlled, batch), out(dense, batch)
        state = controlled.state()
        controlled.detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[family].tolerance)
        assert float((found - out(model, batch)).detach().abs().max()) > 1e-3
        again = attach(copy.deepcopy(model), EMBEDDING)
        again.load(state)
        merged = out(again.merge(), batch).detach()
        torch.testing.assert_close(merged, expected, rtol=0, atol=FAMILIES[family].tolerance)

    def test_derivatives_agree(self, build: Build, family):
        model = build(family)
        batch = batch_of(model)
        controlled = move(attach(model, EMBEDDING))
        controls = {k: v.detach() for k, v in controlled.trainable().items()}
        direction = {k: torch.randn_like(v) for k, v in controls.items()}

        def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
            named = {f"controls.{k}": v for k, v in values.items()}
            outputs = functional_call(controlled, named, kwargs={**batch, "return_dict": True})
            return (outputs.logits if hasattr(outputs, "logits") else outputs[0]).square().mean()

        forward = jvp(loss, (controls,), (direction,))[1]
        value = loss(dict(controlled.trainable()))
        grads = gradients(value, controlled.trainable().values())
        backward = sum((g * v).sum() for g, v in zip(grads, direction.values(), strict=True))
        tolerance = max(1e-10, FAMILIES[family].tolerance)
        torch.testing.assert_close(forward, backward, rtol=tolerance, atol=tolerance)
        stacked = {k: torch.stack([v, 2 * v]) for k, v in controls.items()}
        many = vmap(loss)(stacked)
        one = [loss({k: v[i] for k, v in stacked.items()}).detach() for i in (0, 1)]
        torch.testing.assert_close(many.detach(), torch.stack(one), rtol=1e-5, atol=1e-6)
        controlled.detach()


def test_a_tied_table_moves_at_the_input_alone(build: Build):
    """As in peft: the head keeps the base's table, so merging is refused."""
    model = build("gpt2", "causal-lm")
    ids = batch_of(model)["input_ids"]
    controlled = move(attach(model, EMBEDDING))
    last: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _m, args: last.append(args[0]))
    found = out(controlled, {"input_ids": ids})
    hook.remove()
    torch.testing.assert_close(found, last[0] @ model.lm_head.weight.T)
    with pytest.raises(InputError, match=r"tied to lm_head\.weight"):
        controlled.merge()
    controlled.detach()


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_a_prompt_that_stays_is_rows_of_the_input(build: Build, family):
    """The base on [P; E(x)] and a longer mask, pooled where it pools."""
    model = build(family, "backbone")
    batch = batch_of(model)
    controlled = move(attach(model, PromptTuning(length=3, strip=False)))
    (rows,) = controlled.trainable().values()
    found = controlled(**batch)
    controlled.detach()
    text = model.get_input_embeddings()(batch["input_ids"])
    inputs = torch.cat([rows.expand(len(text), -1, -1), text], 1)
    mask = torch.cat([torch.ones(len(text), 3, dtype=torch.long), batch["attention_mask"]], 1)
    expected = model(inputs_embeds=inputs, attention_mask=mask)
    torch.testing.assert_close(found[0], expected[0])
    if getattr(expected, "pooler_output", None) is not None:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt", "qwen3"])
def test_positions_start_behind_the_prefix(build: Build, family):
    """The same prefix, and positions that are handed over by hand."""
    model = build(family, "backbone")
    batch: dict[str, Any] = batch_of(model, pad=0)
    positions = torch.arange(3, 3 + batch["input_ids"].shape[1])[None]
    controlled = move(attach(model, PrefixTuning(length=3, init_std=1.0)))
    state = controlled.state()
    with torch.no_grad():
        expected = out(controlled, batch, position_ids=positions)
        unshifted = out(controlled, batch)
    controlled.detach()
    controlled = attach(model, PrefixTuning(length=3, init_std=1.0, shift=True))
    controlled.load(state)
    with torch.no_grad():
        found = out(controlled, batch)
    controlled.detach()
    torch.testing.assert_close(found, expected)
    assert float((found - unshifted).abs().max()) > 1e-3
