"""Below the lowest control nothing is kept for the backward pass, but states can be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    BitFit,
    Delta,
    HeadTuning,
    HoulsbyAdapter,
    LadderSideTuning,
    LastLayers,
    LoRA,
    PrefixTuning,
    PromptTuning,
    StateBasedTuning,
    Subspace,
    attach,
)
from deltacontrol.deltas.dynamics.frozen_states import FrozenStates
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, TEXT, assert_same, batch_of, move, out, snapshot, texts

Build = Callable[..., PreTrainedModel]
UPPER: list[Delta] = [
    LoRA(rank=2, layers=(1,)),
    HoulsbyAdapter(bottleneck=3, layers=(1,)),
    PrefixTuning(length=2, layers=(1,)),
    StateBasedTuning(rank=2, layers=(1,)),
    LastLayers(num_layers=1),
]


def names(value: Delta | str) -> str:
    return value if isinstance(value, str) else value.name


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("delta", UPPER, ids=names)
def test_nothing_is_kept_below_the_lowest_control(build: Build, family, delta) -> None:
    model = build(family, attention="sdpa")
    batch = batch_of(model)
    controlled = move(attach(model, delta))
    blocks = controlled.host.sites.blocks
    below: list[Tensor] = []
    reached: list[bool] = []

    def enter(_module, args, kwargs) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        assert not state.requires_grad
        reached.append(True)

    def pack(tensor: Tensor) -> Tensor:
        if not reached:
            below.append(tensor)
        return tensor

    handle = blocks[1].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out(controlled, batch).sum().backward()
    handle.remove()
    assert reached and not below
    controlled.detach()


def kept(build: Build, delta: Delta) -> int:
    """Bytes that a block keeps for the backward pass beside its parameters."""
    model = build("bert", attention="sdpa", dtype=torch.float32)
    controlled = move(attach(model, delta))
    own = {p.untyped_storage().data_ptr() for p in controlled.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = out(controlled, texts(model, (16,) * 8))
    del result
    controlled.detach()
    return sum(found.values())


def test_a_control_around_blocks_keeps_less_than_paths_at_all_linear_maps(build: Build) -> None:
    """No input of a frozen map is kept, because no weight of it needs a gradient."""
    every = ("attention.query", "attention.key", "attention.value", "attention.output")
    lora = LoRA(rank=2, sites=(*every, "mlp.up", "mlp.down"))
    assert kept(build, StateBasedTuning(rank=2)) <= 0.7 * kept(build, lora)


@pytest.mark.parametrize("family", [f for f in TEXT if f != "t5"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.one_in(2)
def test_a_pass_from_kept_states_is_the_whole_pass(build: Build, family, attention) -> None:
    model = build(family, attention=attention)
    before, batch = snapshot(model), batch_of(model)
    controlled = move(attach(model, LoRA(rank=2, layers=(1,)), HeadTuning()))
    frozen = FrozenStates(controlled, batch)
    assert frozen.num_frozen == 1
    whole = out(controlled, batch)
    calls: list[int] = []
    block = controlled.host.sites.blocks[0]
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    numbers = torch.tensor([4, 0, 9])
    for turn in range(3):
        with frozen.passing(numbers, batch["attention_mask"]):
            found = out(controlled, batch)
        assert torch.equal(found, whole)
        assert len(calls) == 1 and len(frozen) == 3, "the frozen block ran once"
        if turn:
            found.sum().backward()  # the controls get their gradients
    assert all(p.grad is not None for p in controlled.trainable().values())
    # In other company and with other padding.
    order, wider = [2, 0], texts(model, (7, 5, 7), width=9)
    wider = {k: v[order] for k, v in wider.items()}
    alone = texts(model, (7, 5, 7), width=9)
    with frozen.passing(torch.tensor([20, 21, 22]), alone["attention_mask"]):
        out(controlled, alone)
    mask = wider["attention_mask"]
    expected = out(controlled, wider)
    calls.clear()
    with frozen.passing(torch.tensor([22, 20]), mask):
        found = out(controlled, wider)
    assert not calls
    torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[family].tolerance)
    handle.remove()
    controlled.detach()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("family", "delta", "reason"),
    [
        ("bert", LoRA(rank=2), "first block or before it"),
        ("bert", PromptTuning(length=2), "first block or before it"),
        ("bert", Subspace(dimension=4), "first block or before it"),
        ("bert", BitFit(), "first block or before it"),
        ("bert", LadderSideTuning(reduction=4), "first block or before it"),
        ("t5", LoRA(rank=2, layers=(1,)), "hand more than the state"),
        ("bart", LoRA(rank=2, layers=(1,)), "two stacks"),
    ],
    ids=names,
)
def test_states_that_change_are_refused(build: Build, family, delta, reason) -> None:
    model = build(family)
    controlled = move(attach(model, delta))
    with pytest.raises(InputError, match=f"{reason}.*cache_frozen"):
        FrozenStates(controlled, batch_of(model))
    controlled.detach()


def test_padding_before_tokens_is_refused(build: Build) -> None:
    model = build("bert")
    controlled = attach(model, LoRA(rank=2, layers=(1,)))
    batch = batch_of(model)
    frozen = FrozenStates(controlled, batch)
    mask = batch["attention_mask"].flip(1)
    assert not bool(mask.all()), "some row is padded"
    with (
        pytest.raises(InputError, match="padding before tokens"),
        frozen.passing(torch.arange(len(mask)), mask),
    ):
        pass
    controlled.detach()


def test_all_blocks_lie_below_a_head(build: Build) -> None:
    model = build("bert")
    controlled = attach(model, HeadTuning())
    assert FrozenStates(controlled, batch_of(model)).num_frozen == 2
    controlled.detach()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("strip", [True, False])
def test_rows_of_a_prompt_that_is_not_trained_are_kept(build: Build, family, strip) -> None:
    """Texts of other lengths, and another padding, with the prompt in front of each."""
    kind = "classification" if strip else "backbone"
    model = build(family, kind, attention="sdpa")
    controlled = attach(model, PromptTuning(length=3, strip=strip), LoRA(rank=2, layers=(1,)))
    move(controlled)
    controlled.train_only(["lora"])
    batch = batch_of(model)
    frozen = FrozenStates(controlled, batch)
    assert frozen.num_frozen == 1
    mask, whole = batch["attention_mask"], out(controlled, batch)
    if not strip:  # the states of padding are those of nothing
        seen = torch.nn.functional.pad(mask, (3, 0), value=1)[..., None]
        whole = whole * seen
    for _ in range(2):
        with frozen.passing(torch.arange(3), mask):
            found = out(controlled, batch) * (1 if strip else seen)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    short = {name: value[:1, :5] for name, value in batch.items()}
    with frozen.passing(torch.tensor([0]), short["attention_mask"]):
        found = out(controlled, short)
    torch.testing.assert_close(found, out(controlled, short), rtol=0, atol=1e-6)
    controlled.detach()


def test_states_follow_the_controls_that_made_them(build: Build) -> None:
    model = build("bert", attention="sdpa")
    controlled = attach(model, PromptTuning(length=2), LoRA(rank=2, layers=(1,)))
    controlled.train_only(["lora"])
    batch, numbers = batch_of(model), torch.arange(3)
    mask = batch["attention_mask"]
    frozen = FrozenStates(controlled, batch)
    with frozen.passing(numbers, mask):
        before = out(controlled, batch)
    state = controlled.state()
    rows = next(name for name in state if name.startswith("prompt"))
    controlled.load(state | {rows: state[rows].flip(-1)})
    expected = out(controlled, batch)
    assert not torch.allclose(before, expected)
    with frozen.passing(numbers, mask):
        assert torch.equal(out(controlled, batch), expected)
    controlled.train_only(None)
    with pytest.raises(InputError, match="prompt.* was not trained .* and is now"):
        frozen.passing(numbers, mask).__enter__()
    controlled.detach()
