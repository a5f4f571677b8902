"""Specifications of parameters, each against its paper's formula, evaluated densely by hand."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    DeltaModel,
    DiffPruning,
    FisherMask,
    LotteryTicket,
    RandomMask,
    attach,
)
from deltacontrol.deltas.methods.parts.masks import random_places
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, L, attached, batch_of, d, m, move, out

Build = Callable[..., PreTrainedModel]


def backbone(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters without those of the task head, tied ones once."""
    return {n: p for n, p in model.named_parameters() if not n.startswith(("classifier", "score"))}


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters.values()])


def with_change(model: PreTrainedModel, change: Tensor) -> PreTrainedModel:
    """A copy whose backbone, laid end to end, is moved by ``change``; of a model without deltas."""
    made = copy.deepcopy(model)
    parameters = backbone(made)
    with torch.no_grad():
        parts = change.split([p.numel() for p in parameters.values()])
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter += part.view_as(parameter)
    return made


class TestRandomMask:
    @pytest.mark.parametrize(
        ("family", "kind"), [("bert", "classification"), ("gpt2", "causal-lm")]
    )
    def test_adds_values_at_its_places(self, build: Build, family, kind):
        """Also where the embedding is the language-model head: it moves at both places."""
        model = build(family, kind)
        size = len(flat(backbone(model)))
        controlled = move(attach(model, RandomMask(density=0.1)))
        (values,) = controlled.trainable().values()
        places = controlled.controls.get_buffer("random-mask.change.places")
        assert len(values) == len(places.unique()) == round(0.1 * size)
        found = out(controlled, batch_of(model))
        controlled.detach()
        change = torch.zeros(size, dtype=torch.float64)
        change[places] = values.detach()
        expected = out(with_change(model, change), batch_of(model))
        assert torch.equal(found, expected)

    def test_every_place_is_equally_likely(self):
        """Binomial in each place: the variance over places is draws·share·(1 - share)."""
        size, draws, share = 5000, 400, 0.2
        counts = torch.zeros(size)
        for seed in range(draws):
            counts[random_places(size, 1000, seed)] += 1
        assert float(counts.sum()) == draws * 1000
        expected = draws * share * (1 - share)
        assert abs(float(counts.var()) - expected) < 4 * expected * math.sqrt(2 / size)
        halves = counts[: size // 2].mean() - counts[size // 2 :].mean()
        assert abs(float(halves)) < 4 * math.sqrt(4 * expected / size)

    def test_keeps_a_seed_and_not_the_places(self, build):
        model = build("bert")
        controlled = attach(model, RandomMask(density=0.01), seed=4)
        state = controlled.state()
        assert {k.rpartition(".")[2] for k in state} == {"values", "seed"}
        controlled.detach()
        other = attach(model, RandomMask(density=0.01), seed=5)
        with pytest.raises(InputError, match=r"random-mask\.change\.seed"):
            other.load(state)
        other.detach()
        fixed = attach(model, RandomMask(density=0.01, mask_seed=int(state[
            "random-mask.change.seed"])), seed=5)  # fmt: skip
        fixed.load(state)
        fixed.detach()

    def test_sites_and_layers_restrict_it(self, build):
        model = build("bert")
        for delta, size in (
            (RandomMask(1.0, sites=("mlp.down",)), L * (m * d + d)),
            (RandomMask(1.0, sites=("mlp.down",), layers=(1,)), m * d + d),
            (RandomMask(0.5, layers=(0,)), FAMILIES["bert"].block // 2),
        ):
            controlled = attach(model, delta)
            assert controlled.num_trainable == size
            controlled.detach()


class TestFisherMask:
    def losses(self, model, batch):
        """One cross-entropy for each example."""
        for row in range(3):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            yield model(**one, labels=torch.tensor([row % 2])).loss

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_takes_the_largest_information(self, build: Build, family):
        model = build(family)
        batch = batch_of(model)
        plain = copy.deepcopy(model)
        expected = torch.zeros_like(flat(backbone(plain)))
        for loss in self.losses(plain, batch):
            plain.zero_grad()
            loss.backward()
            grads = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in backbone(plain).values()
            ]
            expected += torch.cat([g.flatten() for g in grads]) ** 2
        controlled = attach(model, FisherMask(density=0.03))
        assert controlled.needs_data
        controlled.prepare(lambda: self.losses(controlled, batch))
        places = controlled.controls.get_buffer("fisher-mask.change.places")
        count = round(0.03 * len(expected))
        assert set(places.tolist()) == set(expected.topk(count).indices.tolist())
        move(controlled)
        found = out(controlled, batch)
        (values,) = controlled.trainable().values()
        controlled.detach()
        change = torch.zeros_like(expected)
        change[places] = values.detach()
        assert torch.equal(found, out(with_change(model, change), batch))
        assert all(p.grad is None for p in model.parameters())

    def test_must_see_data_first(self, build):
        model = build("bert")
        batch = batch_of(model)
        controlled = attach(model, FisherMask(density=0.01))
        for act in (lambda: controlled(**batch), controlled.merge):
            with pytest.raises(InputError, match=r"fisher-mask has not seen data.*prepare\(losses"):
                act()
        for losses, message in (
            (lambda: iter(()), "got no loss"),
            (lambda: (loss * math.nan for loss in self.losses(controlled, batch)), "1 .* is nan"),
        ):
            with pytest.raises(InputError, match=message):
                controlled.prepare(losses)
            with pytest.raises(InputError, match="has not seen data"):
                controlled(**batch)
        controlled.prepare(lambda: self.losses(controlled, batch))
        state, outputs = move(controlled).state(), out(controlled, batch).detach()
        controlled.detach()
        again = attach(model, FisherMask(density=0.01))
        again.load(state)
        assert torch.equal(out(again, batch).detach(), outputs)
        again.detach()


class TestLotteryTicket:
    def dense_steps(self, controlled: DeltaModel, batch, steps: range, total: int, rate=1e-2):
        """SGD, and what `after_step` says."""
        said = []
        for step in steps:
            controlled.zero_grad()
            out(controlled, batch).square().sum().backward()
            with torch.no_grad():
                for parameter in controlled.trainable().values():
                    if parameter.grad is not None:
                        parameter.sub_(rate * parameter.grad)
            said.append(controlled.after_step(step, total))
        return said

    def test_keeps_what_moved_most_and_rewinds(self, build: Build):
        """Two rounds in 20 steps: pruned after 4 and 8, to √density and density."""
        model = build("bert")
        batch = batch_of(model)
        size = len(flat(backbone(model)))
        start = out(model, batch).detach()
        controlled = attach(model, LotteryTicket(density=0.04, rounds=2, search=0.4))
        assert controlled.num_trainable == size
        alive = torch.ones(size, dtype=torch.bool)
        for end, share in ((4, 0.2), (8, 0.04)):
            said = self.dense_steps(controlled, batch, range(end - 3, end), 20)
            assert said == [False] * 3
            controlled.zero_grad()
            out(controlled, batch).square().sum().backward()
            with torch.no_grad():
                for parameter in controlled.trainable().values():
                    if parameter.grad is not None:
                        parameter.sub_(1e-2 * parameter.grad)
            moved = flat(controlled.trainable()).abs() * alive
            assert controlled.after_step(end, 20) is True
            masks = [v.flatten() for k, v in controlled.state().items() if k.endswith("mask")]
            expected = torch.zeros_like(alive)
            expected[moved.topk(round(share * size)).indices] = True
            alive = torch.cat(masks)
            assert torch.equal(alive, expected)
            assert not bool(flat(controlled.trainable()).any())
            assert torch.equal(out(controlled, batch).detach(), start)
        assert self.dense_steps(controlled, batch, range(9, 21), 20) == [False] * 12
        change = flat(controlled.trainable())
        assert torch.equal(change != 0, change.bool() & alive)  # nothing else has a gradient
        assert int((change != 0).sum()) > 0.9 * round(0.04 * size)
        found = out(controlled, batch).detach()
        controlled.detach()
        assert torch.equal(found, out(with_change(model, change * alive), batch).detach())
        assert not torch.equal(found, start)

    @pytest.mark.parametrize("steps", [1, 2, 5, 30])
    def test_short_trainings_find_the_ticket(self, build, steps):
        controlled = attach(build("bert"), LotteryTicket(density=0.1, rounds=3, search=0.5))
        size = controlled.num_trainable
        self.dense_steps(controlled, batch_of(controlled.model), range(1, steps + 1), steps)
        masks = [v for k, v in controlled.state().items() if k.endswith("mask")]
        assert sum(int(mask.sum()) for mask in masks) == round(0.1 * size)
        controlled.detach()


class TestDiffPruning:
    def parts(self, controlled: DeltaModel, leaf: str) -> list[Tensor]:
        state = controlled.state()
        return [v for k, v in state.items() if k.rpartition(".")[2] == leaf]

    @pytest.mark.parametrize("structured", [False, True])
    @pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (-0.1, 1.1)])
    def test_law_and_penalty(self, build: Build, structured, low, high):
        model = build("bert")
        written = copy.deepcopy(model)
        delta = DiffPruning(structured=structured, log_alpha=0.7, low=low, high=high, penalty=1e-3)
        controlled = move(attach(model, delta), scale=0.5)
        names = list(backbone(model))
        size = len(flat(backbone(model)))
        assert controlled.num_trainable == 2 * size + (len(names) if structured else 0)

        def gate(alpha: Tensor) -> Tensor:
            return (1 / (1 + torch.exp(-alpha)) * (high - low) + low).clamp(0, 1)

        def is_open(alpha: Tensor) -> Tensor:
            return 1 / (1 + torch.exp(-(alpha - math.log(-low / high))))

        state, count = controlled.state(), 0.0
        for name, parameter in backbone(written).items():
            alpha, w = (state[f"diff-pruning.{name}.{leaf}"] for leaf in ("log_alpha", "w"))
            z, probability = gate(alpha), is_open(alpha)
            if structured:
                group = state[f"diff-pruning.{name}.group_log_alpha"]
                z, probability = z * gate(group), probability * is_open(group)
            count += float(probability.sum())
            with torch.no_grad():
                parameter += z * w
        batch = batch_of(model)
        torch.testing.assert_close(out(controlled, batch), out(written, batch), rtol=0, atol=1e-12)
        assert float(controlled.penalty().detach()) == pytest.approx(1e-3 * count, rel=1e-12)
        controlled.detach()

    def test_the_expected_count_is_that_of_the_draws(self, build):
        """E‖z‖₀ against gates drawn in training; the draws are new in every pass."""
        delta = DiffPruning(log_alpha=0.3, structured=False, penalty=1.0)
        controlled = attach(build("bert"), delta).train()
        size = controlled.num_trainable // 2
        change = controlled.controls.get_submodule(
            "diff-pruning.bert.embeddings.word_embeddings.weight"
        )
        probability = float(controlled.penalty().detach()) / size
        torch.manual_seed(0)
        draws = torch.stack([change.gate(random=True) for _ in range(50)])
        share, n = float((draws > 0).double().mean()), draws.numel()
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / n)
        assert not torch.equal(draws[0], draws[1])
        controlled.eval().detach()

    def test_pruning_keeps_the_largest_differences(self, build):
        model = build("bert")
        batch = batch_of(model)
        size = len(flat(backbone(model)))
        delta = DiffPruning(density=0.05, log_alpha=0.5, prune_at=0.6, penalty=1e-6)
        controlled = move(attach(model, delta))
        controlled.controls.get_parameter(
            "diff-pruning.bert.encoder.layer.0.output.dense.weight.group_log_alpha"
        ).data.fill_(-5.0)  # a closed group goes as a whole
        gates = [
            c.gate(random=False).detach().flatten()
            for c in controlled.controls.modules()
            if hasattr(c, "gate")
        ]
        effective = torch.cat(gates) * torch.cat([w.flatten() for w in self.parts(controlled, "w")])
        for step in range(1, 6):
            assert not controlled.after_step(step, 10)
        assert controlled.after_step(6, 10) is True
        masks = torch.cat([v.flatten() for v in self.parts(controlled, "mask")])
        expected = torch.zeros_like(masks)
        expected[effective.abs().topk(round(0.05 * size)).indices] = True
        assert torch.equal(masks, expected)
        kept = torch.cat([w.flatten() for w in self.parts(controlled, "w")])
        torch.testing.assert_close(kept, effective * masks, rtol=0, atol=0)
        assert float(controlled.penalty().detach()) == 0
        # Without gates, training has no randomness left.
        found = out(controlled.train(), batch).detach()
        assert torch.equal(found, out(controlled, batch).detach())
        controlled.zero_grad()
        out(controlled, batch).square().sum().backward()
        for name, parameter in controlled.trainable().items():
            mask = controlled.state().get(name.removesuffix("w") + "mask")
            if name.endswith(".w"):
                assert not bool(parameter.grad[~mask].any())
            else:
                assert parameter.grad is None or not bool(parameter.grad.any())
        assert not any(controlled.after_step(step, 10) for step in range(7, 11))
        controlled.eval().detach()
        torch.testing.assert_close(
            out(with_change(model, effective * masks), batch).detach(), found, rtol=0, atol=1e-12
        )

    def test_gates_step_faster(self, build):
        controlled = attach(build("bert"), DiffPruning(gate_step_ratio=10.0))
        factors = controlled.rate_factors
        assert set(factors) == {n for n in controlled.trainable() if n.endswith("log_alpha")}
        assert set(factors.values()) == {10.0}
        controlled.detach()


def test_attached_is_ready(build):
    """The suite's own helper: what needs data has seen some."""
    controlled = attached(build("bert"), FisherMask(density=0.01))
    assert out(controlled, batch_of(controlled.model)).isfinite().all()
    controlled.detach()
