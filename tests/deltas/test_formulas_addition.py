"""Addition-based and combined deltas against their papers' formulas, evaluated by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    IA3,
    AdapterDrop,
    AttentionControl,
    BitFit,
    Compacter,
    Delta,
    DeltaModel,
    HoulsbyAdapter,
    LadderSideTuning,
    LoRA,
    LowRankAdapter,
    MixAndMatch,
    MixtureOfControl,
    ParallelAdapter,
    PfeifferAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    StateBasedTuning,
    UniPELT,
    attach,
)
from deltacontrol.deltas.methods.ia3 import Gain
from tests.deltas.zoo import FAMILIES, H, L, assert_same, batch_of, d, m, move, out, snapshot

Build = Callable[..., PreTrainedModel]
CAUSAL = ("gpt2", "opt", "llama", "gpt_neox", "qwen3", "gemma3")
SMALL = ["bert", "distilbert", "mpnet", "gpt2", "opt", "llama", "t5", "vit"]
SPANS = {"attention": ("attention.query", "attention.output"), "mlp": ("mlp.up", "mlp.down")}


def controls(controlled: DeltaModel, path: str) -> dict[str, Tensor]:
    """The controls under a path, by the rest of their names."""
    prefix = f"{controlled.attachments[0].namespace}.{path}."
    found = controlled.trainable().items()
    return {k.removeprefix(prefix): v.detach() for k, v in found if k.startswith(prefix)}


def seen_by(model: nn.Module, entry: nn.Module, end: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """The first input of one module and the last output of another in a pass."""
    states: list[Tensor] = []
    outputs: list[Tensor] = []
    first = entry.register_forward_pre_hook(
        lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    last = end.register_forward_hook(
        lambda _, args, o: outputs.append(o if isinstance(o, Tensor) else o[0])
    )
    with torch.no_grad():
        model(**batch)
    first.remove()
    last.remove()
    return states[0], outputs[-1]


def around(build: Build, family: str, delta: Delta, kind: str, attention: str = "eager"):
    """Input h and output y of a span of the first block, y under control, and the controls."""
    model = build(family, attention=attention)
    batch = batch_of(model)
    entry, end = SPANS.get(kind, ("block", "block"))
    controlled = move(attach(model, delta))
    first, last = (controlled.host.find((name,), (0,))[0] for name in (entry, end))
    values = controls(controlled, last.path)
    _, found = seen_by(controlled, first.module, last.module, batch)
    controlled.detach()
    state, output = seen_by(model, first.module, last.module, batch)
    return state, output, found, values, batch


class TestSequential:
    def outcome(self, build, delta: Delta):
        """Input and output of BERT's first mlp.down, and of the delta there, and the controls."""
        model = build("bert")
        module = model.bert.encoder.layer[0].output.dense
        x = torch.randn(3, m, dtype=torch.float64)
        before = module(x).detach()
        controlled = move(attach(model, delta), scale=0.5)
        found, values = (
            module(x).detach(),
            controls(controlled, "bert.encoder.layer.0.output.dense"),
        )
        shared = controlled.state()
        controlled.detach()
        return before, found, values, shared

    def test_pfeiffer(self, build):
        h, found, u, _ = self.outcome(build, PfeifferAdapter(bottleneck=4))
        inner = relu(h @ u["down"].T + u["down_bias"])
        expected = h + inner @ u["up"].T + u["up_bias"]
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)

    def test_pfeiffer_is_houlsby_after_the_mlp_alone(self, build):
        model, batch = build("gpt2"), batch_of(build("gpt2"))
        one = move(attach(model, PfeifferAdapter(bottleneck=4)))
        expected, values = out(one, batch), list(one.state().values())
        one.detach()
        other = attach(model, HoulsbyAdapter(4, "relu", sites=("mlp.down",)))
        other.load(dict(zip(other.state(), values, strict=True)))
        assert torch.equal(out(other, batch), expected)
        other.detach()

    def test_low_rank(self, build):
        h, found, u, _ = self.outcome(build, LowRankAdapter(bottleneck=6, rank=2))
        down, up = u["down_out"] @ u["down_in"], u["up_out"] @ u["up_in"]
        assert torch.linalg.matrix_rank(down) == torch.linalg.matrix_rank(up) == 2
        inner = gelu(h @ down.T + u["down_bias"])
        torch.testing.assert_close(found, h + inner @ up.T + u["up_bias"], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("terms", "rank"), [(4, 1), (2, 3)])
    def test_compacter(self, build, terms, rank):
        delta = Compacter(bottleneck=8, num_terms=terms, rank=rank)
        h, found, u, state = self.outcome(build, delta)
        rule = state["compacter.rule.A"]
        assert rule.shape == (terms, terms, terms)

        def matrix(s: Tensor, t: Tensor) -> Tensor:
            return sum(torch.kron(rule[i], s[i] @ t[i]) for i in range(terms))  # type: ignore[return-value]

        down, up = matrix(u["down_s"], u["down_t"]), matrix(u["up_s"], u["up_t"])
        assert down.shape == (8, d) and up.shape == (d, 8)
        inner = gelu(h @ down.T + u["down_bias"])
        torch.testing.assert_close(found, h + inner @ up.T + u["up_bias"], rtol=1e-12, atol=1e-12)

    def test_compacter_shares_its_rule_among_all_adapters(self, build):
        model = build("bert")
        controlled = move(attach(model, Compacter(bottleneck=8)))
        rule = controlled.trainable()["compacter.rule.A"]
        sites = controlled.host.find(("attention.output", "mlp.down"))
        x = {s: torch.randn(2, s.in_features, dtype=torch.float64) for s in sites}
        before = [s.module(x[s]).detach() for s in sites]
        with torch.no_grad():
            rule.mul_(2)
        assert all(
            not torch.allclose(s.module(x[s]), y) for s, y in zip(sites, before, strict=True)
        )
        controlled.detach()


