"""Changes of weight in few numbers, each against its paper's formula, written densely by hand."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from deltacontrol.deltas import AdaLoRA, DeltaModel, DoRA, LoHa, LoKr, LoRA, VeRA, attach
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, H, L, batch_of, d, gradients, m, move, out

Build = Callable[..., PreTrainedModel]
Factors = dict[str, Tensor]
SITES = ("attention.query", "attention.value", "mlp.down")
THREE = ["bert", "gpt2", "llama"]


def factors_of(controlled: DeltaModel) -> dict[str, Factors]:
    """The controls and buffers of every site, by the site's key."""
    found: dict[str, Factors] = {}
    for name, value in controlled.controls.state_dict().items():
        site, _, leaf = name.partition(".")[2].rpartition(".")
        if site.rpartition(".")[2] in ("W_1", "W_2"):
            site, _, stem = site.rpartition(".")
            leaf = f"{stem}.{leaf}"
        if site != "shared":
            found.setdefault(site, {})[leaf] = value.clone()
    return found


def write(
    made: PreTrainedModel, controlled: DeltaModel, weight: Callable[[Tensor, Factors], Tensor]
) -> None:
    """Let the weights (out, in) of a copy of the base be ``weight(W, factors)`` at the sites."""
    for key, factors in factors_of(controlled).items():
        path, part = key, slice(None)
        if path.rpartition(".")[2][0].isdigit() and "-" in path.rpartition(".")[2]:
            path, _, features = path.rpartition(".")
            part = slice(*map(int, features.split("-")))
        module = made.get_submodule(path)
        with torch.no_grad():
            rows = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
            rows[part] = weight(rows[part].clone(), factors)


