"""Subspaces of what other deltas train, and every kind of projection by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    BitFit,
    Delta,
    DeltaModel,
    HeadTuning,
    LoRA,
    StructuredSubspace,
    Subspace,
    attach,
    parse,
)
from deltacontrol.deltas.methods.parts.coordinates import held
from deltacontrol.theory.dimension.projections import RANDOM_PROJECTIONS
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import METHODS, REFUSED, batch_of, move, out

Build = Callable[..., PreTrainedModel]

# What asks the training loop for something that only parameters of its own can answer.
DEMANDING = ("adalora", "fisher-mask", "lottery-ticket", "diff-pruning")
NESTED = ("subspace", "said")
PAIRS = [
    (family, name)
    for family, names in (("bert", METHODS), ("gpt2", ("bitfit", "lora", "prefix", "prompt")))
    for name in names
    if name not in NESTED + DEMANDING and (family, name) not in REFUSED
]


def text_of(delta: Delta) -> str:
    """The delta as the field ``of`` writes it."""
    items = []
    for field in fields(delta):  # type: ignore[arg-type]
        value = getattr(delta, field.name)
        if value != field.default:
            written = "+".join(map(str, value)) if isinstance(value, tuple) else value
            items.append(f"{field.name}={written}")
    return delta.name + (":" + ";".join(items) if items else "")


def by_hand(model: PreTrainedModel, of: str, values: Tensor) -> DeltaModel:
    """The inner delta itself, on a copy of the model, its parameters set to ``values``."""
    plain = attach(copy.deepcopy(model), parse(of.replace(";", ",")))
    with torch.no_grad():
        parts = values.split([p.numel() for p in plain.trainable().values()])
        for parameter, part in zip(plain.trainable().values(), parts, strict=True):
            parameter.copy_(part.view_as(parameter))
    return plain


def position(controlled: DeltaModel, of_z: str = "subspace.z") -> Tensor:
    """``u_0 + P z`` through the dense matrix."""
    coordinates: Any = controlled.controls.get_submodule(of_z)
    return coordinates.start + coordinates.projection.dense() @ coordinates.z.detach()


@pytest.mark.parametrize(("family", "name"), PAIRS)
@pytest.mark.one_in(2)
def test_every_delta_in_a_subspace(build: Build, family: str, name: str) -> None:
    """The model computes as under the inner delta at ``u_0 + P z``; z alone is trained."""
    delta, _ = METHODS[name]
    of = text_of(delta)
    assert parse(of.replace(";", ",")) == delta
    model = build(family)
    batch = batch_of(model)
    untouched = out(model, batch).detach()
    outer = Subspace(dimension=3, projection="dense", projection_seed=1, of=of)
    assert outer.trains_head == delta.trains_head and outer.unmergeable == delta.unmergeable
    controlled = attach(model, outer)
    start = out(controlled, batch).detach()
    assert torch.equal(start, untouched) == delta.identity_at_start
    assert controlled.num_trainable == 3 and list(controlled.trainable()) == ["subspace.z.z"]
    move(controlled, scale=5.0)
    output = out(controlled, batch)
    (gradient,) = torch.autograd.grad(output.square().sum(), controlled.trainable().values())
    found, values = output.detach(), position(controlled)
    assert float((found - start).abs().max()) > 1e-3 and float(gradient.norm()) > 1e-4
    controlled.detach()
    assert torch.equal(out(model, batch).detach(), untouched)
    plain = by_hand(model, of, values)
    torch.testing.assert_close(out(plain, batch).detach(), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DEMANDING + NESTED)
def test_what_cannot_work_is_refused(build: Build, name: str) -> None:
    model = build("bert")
    before = out(model, batch_of(model)).detach()
    message = "its own parameters" if name in DEMANDING else "is a subspace itself"
    with pytest.raises(InputError, match=message):
        attach(model, Subspace(dimension=3, of=text_of(METHODS[name][0])))
    assert torch.equal(out(model, batch_of(model)).detach(), before)
    assert attach(model, LoRA(rank=2)).detach() is model


def test_gains_of_layers_over_a_delta(build: Build) -> None:
    """``u_i + lambda_i (P z)_i``: two blocks have a gain each, and LoRA acts nowhere else."""
    controlled = attach(build("bert"), StructuredSubspace(dimension=5, of="lora:rank=2"))
    move(controlled, scale=3.0)
    state = controlled.state()
    gains = state["said.coordinates.gains"]
    coordinates: Any = controlled.controls.get_submodule("said.coordinates.subspace")
    assert len(gains) == 2 and len(coordinates.z) == 3
    change = coordinates.projection.dense() @ coordinates.z.detach()
    half = len(change) // 2
    scaled = torch.cat([gains[0] * change[:half], gains[1] * change[half:]])
    batch = batch_of(controlled.model)
    found = out(controlled, batch).detach()
    plain = by_hand(controlled.detach(), "lora:rank=2", coordinates.start + scaled)
    torch.testing.assert_close(out(plain, batch).detach(), found, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_the_adjoint(build: Build) -> None:
    """``P'`` of the gradient that the inner delta's own parameters have."""
    controlled = move(attach(build("bert"), Subspace(dimension=4, of="lora:rank=2")), scale=3.0)
    batch = batch_of(controlled.model)
    out(controlled, batch).square().sum().backward()
    coordinates: Any = controlled.controls.get_submodule("subspace.z")
    found, values = coordinates.z.grad, position(controlled)
    plain = by_hand(controlled.detach(), "lora:rank=2", values)
    out(plain, batch).square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in plain.trainable().values()])  # type: ignore[union-attr]
    expected = coordinates.projection.T @ gradient
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing_changes_nothing(build: Build) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(build("bert")).train()
        controlled = attach(model, Subspace(dimension=4, of="lora:rank=2"))
        move(controlled, scale=3.0)
        if checkpointing:
            model.activation_checkpointing_enable()
        batch = batch_of(model)
        output = out(controlled, batch).square().sum()
        with torch.no_grad():  # an evaluation before the backward pass
            out(controlled, batch)
        output.backward()
        gradients.append(controlled.trainable()["subspace.z.z"].grad)
        controlled.detach()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("text", ["subspace:dimension=4", "said:dimension=7,of=lora:rank=2"])
def test_an_evaluation_projects_once(
    build: Build, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    controlled = move(attach(build("bert"), parse(text)), scale=3.0)
    batch, calls = batch_of(controlled.model), 0
    product = RANDOM_PROJECTIONS["fastfood"]._product

    def counted(self: Any, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return product(self, z)

    monkeypatch.setattr(RANDOM_PROJECTIONS["fastfood"], "_product", counted)
    with torch.no_grad():
        expected = out(controlled, batch)
        with held(controlled):
            assert all(torch.equal(out(controlled, batch), expected) for _ in range(3))
        assert calls == 2
        move(controlled, scale=1.0)
        assert not torch.equal(out(controlled, batch), expected) and calls == 3
    controlled.detach()


@pytest.mark.parametrize("of", ["lora:rank=2", "bitfit", "layer-norm"])
def test_merging(build: Build, of: str) -> None:
    model = copy.deepcopy(build("bert"))
    batch = batch_of(model)
    controlled = move(attach(model, Subspace(dimension=4, of=of)), scale=3.0)
    found = out(controlled, batch).detach()
    merged = controlled.merge()
    torch.testing.assert_close(out(merged, batch).detach(), found, rtol=1e-12, atol=1e-12)
    assert all(isinstance(p, torch.nn.Parameter) for p in merged.parameters())


def test_saved_controls_hold_what_was_drawn(build: Build) -> None:
    """The initial values of A are saved: another seed of attach, with P's own, reads them back."""
    delta = Subspace(dimension=4, of="lora:rank=2", projection_seed=5)
    first = move(attach(copy.deepcopy(build("bert")), delta, HeadTuning(), seed=1), scale=3.0)
    batch = batch_of(first.model)
    second = attach(copy.deepcopy(build("bert")), delta, HeadTuning(), seed=2)
    assert not torch.allclose(out(first, batch), out(second, batch))
    second.load(first.state())
    assert torch.equal(out(first, batch), out(second, batch))


