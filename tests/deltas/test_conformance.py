"""What every delta promises, on every architecture that can carry it.

A cell of the support matrix is one test here; `test_conformance_deep` holds the dearer promises.
"""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel

from deltacontrol.deltas import Delta, attach
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import (
    FAMILIES,
    METHODS,
    PAIRS,
    assert_same,
    attached,
    batch_of,
    move,
    out,
    snapshot,
)

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(("family", "method"), PAIRS, ids=lambda value: value)
def test_a_delta_keeps_its_promises(build: Build, family: str, method: str) -> None:
    model, sizes, delta = build(family), FAMILIES[family], METHODS[method][0]
    batch, expected = batch_of(model), METHODS[method][1](sizes)
    base, before = list(model.parameters()), snapshot(model)
    with torch.no_grad():
        outputs = out(model, batch)

    # It has as many parameters as its formula, and trains them and nothing else.
    controlled = attached(model, delta)
    trained = controlled.trainable()
    assert controlled.num_trainable == expected
    assert [a.num_parameters for a in controlled.attachments] == [expected]
    assert controlled.num_total == sizes.total
    wanted = {id(p) for p in trained.values()}
    assert {id(p) for p in controlled.parameters() if p.requires_grad} == wanted
    assert not any(p.requires_grad for p in base)

    # It starts at the base model where it says so, and every control counts.
    with torch.no_grad():
        assert torch.equal(out(controlled, batch), outputs) == delta.identity_at_start
    moved = out(move(controlled), batch)
    assert not torch.equal(moved.detach(), outputs)
    moved.square().sum().backward()
    assert all(p.grad is None for p in base)
    for name, parameter in trained.items():
        if any(end in name for end in sizes.unused):
            continue
        # A key's bias shifts all scores of a query alike, which softmax ignores: zero up to noise.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) or "bias" in name, name

    # A second attach is refused, and so is one that fails late; neither leaves a trace.
    during = snapshot(model)
    for target in (model, controlled):
        with pytest.raises(InputError, match="has deltas already.*detach"):
            attach(target, delta)  # type: ignore[arg-type]
    assert_same(during, snapshot(model))

    # Its state is a copy, fit for safetensors, and goes in exactly or not at all.
    state, outputs_moved = load(save(controlled.state())), moved.detach()
    assert state.keys() >= trained.keys()
    assert not torch.equal(out(move(controlled), batch).detach(), outputs_moved)
    controlled.load(state)
    assert torch.equal(out(controlled, batch).detach(), outputs_moved)

    # Detaching restores the model bit for bit.
    assert controlled.detach() is model
    with torch.no_grad():
        assert torch.equal(out(model, batch), outputs)
    assert_same(before, snapshot(model))
    for use in (lambda: controlled(**batch), controlled.detach):
        with pytest.raises(InputError, match="were detached"):
            use()
    with pytest.raises(InputError, match="reaches"):
        attach(model, delta, _Refuses())
    assert_same(before, snapshot(model))

    # Attached again it takes the state up, with strict keys; loading is enough to prepare it.
    again = attach(model, delta)
    again.load(state)
    assert torch.equal(out(again, batch).detach(), outputs_moved)
    key = next(iter(trained))
    for wrong in (
        {k: v for k, v in state.items() if k != key},
        state | {"lora.nowhere.A": torch.zeros(1)},
        state | {key: torch.zeros(1, 2, 3)},
    ):
        with pytest.raises(InputError, match="lora.nowhere.A|" + key.replace(".", r"\.")):
            again.load(wrong)
    assert torch.equal(out(again, batch).detach(), outputs_moved)
    again.detach()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", METHODS)
def test_detaching_restores_the_flags_of_parameters(build: Build, method: str) -> None:
    model = build("gpt2")
    first = next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    attached(model, METHODS[method][0]).detach()
    assert [p.requires_grad for p in model.parameters()] == flags
    first.requires_grad_(True)


class _Refuses(Delta):
    """Reaches its turn and fails, as a delta does that finds a mistake late."""

    name = "refuses"

    def build(self, host) -> None:
        raise InputError("reaches the second delta")

    def num_parameters(self, host) -> int:
        return 0