def assert_as_written(build, family, delta, weight, scale=0.2):
    """The controlled model is the base with these weights, and not the base."""
    model = build(family)
    batch = batch_of(model)
    dense = copy.deepcopy(model)
    controlled = move(attach(model, delta), scale=scale)
    write(dense, controlled, lambda w, f: weight(w, f, controlled))
    found, expected = out(controlled, batch).detach(), out(dense, batch).detach()
    controlled.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[family].tolerance)
    assert float((found - out(model, batch)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("family", THREE)
class TestWeights:
    def test_dora(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            moved = w + (5.0 / 3) * f["B"] @ f["A"]
            return torch.stack(
                [
                    g * row / math.sqrt(float(row @ row))
                    for g, row in zip(f["m"], moved, strict=True)
                ]
            )

        for constant in (True, False):
            delta = DoRA(rank=3, alpha=5.0, sites=SITES, constant_norm=constant)
            assert_as_written(build, family, delta, weight)

    def test_adalora(self, build, family):
        delta = AdaLoRA(rank=3, target_rank=1, alpha=5.0, sites=SITES)
        assert_as_written(
            build, family, delta,
            lambda w, f, _: w + (5.0 / 3) * f["P"] @ torch.diag(f["Lambda"]) @ f["Q"],
        )  # fmt: skip

    def test_vera(self, build, family):
        def weight(w: Tensor, f: Factors, controlled: DeltaModel) -> Tensor:
            down = controlled.controls.get_buffer("vera.shared.A")
            up = controlled.controls.get_buffer("vera.shared.B")
            assert down.shape == (40, m) and up.shape == (d, 40)
            narrow = up[: len(w)] @ torch.diag(f["d"]) @ down[:, : w.shape[1]]
            return w + torch.diag(f["b"]) @ narrow

        assert_as_written(build, family, VeRA(rank=40, sites=SITES), weight)

    def test_loha(self, build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            return w + (5.0 / 3) * (f["X_1"] @ f["Y_1"]) * (f["X_2"] @ f["Y_2"])

        assert_as_written(build, family, LoHa(rank=3, alpha=5.0, sites=SITES), weight, scale=0.6)

    @pytest.mark.parametrize("both", [False, True])
    @pytest.mark.parametrize("factor", [None, 2, 16])
    def test_lokr(self, build, family, factor, both):
        def factor_of(f: Factors, name: str) -> Tensor:
            parts = [f[key] for key in sorted(f) if key.startswith(name)]
            return parts[0] @ parts[1] if len(parts) == 2 else parts[0]

        def weight(w: Tensor, f: Factors, _) -> Tensor:
            first, second = factor_of(f, "W_1"), factor_of(f, "W_2")
            blocks = [torch.cat([entry * second for entry in row], dim=1) for row in first]
            return w + (5.0 / 3) * torch.cat(blocks)

        delta = LoKr(rank=3, alpha=5.0, factor=factor, decompose_both=both, sites=SITES)
        assert_as_written(build, family, delta, weight)

    @pytest.mark.parametrize("scaling", ["standard", "rslora"])
    def test_lora_from_the_principal_part(self, build, family, scaling):
        """Meng et al.: W_res + s B A, W_res what the r largest singular values leave."""
        scale = 5.0 / 3 if scaling == "standard" else 5.0 / math.sqrt(3)

        def weight(w: Tensor, f: Factors, _) -> Tensor:
            left, values, right = torch.linalg.svd(w)
            values = values.clone()
            values[:3] = 0
            n = len(values)
            residual = left[:, :n] @ torch.diag(values) @ right[:n]
            return residual + scale * f["B"] @ f["A"]

        delta = LoRA(rank=3, alpha=5.0, sites=SITES, init="svd", scaling=scaling)
        assert_as_written(build, family, delta, weight)


class TestLoRA:
    def test_the_principal_start_is_the_best_approximation(self, build):
        """Eckart–Young; and the state holds A and B alone, which fit a model attached anew."""
        model = build("bert")
        w = model.bert.encoder.layer[0].attention.self.query.weight.detach()
        controlled = attach(model, LoRA(rank=4, alpha=4.0, init="svd"))
        f = factors_of(controlled)["bert.encoder.layer.0.attention.self.query"]
        assert f.keys() == {"A", "B"}
        tail = torch.linalg.svdvals(w)[4:]
        error = torch.linalg.matrix_norm(w - f["B"] @ f["A"])
        torch.testing.assert_close(error, tail.norm(), rtol=1e-12, atol=0)
        batch = batch_of(model)
        assert torch.equal(out(controlled, batch), out(controlled.detach(), batch))

    def test_scaling(self, build):
        for rank in (1, 4, 9):
            standard, root = (LoRA(rank, 6.0, scaling=s) for s in ("standard", "rslora"))
            assert standard.scale == 6.0 / rank and root.scale == 6.0 / math.sqrt(rank)

    def test_gaussian_start(self, build):
        controlled = attach(build("bert"), LoRA(rank=8, init="gaussian"))
        start = torch.stack([v for k, v in controlled.state().items() if k.endswith("A")])
        sigma, n = 1 / 8, start.numel()
        assert abs(float(start.mean())) < 4 * sigma / math.sqrt(n)
        assert abs(float(start.std()) - sigma) < 4 * sigma / math.sqrt(2 * n)
        controlled.detach()

    def test_step_ratio(self, build):
        controlled = attach(build("bert"), LoRA(rank=2), LoRA(rank=3, step_ratio=16.0))
        factors = controlled.rate_factors
        assert len(factors) == 2 * L and set(factors.values()) == {16.0}
        assert all(n.startswith("lora_2.") and n.endswith(".B") for n in factors)
        controlled.detach()


class TestDoRA:
    def test_the_gradient_without_the_norm_is_a_projection(self, build):
        """Eq. 6 and 11: with ‖V‖ constant, the gradient keeps its part along V."""
        model = build("bert")
        module = model.bert.encoder.layer[0].attention.self.query
        key = "dora.bert.encoder.layer.0.attention.self.query."
        x = torch.randn(5, d, dtype=torch.float64)
        weights = torch.randn(5, d, dtype=torch.float64)
        w = module.weight.detach()
        for constant in (True, False):
            controlled = move(attach(model, DoRA(rank=2, alpha=2.0, constant_norm=constant)))
            a, b, magnitude = (controlled.trainable()[key + leaf] for leaf in "ABm")
            found = gradients((module(x) * weights).sum(), [a, b, magnitude])
            v = (w + b @ a).detach()
            norms = v.norm(dim=1, keepdim=True)
            outer = weights.T @ x  # d loss / d W'
            through = magnitude.detach()[:, None] / norms * outer
            if not constant:
                unit = v / norms
                through = through - unit * (unit * through).sum(1, keepdim=True)
            expected = [b.T @ through, through @ a.T, (outer * v / norms).sum(1)]
            for left, right in zip(found, expected, strict=True):
                torch.testing.assert_close(left, right.detach(), rtol=1e-11, atol=1e-12)
            controlled.detach()

    def test_scales_what_acted_before_and_leaves_the_bias(self, build):
        """g (W x + BA x + earlier path) + bias."""
        model = build("bert")
        module = model.bert.encoder.layer[1].attention.self.value
        x = torch.randn(4, d, dtype=torch.float64)
        controlled = move(attach(model, LoRA(rank=2, alpha=2.0), DoRA(rank=3, alpha=3.0)))
        path = "bert.encoder.layer.1.attention.self.value"
        values = {k.partition(".")[::2]: v for k, v in controlled.state().items()}
        lora = values["lora", f"{path}.B"] @ values["lora", f"{path}.A"]
        turned = module.weight + values["dora", f"{path}.B"] @ values["dora", f"{path}.A"]
        gain = values["dora", f"{path}.m"] / turned.norm(dim=1)
        expected = linear(x, gain[:, None] * (turned + lora), module.bias)
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
        controlled.detach()


class TestVeRA:
    def test_the_pair_is_shared_and_comes_back_from_its_seed(self, build):
        model = build("bert")
        controlled = attach(model, VeRA(rank=6))
        state = controlled.state()
        sizes = {k.rpartition(".")[2]: v.numel() for k, v in state.items()}
        assert sizes == {"b": d, "d": 6, "seed": 1}
        pair = controlled.controls.get_buffer("vera.shared.A").clone()
        controlled.detach()
        for seed, same in ((0, True), (1, False)):
            controlled = attach(model, VeRA(rank=6), seed=seed)
            again = controlled.controls.get_buffer("vera.shared.A")
            assert torch.equal(again, pair) == same
            if not same:
                with pytest.raises(InputError, match=r"vera\.shared\.seed"):
                    controlled.load(state)
            controlled.detach()
        bound = math.sqrt(6 / d)
        assert 0.9 * bound < float(pair.abs().max()) <= bound


class TestAdaLoRA:
    def controlled(self, build, **changes) -> DeltaModel:
        config = {"rank": 4, "target_rank": 1, "interval": 2, "warmup": 0.1, "final": 0.3}
        return move(attach(build("bert"), AdaLoRA(**(config | changes))))

    def test_penalty(self, build):
        controlled = self.controlled(build, orthogonality=0.3)
        eye = torch.eye(4, dtype=torch.float64)
        expected = 0.0
        for f in factors_of(controlled).values():
            for gram in (f["P"].T @ f["P"], f["Q"] @ f["Q"].T):
                expected += 0.3 * float(((gram - eye) ** 2).sum())
        assert len(factors_of(controlled)) == 6 * L
        assert float(controlled.penalty().detach()) == pytest.approx(expected, rel=1e-12)
        controlled.detach()
        free = attach(build("bert"), AdaLoRA(orthogonality=0.0))
        assert not free.is_penalised
        free.detach()

    def test_budget_and_importance_by_hand(self, build):
        """20 steps: t_i = 2, T - t_f = 14; allocations at 4, 6, …, 12, the final one at 14."""
        controlled = self.controlled(build)
        batch = batch_of(controlled.model)
        sites = 6 * L
        smoothed: dict[str, Tensor] = {}
        spread: dict[str, Tensor] = {}
        masks = {}
        for step in range(1, 21):
            parameters = controlled.trainable()
            controlled.zero_grad()
            out(controlled, batch).square().sum().backward()
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.sub_(1e-3 * parameter.grad.sign())
            if step <= 14:
                for name, parameter in parameters.items():
                    now = (parameter * parameter.grad).detach().abs()
                    old = smoothed.get(name, torch.zeros_like(now))
                    smoothed[name] = 0.85 * old + 0.15 * now
                    gap = (now - smoothed[name]).abs()
                    spread[name] = 0.85 * spread.get(name, torch.zeros_like(now)) + 0.15 * gap
            before = {n: p.detach().clone() for n, p in parameters.items()}
            controlled.after_step(step, 20)
            changed = [n for n, p in parameters.items() if not torch.equal(p, before[n])]
            if step in (4, 6, 8, 10, 12, 14):
                budget = sites + int(sites * 3 * (1 - (step - 2) / 12) ** 3)
                scores = {}
                for name in (n for n in parameters if n.endswith("Lambda")):
                    entry = {
                        leaf: smoothed[name[:-6] + leaf] * spread[name[:-6] + leaf]
                        for leaf in ("P", "Q", "Lambda")
                    }
                    scores[name] = entry["Lambda"] + entry["P"].mean(0) + entry["Q"].mean(1)
                threshold = torch.cat([*scores.values()]).sort(descending=True).values[budget - 1]
                masks = {name: score >= threshold for name, score in scores.items()}
                assert sum(int(mask.sum()) for mask in masks.values()) == budget
            if step in (4, 6, 8, 10, 12):
                assert changed and all(n.endswith("Lambda") for n in changed)
                for name, mask in masks.items():
                    assert torch.equal(parameters[name], before[name] * mask)
            else:
                assert not changed
            kept = {n: f["mask"] for n, f in factors_of(controlled).items()}
            if step < 14:
                assert all(bool(mask.all()) for mask in kept.values())
            else:
                assert sum(int(mask.sum()) for mask in kept.values()) == sites
                for name, mask in masks.items():
                    site = name.removeprefix("adalora.").removesuffix(".Lambda")
                    assert torch.equal(kept[site], mask)
        # What the final allocation dropped has no effect and no gradient.
        controlled.zero_grad()
        out(controlled, batch).sum().backward()
        for name, mask in masks.items():
            assert not bool(controlled.trainable()[name].grad[~mask].any())
        controlled.detach()

    @pytest.mark.parametrize("steps", [1, 2, 3, 7])
    def test_short_trainings_reach_the_target(self, build, steps):
        controlled = self.controlled(build)
        for step in range(1, steps + 1):
            controlled.zero_grad()
            out(controlled, batch_of(controlled.model)).square().sum().backward()
            controlled.after_step(step, steps)
        kept = sum(int(f["mask"].sum()) for f in factors_of(controlled).values())
        assert kept == 6 * L
        controlled.detach()

    def test_its_importances_are_part_of_the_state(self, build):
        """So that a training that is continued allocates as one that was never interrupted."""
        controlled = self.controlled(build)
        controlled.zero_grad()
        out(controlled, batch_of(controlled.model)).square().sum().backward()
        controlled.after_step(1, 20)
        variables = controlled.variables()
        moments = [v for k, v in variables.items() if "sensitivity" in k or "uncertainty" in k]
        assert len(moments) == 2 * 3 * 6 * L and all(bool(v.any()) for v in moments)
        controlled.detach()


def test_lokr_counts_follow_the_factors(build):
    """32 × 32: 4 ⊗ 8 of each; with factor 2: 2 ⊗ 16; both products only where they are smaller."""
    for delta, count in (
        (LoKr(rank=3), 4 * 4 + 3 * (8 + 8)),
        (LoKr(rank=4), 4 * 4 + 8 * 8),
        (LoKr(rank=1, decompose_both=True), 1 * (4 + 4) + 1 * (8 + 8)),
        (LoKr(rank=2, decompose_both=True), 4 * 4 + 2 * (8 + 8)),
        (LoKr(rank=3, factor=2), 2 * 2 + 3 * (16 + 16)),
        (LoKr(rank=3, factor=16), 16 * 16 + 2 * 2),
        (LoKr(rank=3, factor=5), 4 * 4 + 3 * (8 + 8)),
    ):
        controlled = attach(build("bert"), delta)
        assert controlled.num_trainable == 2 * L * count, delta
        controlled.detach()
    assert H == 4
