"""Blocks that are one function of different tensors: equal to the steps, or not taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    Delta,
    DeltaModel,
    FullFineTuning,
    HeadTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Subspace,
    VeRA,
    attach,
)
from deltacontrol.deltas.dynamics import alike_blocks
from deltacontrol.deltas.dynamics.block_calls import BlockCall
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
from deltacontrol.deltas.editing.passes import first_tensor, with_first_tensor
from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.linear.linearisation import differentiable_attention
from deltacontrol.theory.quadratic import alike
from deltacontrol.theory.quadratic.alike import alike_at_once
from deltacontrol.theory.quadratic.derivatives import one_by_one
from tests.deltas.zoo import METHODS, move, out, texts

Build = Callable[..., PreTrainedModel]


@contextlib.contextmanager
def problem_on(
    model: PreTrainedModel, *deltas: Delta
) -> Iterator[tuple[ControlProblem, TransformerDynamics, DeltaModel]]:
    """One short text, and controls away from their start."""
    controlled = move(attach(model, *deltas))
    batch = texts(model, (3,))
    dynamics = TransformerDynamics(controlled, batch)
    target = torch.zeros_like(out(controlled, batch))
    try:
        yield ControlProblem(dynamics, SquaredErrorCost(target), dynamics.x0), dynamics, controlled
    finally:
        controlled.detach()


def let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the two blocks of the small models at once, though they are few and not so small."""
    monkeypatch.setattr(alike, "MOST_ENTRIES", 2**20)
    monkeypatch.setattr(alike, "LEAST_STEPS", 2)


def assert_near(found, wanted, rtol: float = 1e-12) -> None:
    for a, b in zip(found, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.norm()))


def values(dynamics: TransformerDynamics, states: list[Tensor], u) -> tuple[Tensor, Tensor]:
    """What the blocks give at once, and one by one."""
    found = dynamics.alike()
    assert found is not None
    steps = range(found.start, found.stop)
    X, U = (torch.stack([part[t] for t in steps]) for part in (states, u))
    with torch.no_grad(), differentiable_attention():
        each = torch.stack([dynamics.step(t, states[t], u[t]) for t in steps])
        return torch.vmap(found.function)(found.constants, X, U), each


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("bert", "lora"),
        ("bert", "houlsby"),
        ("bert", "vera"),
        ("bert", "compacter"),  # one rule for all layers: a shared control
        ("gpt2", "lora"),
        ("gpt2", "prefix"),
        ("gpt_neox", "lora"),  # rotary angles
        ("opt", "ia3"),
    ],
)
def test_jacobians_at_once_are_those_of_the_steps(
    build: Build, monkeypatch: pytest.MonkeyPatch, family: str, method: str
) -> None:
    let_pass(monkeypatch)
    delta = LoRA(rank=1) if method == "lora" else METHODS[method][0]
    with problem_on(build(family), delta) as (problem, dynamics, _):
        found = dynamics.alike()
        assert found is not None
        names = dynamics.stage_names[found.start : found.stop]
        assert names == ("block.0", "block.1")
        u = dynamics.controls()
        now = problem.evaluate(u)
        with differentiable_attention():
            wanted = one_by_one(problem, u, now, False)
            monkeypatch.setattr(TransformerDynamics, "step", only_between(found.start, found.stop))
            assert_near(alike_at_once(problem, u, now, False), wanted)


def only_between(start: int, stop: int):
    """A step that may not be asked for alike blocks."""
    step = TransformerDynamics.step

    def guarded(self: TransformerDynamics, t: int, x: Tensor, u: Tensor) -> Tensor:
        assert not start <= t < stop
        return step(self, t, x, u)

    return guarded


