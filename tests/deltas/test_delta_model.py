"""What a user sees of a model with deltas: a table, and the face of the base."""

import inspect
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltacontrol.deltas import BitFit, DeltaModel, HeadTuning, LoRA, PrefixTuning, attach
from deltacontrol.deltas.summary import SHARE
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, H, L, batch_of, d, m, move, out


class TestSummary:
    def test_it_has_one_row_for_every_delta_and_a_total(self, build):
        family = FAMILIES["bert"]
        tuned = attach(build("bert"), LoRA(rank=3), LoRA(rank=1, sites=("mlp.down",)), HeadTuning())
        table = tuned.summary()
        assert list(table["delta"]) == ["lora", "lora_2", "head", "total"]
        assert list(table["category"]) == ["reparametrisation"] * 2 + ["specification", ""]
        assert list(table["sites"]) == [2 * L, L, 1, 3 * L + 1]
        counts = [L * 2 * 3 * (d + d), L * (m + d), family.head]
        assert list(table["parameters"]) == [*counts, sum(counts)]
        for share, count in zip(table[SHARE], [*counts, sum(counts)], strict=True):
            assert share == pytest.approx(100 * count / family.total, rel=1e-15)
        tuned.detach()

    def test_it_prints_short(self, build):
        tuned = attach(build("bert"), LoRA(rank=3), PrefixTuning(length=H))
        text = repr(tuned)
        assert text.startswith("DeltaModel of BertForSequenceClassification (22,818 parameters, fr")
        assert len(text.splitlines()) == 5 and len(text) < 500
        html: Any = tuned._repr_html_()
        assert html.count("<tr") == 4 and "prefix" in html
        tuned.detach()
        assert "detached" in repr(tuned).splitlines()[0]


class TestFace:
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5-seq2seq"])
    def test_it_has_the_signature_of_the_base(self, build, family):
        model = build(family)
        tuned = attach(model, LoRA(rank=2))
        assert isinstance(tuned, DeltaModel)
        ours, theirs = inspect.signature(tuned.forward), inspect.signature(model.forward)
        assert list(ours.parameters) == list(theirs.parameters) and "input_ids" in ours.parameters
        assert torch.equal(out(tuned, batch_of(model)), out(model, batch_of(model)))
        tuned.detach()
        with pytest.raises(InputError, match="were detached"):
            tuned(**batch_of(model))

    def test_what_it_does_not_define_is_the_bases(self, build):
        model = build("bert")
        tuned = attach(model, LoRA(rank=2))
        assert tuned.config is model.config
        assert (tuned.device, tuned.dtype) == (torch.device("cpu"), torch.float64)
        assert tuned.main_input_name == "input_ids"
        assert tuned.get_input_embeddings() is model.get_input_embeddings()
        with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
            tuned.no_such_thing  # noqa: B018
        with pytest.raises(InputError, match="BertForSequenceClassification does not generate"):
            tuned.generate(torch.tensor([[3]]))
        tuned.detach()

    def test_it_generates_and_checkpoints_under_control(self):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(FAMILIES["gpt2"].config()).double()
        ids = torch.tensor([[5, 6, 7]])
        tuned = move(attach(model.eval(), LoRA(rank=2), BitFit()))
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        tokens = ids
        for _ in range(4):
            logits = tuned(tokens).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(tuned.generate(ids, **options), tokens)

        def gradients() -> list[torch.Tensor]:
            loss = tuned.train()(ids, labels=ids, use_cache=False).loss
            return list(torch.autograd.grad(loss, list(tuned.trainable().values())))

        torch.manual_seed(1)
        plain = gradients()
        tuned.gradient_checkpointing_enable()
        assert model.is_activation_checkpointing
        torch.manual_seed(1)
        for ours, theirs in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        tuned.gradient_checkpointing_disable()
        assert not model.is_activation_checkpointing

    def test_its_state_is_that_of_the_controls(self, build):
        model = build("bert")
        names = list(model.state_dict())
        tuned = move(attach(model, LoRA(rank=2), HeadTuning()))
        assert list(model.state_dict()) == names
        state = tuned.state_dict()
        assert list(state) == [f"controls.{name}" for name in tuned.state()]
        wrapper = torch.nn.Sequential(tuned)
        assert list(wrapper.state_dict()) == [f"0.{name}" for name in state]
        kept = {name: value.clone() for name, value in state.items()}
        move(tuned)
        tuned.load_state_dict(kept)
        assert all(torch.equal(value, kept[name]) for name, value in tuned.state_dict().items())
        kept.popitem()
        for strict in (True, False):
            with pytest.raises(InputError, match="1 missing"):
                tuned.load_state_dict(kept, strict=strict)
        tuned.detach()
