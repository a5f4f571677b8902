"""What every delta promises, where a test costs too much for each method on each architecture.

All methods on BERT, GPT-2 and Llama; one of each way to act on a model everywhere.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas import Delta, DeltaModel
from tests.deltas.zoo import (
    DEEP,
    FAMILIES,
    METHODS,
    attached,
    batch_of,
    cells,
    draws_at_random,
    gradients,
    move,
    out,
    relative,
    texts,
)

Build = Callable[..., PreTrainedModel]
BOTH = pytest.mark.parametrize("attention", ["eager", "sdpa"])
# Their controls lie behind the blocks, so a backward pass does not run these again.
BEHIND = ("head", "ladder")


# Images and sounds have one size; transformers has no checkpointing for MPNet and ALBERT.
QUICK = ("gpt2",), ("lora", "prompt")
PADDED = [(f, n) for f, n in DEEP if FAMILIES[f].reads == "tokens"]
CHECKPOINTED = [(f, n) for f, n in DEEP if f not in ("mpnet", "albert")]
# Models that torch.func cannot go through: BLOOM's activation has a derivative of its own, and
# Pegasus looks its positions up without a gradient, which forward mode gives all the same.
FUNCTIONAL = [(f, n) for f, n in DEEP if f != "bloom" and (f, n) != ("pegasus", "subspace")]
# Models that torch.vmap cannot: they choose experts by the numbers, or add in place.
ONE_AT_A_TIME = ("mixtral", "qwen2-moe", "deepseek-v3", "mamba2", "falcon", "pegasus")


@pytest.fixture
def delta(method: str) -> Delta:
    return METHODS[method][0]


@pytest.mark.parametrize(("family", "method"), cells(PADDED, *QUICK))
class TestPadding:
    @BOTH
    @pytest.mark.one_in(2)
    def test_padding_does_not_change_a_row(self, build: Build, family, delta, attention):
        model = build(family, attention=attention)
        controlled = move(attached(model, delta))
        together = texts(model, (5, 9, 9))
        alone = {k: v[:1, :5] if v.shape[1] == 9 else v[:1] for k, v in together.items()}
        with torch.no_grad():
            expected, found = out(controlled, alone), out(controlled, together)[:1]
        if found.dim() == 3:
            found = found[:, : expected.shape[1]]
        tolerance = FAMILIES[family].tolerance
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        controlled.detach()


@pytest.mark.parametrize(("family", "method"), cells(CHECKPOINTED, *QUICK))
class TestCheckpointing:
    @pytest.mark.one_in(2)
    def test_gradient_checkpointing_gives_equal_gradients(self, build, family, method, delta):
        model = copy.deepcopy(build(family))  # transformers leaves a hook of its own behind
        batch = batch_of(model)
        controlled = move(attached(model, delta)).train()  # all dropout rates are zero
        parameters = controlled.trainable().values()
        torch.manual_seed(0)  # for controls that draw at random while training
        expected = gradients(out(controlled, batch).square().sum(), parameters)
        calls: list[int] = []
        last = controlled.host.sites.blocks[-1]
        deep = next(m for m in last.modules() if isinstance(m, nn.Linear | Conv1D))
        counter = deep.register_forward_pre_hook(lambda *_: calls.append(1))
        model.activation_checkpointing_enable()
        torch.manual_seed(0)
        loss = out(controlled, batch).square().sum()
        with torch.no_grad():  # another pass, between forward and backward
            out(controlled, batch)
        calls.clear()
        found = gradients(loss, parameters)
        assert calls or method in BEHIND, "the block was not run again"
        # GPT-J's attention is in float32, and so is the rounding of a sum laid out in another way.
        assert relative(found, expected) <= (1e-6 if family == "gptj" else 1e-12)
        model.activation_checkpointing_disable()
        counter.remove()
        before = build(family).state_dict()
        restored = controlled.detach().state_dict()
        assert all(torch.equal(before[key], value) for key, value in restored.items())


@pytest.mark.parametrize(("family", "method"), cells(DEEP, *QUICK))
class TestDeepConformance:
    @pytest.mark.one_in(2)
    def test_sdpa_starts_at_the_base_and_detaching_restores_it(self, build, family, delta):
        model = build(family, attention="sdpa")
        batch = batch_of(model)
        with torch.no_grad():  # T5's sdpa kernel depends on whether its bias needs a gradient
            before = out(model, batch)
            controlled = attached(model, delta)
            assert torch.equal(out(controlled, batch), before) == delta.identity_at_start
            assert not torch.equal(out(move(controlled), batch), before)
            with torch.enable_grad():
                out(controlled, batch).sum().backward()
            controlled.detach()
            assert torch.equal(out(model, batch), before)

    @pytest.mark.one_in(2)
    def test_the_seed_decides_the_start(self, build, family, method, delta):
        model = build(family)
        batch = batch_of(model)

        def start(seed: int) -> tuple[dict[str, Tensor], Tensor, bool]:
            torch.manual_seed(torch.seed() % 1000)  # the global generator must not matter
            generator = torch.get_rng_state()
            controlled = attached(model, delta, seed=seed)
            assert torch.equal(torch.get_rng_state(), generator)
            state, random = controlled.state(), draws_at_random(controlled, seed)
            outputs = out(move(controlled), batch).detach()
            controlled.detach()
            return state, outputs, random

        (state, outputs, random), (again, same, _), (other, different, _) = map(start, (0, 0, 1))
        assert all(torch.equal(state[k], again[k]) for k in state)
        assert torch.equal(outputs, same)
        assert any(not torch.equal(state[k], other[k]) for k in state) == random
        assert torch.equal(outputs, different) != random

    @pytest.mark.one_in(2)
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


@pytest.mark.parametrize(("family", "method"), cells(FUNCTIONAL, *QUICK))
class TestFunctional:
    @pytest.mark.one_in(2)
    def test_controls_become_an_argument(self, build, family, delta):
        """torch.func over the controls agrees with autograd."""
        model = build(family)
        # A table of embeddings gives padding no gradient, but forward mode does.
        batch = batch_of(model, 2 if model.loss_type == "ForSequenceClassification" else 0)
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
        if family not in ONE_AT_A_TIME:
            moved = {n: v + tangent[n] for n, v in values.items()}
            stacked = {n: torch.stack([v, moved[n]]) for n, v in values.items()}
            both = vmap(apply)(stacked)
            assert relative([both], [torch.stack([apply(values), apply(moved)])]) <= tolerance
        for name, parameter in controlled.trainable().items():
            assert parameter is controls[name], "functional_call must put the controls back"
        controlled.detach()


class _Functional(nn.Module):
    """The controlled model as a function of its controls."""

    def __init__(self, controlled: DeltaModel, controls: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["controlled"] = controlled
        self.__dict__["controls"] = {f"controls.{n}": v for n, v in controls.items()}

    def forward(self, **batch: Tensor):
        return functional_call(self.__dict__["controlled"], self.__dict__["controls"], (), batch)
