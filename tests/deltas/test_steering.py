"""Steering a Transformer: the adjoints, the promise of the linear model, what the model does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, attach
from deltacontrol.deltas.dynamics.transformer import control_problem
from deltacontrol.deltas.feedback.laws import attach_feedback, attended
from deltacontrol.deltas.feedback.steering import steer
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.correction import AdditiveControl
from deltacontrol.theory.feedback.steering import steer_output
from tests.deltas import zoo

F64 = torch.float64
Build = Callable[..., PreTrainedModel]


def margin(logits: Tensor) -> Tensor:
    return logits[:, 1:2] - logits[:, :1]


def gap(family: str, build: Build, change: float, rounds: int = 1) -> tuple[float, Tensor]:
    model = build(family)
    batch = zoo.batch_of(model)
    with torch.no_grad():
        goal = margin(zoo.out(model, batch)) + change
    found = steer(model, batch, margin, goal, rounds=rounds)
    assert float((found.predicted - goal).abs().max()) < 1e-9 * max(1.0, float(goal.abs().max()))
    with attach_feedback(model, found.law):
        again = zoo.out(model, batch)
    torch.testing.assert_close(again.detach(), found.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(margin(again).detach(), found.achieved, rtol=0, atol=1e-12)
    return float((found.achieved - goal).abs().max()), found.achieved - found.initial


@pytest.mark.parametrize("family", ["bert", "gpt2", "electra", "roberta", "mpnet"])
def test_the_miss_is_of_second_order(family: str, build: Build) -> None:
    small, _ = gap(family, build, 1e-4)
    large, moved = gap(family, build, 2e-4)
    assert bool((moved > 1e-4).all())  # it does change the margin, of every example
    assert large < 0.05 * 2e-4
    assert large / small == pytest.approx(4.0, rel=0.05)


def test_feedback_repairs_its_own_linear_model(build: Build) -> None:
    """DistilBERT's head is piecewise linear, so the law meets the target at its last step."""
    miss, moved = gap("distilbert", build, 1e-2)
    assert miss < 1e-12
    assert bool((moved > 0.9e-2).all())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_repeated_steering_reaches_the_target(family: str, build: Build) -> None:
    first, _ = gap(family, build, 0.1)
    last, _ = gap(family, build, 0.1, rounds=8)
    assert last < 1e-5 < first


def test_is_the_law_of_the_layered_system(build: Build) -> None:
    """One backward pass with taps, against the stage-wise sweep of theory."""
    model = build("bert")
    batch = zoo.batch_of(model)
    controlled = zoo.move(attach(model, LoRA(rank=2)))
    labelled = {**batch, "labels": torch.tensor([0, 1, 0])}
    problem = control_problem(controlled, labelled)
    dynamics = problem.dynamics
    added = AdditiveControl(problem, dynamics.controls())  # type: ignore[attr-defined]
    assert added.control_sizes == (0, *(zoo.TOKENS * zoo.d,) * 3)
    goal = torch.tensor([[0.3], [-0.2], [1.0]], dtype=F64)
    mask = attended(batch, torch.zeros(3, zoo.TOKENS, 1)).unsqueeze(-1)
    expected = steer_output(
        added, problem.x0, margin, goal, weight=4.0, control_cost=0.2, masks=[None, *[mask] * 3]
    )
    found = steer(controlled, batch, margin, goal, weight=4.0, control_cost=0.2)
    for t in range(3):
        for name in ("adjoints", "information", "miss", "states"):
            a, b = getattr(found.law, name)[t], getattr(expected, name)[t + 1]
            assert zoo.relative([a], [b]) < 1e-11, (t, name)
    torch.testing.assert_close(found.predicted, expected.predicted)
    controlled.detach()


def test_the_linear_model_is_exact_at_the_readout(build: Build) -> None:
    """gpt2 without its last norm reads the logits off linearly: the last state alone suffices."""
    model = build("gpt2")
    batch = zoo.batch_of(model, pad=0)
    inner = model.get_submodule("transformer")
    norm = inner.get_submodule("ln_f")
    inner.add_module("ln_f", torch.nn.Identity())
    try:
        goal = torch.tensor([5.0], dtype=F64)
        with torch.no_grad():
            start = margin(zoo.out(model, batch))
        found = steer(model, batch, margin, goal, site="transformer.h.1", weight=2.0)
    finally:
        inner.add_module("ln_f", norm)
    assert zoo.relative([found.achieved], [found.predicted]) < 1e-12
    # closed form of one step: the miss shrinks by 1/(1 + w |a|^2 / r)
    weight = model.get_parameter("score.weight")
    a = weight[1] - weight[0]
    left = (start - goal) / (1 + 2.0 * a.square().sum())
    assert zoo.relative([found.achieved - goal], [left.detach()]) < 1e-12