class TestAdapterDrop:
    def values(self, controlled: DeltaModel, state: dict[str, Tensor]) -> None:
        """Load the controls of another adapter delta, where there is a place for them."""
        names = {name: name.partition(".")[2] for name in controlled.state()}
        rest = {name.partition(".")[2]: value for name, value in state.items()}
        controlled.load({name: rest[key] for name, key in names.items()})

    def test_fixed_is_pfeiffer_in_the_later_blocks(self, build):
        model, batch = build("bert"), batch_of(build("bert"))
        controlled = move(attach(model, AdapterDrop(num_dropped=1, bottleneck=4)))
        found, state = out(controlled, batch), controlled.state()
        assert {name.split(".")[4] for name in state} == {"1"}
        controlled.detach()
        controlled = attach(model, PfeifferAdapter(bottleneck=4, layers=(1,)))
        self.values(controlled, state)
        assert torch.equal(out(controlled, batch), found)
        controlled.detach()

    def test_random_drops_anew_in_each_training_pass_and_as_told_afterwards(self, build):
        model, batch = build("bert"), batch_of(build("bert"))
        controlled = move(attach(model, AdapterDrop(1, random=True, bottleneck=4)))
        state = controlled.state()
        evaluated = out(controlled, batch)
        controlled.train()
        trained: dict[int, Tensor] = {}
        for seed in range(8):
            torch.manual_seed(seed)
            found = out(controlled, batch)
            torch.manual_seed(seed)
            dropped = int(torch.randint(L, ()))
            assert torch.equal(trained.setdefault(dropped, found), found)
        assert sorted(trained) == list(range(L))
        model.eval()
        controlled.detach()
        for dropped, found in {**trained, -1: evaluated}.items():
            layers = tuple(range(1 if dropped < 0 else dropped, L))
            controlled = attach(model, PfeifferAdapter(bottleneck=4, layers=layers))
            self.values(controlled, state)
            assert torch.equal(out(controlled, batch), found), dropped
            controlled.detach()


