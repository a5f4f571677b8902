"""Several deltas at once, and what happens to a controlled model in its life."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from deltacontrol.deltas import (
    BitFit,
    DeltaModel,
    FullFineTuning,
    HeadTuning,
    HoulsbyAdapter,
    LastLayers,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Subspace,
    attach,
)
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import (
    FAMILIES,
    METHODS,
    REFUSED,
    V,
    assert_same,
    attached,
    batch_of,
    d,
    each_family,
    gradients,
    move,
    one_of_a_kind,
    out,
    snapshot,
)

Build = Callable[..., PreTrainedModel]


def fill(controlled: DeltaModel, namespace: str, values: dict[str, torch.Tensor]) -> None:
    """Give a delta the values of another one of its kind."""
    with torch.no_grad():
        for name, parameter in controlled.trainable().items():
            first, _, rest = name.partition(".")
            if first == namespace:
                parameter.copy_(values[rest])


def values_of(model: PreTrainedModel, delta, seed: int) -> dict[str, torch.Tensor]:
    controlled = move(attach(model, delta, seed=seed), seed=seed)
    state = {k.partition(".")[2]: v for k, v in controlled.state().items()}
    controlled.detach()
    return state


class TestComposition:
    @pytest.mark.parametrize("family", each_family("lora", "houlsby"))
    def test_many_deltas_start_at_the_base_and_leave_no_trace(self, build: Build, family):
        model = build(family, attention="sdpa")
        batch = batch_of(model)
        with torch.no_grad():  # T5's sdpa kernel depends on whether its bias needs a gradient
            outputs = out(model, batch)
        deltas = [LoRA(rank=2), HoulsbyAdapter(bottleneck=3), LoRA(rank=1, sites=("mlp.down",))]
        more = (BitFit(), HeadTuning())
        deltas += [delta for delta in more if (family, delta.name) not in REFUSED]
        controlled = attach(model, *deltas)
        with torch.no_grad():
            assert torch.equal(out(controlled, batch), outputs)
        assert controlled.deltas == tuple(deltas)
        assert [a.namespace for a in controlled.attachments][:3] == ["lora", "houlsby", "lora_2"]
        assert controlled.num_trainable == sum(a.num_parameters for a in controlled.attachments)
        grads = gradients(out(move(controlled), batch).sum(), controlled.trainable().values())
        assert all(bool(g.isfinite().all()) for g in grads)
        controlled.detach()
        with torch.no_grad():
            assert torch.equal(out(model, batch), outputs)

    @pytest.mark.parametrize("method", one_of_a_kind(METHODS))
    @pytest.mark.one_in(4)
    def test_any_two_in_any_order_act_together_or_are_refused(self, build, method):
        """And leave no trace, whichever was attached before."""
        model = build("gpt2")
        batch, before = batch_of(model), snapshot(model)
        delta, names = METHODS[method][0], list(METHODS)
        refused = 0
        for step in (1, 5, 11):
            other = METHODS[names[(names.index(method) + step) % len(names)]][0]
            for pair in ((delta, other), (other, delta)):
                try:
                    controlled = attached(model, *pair)
                except InputError as error:
                    assert "is controlled by two deltas" in str(error)
                    refused += 1
                    assert_same(before, snapshot(model))
                    continue
                assert controlled.deltas == pair
                outputs = out(move(controlled), batch)
                grads = gradients(outputs.square().sum(), controlled.trainable().values())
                spaces = [a.namespace for a in controlled.attachments]
                for space in spaces:
                    own = zip(controlled.trainable(), grads, strict=True)
                    assert any(bool(g.any()) for n, g in own if n.startswith(space + "."))
                controlled.detach()
                assert_same(before, snapshot(model))
        assert refused < 6, "acts with some others"

    def test_lora_and_bitfit_add_up(self, build):
        model = build("bert")
        module = model.bert.encoder.layer[0].attention.self.query
        x = torch.randn(3, d, dtype=torch.float64)
        controlled = move(attach(model, LoRA(rank=2, alpha=2.0), BitFit()))
        prefix = "lora.bert.encoder.layer.0.attention.self.query"
        a, b = controlled.trainable()[f"{prefix}.A"], controlled.trainable()[f"{prefix}.B"]
        bias = controlled.trainable()["bitfit.bert.encoder.layer.0.attention.self.query.bias"]
        expected = x @ module.weight.T + bias + x @ a.T @ b.T
        torch.testing.assert_close(module(x), expected, rtol=1e-13, atol=1e-13)
        controlled.detach()

    def test_two_loras_are_the_sum_of_their_paths(self, build):
        model = build("gpt2")
        block = model.transformer.h[0]
        x = torch.randn(3, d, dtype=torch.float64)
        before = block.attn.c_attn(x)
        one, two = values_of(model, LoRA(rank=2), 1), values_of(model, LoRA(rank=3), 2)
        changes = []
        for delta, values in ((LoRA(rank=2), one), (LoRA(rank=3), two)):
            controlled = attach(model, delta)
            fill(controlled, "lora", values)
            changes.append(block.attn.c_attn(x) - before)
            controlled.detach()
        controlled = attach(model, LoRA(rank=2), LoRA(rank=3))
        fill(controlled, "lora", one)
        fill(controlled, "lora_2", two)
        both = block.attn.c_attn(x) - before
        torch.testing.assert_close(both, sum(changes), rtol=1e-12, atol=1e-12)
        controlled.detach()

    def test_the_order_counts_at_one_site(self, build):
        model = build("bert")
        module = model.bert.encoder.layer[0].output.dense
        x = torch.randn(3, module.in_features, dtype=torch.float64)
        before = module(x)
        lora, houlsby = LoRA(rank=2, sites=("mlp.down",)), HoulsbyAdapter(bottleneck=3)
        path, adapter = values_of(model, lora, 1), values_of(model, houlsby, 2)

        def run(*deltas):
            controlled = attach(model, *deltas)
            fill(controlled, "lora", path)
            fill(controlled, "houlsby", adapter)
            result = module(x).detach()
            phi = controlled.controls.get_submodule("houlsby.bert.encoder.layer.0.output.dense") \
                if houlsby in deltas else None  # fmt: skip
            controlled.detach()
            return result, phi

        added = run(lora)[0] - before
        _, phi = run(houlsby)
        torch.testing.assert_close(run(lora, houlsby)[0], phi((x,), before + added))
        torch.testing.assert_close(run(houlsby, lora)[0], phi((x,), before) + added)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
    @pytest.mark.parametrize("kind", [PrefixTuning, PromptTuning])
    def test_two_short_ones_are_a_long_one(self, build, family, attention, kind):
        """Prefixes have no order; the second prompt stands in front of the first."""
        model = build(family, attention=attention)
        batch = batch_of(model)
        one, two = values_of(model, kind(length=2), 1), values_of(model, kind(length=3), 2)
        controlled = attach(model, kind(length=2), kind(length=3))
        fill(controlled, kind.name, one)
        fill(controlled, f"{kind.name}_2", two)
        found = out(controlled, batch)
        controlled.detach()
        controlled = attach(model, kind(length=5))
        fill(controlled, kind.name, {k: torch.cat([two[k], one[k]], dim=-2) for k in one})
        tolerance = max(1e-12, FAMILIES[family].tolerance)
        torch.testing.assert_close(found, out(controlled, batch), rtol=0, atol=tolerance)
        controlled.detach()

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    @pytest.mark.parametrize("other", [LoRA(rank=2, sites=("attention.key",)), PromptTuning(4)])
    def test_a_prefix_goes_with_other_deltas(self, build, family, other):
        """Both act, and both get gradients."""
        model = build(family)
        batch = batch_of(model)
        values = values_of(model, other, 1)
        controlled = attach(model, other)
        fill(controlled, other.name, values)
        alone = out(controlled, batch).detach()
        controlled.detach()
        controlled = attach(model, PrefixTuning(length=2, init_std=1.0), other)
        fill(controlled, other.name, values)
        assert float((out(controlled, batch) - alone).detach().abs().max()) > 1e-3
        grads = gradients(out(controlled, batch).sum(), controlled.trainable().values())
        assert all(bool(g.any()) for g in grads)
        controlled.detach()

    @pytest.mark.parametrize(
        ("deltas", "name"),
        [
            ((FullFineTuning(), HeadTuning()), r"classifier\.weight"),
            ((HeadTuning(), FullFineTuning()), r"classifier\.weight"),
            ((BitFit(), LastLayers()), r"layer\.1\.attention\.self\.query\.bias"),
            ((Subspace(dimension=5), BitFit()), r"embeddings\.LayerNorm\.bias"),
            ((BitFit(), Subspace(dimension=5)), r"embeddings\.LayerNorm\.bias"),
            ((Subspace(dimension=5), Subspace(dimension=5)), r"word_embeddings\.weight"),
        ],
        ids=lambda value: "+".join(x.name for x in value) if isinstance(value, tuple) else "",
    )
    def test_two_owners_of_a_parameter_are_refused(self, build, deltas, name):
        model = build("bert")
        before = snapshot(model)
        with pytest.raises(InputError, match=name + " is controlled by two deltas"):
            attach(model, *deltas)
        assert_same(before, snapshot(model))


class TestLife:
    def test_the_mode_is_the_bases_and_dropout_obeys_it(self, build):
        model = build("bert")
        batch = batch_of(model)
        for training in (True, False):
            controlled = move(attach(model.train(training), LoRA(rank=2, dropout=0.5)))
            assert controlled.training is training
            assert all(m.training is training for m in controlled.modules())
            assert torch.equal(out(controlled, batch), out(controlled, batch)) is not training
            model.eval()
            controlled.detach()
        controlled = move(attach(model, LoRA(rank=2, dropout=0.5)))
        torch.manual_seed(0)
        first = out(controlled.train(), batch)
        torch.manual_seed(0)
        assert torch.equal(out(controlled, batch), first)
        module = model.bert.encoder.layer[0].attention.self.query
        x = torch.randn(1, d, dtype=torch.float64)
        samples = module(x.expand(20_000, -1)).detach()
        error = samples.std(0) / 20_000**0.5
        controlled.eval()
        assert bool(((samples.mean(0) - module(x)).abs() < 5 * error).all()), "the mean is kept"
        controlled.detach()

    @pytest.mark.parametrize("delta", [LoRA(rank=2), Subspace(dimension=4)], ids=lambda v: v.name)
    def test_a_copy_is_refused(self, build, delta):
        controlled = attach(build("bert"), delta)
        with pytest.raises(InputError, match=r"copied.*detach.*load\(state"):
            copy.deepcopy(controlled)
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            pickle.dumps(controlled)
        controlled.detach()

    @pytest.mark.parametrize(
        "delta",
        [FullFineTuning(), BitFit(), LoRA(rank=2), PrefixTuning(2), Subspace(dimension=4)],
        ids=lambda delta: delta.name,
    )
    def test_the_model_may_change_its_dtype_meanwhile(self, build, delta):
        model = copy.deepcopy(build("bert", attention="sdpa"))
        expected = copy.deepcopy(model).to(torch.float32).state_dict()
        batch = batch_of(model)
        controlled = move(attach(model, delta))
        before = out(controlled, batch)
        controlled.to(torch.float32)
        after = out(controlled, batch)
        assert after.dtype == torch.float32
        torch.testing.assert_close(after.double(), before, rtol=1e-3, atol=1e-3)
        restored = controlled.detach().state_dict()
        for key, value in expected.items():
            assert restored[key].dtype == value.dtype and torch.equal(restored[key], value), key

    def test_coordinates_mean_nothing_under_another_projection(self, build):
        model = build("bert")
        controlled = move(attach(model, Subspace(dimension=4), seed=0))
        state = controlled.state()
        controlled.detach()
        for delta, seed in ((Subspace(dimension=4), 1), (Subspace(4, projection_seed=7), 0)):
            controlled = attach(model, delta, seed=seed)
            with pytest.raises(InputError, match=r"subspace\.z\.seed is \d+, but .*seed"):
                controlled.load(state)
            assert not bool(controlled.trainable()["subspace.z.z"].any())
            controlled.detach()

    def test_a_failing_pass_leaves_the_model_usable(self, build):
        model = build("bert")
        batch, theta = batch_of(model), {k: id(p) for k, p in model.named_parameters()}
        controlled = move(attach(model, Subspace(dimension=4), PrefixTuning(2), PromptTuning(2)))
        first, state = out(controlled, batch).detach(), controlled.state()
        second = out(move(controlled), batch).detach()
        for _ in range(2):
            with pytest.raises((IndexError, RuntimeError)):
                controlled(input_ids=torch.full((1, 3), V + 5))
        assert {k: id(p) for k, p in model.named_parameters()} == theta
        assert torch.equal(out(controlled, batch), second)
        controlled.load(state)
        assert torch.equal(out(controlled, batch), first)
        controlled.detach()

    def test_the_users_own_hooks_stay(self, build):
        model = copy.deepcopy(build("bert"))
        calls: list[nn.Module] = []
        site = model.bert.encoder.layer[0].attention.self.query
        site.register_forward_hook(lambda module, *_: calls.append(module))
        controlled = attach(model, LoRA(rank=2))
        site.register_forward_hook(lambda module, *_: calls.append(module))
        controlled.detach()
        model(**batch_of(model))
        assert len(calls) == 2

    def test_a_shared_configuration_is_refused_for_a_second_prefix(self):
        config = BertConfig(
            hidden_size=d, num_hidden_layers=1, num_attention_heads=4, intermediate_size=d
        )
        first, second = BertModel(config), BertModel(config)
        controlled = attach(first, PrefixTuning(length=2))
        with pytest.raises(InputError, match="shares its configuration object"):
            attach(second, PrefixTuning(length=2))
        controlled.detach()
        attach(second, PrefixTuning(length=2)).detach()

    def test_a_subspace_reaches_an_encoder_that_runs_alone(self):
        """As in generation."""
        torch.manual_seed(0)
        config = T5Config(
            d_model=d, num_layers=1, num_heads=4, d_ff=d, d_kv=8, vocab_size=V, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config).eval()
        ids = torch.randint(3, V, (2, 5))
        base = model.encoder(input_ids=ids)[0]
        controlled = move(attach(model, Subspace(dimension=4)), scale=10.0)
        inside = controlled(input_ids=ids, decoder_input_ids=ids[:, :1]).encoder_last_hidden_state
        assert torch.equal(model.encoder(input_ids=ids)[0], inside)
        assert float((inside - base).detach().abs().max()) > 1e-2
        controlled.detach()
        assert torch.equal(model.encoder(input_ids=ids)[0], base)

    def test_checkpointing_that_ended_leaves_no_values_behind(self, build):
        model = copy.deepcopy(build("bert"))
        batch, theta = batch_of(model), {k: id(p) for k, p in model.named_parameters()}
        controlled = move(attach(model, Subspace(dimension=4))).train()
        model.activation_checkpointing_enable()
        out(controlled, batch).sum().backward()
        model.activation_checkpointing_disable()
        out(controlled.eval(), batch)
        assert {k: id(p) for k, p in model.named_parameters()} == theta


def test_only_the_chosen_deltas_are_trained(build):
    model = build("bert")
    controlled = attach(model, LoRA(rank=2), BitFit())
    controlled.train_only(["bitfit"])
    assert controlled.trainable()
    assert all(name.startswith("bitfit.") for name in controlled.trainable())
    count = controlled.num_trainable
    controlled.train_only(None)
    assert sum(p.numel() for p in controlled.trainable().values()) == count
    with pytest.raises(InputError, match=r"lorra.*lora"):
        controlled.train_only(["lorra"])
    with pytest.raises(InputError, match="nothing is left"):
        controlled.train_only([])
    controlled.detach()