def test_steers_the_next_token_at_chosen_positions(build: Build) -> None:
    model = build("gpt2", "causal-lm")
    batch = zoo.batch_of(model, pad=0)
    with torch.no_grad():
        best = zoo.out(model, batch)[:, -1].argmax(-1)
    wanted = (best + 1) % zoo.V
    rows = torch.arange(3)

    def lead(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last[rows, wanted] - last[rows, best]).unsqueeze(1)

    positions = torch.zeros(3, zoo.TOKENS, dtype=torch.bool)
    positions[:, -1] = True
    goal = torch.tensor([1.0], dtype=F64)
    found = steer(model, batch, lead, goal, positions=positions, rounds=3)
    # within a hundredth of the way, although the way is long and the model far from linear
    assert bool(((found.achieved - goal).abs() < 0.01 * (goal - found.initial)).all())
    for chosen in found.law.adjoints:
        assert chosen is not None and not chosen[:, :, :-1].any() and chosen.any()
    with attach_feedback(model, found.law):
        steered = zoo.out(model, batch, use_cache=False)
    plain = zoo.out(model, batch, use_cache=False)
    assert torch.equal(steered[:, :-1], plain[:, :-1])  # a causal model: nothing before moves
    assert bool((lead(steered) > 0).all()) and bool((lead(plain) < 0).all())


def test_examples_do_not_interact_and_padding_is_not_moved(build: Build) -> None:
    model = build("bert")
    batch = zoo.batch_of(model)
    goal = torch.tensor([2.0], dtype=F64)
    together = steer(model, batch, margin, goal)
    for t, a in enumerate(together.law.adjoints):
        assert a is not None and not a[0, :, -2:].any(), t
    for i in range(3):
        one = {k: v[i : i + 1, : 5 if i == 0 else None] for k, v in batch.items()}
        alone = steer(model, one, margin, goal)
        assert zoo.relative([together.achieved[i]], [alone.achieved[0]]) < 1e-9
        assert float(together.energy[i]) == pytest.approx(float(alone.energy[0]), rel=1e-9)


def test_nothing_is_left_behind(build: Build) -> None:
    model = build("bert")
    batch = zoo.batch_of(model)
    before = zoo.snapshot(model)
    steer(model, batch, margin, torch.tensor([2.0]), rounds=2)
    zoo.assert_same(before, zoo.snapshot(model))
    with pytest.raises(InputError, match="outputs have shape"):
        steer(model, batch, lambda logits: logits[:, 0], torch.tensor([2.0]))
    with pytest.raises(InputError, match="rounds is 0"):
        steer(model, batch, margin, torch.tensor([2.0]), rounds=0)
    with pytest.raises(InputError, match="positions has shape"):
        steer(model, batch, margin, torch.tensor([2.0]), positions=torch.ones(3, 2))
    with pytest.raises(InputError, match="does not react"):
        steer(model, batch, margin, torch.tensor([2.0]), positions=torch.zeros(3, zoo.TOKENS))
    zoo.assert_same(before, zoo.snapshot(model))
    model.train()
    with pytest.raises(InputError, match="training mode"):
        steer(model, batch, margin, torch.tensor([2.0]))
    model.eval()


def test_steers_the_real_model(minilm_l6: str) -> None:
    """The margin of MiniLM's untrained head."""
    from deltacontrol.experiments import models

    model, tokenizer = models.load(minilm_l6, kind="classification", num_labels=2)
    batch = dict(tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt"))
    goal = torch.tensor([0.5])
    found = steer(model, batch, margin, goal, rounds=3)
    assert float((found.initial - goal).abs().min()) > 0.3
    assert float((found.achieved - goal).abs().max()) < 0.01
    assert float(found.relative.max()) < 0.25
