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
    MixtureOfControl,
    ParallelAdapter,
    PfeifferAdapter,
    StateBasedTuning,
    attach,
)
from deltacontrol.deltas.methods.ia3 import Gain
from tests.deltas.formula_parts import CAUSAL, controls, seen_by
from tests.deltas.zoo import FAMILIES, L, batch_of, d, m, move, out

Build = Callable[..., PreTrainedModel]
SMALL = ["bert", "distilbert", "mpnet", "gpt2", "opt", "llama", "t5", "vit"]
SPANS = {"attention": ("attention.query", "attention.output"), "mlp": ("mlp.up", "mlp.down")}


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


def test_ia3_scales_a_bfloat16_state_like_the_rounded_product() -> None:
    gain = Gain(64)
    torch.nn.init.uniform_(gain.u, -1, 1)
    u = gain.u.detach().bfloat16()
    state = torch.randn(50, 64).bfloat16()
    found = gain.scale_output((), state)
    wanted = (state.double() * (1 + u.double())).float()
    assert found.dtype is torch.bfloat16
    assert ((found.float() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all()
