"""Padding before a text changes nothing, and no token reads a later one, whatever the control."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import Delta, PrefixTuning, PromptTuning
from tests.deltas.zoo import FAMILIES, METHODS, REFUSED, V, attached, move, out, texts

Build = Callable[..., PreTrainedModel]
DECODERS = ("gpt2", "llama", "opt")
NUM_PADDING = 3
CHOSEN = ("lora", "prefix", "prompt", "p-tuning", "mam", "unipelt", "houlsby", "attention-control")


def decoder(build: Build, family: str, method: str = "") -> PreTrainedModel:
    """A language model; its head is a parameter of its own, where the head is trained."""
    ties: dict[str, Any] = {"tie_word_embeddings": False} if method == "head" else {}
    return build(family, "causal-lm", attention="sdpa", **ties)


def moved(model: PreTrainedModel, delta: Delta) -> nn.Module:
    return move(attached(model, delta)).eval()


def with_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padding before each text, with the positions that the text has without it."""
    mask = torch.nn.functional.pad(batch["attention_mask"], (NUM_PADDING, 0), value=0)
    ids = torch.nn.functional.pad(batch["input_ids"], (NUM_PADDING, 0), value=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", ["", *CHOSEN])
def test_padding_before_a_text_changes_nothing(build: Build, family: str, method: str) -> None:
    """Without positions as well, where the base itself sees distances, or counts the mask."""
    model = decoder(build, family)
    batch = texts(model, (6, 6))
    tuned: Any = moved(model, METHODS[method][0]) if method else model
    with torch.no_grad():
        expected = out(tuned, batch)
        padded = with_padding(batch)
        found = [out(tuned, padded)]
        if family != "gpt2":
            found.append(out(tuned, {k: v for k, v in padded.items() if k != "position_ids"}))
    if method:
        tuned.detach()
    for logits in found:
        torch.testing.assert_close(
            logits[:, NUM_PADDING:], expected, rtol=0, atol=FAMILIES[family].tolerance
        )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("delta", [PromptTuning(length=2), PrefixTuning(length=2, init_std=1.0)])
def test_a_step_with_a_cache_goes_on_where_the_text_ends(
    build: Build, family: str, delta: Delta
) -> None:
    """In a loop of one's own, without positions."""
    model = decoder(build, family)
    batch = texts(model, (6, 6))
    tuned: Any = moved(model, delta)
    padded = {k: v for k, v in with_padding(batch).items() if k != "position_ids"}
    with torch.no_grad():
        expected = out(tuned, batch)
        first = tuned(**{k: v[:, :-1] for k, v in padded.items()}, use_cache=True)
        last = tuned(
            input_ids=padded["input_ids"][:, -1:],
            attention_mask=padded["attention_mask"],
            past_key_values=first.past_key_values,
        )
    tuned.detach()
    atol = FAMILIES[family].tolerance
    torch.testing.assert_close(first.logits[:, NUM_PADDING:], expected[:, :-1], rtol=0, atol=atol)
    torch.testing.assert_close(last.logits, expected[:, -1:], rtol=0, atol=atol)


CELLS = [(f, name) for f in DECODERS for name in METHODS if (f, name) not in REFUSED]


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_no_token_reads_a_later_one(build: Build, family: str, method: str) -> None:
    """Bit for bit, with a mask and without one, also where the control mixes tokens."""
    model = decoder(build, family, method)
    batch = texts(model, (7, 5, 7))
    other = {k: v.clone() for k, v in batch.items()}
    last = batch["attention_mask"].sum(1) - 1
    rows = torch.arange(3)
    other["input_ids"][rows, last] = 3 + (batch["input_ids"][rows, last] - 2) % (V - 3)
    tuned: Any = moved(model, METHODS[method][0])
    seed = torch.random.get_rng_state()
    for names in (("input_ids", "attention_mask"), ("input_ids",)):
        results = []
        for each in (batch, other):
            torch.random.set_rng_state(seed)
            with torch.no_grad():
                results.append(out(tuned, {name: each[name] for name in names}))
        for row, end in enumerate(last.tolist()):
            assert torch.equal(results[0][row, :end], results[1][row, :end])
            assert not torch.equal(results[0][row, end], results[1][row, end])
    tuned.detach()
