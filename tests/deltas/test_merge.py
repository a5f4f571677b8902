"""Merging: the plain model computes what the controlled one did, to the rounding of its dtype."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    DoRA,
    HeadTuning,
    LastLayers,
    LoRA,
    PrefixTuning,
    Subspace,
    VeRA,
    attach,
)
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import (
    FAMILIES,
    METHODS,
    PAIRS,
    assert_same,
    attached,
    batch_of,
    cells,
    move,
    one_of_a_kind,
    out,
    snapshot,
)

Build = Callable[..., PreTrainedModel]
MERGEABLE = [n for n, (delta, _) in METHODS.items() if not delta.unmergeable]
# All methods on these, and some of each kind on every architecture.
BROAD = {"bert", "gpt2", "llama", "gpt_neox"}
DEEP = {"lora", "dora", "ia3", "bitfit", "selected-modules", "random-mask", "said"}
CELLS = [(f, n) for f, n in PAIRS if n in MERGEABLE and (f in BROAD or n in DEEP)]
# What float64 makes of the same controls, rounded once. The others take something else of the
# dtype: gains (dora, ia3), a random pair (vera), a projection, a Fisher mask.
SUMS = ("adalora", "bitfit", "full", "loha", "lokr", "lora", "random-mask")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize(("family", "method"), cells(CELLS, ("bert", "gpt2")))
@pytest.mark.one_in(4)
def test_the_merged_model_computes_the_same(build: Build, family, method):
    base = build(family)
    model = copy.deepcopy(base)
    batch = batch_of(model)
    controlled = move(attached(model, METHODS[method][0]), scale=0.05)
    with torch.no_grad():
        expected = out(controlled, batch)
        assert controlled.merge() is model
        found = out(model, batch)
        assert not torch.equal(found, out(base, batch))
    tolerance = FAMILIES[family].tolerance * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    before, after = snapshot(base), snapshot(model)
    for part in ("requires_grad", "attention", "hooks", "marks"):
        assert before[part] == after[part], part
    with pytest.raises(InputError, match="were detached"):
        controlled(**batch)


def cast(build, family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model of this dtype, and one in float64 with the same numbers."""
    model = copy.deepcopy(build(family)).to(dtype)
    return model, copy.deepcopy(model).double()


@DTYPES
@pytest.mark.parametrize("method", one_of_a_kind(MERGEABLE))
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.one_in(5)
def test_merging_rounds_once(build, family, method, dtype):
    """Logits within 16 units of roundoff of the largest; weights within one of the exact sum."""
    model, exact = cast(build, family, dtype)
    batch = batch_of(model)
    delta = METHODS[method][0]
    controlled, reference = attached(model, delta), attached(exact, delta)
    move(controlled, scale=0.05)
    reference.load({k: v.double() if v.is_floating_point() else v
                    for k, v in controlled.state().items()})  # fmt: skip
    in_place = all(merge.whole for merge in controlled.host.merges)
    with torch.no_grad():
        expected = out(controlled, batch)
        controlled.merge()
        found = out(model, batch)
    if in_place:  # the forward pass computed with the merged weights already
        assert torch.equal(found, expected)
    bound = 16 * torch.finfo(dtype).eps / 2 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    reference.merge()
    if method in SUMS:
        half_unit = torch.finfo(dtype).eps / 2
        for (name, rounded), sum_ in zip(model.named_parameters(), exact.parameters(), strict=True):
            error = (rounded.double() - sum_).abs()
            assert bool((error <= half_unit * sum_.abs() * (1 + 1e-9)).all()), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [n for n in MERGEABLE if METHODS[n][0].identity_at_start])
@pytest.mark.one_in(2)
def test_merging_an_untrained_delta_changes_no_bit(build, method, dtype):
    model, _ = cast(build, "gpt2", dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attached(model, METHODS[method][0]).merge()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", [n for n, (delta, _) in METHODS.items() if delta.unmergeable])
def test_what_cannot_be_merged_says_why(build, method):
    model = build("bert")
    delta = METHODS[method][0]
    controlled = attach(model, delta)
    during = snapshot(model)
    with pytest.raises(InputError, match="cannot be merged: .*(detach|attached)"):
        controlled.merge()
    assert_same(during, snapshot(model))
    out(controlled, batch_of(model))
    controlled.detach()


def test_a_tied_weight_is_refused(build):
    """GPT-2's head is its embedding: what acts at the head alone would change both."""
    model = build("gpt2", "causal-lm")
    for delta in (LoRA(rank=2, sites=("lm_head",)), DoRA(rank=2, sites=("lm_head",))):
        controlled = attach(model, delta)
        with pytest.raises(InputError, match=r"lm_head\.weight, which is tied to .*wte.*Untie"):
            controlled.merge()
        controlled.detach()
    untied = copy.deepcopy(build("llama", "causal-lm"))
    controlled = move(attach(untied, LoRA(rank=2, sites=("lm_head",))))
    expected = out(controlled, batch_of(untied)).detach()
    torch.testing.assert_close(
        out(controlled.merge(), batch_of(untied)).detach(), expected, rtol=0, atol=1e-5
    )


def test_all_is_refused_if_one_is(build):
    model = build("bert")
    before = snapshot(model)
    controlled = move(attach(model, LoRA(rank=2), PrefixTuning(length=2)))
    expected = out(controlled, batch_of(model)).detach()
    with pytest.raises(InputError, match="prefix cannot be merged"):
        controlled.merge()
    assert torch.equal(out(controlled, batch_of(model)).detach(), expected)
    controlled.detach()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "deltas",
    [
        (LoRA(rank=2), LastLayers(), HeadTuning()),
        (LastLayers(), LoRA(rank=2)),
        (DoRA(rank=2), Subspace(dimension=5)),
        (Subspace(dimension=5), DoRA(rank=2), LoRA(rank=1)),
        (LoRA(rank=3), DoRA(rank=2), VeRA(rank=4)),
        (DoRA(rank=2), LastLayers()),
    ],
    ids=lambda deltas: "+".join(delta.name for delta in deltas),
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox"])
def test_combinations_merge_as_they_act(build, family, deltas):
    """What stands for a parameter and what acts beside it, in any order."""
    model = copy.deepcopy(build(family))
    controlled = move(attach(model, *deltas))
    batch = batch_of(model)
    expected = out(controlled, batch).detach()
    found = out(controlled.merge(), batch).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[family].tolerance)


def test_merging_draws_nothing_at_random(build):
    """Hard-concrete gates are random while training; what is merged is their evaluation."""
    model = copy.deepcopy(build("bert"))
    controlled = move(attach(model, METHODS["diff-pruning"][0]))
    batch = batch_of(model)
    expected = out(controlled.eval(), batch).detach()
    controlled.train().merge()
    torch.testing.assert_close(out(model.eval(), batch).detach(), expected, rtol=0, atol=1e-12)