class TestIA3:
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_neox", "t5", "opt"])
    def test_equals_the_model_with_scaled_weights(self, build, family):
        """l_k and l_v scale rows of W_k and W_v and their biases, l_ff columns of W_2."""
        model = build(family)
        written, batch = copy.deepcopy(model), batch_of(model)
        controlled = move(attach(model, IA3()))
        for site in controlled.host.find(("attention.key", "attention.value")):
            gain = 1 + controlled.trainable()[f"ia3.{site.key}.u"].detach()
            module = written.get_submodule(site.path)
            rows = torch.ones(site.total_out_features, dtype=torch.float64)
            rows += site.spread(gain - 1)
            with torch.no_grad():
                is_linear = isinstance(module, nn.Linear)
                module.weight.mul_(rows[:, None] if is_linear else rows)
                if getattr(module, "bias", None) is not None:
                    module.bias.mul_(rows)
        for site in controlled.host.find(("mlp.down",)):
            gain = 1 + controlled.trainable()[f"ia3.{site.path}.u"].detach()
            module = written.get_submodule(site.path)
            with torch.no_grad():
                module.weight.mul_(gain if isinstance(module, nn.Linear) else gain[:, None])
        tolerance = FAMILIES[family].tolerance
        expected = out(written, batch)
        torch.testing.assert_close(out(controlled, batch), expected, rtol=0, atol=tolerance)
        controlled.detach()

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_neox"])
    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
    def test_merges_in_any_order_with_others_at_its_sites(self, build, family, order):
        model = copy.deepcopy(build(family))
        sites = ("attention.key", "mlp.down")
        other = (
            LoRA(rank=2, sites=("mlp.down",)) if family == "llama" else BitFit(sites=("mlp.down",))
        )
        deltas = [IA3(), LoRA(rank=2, sites=sites), other]
        batch = batch_of(model)
        controlled = move(attach(model, *(deltas[i] for i in order)))
        expected = out(controlled, batch).detach()
        merged = controlled.merge()
        tolerance = max(1e-11, FAMILIES[family].tolerance)
        torch.testing.assert_close(out(merged, batch), expected, rtol=0, atol=tolerance)


class TestParallel:
    @pytest.mark.parametrize("family", SMALL)
    @pytest.mark.parametrize("kind", ["attention", "mlp"])
    def test_adapter(self, build, family, kind):
        delta = ParallelAdapter(bottleneck=4, scale=3.0, sites=(kind,))
        h, y, found, u, _ = around(build, family, delta, kind)
        expected = y + 3.0 * relu(h @ u["down"].T) @ u["up"].T
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert float((found - y).abs().max()) > 1e-2

    @pytest.mark.parametrize("family", SMALL)
    @pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
    def test_state_based(self, build, family, kind):
        delta = StateBasedTuning(rank=3, scale=0.7, around=kind)
        h, y, found, u, _ = around(build, family, delta, kind)
        expected = y + 0.7 * h @ u["down"].T @ u["up"].T
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert float((found - y).abs().max()) > 1e-2

    def test_acts_on_the_input_of_the_sub_layer_and_before_the_residual(self, build):
        """Written out for BERT's MLP, which is two maps of the block and no module."""
        model = build("bert")
        block = model.bert.encoder.layer[0]
        x = torch.randn(2, 5, d, dtype=torch.float64)
        controlled = move(attach(model, ParallelAdapter(bottleneck=4)))
        found, u = block(x), controls(controlled, "bert.encoder.layer.0.output.dense")
        controlled.detach()
        h = block.attention(x)[0]
        inner = gelu(h @ block.intermediate.dense.weight.T + block.intermediate.dense.bias)
        mlp = inner @ block.output.dense.weight.T + block.output.dense.bias
        control = 4.0 * relu(h @ u["down"].T) @ u["up"].T
        expected = block.output.LayerNorm(mlp + control + h)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
    @pytest.mark.parametrize("family", ["bert", "opt", "llama"])
    def test_mixture(self, build, family, kind):
        delta = MixtureOfControl(num_controls=3, rank=2, scale=0.7, around=kind)
        h, y, found, u, _ = around(build, family, delta, kind)
        gains = (h @ u["G"].T).softmax(-1)
        expected = y.clone()
        for k in range(3):
            expected += 0.7 * gains[..., k : k + 1] * (h @ u["A"][k].T @ u["B"][k].T)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", [f for f in SMALL if f != "mpnet"])
    @pytest.mark.parametrize("kind", ["mlp", "block"])
    def test_attention_control(self, build, family, kind, attention):
        """Row by row over the tokens in sight: no padding, in causal models no later one."""
        delta = AttentionControl(rank=3, scale=0.7, around=kind)
        h, y, found, u, batch = around(build, family, delta, kind, attention)
        size = len(batch[next(iter(batch))])
        h, y, found = (x.reshape(size, -1, x.shape[-1]) for x in (h, y, found))
        real = batch.get("attention_mask", torch.ones(h.shape[:2])).bool()
        checked = 0
        for b, i in real.nonzero().tolist():
            allowed = real[b].clone()
            if family in CAUSAL:
                allowed[i + 1 :] = False
            z = h[b, allowed] @ u["down"].T @ u["up"].T
            own = h[b, i] @ u["down"].T @ u["up"].T
            control = own + (z @ own).softmax(0) @ z
            torch.testing.assert_close(found[b, i], y[b, i] + 0.7 * control, rtol=0, atol=1e-11)
            checked += 1
        assert checked == int(real.sum()) > 10


