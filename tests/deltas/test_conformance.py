"""What every delta promises, on every architecture that can carry it: one test for each promise.

A cell of the support matrix is one `Cell`: its tests run one after another and share the model, so
that a delta is attached about three times for all of them. `test_conformance_deep` holds the
dearer promises.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import Delta, DeltaModel, attach
from deltacontrol.theory.errors import InputError
from tests.deltas import zoo
from tests.deltas.zoo import (
    FAMILIES,
    METHODS,
    PAIRS,
    STARTS,
    assert_same,
    attached,
    batch_of,
    move,
    out,
    snapshot,
)

Build = Callable[..., PreTrainedModel]


class Cell:
    """One method on one architecture: the bare model, and the delta on it where a test asks.

    Attributes:
        base: the parameters of the bare model.
        before: the bare model, as detaching has to give it back.
        outputs: of the bare model.
    """

    def __init__(self, family: str, method: str) -> None:
        self.model, self.sizes = zoo.build(family), FAMILIES[family]
        self.delta, self.method = (METHODS | STARTS)[method][0], method
        self.batch, self.base = batch_of(self.model), list(self.model.parameters())
        self.before = snapshot(self.model)
        with torch.no_grad():
            self.outputs = out(self.model, self.batch)
        self._attached: DeltaModel | None = None
        self._detached: DeltaModel | None = None

    def at_start(self) -> DeltaModel:
        """The controlled model, its controls where `attach` puts them."""
        if self._attached is None:
            self._attached = attached(self.model, self.delta)
            self._start = {n: p.detach().clone() for n, p in self._attached.trainable().items()}
        with torch.no_grad():
            for name, parameter in self._attached.trainable().items():
                parameter.grad = None
                parameter.copy_(self._start[name])
        return self._attached

    def moved(self) -> DeltaModel:
        """The controlled model, its controls away from their start: at the same place each time."""
        return move(self.at_start())

    def detached(self) -> DeltaModel:
        """A model whose deltas were taken off."""
        if self._attached is not None or self._detached is None:
            self._detached = self.at_start()
            self._attached = None
            self._detached.detach()
        return self._detached

    def bare(self) -> PreTrainedModel:
        """The base model without deltas."""
        self.detached()
        return self.model

    @cached_property
    def moved_outputs(self) -> Tensor:
        """The outputs under the moved controls."""
        return self.compute(self.moved())

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The moved controls, as a file of safetensors gives them back."""
        return load(save(self.moved().state()))

    def compute(self, model: torch.nn.Module) -> Tensor:
        """The outputs of a model on the cell's batch."""
        with torch.no_grad():
            return out(model, self.batch)


CELLS = [
    pytest.param(cell.values, marks=cell.marks, id=cell.id)
    for cell in [
        *zoo.cells(PAIRS, smoke=zoo.SMOKE),
        *zoo.cells([(f, start) for f in zoo.QUICK_FAMILIES for start in STARTS], ("bert", "gpt2")),
    ]
]


@pytest.fixture(scope="module", params=CELLS)
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """The cell, shared by its tests; a model that it leaves changed is not used again."""
    cell = Cell(*request.param)
    yield cell
    try:
        cell.bare()
        assert_same(cell.before, snapshot(cell.model))
    except BaseException:
        zoo.build.cache_clear()
        raise


@pytest.mark.one_in(2)
def test_it_has_as_many_parameters_as_its_formula(cell: Cell) -> None:
    controlled = cell.at_start()
    expected = zoo.num_parameters(cell.method, cell.sizes, controlled)
    assert controlled.num_trainable == expected
    assert [a.num_parameters for a in controlled.attachments] == [expected]
    assert controlled.num_total == cell.sizes.total


@pytest.mark.one_in(2)
def test_it_trains_its_controls_and_nothing_else(cell: Cell) -> None:
    controlled = cell.at_start()
    wanted = {id(p) for p in controlled.trainable().values()}
    assert {id(p) for p in controlled.parameters() if p.requires_grad} == wanted
    assert not any(p.requires_grad for p in cell.base)


