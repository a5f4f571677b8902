"""Padding before a text changes nothing, and no token reads a later one, whatever the control."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import Delta, PrefixTuning, PromptTuning
from tests.deltas.zoo import FAMILIES, METHODS, REFUSED, V, attached, move, out, texts

Build = Callable[..., PreTrainedModel]
DECODERS = ("gpt2", "llama", "opt")  # what `make test` takes
MORE_DECODERS = (
    "gpt_neox", "qwen3", "gemma3", "mistral", "qwen2", "gemma", "gemma2", "cohere", "olmo2",
    "smollm3", "phi3", "stablelm", "nemotron", "phi", "gptj", "bloom", "mpt", "falcon",
    "falcon-alibi", "mixtral", "qwen2-moe", "deepseek-v3", "mamba2",
)  # fmt: skip
ENCODER_DECODERS = ("t5-seq2seq", "bart", "pegasus", "mt5")
# Where the base itself needs the positions to be given, and where it takes none.
ABSOLUTE, NO_POSITIONS = ("gpt2",), ("bloom", "mpt", "mamba2")
FLOAT32 = ("bloom", "mpt", "gemma2")  # whose own scores of padding overflow otherwise
MIXTURES = ("mixtral", "qwen2-moe", "deepseek-v3")  # rounding depends on the tokens of an expert
NUM_PADDING = 3
CHOSEN = ("lora", "prefix", "prompt", "p-tuning", "mam", "unipelt", "houlsby", "attention-control")


def decoder(build: Build, family: str, method: str = "") -> PreTrainedModel:
    """A language model; its head is a parameter of its own, where the head is trained."""
    ties: dict[str, Any] = {"tie_word_embeddings": False} if method == "head" else {}
    dtype = torch.float32 if family in FLOAT32 else torch.float64
    return build(family, "causal-lm", attention="sdpa", dtype=dtype, **ties)


def moved(model: PreTrainedModel, delta: Delta) -> nn.Module:
    return move(attached(model, delta)).eval()


def with_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padding before each text, with the positions that the text has without it."""
    mask = torch.nn.functional.pad(batch["attention_mask"], (NUM_PADDING, 0), value=0)
    ids = torch.nn.functional.pad(batch["input_ids"], (NUM_PADDING, 0), value=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def cells(wanted: Iterable[str], smoke: Iterable[tuple[str, str]]) -> list[Any]:
    """All methods on all decoders, those that `make test` leaves out marked slow."""
    return [
        pytest.param(
            family,
            method,
            id=f"{family}-{method or 'base'}",
            marks=()
            if (family in DECODERS and method in wanted) or (family, method) in smoke
            else pytest.mark.slow,
        )
        for family in (*DECODERS, *MORE_DECODERS)
        for method in ("", *METHODS)
        if (family, method) not in REFUSED
    ]


# Distances by index, by the mask, and within a window.
PADDED = [("mpt", "prompt"), ("bloom", "prompt"), ("mistral", "prompt"), ("smollm3", "prefix")]


@pytest.mark.parametrize(("family", "method"), cells(("", *CHOSEN), PADDED))
def test_padding_before_a_text_changes_nothing(build: Build, family: str, method: str) -> None:
    """Without positions as well, where the base itself sees distances, or counts the mask."""
    model = decoder(build, family, method)
    batch = texts(model, (6, 6))
    tuned: Any = moved(model, METHODS[method][0]) if method else model
    with torch.no_grad():
        expected = out(tuned, batch)
        padded = with_padding(batch)
        found = [] if family in NO_POSITIONS else [out(tuned, padded)]
        if family not in ABSOLUTE:
            found.append(out(tuned, {k: v for k, v in padded.items() if k != "position_ids"}))
    if method:
        tuned.detach()
    atol = 1e-5 if family in FLOAT32 else FAMILIES[family].tolerance
    for logits in found:
        torch.testing.assert_close(logits[:, NUM_PADDING:], expected, rtol=0, atol=atol)


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


MIXED = [("mpt", "attention-control"), ("bloom", "attention-control"), ("falcon", "prompt")]


@pytest.mark.parametrize(("family", "method"), [c for c in cells(METHODS, MIXED) if c.values[1]])
@pytest.mark.one_in(2)
def test_no_token_reads_a_later_one(build: Build, family: str, method: str) -> None:
    """Bit for bit, with a mask and without one, also where the control mixes tokens."""
    model = decoder(build, family, method)
    batch = texts(model, (7, 5, 7))
    other = {k: v.clone() for k, v in batch.items()}
    last = batch["attention_mask"].sum(1) - 1
    rows = torch.arange(3)
    other["input_ids"][rows, last] = 3 + (batch["input_ids"][rows, last] - 2) % (V - 3)
    tuned: Any = moved(model, METHODS[method][0])
    rounding = 1e-6 if family in MIXTURES else 0.0
    seed = torch.random.get_rng_state()
    for names in (("input_ids", "attention_mask"), ("input_ids",)):
        results = []
        for each in (batch, other):
            torch.random.set_rng_state(seed)
            with torch.no_grad():
                results.append(out(tuned, {name: each[name] for name in names}))
        for row, end in enumerate(last.tolist()):
            change = (results[0][row] - results[1][row]).abs().amax(-1)
            assert float(change[:end].max()) <= rounding < float(change[end])
    tuned.detach()


def seq2seq_cells() -> list[Any]:
    """All methods on all encoder-decoders; `make test` has those that mix tokens."""
    return [
        pytest.param(
            family,
            method,
            id=f"{family}-{method}",
            marks=() if method in ("attention-control", "prefix") else pytest.mark.slow,
        )
        for family in ENCODER_DECODERS
        for method in METHODS
        if (family, method) not in REFUSED
    ]


@pytest.mark.parametrize(("family", "method"), seq2seq_cells())
def test_no_token_of_a_decoder_reads_a_later_one(build: Build, family: str, method: str) -> None:
    """In the states behind the decoder, whose task head may read the last of them."""
    model = build(family, attention="sdpa")
    batch = texts(model, (7, 5, 7))
    last = model.config.eos_token_id  # from which BART reads the classes
    written = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [5, 5, 6, last]])
    batch["decoder_input_ids"] = written.masked_fill(written == last, 4)
    other = batch | {"decoder_input_ids": batch["decoder_input_ids"].clone()}
    other["decoder_input_ids"][:, -1] = 11
    tuned: Any = moved(model, METHODS[method][0])
    states: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(
        lambda _module, _args, output: states.append(output[0])
    )
    seed = torch.random.get_rng_state()
    for each in (batch, other):
        torch.random.set_rng_state(seed)
        with torch.no_grad():
            model.base_model(**each) if family == "bart" else tuned(**each)
    handle.remove()
    tuned.detach()
    change = (states[0] - states[1]).abs().amax(-1)
    assert float(change[:, :-1].max()) == 0.0 < float(change[:, -1].min())
