"""Where the deltas of a model are disabled, its outputs are those of the base, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from deltacontrol.deltas import (
    BitFit,
    Delta,
    FullFineTuning,
    HeadTuning,
    LoRA,
    MixtureOfControl,
    PrefixTuning,
    PromptTuning,
    StructuredSubspace,
    Subspace,
    attach,
)
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import (
    FAMILIES,
    METHODS,
    PAIRS,
    V,
    assert_same,
    attached,
    batch_of,
    move,
    out,
    snapshot,
)

CHOSEN = ("bitfit", "full", "lora", "prefix", "prompt", "said")
MATRIX = [
    (family, name)
    for family, name in PAIRS
    if family == "bert" or (family in ("gpt2", "llama", "t5-seq2seq") and name in CHOSEN)
]
ALL: tuple[Delta, ...] = (
    PromptTuning(length=2),
    LoRA(rank=2),
    PrefixTuning(length=2, init_std=1.0),
    HeadTuning(),
)


@pytest.mark.parametrize(("family", "name"), MATRIX)
@pytest.mark.one_in(4)
def test_the_outputs_are_the_bases(build, family, name):
    model = build(family)
    batch = batch_of(model)
    base = out(model, batch).detach()
    tuned = move(attached(model, METHODS[name][0]))
    controlled = out(tuned, batch).detach()
    assert not torch.equal(controlled, base)
    with tuned.disable():
        assert torch.equal(out(tuned, batch), base)
        assert torch.equal(out(model, batch), base)
    if name != "adapterdrop":  # which draws layers at random
        assert torch.equal(out(tuned, batch), controlled)
    tuned.detach()


class TestBlocks:
    def test_they_may_be_nested_and_may_fail(self, build):
        model = build("bert")
        batch = batch_of(model)
        base = out(model, batch).detach()
        tuned = move(attach(model, *ALL))
        controlled = out(tuned, batch).detach()
        places = {name: id(p) for name, p in model.named_parameters()}
        with pytest.raises(KeyError), tuned.disable():
            with tuned.disable():
                assert torch.equal(out(tuned, batch), base)
            assert torch.equal(out(tuned, batch), base)
            with pytest.raises((IndexError, RuntimeError)):
                tuned(input_ids=torch.full((1, 3), V + 5))
            with pytest.raises(ZeroDivisionError), tuned.disable():
                raise ZeroDivisionError
            assert torch.equal(out(tuned, batch), base)
            raise KeyError
        assert torch.equal(out(tuned, batch), controlled)
        assert {name: id(p) for name, p in model.named_parameters()} == places
        tuned.detach()

    def test_what_is_detached_inside_stays_detached(self, build):
        model = build("bert")
        before = snapshot(model)
        tuned = move(attach(model, *ALL))
        with tuned.disable():
            tuned.detach()
        assert_same(before, snapshot(model))

    def test_a_users_hook_keeps_its_place(self, build):
        """It was put behind the deltas, and sees their output before and after."""
        model = copy.deepcopy(build("bert"))
        site = model.bert.encoder.layer[0].attention.self.query
        tuned, seen, batch = move(attach(model, LoRA(rank=2))), [], batch_of(model)
        site.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
        out(tuned, batch)
        with tuned.disable():
            out(tuned, batch)
        out(tuned, batch)
        assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])

    def test_the_model_may_have_changed_its_dtype(self, build):
        model = copy.deepcopy(build("bert"))
        batch = batch_of(model)
        expected = out(copy.deepcopy(model).float(), batch)
        exact = {key: value.clone() for key, value in model.state_dict().items()}
        tuned = move(attach(model, HeadTuning(), LoRA(rank=2)))
        tuned.float()
        with tuned.disable():
            assert torch.equal(out(tuned, batch), expected)
        tuned.double()
        restored = tuned.detach().state_dict()
        assert torch.equal(restored["classifier.weight"], exact["classifier.weight"])

    @pytest.mark.parametrize(
        "delta",
        [
            Subspace(dimension=3),
            StructuredSubspace(dimension=9),
            MixtureOfControl(num_controls=2, rank=2),
            FullFineTuning(),
            PrefixTuning(length=2, init_std=1.0),
        ],
        ids=lambda delta: delta.name,
    )
    def test_a_backward_pass_may_wait_under_checkpointing(self, build, delta):
        """The reference of a preference loss: the base's outputs between forward and backward."""
        model = copy.deepcopy(build("bert")).eval()
        batch = batch_of(model)
        base = out(model, batch).detach()

        def gradients(reference: bool, checkpointing: bool) -> list[torch.Tensor]:
            tuned = move(attach(model, delta)).train()
            if checkpointing:
                tuned.gradient_checkpointing_enable()
            loss = out(tuned, batch).square().sum()
            if reference:
                with tuned.disable(), torch.no_grad():
                    assert torch.equal(out(tuned, batch), base)
            loss.backward()
            found = [p.grad for p in tuned.trainable().values() if p.grad is not None]
            tuned.gradient_checkpointing_disable()
            tuned.detach().eval()
            return found

        plain = gradients(False, False)
        assert plain and any(bool(gradient.any()) for gradient in plain)
        for reference, checkpointing in ((False, True), (True, True), (True, False)):
            for ours, theirs in zip(gradients(reference, checkpointing), plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5-seq2seq"])
def test_generation_is_the_bases(family):
    torch.manual_seed(0)
    config = FAMILIES[family].config()
    seq2seq = config.is_encoder_decoder
    kind: Any = T5ForConditionalGeneration if seq2seq else AutoModelForCausalLM
    model = (kind(config) if seq2seq else kind.from_config(config)).double().eval()
    ids = torch.randint(3, V, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def generated(model: Any) -> torch.Tensor:
        return torch.stack(model.generate(ids, **options).logits)

    base = generated(model)
    deltas = (*ALL[:3], BitFit()) if family == "gpt2" else ALL[:3]
    tuned = move(attach(model, *deltas, StructuredSubspace(dimension=9) if seq2seq else LoRA(2)))
    controlled = generated(tuned)
    assert not torch.equal(controlled, base)
    with tuned.disable():
        assert torch.equal(generated(tuned), base)
    assert torch.equal(generated(tuned), controlled)


class TestMixedAttention:
    """A model whose parts have other attention implementations gets each of them back."""

    def mixed(self, build, family: str) -> Any:
        model: Any = copy.deepcopy(build(family, attention="sdpa"))
        if family == "bart":  # the encoder's own configuration
            encoder = model.get_encoder()
            own = copy.deepcopy(encoder.config)
            for module in encoder.modules():
                if getattr(module, "config", None) is encoder.config and module is not encoder:
                    module.config = own
            encoder.config = own
        else:  # that of the last layer alone
            last = [m for m in model.modules() if type(m).__name__.endswith("SelfAttention")][-1]
            last.config = own = copy.deepcopy(last.config)
        own._attn_implementation = "eager"
        return model

    @pytest.mark.parametrize("family", ["bert", "bart"])
    def test_each_part_has_its_own_back(self, build, family):
        model = self.mixed(build, family)
        batch, before = batch_of(model), snapshot(model)
        assert {"eager", "sdpa"} <= set(before["attention"])
        base = out(model, batch).detach()
        tuned = move(attach(model, PrefixTuning(length=2, init_std=1.0)))
        assert not any(name in ("eager", "sdpa") for name in snapshot(model)["attention"])
        controlled = out(tuned, batch).detach()
        with tuned.disable():
            assert snapshot(model)["attention"] == before["attention"]
            assert torch.equal(out(model, batch), base)
        assert torch.equal(out(tuned, batch), controlled)
        tuned.detach()
        assert_same(before, snapshot(model))
        assert torch.equal(out(model, batch), base)

    @pytest.mark.parametrize("family", ["bert", "bart"])
    def test_a_prefix_acts_as_on_one_implementation(self, build, family):
        """Which computes the same function, so that the outputs agree up to rounding."""
        same, mixed = copy.deepcopy(build(family, attention="sdpa")), self.mixed(build, family)
        batch = batch_of(same)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        found = [
            out(move(attach(m, PrefixTuning(length=2, init_std=1.0))), batch) for m in (same, mixed)
        ]
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)

    def test_a_layer_without_masks_is_refused(self, build):
        model: Any = self.mixed(build, "bert")
        before = snapshot(model)
        last = [m for m in model.modules() if type(m).__name__.endswith("SelfAttention")][-1]
        last.config._attn_implementation_internal = "flex_attention"
        with pytest.raises(InputError, match="eager and sdpa, not 'flex_attention'"):
            attach(model, PrefixTuning(length=2))
        last.config._attn_implementation_internal = "eager"
        assert_same(before, snapshot(model))
