"""Each delta against its formula, evaluated densely by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertForSequenceClassification, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltacontrol.deltas import (
    BitFit,
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
from deltacontrol.theory.dimension.projections import DenseProjection, FastfoodProjection
from tests.deltas.zoo import FAMILIES, TEXT, H, V, batch_of, d, each_family, m, move, out

Build = Callable[..., PreTrainedModel]
ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")
# Heads of keys, where query, key and value of each lie side by side.
GROUPS = {"gpt_neox": H, "bloom": H, "falcon": H // 2, "falcon-alibi": H}
EVERY_MAP = (*ATTENTION, "mlp.up", "mlp.down")


class TestLoRA:
    @pytest.mark.parametrize("family", each_family("lora", "selected-modules"))
    def test_equals_the_merged_weights(self, build: Build, family):
        model = build(family)
        merged = copy.deepcopy(model)
        delta = LoRA(rank=3, alpha=5.0, sites=EVERY_MAP)
        controlled = move(attach(model, delta))
        state = controlled.state()
        assert len(state) == 2 * FAMILIES[family].layers * len(EVERY_MAP)
        with torch.no_grad():
            for key in (k for k in state if k.endswith(".A")):
                change = (5.0 / 3) * state[key[:-1] + "B"] @ state[key]
                path, part = key.removeprefix("lora.").removesuffix(".A"), slice(None)
                if path.rpartition(".")[2][0].isdigit():  # a slice of a fused matrix
                    path, _, columns = path.rpartition(".")
                    part = torch.arange(*map(int, columns.split("-")))
                    if family in GROUPS:  # of every head of keys
                        rows = len(merged.get_submodule(path).weight) // GROUPS[family]
                        part = (torch.arange(GROUPS[family])[:, None] * rows + part).flatten()
                module = merged.get_submodule(path)
                if isinstance(module, torch.nn.Linear):
                    module.weight[part] += change
                else:
                    module.weight[:, part] += change.T
        batch = batch_of(model)
        torch.testing.assert_close(
            out(controlled, batch), out(merged, batch), rtol=0, atol=FAMILIES[family].tolerance
        )
        controlled.detach()

    def test_changes_only_query_and_value_of_a_fused_matrix(self, build):
        model = build("gpt2")
        fused = model.transformer.h[0].attn.c_attn
        state = torch.randn(2, 5, d, dtype=torch.float64)
        before = fused(state)
        controlled = move(attach(model, LoRA(rank=2)))
        query, key, value = (fused(state) - before).split(d, dim=-1)
        assert query.abs().min() > 0 and value.abs().min() > 0
        assert torch.equal(key, torch.zeros_like(key))
        controlled.detach()

    def test_is_linear_in_each_factor_and_scaled_by_alpha(self, build):
        model = build("bert")
        module = model.bert.encoder.layer[1].attention.self.value
        state = torch.randn(4, d, dtype=torch.float64)
        before = module(state)
        changes = []
        for alpha in (1.0, 3.0):
            controlled = move(attach(model, LoRA(rank=2, alpha=alpha)))
            changes.append(module(state) - before)
            controlled.detach()
        torch.testing.assert_close(changes[1], 3 * changes[0], rtol=1e-12, atol=1e-13)

    def test_acts_in_the_given_layers_only(self, build):
        model = build("llama")
        controlled = attach(model, LoRA(rank=2, layers=(1,)))
        assert {name.split(".")[3] for name in controlled.trainable()} == {"1"}
        controlled.detach()


class TestHoulsby:
    @pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
    def test_equals_the_bottleneck_by_hand(self, build, activation):
        model = build("bert")
        block = model.bert.encoder.layer[0]
        inputs = {block.attention.output.dense: d, block.output.dense: m}
        states = {k: torch.randn(3, width, dtype=torch.float64) for k, width in inputs.items()}
        before = {module: module(x) for module, x in states.items()}
        delta = HoulsbyAdapter(bottleneck=4, activation=activation)
        controlled = move(attach(model, delta), scale=0.5)
        phi = getattr(torch.nn.functional, activation)
        paths = ("attention.output.dense", "output.dense")
        for (module, h), path in zip(before.items(), paths, strict=True):
            u = {
                k: controlled.trainable()[f"houlsby.bert.encoder.layer.0.{path}.{k}"]
                for k in ("down", "down_bias", "up", "up_bias")
            }
            expected = h + phi(h @ u["down"].T + u["down_bias"]) @ u["up"].T + u["up_bias"]
            torch.testing.assert_close(module(states[module]), expected, rtol=1e-13, atol=1e-13)
        controlled.detach()


def _attend(q, k, v, mask, scale) -> tuple[Tensor, Tensor]:
    """softmax(q k'/scale + mask) v, and the softmax."""
    scores = (q @ k.mT) * scale + mask
    weights = scores.softmax(-1)
    return weights @ v, weights


def _projected(family: str, module, h: Tensor, model) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of shape (batch, heads, tokens, head width), keys not repeated."""
    if family == "bert":
        maps = [module.query(h), module.key(h), module.value(h)]
    elif family == "gpt2":
        maps = list(module.c_attn(h).split(d, dim=-1))
    else:
        maps = [module.q_proj(h), module.k_proj(h), module.v_proj(h)]
    q, k, v = (x.unflatten(-1, (-1, d // H)).transpose(1, 2) for x in maps)
    if family == "llama":
        cos, sin = model.model.rotary_emb(h, torch.arange(h.shape[1])[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q, k, v


class TestPrefix:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_equals_attention_to_more_keys_and_the_gated_form(self, build, family, attention):
        """Li & Liang's Eq. 3 and He et al.'s Eq. 7, in one attention layer."""
        model = build(family, attention=attention)
        delta = PrefixTuning(length=3, init_std=1.0, layers=(0,))
        controlled = attach(model, delta)
        module = controlled.host.find(("attention",), (0,))[0].module
        h = torch.randn(2, 6, d, dtype=torch.float64)
        q, k, v = _projected(family, module, h, model)
        keys, values = controlled.trainable().values()
        groups = q.shape[1] // k.shape[1]
        assert groups == (2 if family == "llama" else 1)
        k, v, pk, pv = (x.repeat_interleave(groups, -3) for x in (k, v, keys, values))
        pk, pv = pk.expand(2, -1, -1, -1), pv.expand(2, -1, -1, -1)
        hidden = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
        mask = hidden if family != "bert" else torch.zeros(6, 6, dtype=torch.float64)
        visible = torch.cat([torch.zeros(6, 3, dtype=torch.float64), mask], dim=1)
        scale = (d // H) ** -0.5
        expected, weights = _attend(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), visible, scale)
        gate = weights[..., :3].sum(-1, keepdim=True)
        own, _ = _attend(q, k, v, mask, scale)
        other, _ = _attend(q, pk, pv, torch.zeros((), dtype=torch.float64), scale)
        torch.testing.assert_close((1 - gate) * own + gate * other, expected, rtol=0, atol=1e-12)

        seen: list[Tensor] = []
        output = controlled.host.find(("attention.output",), (0,))[0].module
        handle = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        given = None if attention == "sdpa" else mask[None, None].clamp_min(-1e300)
        more = {}
        if family == "llama":
            more["position_embeddings"] = model.model.rotary_emb(h, torch.arange(6)[None])
        result = module(h, attention_mask=given, **more)
        handle.remove()
        found = result[0] if family == "bert" else seen[0]
        # Llama's eager attention takes the softmax in float32.
        tolerance = 1e-6 if (family, attention) == ("llama", "eager") else 1e-12
        torch.testing.assert_close(
            found, expected.transpose(1, 2).flatten(2), rtol=0, atol=tolerance
        )
        controlled.detach()

    @pytest.mark.parametrize(
        "family", [*(f for f in TEXT if f != "mpnet"), "bart", "vit", "dinov2"]
    )
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_reaches_every_token(self, build, family, attention):
        """Also the first one of a causal model, with padding and without."""
        kind = "causal-lm" if family in ("gpt2", "opt", "llama") else "backbone"
        if family == "t5":
            kind = "classification"  # its encoder
        model = build(family, kind, attention=attention)
        controlled = attach(model, PrefixTuning(length=2, init_std=1.0, layers=(0,)))
        for pad in (0, 2):
            batch = batch_of(model, pad=pad)
            before = out(controlled, batch)
            with torch.no_grad():
                next(p for n, p in controlled.trainable().items() if "values" in n).add_(1.0)
            change = (out(controlled, batch) - before).abs().amax(-1)
            real = batch["attention_mask"].bool() if "attention_mask" in batch else ...
            assert bool((change[real] > 1e-3).all())
        controlled.detach()


class TestPrompt:
    @pytest.mark.parametrize(
        ("family", "kind"),
        [(family, "backbone") for family in TEXT if family != "t5"]
        + [("t5", "classification")]  # its encoder
        + [(family, "causal-lm") for family in ("gpt2", "opt", "llama")]
        + [(family, "masked-lm") for family in ("bert", "mpnet", "distilbert", "electra")],
    )
    def test_equals_a_run_on_longer_embeddings(self, build, family, kind):
        model = build(family, kind)
        batch = batch_of(model)
        embedding = model.get_input_embeddings()
        controlled = attach(model, PromptTuning(length=3))
        (rows,) = controlled.trainable().values()
        start = embedding(torch.arange(V))
        assert all(bool((start == row).all(-1).any()) for row in rows), "starts in the vocabulary"
        move(controlled)
        found = controlled(**batch)
        prompt = rows.detach()
        controlled.detach()
        text = embedding(batch["input_ids"])
        longer = torch.cat([prompt.expand(3, -1, -1), text], dim=1)
        mask = torch.cat([torch.ones(3, 3, dtype=torch.long), batch["attention_mask"]], dim=1)
        expected = model(inputs_embeds=longer, attention_mask=mask)[0][:, 3:]
        assert found[0].shape == expected.shape
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(found[0][real], expected[real], rtol=0, atol=1e-12)
        if getattr(model, "pooler", None) is not None:
            torch.testing.assert_close(found.pooler_output, model.pooler(expected))

    @pytest.mark.parametrize(
        ("family", "kind"), [("bart", "backbone"), ("t5-seq2seq", "classification")]
    )
    def test_enters_the_encoder_of_an_encoder_decoder(self, build, family, kind):
        """The decoder sees the text's own states, which have seen the prompt."""
        model = build(family, kind)
        batch = batch_of(model)
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
        controlled = move(attach(model, PromptTuning(length=3)))
        (rows,) = (row.detach() for row in controlled.trainable().values())
        found = out(controlled, batch).detach()
        controlled.detach()
        text = model.get_input_embeddings()(batch["input_ids"])
        longer = torch.cat([rows.expand(3, -1, -1), text], dim=1)
        mask = torch.cat([torch.ones(3, 3, dtype=torch.long), batch["attention_mask"]], dim=1)
        states = model.get_encoder()(inputs_embeds=longer, attention_mask=mask)[0][:, 3:]
        expected = model(
            encoder_outputs=(states,),
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
        )[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[family].tolerance)

    def test_leaves_once_where_all_layers_are_one(self):
        """ALBERT runs the same block again and again, and takes its first token before pooling."""
        torch.manual_seed(0)
        config = AlbertConfig(
            hidden_size=d, embedding_size=d, num_hidden_layers=3, num_attention_heads=H,
            intermediate_size=m, vocab_size=V, num_labels=2,
        )  # fmt: skip
        model = AlbertForSequenceClassification(config).double().eval()
        ids = batch_of(model, pad=0)["input_ids"]
        controlled = move(attach(model, PromptTuning(length=3)))
        (rows,) = controlled.trainable().values()
        found = controlled(input_ids=ids).logits
        controlled.detach()
        longer = torch.cat([rows.expand(3, -1, -1), model.get_input_embeddings()(ids)], dim=1)
        first = model.albert(inputs_embeds=longer)[0][:, 3]
        expected = model.classifier(model.albert.pooler_activation(model.albert.pooler(first)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
    def test_heads_see_the_texts_own_positions(self, build, family):
        model = build(family)
        batch = batch_of(model)
        controlled = move(attach(model, PromptTuning(length=3)))
        found = out(controlled, batch).detach()
        with torch.no_grad():
            states = controlled.model.base_model(**batch)[0]
        controlled.detach()
        if family == "bert":
            expected = model.classifier(model.bert.pooler(states))
        elif family == "roberta":
            expected = model.classifier(states)
        else:
            last = batch["attention_mask"].sum(-1) - 1
            expected = model.score(states[torch.arange(3), last])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "opt"])
    def test_given_positions_count_behind_the_prompt(self, build, family):
        model = build(family)
        controlled = move(attach(model, PromptTuning(length=3)))
        batch = batch_of(model, pad=0)
        first = 2 if family == "roberta" else 0  # RoBERTa counts from behind its padding index
        given = torch.arange(first, first + 7)[None]
        assert torch.equal(out(controlled, batch, position_ids=given), out(controlled, batch))
        controlled.detach()


class TestSpecification:
    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    @pytest.mark.parametrize(
        "delta",
        [
            BitFit(),
            BitFit(sites=("mlp.up", "norm")),
            FullFineTuning(),
            HeadTuning(),
            LastLayers(num_layers=2),
        ],
        ids=lambda delta: delta.name,
    )
    def test_equals_the_model_with_those_parameters(self, build, family, delta):
        model = build(family)
        written = copy.deepcopy(model)
        controlled = move(attach(model, delta))
        prefix = controlled.attachments[0].namespace + "."
        values = {k.removeprefix(prefix): v for k, v in controlled.state().items()}
        outcome = written.load_state_dict(values, strict=False)
        assert not outcome.unexpected_keys
        if isinstance(delta, BitFit):
            assert all(name.endswith(".bias") for name in values)
        batch = batch_of(model)
        assert torch.equal(out(controlled, batch), out(written, batch))
        controlled.detach()

    def test_bitfit_adds_a_constant_to_the_state(self, build):
        model = build("bert")
        module = model.bert.encoder.layer[0].intermediate.dense
        state = torch.randn(3, d, dtype=torch.float64)
        before, bias = module(state), module.bias.detach().clone()
        controlled = move(attach(model, BitFit(sites=("mlp.up",))))
        change = module.bias - bias
        torch.testing.assert_close(module(state) - before, change.expand(3, -1))
        controlled.detach()


class TestSubspace:
    @pytest.mark.parametrize("projection", [DenseProjection, FastfoodProjection])
    @pytest.mark.parametrize(
        ("family", "kind"), [("bert", "classification"), ("gpt2", "causal-lm")]
    )
    def test_moves_all_parameters_by_a_projection(self, build, family, kind, projection):
        """GPT-2's embedding is its language-model head as well, and is moved once."""
        model = build(family, kind)
        written = copy.deepcopy(model)
        name = {DenseProjection: "dense", FastfoodProjection: "fastfood"}[projection]
        delta = Subspace(dimension=9, projection=name, projection_seed=5)
        controlled = move(attach(model, delta), scale=20.0)
        parameters = list(written.parameters())
        sizes = [p.numel() for p in parameters]
        matrix = projection(sum(sizes), 9, seed=5, dtype=torch.float64).dense()
        moves = (matrix @ controlled.trainable()["subspace.z.z"].detach()).split(sizes)
        batch = batch_of(model)
        before = out(written, batch)
        with torch.no_grad():
            for parameter, change in zip(parameters, moves, strict=True):
                parameter += change.view_as(parameter)
        found = out(controlled, batch)
        assert float((found - before).detach().abs().max()) > 0.1
        torch.testing.assert_close(found, out(written, batch), rtol=1e-11, atol=1e-12)
        controlled.detach()
