"""Prompts and combined deltas against their formulas."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from deltacontrol.deltas import (
    IA3,
    AdapterDrop,
    AttentionControl,
    Compacter,
    LadderSideTuning,
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
from tests.deltas.formula_parts import CAUSAL, controls, seen_by
from tests.deltas.zoo import FAMILIES, H, L, assert_same, batch_of, d, move, out, snapshot


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