def test_hessians_at_once_are_those_of_the_steps(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_pass(monkeypatch)
    delta = LoRA(rank=1, sites=("attention.value",))
    with problem_on(build("bert"), delta) as (problem, dynamics, _):
        u = dynamics.controls()
        now = problem.evaluate(u)
        with differentiable_attention():
            wanted = one_by_one(problem, u, now, True)
            monkeypatch.setattr(TransformerDynamics, "step", only_between(1, 3))
            assert_near(alike_at_once(problem, u, now, True), wanted)


@pytest.mark.parametrize(
    "deltas",
    [
        pytest.param((LoRA(rank=1, layers=(0,)),), id="in-one-layer"),
        pytest.param((LoRA(rank=1), VeRA(rank=2, layers=(1,))), id="two-in-one-layer"),
        pytest.param((Subspace(dimension=3),), id="weights-of-all-layers-at-once"),
    ],
)
def test_blocks_under_different_controls_are_not_alike(build: Build, deltas) -> None:
    with problem_on(build("bert"), *deltas) as (_, dynamics, _):
        assert dynamics.alike() is None


def test_a_setting_of_one_block_shows(build: Build) -> None:
    """Such as a bound that no present value reaches; the number of a block is no setting."""
    model = build("gpt2")
    with problem_on(model, LoRA(rank=1)) as (_, dynamics, controlled):
        blocks = controlled.host.sites.blocks
        assert [block.attn.layer_idx for block in blocks] == [0, 1]
        assert dynamics.alike() is not None
        dynamics._alike_blocks = None
        blocks[1].bound = 1e9
        try:
            assert dynamics.alike() is None
        finally:
            del blocks[1].bound


@pytest.mark.parametrize(("factors", "same"), [((2.0, 2.0), True), ((1.0, 2.0), False)])
def test_what_only_the_values_tell(build: Build, factors, same: bool) -> None:
    """A number that a hook keeps to itself shows in no structure."""

    def scaled(factor: float):
        return lambda _module, _args, output: with_first_tensor(
            output, factor * first_tensor(output)
        )

    with problem_on(build("bert"), LoRA(rank=1)) as (_, dynamics, controlled):
        blocks = controlled.host.sites.blocks
        handles = [
            block.register_forward_hook(scaled(factor))
            for block, factor in zip(blocks, factors, strict=True)
        ]
        try:
            assert (dynamics.alike() is not None) == same
        finally:
            for handle in handles:
                handle.remove()


def test_weights_that_change_are_laid_side_by_side_anew(build: Build) -> None:
    with problem_on(build("bert"), LoRA(rank=1)) as (problem, dynamics, controlled):
        u = dynamics.controls()
        states = problem.rollout(u)
        before = dynamics.alike()
        assert before is not None
        assert dynamics.alike().constants is before.constants
        weight = controlled.model.get_parameter("bert.encoder.layer.1.output.dense.weight")
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        found, wanted = values(dynamics, states, u)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            weight.copy_(kept)
        assert not torch.allclose(problem.rollout(u)[3], wanted[1])


def test_controls_that_stand_for_weights(build: Build) -> None:
    """Each block's own weights are controls; none of the first block's is taken for another's."""
    with problem_on(build("bert"), FullFineTuning(), PrefixTuning(length=1)) as (p, dynamics, _):
        u = dynamics.controls()
        found, wanted = values(dynamics, p.rollout(u), u)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_large_blocks_and_codes_are_not_copied(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with problem_on(build("bert"), LoRA(rank=1), HeadTuning()) as (_, dynamics, controlled):
        assert dynamics.alike() is not None
        dynamics._alike_blocks = None
        monkeypatch.setattr(alike_blocks, "is_quantised", lambda weight: weight.ndim == 2)
        assert dynamics.alike() is None
        monkeypatch.undo()
        dynamics._alike_blocks = None
        block = controlled.host.sites.blocks[0]
        most = 2 * sum(p.numel() for p in block.parameters())  # and the controls are more
        monkeypatch.setattr(alike_blocks, "MOST_STACKED", most)
        assert dynamics.alike() is None


def test_a_suspended_model_steps_as_its_base(build: Build) -> None:
    """A control that stands for a weight lies in the model's place only while it acts."""
    model = build("bert")
    with problem_on(model, FullFineTuning(), PromptTuning(length=1)) as (problem, dynamics, tuned):
        u = dynamics.controls()
        states = problem.rollout(u)
        with tuned.disable():
            assert dynamics.alike() is None
            base = dynamics.step(1, states[1], u[1])
            other = dynamics.step(1, states[1], 2 * u[1])
            block = tuned.host.sites.blocks[0]
            plain = block(states[1])
            assert torch.equal(base, plain if isinstance(plain, Tensor) else plain[0])
            assert torch.equal(base, other)
        assert torch.equal(dynamics.step(1, states[1], u[1]), states[2])
        assert not torch.equal(base, states[2])


def test_calls_with_the_same_constants() -> None:
    state, mask = torch.zeros(1, 2, 3), torch.ones(2)

    def call(*args, **kwargs) -> BlockCall:
        found = BlockCall(nn.Identity(), (torch.zeros(1, 2, 3).requires_grad_(), *args), kwargs, ())
        found.end(state, ())
        found.release()
        return found

    first = call(mask, scale=0.5, flag=True, bias=state.requires_grad_())
    same = call(mask.clone(), scale=0.5, flag=True, bias=torch.ones(1).requires_grad_())
    assert first.has_constants_of(same)  # messages come from the state
    others = (
        call(mask + 1, scale=0.5, flag=True, bias=state),
        call(mask.float().double(), scale=0.5, flag=True, bias=state),
        call(mask, scale=0.25, flag=True, bias=state),
        call(mask, scale=0.5, flag=1, bias=state),
        call(mask, scale=0.5, flag=object(), bias=state),
        call(mask, scale=0.5, bias=state, flag=True),
        call(mask, scale=0.5, flag=True, bias=state, more=None),
    )
    assert [first.has_constants_of(other) for other in others] == [False] * 7