class TestLadder:
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
    def test_equals_the_side_network_by_hand(self, build, family):
        model = build(family)
        batch = batch_of(model)
        controlled = move(attach(model, LadderSideTuning(reduction=4)))
        sites = controlled.host.find(("block",))
        u = controlled.state()
        _, found = seen_by(controlled, sites[0].module, sites[-1].module, batch)
        controlled.detach()
        states = [seen_by(model, sites[0].module, s.module, batch) for s in sites]
        side = states[0][0] @ u["ladder.entry.down"].T
        for site, (_, state) in zip(sites, states, strict=True):
            gate = u[f"ladder.{site.path}.gate"].sigmoid()
            side = gate * state @ u[f"ladder.{site.path}.down"].T + (1 - gate) * side
            inner = gelu(side @ u[f"ladder.{site.path}.inner"].T)
            side = side + inner @ u[f"ladder.{site.path}.outer"].T
        expected = states[-1][1] + side @ u["ladder.end.up"].T
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)

    def test_no_gradient_goes_through_the_backbone(self, build):
        model = build("gpt2")
        controlled = move(attach(model, LadderSideTuning(reduction=4)))
        flags: list[bool] = []
        blocks = list(model.transformer.h)
        handles = [
            module.register_forward_hook(lambda _, args, o: flags.append(o.requires_grad))
            for block in blocks
            for module in (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj)
        ]
        loss = out(controlled, batch_of(model)).square().sum()
        for handle in handles:
            handle.remove()
        assert len(flags) == 3 * L and not any(flags)
        loss.backward()
        grads = [p.grad for p in controlled.trainable().values()]
        assert all(g is not None and bool(g.any()) for g in grads)
        controlled.detach()