def test_other_draws_are_refused(build: Build) -> None:
    """Fastfood's seed meant another map once: such controls must not be misread."""
    controlled = attach(build("bert"), Subspace(dimension=4))
    state = controlled.state()
    older = {**state, "subspace.z.fixed_draws": torch.tensor(1)}
    with pytest.raises(InputError, match=r"fixed_draws is 1, but .* 2: .*train them again"):
        controlled.load(older)
    del state["subspace.z.fixed_draws"]
    with pytest.raises(InputError, match=r"1 missing .*fixed_draws"):
        controlled.load(state)
    controlled.detach()
    dense = attach(build("bert"), Subspace(dimension=4, projection="dense"))
    assert not any("draws" in key for key in dense.state())
    dense.detach()


@pytest.mark.parametrize("kind", list(RANDOM_PROJECTIONS))
def test_every_projection_by_name(build: Build, kind: str) -> None:
    model = build("bert")
    written = parse(
        f"subspace:dimension=4,projection={kind},of=lora:rank=2;alpha=3,projection_seed=7"
    )
    assert written == Subspace(4, kind, 7, "lora:rank=2;alpha=3")  # type: ignore[arg-type]
    controlled = move(attach(model, written), scale=3.0)
    coordinates: Any = controlled.controls.get_submodule("subspace.z")
    direct = RANDOM_PROJECTIONS[kind](coordinates.full_dim, 4, 7, torch.float64)
    assert torch.equal(coordinates.projection.dense(), direct.dense())
    values = position(controlled)
    found = out(controlled, batch_of(model)).detach()
    plain = by_hand(controlled.detach(), "lora:rank=2,alpha=3", values)
    torch.testing.assert_close(out(plain, batch_of(model)).detach(), found, rtol=1e-12, atol=1e-12)


def test_bad_fields(build: Build) -> None:
    with pytest.raises(InputError, match="projection of the delta subspace"):
        Subspace(projection="gauss")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lorra"):
        Subspace(of="lorra")
    with pytest.raises(InputError, match="dimension 1000 is above the 640 parameters of the delta"):
        attach(build("bert"), Subspace(of="bitfit"))
    with pytest.raises(InputError, match="two deltas"):
        attach(build("bert"), Subspace(dimension=3, of="bitfit"), BitFit())
