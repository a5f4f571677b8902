"""Generation with a cache gives the tokens of greedy decoding without one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from deltacontrol.deltas import (
    AttentionControl,
    Delta,
    DeltaModel,
    HoulsbyAdapter,
    LadderSideTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    StateBasedTuning,
    Subspace,
    UniPELT,
    attach,
)
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, V, move

Build = Callable[..., PreTrainedModel]
NEW = 8
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
OPTIONS |= {"return_dict_in_generate": True, "output_logits": True}
DELTAS: dict[str, tuple[Delta, ...]] = {
    "lora": (LoRA(rank=3),),
    "houlsby": (HoulsbyAdapter(bottleneck=4),),
    "prefix": (PrefixTuning(length=3, init_std=1.0),),
    "prompt": (PromptTuning(length=4),),
    "prompt+prefix": (PromptTuning(length=4), PrefixTuning(length=3, init_std=1.0)),
    "two prompts": (PromptTuning(length=2), PromptTuning(length=3)),
    "subspace": (Subspace(dimension=5),),
    "attention-control": (AttentionControl(rank=3), AttentionControl(rank=2, around="block")),
    "ladder": (LadderSideTuning(reduction=4),),
    "state-based": (StateBasedTuning(rank=3),),
    "unipelt": (UniPELT(rank=3, bottleneck=4, length=2, init_std=1.0),),
    "unipelt+prompt": (PromptTuning(length=3), UniPELT(3, 4, 2, init_std=1.0), AttentionControl(2)),
}


def texts(left: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (2, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if left:
        ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def whole(controlled: DeltaModel, sequence: Tensor, real: Tensor) -> Tensor:
    """Logits behind the text of one whole pass over a finished sequence, without a cache."""
    text = torch.cat([sequence[: len(real)][real], sequence[len(real) :]])
    logits = controlled(input_ids=text[None], use_cache=False).logits[0]
    return logits[-NEW - 1 : -1]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("gpt2", "eager"),
        ("llama", "sdpa"),
        pytest.param("gpt2", "sdpa", marks=SLOW),
        pytest.param("llama", "eager", marks=SLOW),
        pytest.param("opt", "eager", marks=SLOW),
        pytest.param("opt", "sdpa", marks=SLOW),
    ],
)
@pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)
@pytest.mark.one_in(3)
def test_with_a_cache_equals_greedy_decoding(build: Build, family, deltas, attention):
    model = build(family, "causal-lm", attention=attention, dtype=torch.float32)
    base = model.generate(**texts(False), **OPTIONS)
    controlled = move(attach(model, *deltas), scale=0.5)
    with torch.no_grad():
        for left in (False, True):
            batch = texts(left)
            cached = model.generate(**batch, **OPTIONS)
            plain = model.generate(**batch, **OPTIONS, use_cache=False)
            assert torch.equal(cached.sequences, plain.sequences)
            rows = zip(cached.sequences, batch["attention_mask"].bool(), strict=True)
            expected = torch.stack([whole(controlled, *row) for row in rows])
            for found in (cached, plain):
                logits = torch.stack(found.logits, dim=1)
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
            tokens = expected.argmax(-1)
            ends = tokens == (model.generation_config.eos_token_id or -1)  # suppressed here
            assert bool(((tokens == cached.sequences[:, -NEW:]) | ends).all())
            if not left:
                change = (expected[:, 0] - base.logits[0]).abs().max()
                assert float(change) > 1e-2, "the delta changes the distribution"
    controlled.detach()
    assert torch.equal(model.generate(**texts(False), **OPTIONS).sequences, base.sequences)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)
@pytest.mark.one_in(3)
def test_beams_do_not_depend_on_the_cache(build, family, deltas):
    model = build(family, "causal-lm", dtype=torch.float32)
    controlled = move(attach(model, *deltas), scale=0.5)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    one, other = (model.generate(**texts(True), **options, use_cache=c) for c in (True, False))
    assert torch.equal(one, other)
    controlled.detach()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_of_a_cached_pass_are_those_of_a_whole_pass(build, family):
    """Several tokens at once behind a cache, where the mask is neither square nor a single row."""
    for attention in ("eager", "sdpa"):
        model = build(family, "causal-lm", attention=attention)
        names = ("prefix", "prompt", "prompt+prefix", "attention-control", "unipelt+prompt")
        for deltas in map(DELTAS.__getitem__, names):
            controlled = move(attach(model, *deltas))
            ids = texts(False)["input_ids"]
            whole = controlled(input_ids=ids, use_cache=False).logits
            start = controlled(input_ids=ids[:, :3], use_cache=True)
            rest = controlled(input_ids=ids[:, 3:], past_key_values=start.past_key_values)
            logits = torch.cat([start.logits, rest.logits], dim=1)
            tolerance = max(1e-12, FAMILIES[family].tolerance)
            torch.testing.assert_close(logits, whole, rtol=0, atol=tolerance)
            controlled.detach()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_static_cache_works_or_is_refused(build, family):
    """It has no room for the rows of a prompt, nor for what a control keeps of a token."""
    model = build(family, "causal-lm", attention="sdpa")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["cache_implementation"] = "static"
    options["disable_compile"] = True
    controlled = move(attach(model, PromptTuning(length=3)))
    with pytest.raises(InputError, match="static cache.*cache_implementation='dynamic'"):
        model.generate(**texts(False), **options)
    controlled.detach()
    for name in ("attention-control", "unipelt"):
        controlled = move(attach(model, *DELTAS[name]))
        with pytest.raises(InputError, match="cache that grows.*cache_implementation='dynamic'"):
            model.generate(**texts(False), **options)
        controlled.detach()
    for deltas in (DELTAS["lora"], DELTAS["prefix"]):
        controlled = move(attach(model, *deltas), scale=0.5)
        found = model.generate(**texts(True), **options)
        assert torch.equal(
            found, model.generate(**texts(True), **options | {"cache_implementation": "dynamic"})
        )
        controlled.detach()


@pytest.mark.parametrize(
    "delta",
    [
        LoRA(rank=2), PrefixTuning(2, init_std=1.0), PromptTuning(2), Subspace(5),
        AttentionControl(2), UniPELT(2, 4, 2),
    ],
    ids=lambda delta: delta.name,
)  # fmt: skip
def test_an_encoder_decoder_generates(delta: Delta):
    config = FAMILIES["t5"].config()
    config.update({"decoder_start_token_id": 0, "eos_token_id": None})
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    controlled = move(attach(model, delta), scale=3.0)
    batch = texts(False)
    with torch.no_grad():
        tokens = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(5):
            logits = controlled(**batch, decoder_input_ids=tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        found = model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=use_cache)
        assert torch.equal(found, tokens)
    controlled.detach()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("name", ["attention-control", "unipelt"])
def test_what_is_kept_slides_with_the_window(name, window, attention):
    """A control mixes the tokens that the attention sees, also where that forgets the first."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=V, sliding_window=window, attn_implementation=attention,
    )  # fmt: skip
    model = MistralForCausalLM(config).double().eval()
    controlled = move(attach(model, *DELTAS[name]), scale=0.5)
    ids = texts(False)["input_ids"]
    with torch.no_grad():
        expected = controlled(input_ids=ids, use_cache=False).logits
        state, found = None, []
        for start, end in ((0, 3), (3, 5), (5, 6)):
            piece = controlled(input_ids=ids[:, start:end], past_key_values=state, use_cache=True)
            state, found = piece.past_key_values, [*found, piece.logits]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)
    controlled.detach()
