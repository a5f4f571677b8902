"""What every delta promises, on every architecture that can carry it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from transformers import PreTrainedModel

from deltas import Delta, DeltaModel, attach
from tests.deltas.zoo import (
    FAMILIES,
    METHODS,
    PAIRS,
    RANDOM,
    V,
    assert_same,
    attached,
    batch_of,
    gradients,
    move,
    out,
    relative,
    snapshot,
)
from theory.errors import InputError

Build = Callable[..., PreTrainedModel]
BOTH = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@pytest.mark.parametrize(("family", "method"), PAIRS, ids=lambda value: value)
class TestConformance:
    @pytest.fixture
    def delta(self, method: str) -> Delta:
        return METHODS[method][0]

    def test_has_as_many_parameters_as_its_formula(self, build: Build, family, method, delta):
        model = build(family)
        controlled = attached(model, delta)
        expected = METHODS[method][1](FAMILIES[family])
        assert controlled.num_trainable == expected
        assert [a.num_parameters for a in controlled.attachments] == [expected]
        assert controlled.num_total == FAMILIES[family].total
        controlled.detach()
        assert sum(p.numel() for p in model.parameters()) == FAMILIES[family].total

    @BOTH
    def test_starts_at_the_base_model_where_it_says_so(self, build, family, delta, attention):
        model = build(family, attention=attention)
        batch = batch_of(model)
        with torch.no_grad():
            before = out(model, batch)
            controlled = attached(model, delta)
            assert torch.equal(out(controlled, batch), before) == delta.identity_at_start
            assert not torch.equal(out(move(controlled), batch), before)
        controlled.detach()

    def test_trains_its_controls_and_nothing_else(self, build, family, method, delta):
        model = build(family)
        base = list(model.parameters())
        controlled = move(attached(model, delta))
        trained = controlled.trainable()
        assert {id(p) for p in controlled.parameters() if p.requires_grad} == {
            id(p) for p in trained.values()
        }
        assert not any(p.requires_grad for p in base)
        out(controlled, batch_of(model)).square().sum().backward()
        # A key's bias shifts all scores of a query alike, which softmax ignores: zero up to noise.
        for name, parameter in trained.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert bool(parameter.grad.any()) or "bias" in name, name
        assert all(p.grad is None for p in base)
        controlled.detach()

    @BOTH
    def test_detaching_restores_the_model_bit_for_bit(self, build, family, delta, attention):
        model = build(family, attention=attention)
        batch = batch_of(model)
        before, outputs = snapshot(model), out(model, batch).detach()
        first = next(model.parameters()).requires_grad_(False)
        flags = [p.requires_grad for p in model.parameters()]
        for seed in (0, 1):  # attaching again after detaching
            controlled = move(attached(model, delta, seed=seed))
            out(controlled, batch).sum().backward()
            assert controlled.detach() is model
            assert [p.requires_grad for p in model.parameters()] == flags
            assert torch.equal(out(model, batch), outputs)
        first.requires_grad_(True)
        assert_same(before, snapshot(model))
        with pytest.raises(InputError, match="were detached"):
            controlled(**batch)
        with pytest.raises(InputError, match="were detached"):
            controlled.detach()

    def test_a_second_attach_is_refused(self, build, family, delta):
        model = build(family)
        controlled = attached(model, delta)
        during = snapshot(model)
        for target in (model, controlled):
            with pytest.raises(InputError, match="has deltas already.*detach"):
                attach(target, delta)
        assert_same(during, snapshot(model))
        controlled.detach()

    def test_a_refusal_leaves_the_model_untouched(self, build, family, delta):
        model = build(family)
        before = snapshot(model)
        with pytest.raises(InputError, match="reaches"):
            attach(model, delta, _Refuses())
        assert_same(before, snapshot(model))

    @BOTH
    def test_padding_does_not_change_a_row(self, build, family, delta, attention):
        model = build(family, attention=attention)
        controlled = move(attached(model, delta))
        ids = torch.randint(3, V, (1, 5), generator=torch.Generator().manual_seed(7))
        others = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(8))
        pad = model.config.pad_token_id or 0
        padded = torch.nn.functional.pad(ids, (0, 4), value=pad)
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[0, 5:] = 0
        with torch.no_grad():
            alone = out(controlled, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            rows = torch.cat([padded, others])
            together = out(controlled, {"input_ids": rows, "attention_mask": mask})[:1]
        if together.dim() == 3:
            together = together[:, :5]
        tolerance = FAMILIES[family].tolerance
        torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
        controlled.detach()

    def test_state_goes_out_and_in_exactly(self, build, family, delta):
        model = build(family)
        batch = batch_of(model)
        controlled = move(attached(model, delta))
        state, outputs = controlled.state(), out(controlled, batch).detach()
        assert state.keys() >= controlled.trainable().keys()
        move(controlled)  # the state is a copy
        assert not torch.equal(out(controlled, batch), outputs)
        controlled.load(state)
        assert torch.equal(out(controlled, batch), outputs)
        controlled.detach()
        again = attach(model, delta)  # loading is enough: nothing to prepare
        again.load(state)
        assert torch.equal(out(again, batch), outputs)
        key = next(iter(again.trainable()))
        for wrong in (
            {k: v for k, v in state.items() if k != key},
            state | {"lora.nowhere.A": torch.zeros(1)},
            state | {key: torch.zeros(1, 2, 3)},
        ):
            with pytest.raises(InputError, match="lora.nowhere.A|" + key.replace(".", r"\.")):
                again.load(wrong)
        assert torch.equal(out(again, batch), outputs)
        again.detach()

    def test_the_seed_decides_the_start(self, build, family, method, delta):
        model = build(family)
        batch = batch_of(model)

        def start(seed: int) -> tuple[dict[str, Tensor], Tensor]:
            torch.manual_seed(torch.seed() % 1000)  # the global generator must not matter
            generator = torch.get_rng_state()
            controlled = attached(model, delta, seed=seed)
            assert torch.equal(torch.get_rng_state(), generator)
            state = controlled.state()
            outputs = out(move(controlled), batch).detach()
            controlled.detach()
            return state, outputs

        (state, outputs), (again, same), (other, different) = start(0), start(0), start(1)
        assert all(torch.equal(state[k], again[k]) for k in state)
        assert torch.equal(outputs, same)
        random = method in RANDOM
        assert any(not torch.equal(state[k], other[k]) for k in state) == random
        assert torch.equal(outputs, different) != random

    def test_autocast_trains(self, build, family, delta):
        model = build(family, attention="sdpa", dtype=torch.float32)
        controlled = move(attached(model, delta))
        exact = out(controlled, batch_of(model)).detach()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = out(controlled, batch_of(model))
        assert float((outputs.detach() - exact).abs().max() / exact.abs().max()) < 0.1
        outputs.float().square().mean().backward()
        for name, parameter in controlled.trainable().items():
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
        controlled.detach()

    def test_gradient_checkpointing_gives_equal_gradients(self, build, family, method, delta):
        if family == "mpnet":
            pytest.skip("transformers has no checkpointing for MPNet")
        model = copy.deepcopy(build(family))  # transformers leaves a hook of its own behind
        batch = batch_of(model)
        controlled = move(attached(model, delta)).train()  # all dropout rates are zero
        parameters = controlled.trainable().values()
        torch.manual_seed(0)  # for controls that draw at random while training
        expected = gradients(out(controlled, batch).square().sum(), parameters)
        calls: list[int] = []
        deep = controlled.host.sites.resolve(["mlp.down"])[-1].module
        counter = deep.register_forward_pre_hook(lambda *_: calls.append(1))
        model.activation_checkpointing_enable()
        torch.manual_seed(0)
        loss = out(controlled, batch).square().sum()
        with torch.no_grad():  # another pass, between forward and backward
            out(controlled, batch)
        calls.clear()
        found = gradients(loss, parameters)
        assert calls or method == "head", "the block was not run again"
        assert relative(found, expected) <= 1e-12
        model.activation_checkpointing_disable()
        counter.remove()
        before = build(family).state_dict()
        restored = controlled.detach().state_dict()
        assert all(torch.equal(before[key], value) for key, value in restored.items())

    def test_controls_become_an_argument(self, build, family, delta):
        """torch.func over the controls agrees with autograd."""
        model = build(family)
        batch = batch_of(model)
        controlled = move(attached(model, delta))
        controls = controlled.trainable()
        generator = torch.Generator().manual_seed(5)
        tangent = {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in controls.items()
        }
        outputs = out(controlled, batch)
        weights = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        expected = gradients((outputs * weights).sum(), controls.values())
        values = {n: p.detach() for n, p in controls.items()}

        def apply(controls: dict[str, Tensor]) -> Tensor:
            return out(_Functional(controlled, controls), batch)

        value, pull = vjp(apply, values)
        tolerance = FAMILIES[family].tolerance
        assert relative([value], [outputs]) <= tolerance
        assert relative(pull(weights)[0].values(), expected) <= tolerance
        _, pushed = jvp(apply, (values,), (tangent,))
        slope = sum((g * t).sum() for g, t in zip(expected, tangent.values(), strict=True))
        torch.testing.assert_close((pushed * weights).sum(), slope, rtol=10 * tolerance, atol=1e-10)
        moved = {n: v + tangent[n] for n, v in values.items()}
        stacked = {n: torch.stack([v, moved[n]]) for n, v in values.items()}
        both = vmap(apply)(stacked)
        assert relative([both], [torch.stack([apply(values), apply(moved)])]) <= tolerance
        for name, parameter in controlled.trainable().items():
            assert parameter is controls[name], "functional_call must put the controls back"
        controlled.detach()


class _Refuses(Delta):
    """Reaches its turn and fails, as a delta does that finds a mistake late."""

    name = "refuses"

    def build(self, host) -> None:
        raise InputError("reaches the second delta")

    def num_parameters(self, host) -> int:
        return 0


class _Functional(nn.Module):
    """The controlled model as a function of its controls."""

    def __init__(self, controlled: DeltaModel, controls: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["controlled"] = controlled
        self.__dict__["controls"] = {f"controls.{n}": v for n, v in controls.items()}

    def forward(self, **batch: Tensor):
        return functional_call(self.__dict__["controlled"], self.__dict__["controls"], (), batch)
