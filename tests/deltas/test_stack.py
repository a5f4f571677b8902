"""Copies that share a pass do what each of them does alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    BitFit,
    Delta,
    DeltaStack,
    HeadTuning,
    HoulsbyAdapter,
    LoRA,
    PrefixTuning,
    PromptTuning,
    attach_many,
)
from deltacontrol.deltas.editing.copies import Copies
from deltacontrol.deltas.ensemble.stack import unstackable
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import (
    DEEP,
    FAMILIES,
    METHODS,
    REPRESENTATIVE,
    assert_same,
    attached,
    gradients,
    relative,
    snapshot,
    texts,
)

Build = Callable[..., PreTrainedModel]
SEEDS = (5, 0, 3)


def moved(stack: DeltaStack) -> DeltaStack:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in stack.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return stack


def batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """One for each copy, of the same shape."""
    lengths = (7, 5)
    return [texts(model, lengths, seed=seed) for seed in SEEDS]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def check(build: Build, family: str, deltas: tuple[Delta, ...], attention: str = "sdpa") -> None:
    """Outputs and gradients of copies in one pass are those of each copy attached alone."""
    model = build(family, attention=attention)
    before, parts = snapshot(model), batches(model)
    stack = moved(attach_many(model, *deltas, seeds=SEEDS))
    states = [stack.state(k) for k in range(3)]
    together = stack(**joined(parts))[0]
    loss = together.square().sum()
    found = dict(zip(stack.trainable(), gradients(loss, stack.trainable().values()), strict=True))
    with torch.no_grad():
        alone = stack(start=1, stop=2, **parts[1])[0]  # one copy is an ordinary pass
        pair = stack(start=1, stop=3, **joined(parts[1:]))[0]
    stack.detach()
    assert_same(before, snapshot(model))
    tolerance = FAMILIES[family].tolerance
    for k, part in enumerate(parts):
        controlled = attached(model, *deltas, seed=SEEDS[k])
        start = controlled.state()
        controlled.load(states[k])
        assert any(not torch.equal(start[name], states[k][name]) for name in start)
        output = controlled(**part)[0]
        rows = slice(2 * k, 2 * k + 2)
        assert relative([together[rows]], [output]) <= tolerance
        if k == 1:
            assert relative([alone], [output]) <= tolerance
        if k:
            assert relative([pair[2 * k - 2 : 2 * k]], [output]) <= tolerance
        expected = gradients(output.square().sum(), controlled.trainable().values())
        own = [found[name][k] for name in controlled.trainable()]
        assert relative(own, expected) <= 10 * tolerance
        controlled.detach()


CELLS = [
    (family, method)
    for family, method in DEEP
    if family == "bert"
    or (method in REPRESENTATIVE and family in ("gpt2", "gpt_neox", "t5", "vit"))
]


@pytest.mark.parametrize(("family", "method"), CELLS, ids=lambda value: value)
@pytest.mark.one_in(4)
def test_copies_in_one_pass_are_each_copy_alone(build: Build, family: str, method: str) -> None:
    delta = METHODS[method][0]
    model = build(family, attention="sdpa")
    controlled = attached(model, delta)
    reason = unstackable(controlled.host)
    controlled.detach()
    if not reason:
        check(build, family, (delta,))
        return
    before = snapshot(model)
    with pytest.raises(InputError, match=f"cannot be stacked: {reason}.*one after another"):
        attach_many(model, delta, seeds=SEEDS)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_deltas_go_together(build: Build, family: str) -> None:
    deltas = [LoRA(rank=2), PrefixTuning(2, init_std=1.0), HoulsbyAdapter(bottleneck=3)]
    if family != "t5":
        deltas.append(HeadTuning())
    if family != "vit":
        deltas.append(PromptTuning(length=3))
    check(build, family, tuple(deltas), attention="eager")


@pytest.mark.parametrize(
    ("family", "kind", "labels"),
    [
        ("bert", "classification", torch.tensor([0, 1, 1, 0, 0, 1])),
        ("bert", "classification", torch.tensor([[1.0, 0], [0, 0], [0.5, 1]] * 2).double()),
        ("gpt2", "causal-lm", None),
        ("bert", "masked-lm", None),
    ],
)
def test_losses_are_those_of_the_model(build: Build, family, kind, labels) -> None:
    model = build(family, kind)
    model.config.problem_type = None  # a pass with labels sets it
    parts = batches(model)
    whole = joined(parts)
    if labels is None:
        labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
        labels[0, :3] = -100  # another number of targets in each copy
    stack = moved(attach_many(model, LoRA(rank=2), seeds=SEEDS))
    found = stack.losses(stack(**whole).logits, labels, 3)
    for k in range(3):
        expected = stack.copy(k)(**parts[k], labels=labels[2 * k : 2 * k + 2]).loss
        # transformers takes the loss of a language model in float32.
        tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found[k], expected.double(), rtol=tolerance, atol=0)
    stack.detach()


def test_losses_of_a_regression(build: Build) -> None:
    model = build("bert", num_labels=1)
    parts, labels = batches(model), torch.randn(6, dtype=torch.float64)
    stack = moved(attach_many(model, BitFit(), HeadTuning(), seeds=SEEDS))
    found = stack.losses(stack(**joined(parts)).logits, labels, 3)
    expected = stack.copy(2)(**parts[2], labels=labels[4:]).loss
    torch.testing.assert_close(found[2], expected, rtol=1e-12, atol=0)
    stack.detach()


def test_mistakes_are_named(build: Build) -> None:
    model = build("bert")
    with pytest.raises(InputError, match="at least one seed"):
        attach_many(model, LoRA(rank=2), seeds=())
    stack = attach_many(model, LoRA(rank=2), seeds=SEEDS)
    with pytest.raises(InputError, match="7 rows cannot be shared by 3 copies"):
        stack(**texts(model, (3,) * 7))
    with pytest.raises(InputError, match="has deltas already"):
        attach_many(model, LoRA(rank=2), seeds=SEEDS)
    stack.detach()


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_a_stack_may_change_its_dtype(build: Build, method: str) -> None:
    """Constants, such as the frozen matrices of VeRA, go with it."""
    model = copy.deepcopy(build("bert", attention="sdpa"))
    stack = moved(attach_many(model, METHODS[method][0], seeds=SEEDS))
    whole = joined(batches(model))
    with torch.no_grad():
        exact = stack(**whole).logits
        found = stack.to(torch.float32)(**whole).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
    stack.detach()


def test_dropout_obeys_the_mode_of_the_stack(build: Build) -> None:
    model = build("bert")
    stack = moved(attach_many(model, LoRA(rank=2, dropout=0.5), seeds=SEEDS))
    whole = joined(batches(model))
    for training in (True, False):
        stack.train(training)
        with torch.no_grad():
            same = torch.equal(stack(**whole).logits, stack(**whole).logits)
        assert same is not training
    stack.detach()


@pytest.mark.parametrize("tokens", [4, 6, 7])
def test_positions_are_no_rows(build: Build, tokens: int) -> None:
    """One list of positions for all rows, as long as a multiple of the rows of one copy or of all.

    Three copies have two rows each here, and GPT-2 looks the list up as it is.
    """
    model = build("gpt2", "backbone", attention="sdpa")
    parts = [texts(model, (tokens, tokens), seed=seed) for seed in SEEDS]
    stack = moved(attach_many(model, PrefixTuning(2, init_std=1.0, shift=True), seeds=SEEDS))
    positions = torch.arange(tokens)
    together = stack(**joined(parts), position_ids=positions)[0]
    for k, part in enumerate(parts):
        expected = stack.copy(k)(**part, position_ids=positions)[0]
        torch.testing.assert_close(together[2 * k : 2 * k + 2], expected, rtol=0, atol=1e-12)
    stack.detach()


@pytest.mark.parametrize("size", [2, 4, 6, 12])
def test_what_a_law_passes_on_unchanged_stays(size: int) -> None:
    """Also a table whose first size is that of one copy's rows."""
    copies = Copies({}, {}, size=3, rows=6, used={})
    states, table, line = torch.randn(6, 5, 4), torch.randn(size, 3), torch.arange(size)

    def law(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert args[0].shape == (2, 5, 4) and kwargs["line"] is line
        return (args[0] + 1,), kwargs | {"line": kwargs["line"] + 1}

    args, kwargs = copies.call(law, (states,), {"table": table, "line": line})
    assert torch.equal(args[0], states + 1)
    assert torch.equal(kwargs["table"], table)
    assert torch.equal(kwargs["line"], line + 1)


def test_an_embedding_of_one_list_of_positions_is_refused(build: Build) -> None:
    """Its six rows are those of positions, and would be shared out among the copies."""
    model = build("gpt2", "backbone", attention="sdpa")
    parts = [texts(model, (6, 6), seed=seed) for seed in SEEDS]
    stack = attach_many(model, LoRA(rank=2, sites=("wpe",)), seeds=SEEDS)
    with pytest.raises(
        InputError, match=r"shape \(6, 32\), which does not hold 2 rows of each of 3"
    ):
        stack(**joined(parts), position_ids=torch.arange(6))
    stack.detach()