@pytest.mark.one_in(2)
def test_it_starts_at_the_base_model_where_it_says_so(cell: Cell) -> None:
    outputs = cell.compute(cell.at_start())
    assert torch.equal(outputs, cell.outputs) == cell.delta.identity_at_start


@pytest.mark.one_in(2)
def test_its_controls_act(cell: Cell) -> None:
    assert not torch.equal(cell.moved_outputs, cell.outputs)


@pytest.mark.one_in(2)
def test_every_control_has_a_gradient_and_the_base_has_none(cell: Cell) -> None:
    controlled = cell.moved()
    out(controlled, cell.batch).square().sum().backward()
    assert all(p.grad is None for p in cell.base)
    for name, parameter in controlled.trainable().items():
        if any(end in name for end in cell.sizes.unused):
            continue
        # A key's bias shifts all scores of a query alike, which softmax ignores: zero up to noise.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) or "bias" in name, name


@pytest.mark.one_in(2)
def test_a_second_attach_is_refused_and_leaves_no_trace(cell: Cell) -> None:
    controlled = cell.at_start()
    during = snapshot(cell.model)
    for target in (cell.model, controlled):
        with pytest.raises(InputError, match="has deltas already.*detach"):
            attach(target, cell.delta)  # type: ignore[arg-type]
    assert_same(during, snapshot(cell.model))


def test_its_state_is_a_copy_with_every_control(cell: Cell) -> None:
    controlled = cell.moved()
    state = controlled.state()
    kept = {name: value.clone() for name, value in state.items()}
    assert state.keys() >= controlled.trainable().keys()
    move(controlled)
    assert all(torch.equal(state[name], value) for name, value in kept.items())


@pytest.mark.one_in(2)
def test_its_state_comes_back_from_a_file(cell: Cell) -> None:
    state, outputs = cell.state, cell.moved_outputs
    controlled = move(cell.moved())
    assert not torch.equal(cell.compute(controlled), outputs)
    controlled.load(state)
    assert torch.equal(cell.compute(controlled), outputs)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(cell: Cell) -> None:
    controlled = cell.moved()
    before, key = controlled.state(), next(iter(controlled.trainable()))
    other = {n: v + 1.0 if v.is_floating_point() else v for n, v in before.items()}
    for wrong, named in (
        ({n: v for n, v in other.items() if n != key}, key),
        (other | {"lora.nowhere.A": torch.zeros(1)}, "lora.nowhere.A"),
        (other | {key: torch.zeros(1, 2, 3)}, key),
    ):
        with pytest.raises(InputError, match=re.escape(named)):
            controlled.load(wrong)
    assert all(torch.equal(before[name], value) for name, value in controlled.state().items())


@pytest.mark.one_in(2)
def test_detaching_restores_the_model_bit_for_bit(cell: Cell) -> None:
    assert not torch.equal(cell.compute(cell.moved()), cell.outputs)
    assert cell.bare() is cell.model
    assert torch.equal(cell.compute(cell.model), cell.outputs)
    assert_same(cell.before, snapshot(cell.model))


def test_detaching_gives_the_base_model_and_ends_the_use_of_the_other(cell: Cell) -> None:
    detached = cell.detached()
    for use in (lambda: detached(**cell.batch), detached.detach):
        with pytest.raises(InputError, match="were detached"):
            use()


@pytest.mark.one_in(2)
def test_an_attach_that_fails_late_leaves_no_trace(cell: Cell) -> None:
    model = cell.bare()
    with pytest.raises(InputError, match="reaches"):
        attach(model, cell.delta, _Refuses())
    assert_same(cell.before, snapshot(model))


@pytest.mark.one_in(2)
def test_loading_is_enough_to_prepare_a_delta_attached_again(cell: Cell) -> None:
    state, outputs = cell.state, cell.moved_outputs
    again = attach(cell.bare(), cell.delta)
    try:
        again.load(state)
        assert torch.equal(cell.compute(again), outputs)
    finally:
        assert again.detach() is cell.model
    assert_same(cell.before, snapshot(cell.model))


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