class TestPrompts:
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "opt"])
    def test_p_tuning_is_a_prompt_that_an_mlp_makes(self, build, family):
        model, batch = build(family), batch_of(build(family))
        controlled = move(attach(model, PTuning(length=3, hidden=5)))
        found, u = out(controlled, batch), list(controlled.state().values())
        controlled.detach()
        rows, w1, w2, w3, b1, b2, b3 = u
        made = relu(relu(rows @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
        controlled = attach(model, PromptTuning(length=3))
        controlled.load(dict.fromkeys(controlled.state(), made))
        torch.testing.assert_close(
            out(controlled, batch), found, rtol=0, atol=FAMILIES[family].tolerance
        )
        controlled.detach()

    @pytest.mark.parametrize("layers", [1, 2])
    def test_p_tuning_runs_the_lstm_of_torch(self, build, layers):
        model, batch = build("bert"), batch_of(build("bert"))
        delta = PTuning(length=4, encoder="lstm", hidden=5, num_layers=layers)
        controlled = move(attach(model, delta))
        found = out(controlled, batch)
        u = controls(controlled, "bert.embeddings.word_embeddings")
        controlled.detach()
        lstm = nn.LSTM(d, 5, num_layers=layers, bidirectional=True, batch_first=True).double()
        with torch.no_grad():
            for i in range(layers):
                for k, end in enumerate(("", "_reverse")):
                    getattr(lstm, f"weight_ih_l{i}{end}").copy_(u[f"encoder.{i}.W"][k])
                    getattr(lstm, f"weight_hh_l{i}{end}").copy_(u[f"encoder.{i}.R"][k])
                    getattr(lstm, f"bias_ih_l{i}{end}").copy_(u[f"encoder.{i}.b"][k])
                    getattr(lstm, f"bias_hh_l{i}{end}").zero_()
            inner = lstm(u["rows"][None])[0][0]
        head = f"encoder.{layers}."
        w1, w2, b1, b2 = (u[head + k] for k in ("weights.0", "weights.1", "biases.0", "biases.1"))
        made = relu(inner @ w1.T + b1) @ w2.T + b2
        controlled = attach(model, PromptTuning(length=4))
        assert delta.num_parameters(controlled.host) == sum(v.numel() for v in u.values())
        controlled.load(dict.fromkeys(controlled.state(), made))
        torch.testing.assert_close(out(controlled, batch), found, rtol=0, atol=1e-12)
        controlled.detach()

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
    def test_a_projected_prefix_is_what_the_mlp_makes(self, build, family):
        """Li & Liang's MLP with one output of 2 L d_kv features, a share for each layer."""
        model, batch = build(family), batch_of(build(family))
        delta = PrefixTuning(length=3, init_std=1.0, projection=5)
        controlled = move(attach(model, delta))
        width = FAMILIES[family].key_width
        assert controlled.num_trainable == 3 * d + (d + 1) * 5 + L * (5 + 1) * 2 * width
        found, u = out(controlled, batch), controlled.state()
        sites = controlled.host.find(("attention",))
        controlled.detach()
        inner = (u["prefix.rows.rows"] @ u["prefix.rows.weight"].T + u["prefix.rows.bias"]).tanh()
        weight = torch.cat([u[f"prefix.{s.path}.weight"] for s in sites])
        bias = torch.cat([u[f"prefix.{s.path}.bias"] for s in sites])
        made = (inner @ weight.T + bias).view(3, 2 * L, -1, d // H).permute(1, 2, 0, 3)
        controlled = attach(model, PrefixTuning(length=3))
        controlled.load(dict(zip(controlled.state(), made, strict=True)))
        torch.testing.assert_close(
            out(controlled, batch), found, rtol=0, atol=FAMILIES[family].tolerance
        )
        controlled.detach()


class TestCombined:
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_mix_and_match_is_its_two_parts(self, build, family):
        model, batch = build(family), batch_of(build(family))
        controlled = move(attach(model, MixAndMatch(length=3, bottleneck=4, init_std=1.0)))
        found, state = out(controlled, batch), controlled.state()
        controlled.detach()
        controlled = attach(model, PrefixTuning(length=3), ParallelAdapter(bottleneck=4))
        values = {k.partition(".")[2]: v for k, v in state.items()}
        controlled.load({k: values[k.partition(".")[2]] for k in controlled.state()})
        assert torch.equal(out(controlled, batch), found)
        controlled.detach()

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
    @pytest.mark.parametrize("also", [False, True])
    def test_unipelt(self, build, family, attention, also):
        """The first block by hand: gates, query and value, attention over the scaled prefix."""
        model = build(family, attention=attention)
        batch = batch_of(model)
        delta = UniPELT(rank=3, bottleneck=4, length=2, init_std=1.0)
        deltas = (delta, PrefixTuning(length=3, init_std=1.0)) if also else (delta,)
        controlled = move(attach(model, *deltas))
        names = ("attention.query", "attention.key", "attention.value", "attention.output")
        sites = [controlled.host.find((name,), (0,))[0] for name in names]
        down = controlled.host.find(("mlp.down",), (0,))[0]
        block, core = (controlled.host.find((n,), (0,))[0] for n in ("block", "attention"))
        u = controls(controlled, block.path)
        plain = {k: v for k, v in controlled.state().items() if k.startswith(f"prefix.{core.path}")}
        attended: list[Tensor] = []
        handle = sites[-1].module.register_forward_pre_hook(
            lambda _, args: attended.append(args[0])
        )
        h, adapted = seen_by(controlled, sites[0].module, down.module, batch)
        handle.remove()
        inner_state, _ = seen_by(controlled, down.module, down.module, batch)
        controlled.detach()

        real = batch["attention_mask"].bool()
        tokens = h.shape[1]
        seen = real[:, None, :].expand(-1, tokens, -1)
        if family in CAUSAL:
            seen = seen & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        share = seen.double() / seen.sum(-1, keepdim=True)

        def gate(name: str, state: Tensor) -> Tensor:
            return share @ (state @ u[f"{name}.weight"].T + u[f"{name}.bias"]).sigmoid()

        def project(site, factors: str | None) -> Tensor:
            y = site.take(nn.Module.__call__(site.module, h).detach())
            if factors:
                y = y + gate("lora_gate", h) * (h @ u[f"{factors}.A"].T @ u[f"{factors}.B"].T)
            return y.unflatten(-1, (H, -1)).transpose(1, 2)

        q, k, v = (project(s, f) for s, f in zip(sites, ("query", None, "value"), strict=False))
        opened = gate("prefix_gate", h)[:, None]
        expand = (len(h), -1, -1, -1)
        scale = (d // H) ** -0.5
        scores = [opened * (q @ u["keys"].mT) * scale, q @ k.mT * scale]
        values = [u["values"].expand(expand), v]
        factors = [opened, 1.0]
        for keys_, values_ in [tuple(plain.values())] if plain else []:
            scores.append(q @ keys_.mT * scale)
            values.append(values_.expand(expand))
            factors.append(1.0)
        scores[1] = scores[1].masked_fill(~seen[:, None], -torch.inf)
        weights = torch.cat(scores, -1).softmax(-1).split([s.shape[-1] for s in scores], -1)
        parts = [f * (w @ x) for f, w, x in zip(factors, weights, values, strict=True)]
        expected = sum(parts[1:], parts[0]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attended[0][real], expected[real], rtol=0, atol=1e-11)

        y = down.module(inner_state).detach()
        inner = relu(y @ u["down"].T + u["down_bias"])
        expected = y + gate("adapter_gate", y) * (inner @ u["up"].T + u["up_bias"])
        torch.testing.assert_close(adapted[real], expected[real], rtol=0, atol=1e-11)

    def test_everything_at_once_leaves_no_trace(self, build):
        model = build("bert")
        before, outputs = snapshot(model), out(model, batch_of(model)).detach()
        deltas = [
            IA3(), PfeifferAdapter(4), LowRankAdapter(4), Compacter(4), ParallelAdapter(4),
            StateBasedTuning(3), AttentionControl(3), MixtureOfControl(2, 2), AdapterDrop(1),
            LadderSideTuning(),
        ]  # fmt: skip
        late = [PTuning(3, hidden=4), MixAndMatch(2, 4), UniPELT(2, 4, 2), PromptTuning(2)]
        controlled = attach(model, *deltas)
        assert torch.equal(out(controlled, batch_of(model)), outputs)
        controlled.detach()
        controlled = move(attach(model, *deltas, *late))
        out(controlled, batch_of(model)).square().sum().backward()
        grads = [p.grad for p in controlled.trainable().values()]
        assert all(g is not None and bool(g.isfinite().all()) for g in grads)
        controlled.detach()
        assert_same(before, snapshot(model))


def test_ia3_scales_a_bfloat16_state_like_the_rounded_product() -> None:
    gain = Gain(64)
    torch.nn.init.uniform_(gain.u, -1, 1)
    u = gain.u.detach().bfloat16()
    state = torch.randn(50, 64).bfloat16()
    found = gain.scale_output((), state)
    wanted = (state.double() * (1 + u.double())).float()
    assert found.dtype is torch.bfloat16
    assert ((found.float() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all()
