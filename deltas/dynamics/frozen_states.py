"""Hidden states below the lowest control: computed once for each example, and never again.

Where all controls act in the blocks b … L-1 or behind them, the state x_b that enters block b is a
function of the example alone,

    x_b = f_{b-1}(… f_0(embed(tokens))),        no u in it,

as long as nothing in it is random. So the blocks 0 … b-1 need to run in the first epoch only. A
state is kept for the tokens of its example, without padding, whose states no other token sees, and
for the rows of a prompt in front of them, where there is one that is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltacontrol.deltas.editing.passes import first_tensor, with_first_tensor
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.errors import InputError


class FrozenStates:
    """The states x_b of examples, and passes of the model that start from them.

    Args:
        delta_model: the controlled model, with its controls.
        batch: some arguments of the model, to see what depends on the controls.
        strict: refuse a batch with padding before tokens; else it passes all blocks.

    Attributes:
        num_frozen: b, how many blocks a pass can leave out.
        width: numbers in a state of one token.
        steady: whether all batches had the same number of rows beside their tokens, those of a
            prompt; a model that pads by itself has other ones, and no state is kept any more then.

    Raises:
        InputError: no block is free of controls, or the blocks hand more than the state on.
    """

    def __init__(
        self, delta_model: DeltaModel, batch: Mapping[str, Any], *, strict: bool = True
    ) -> None:
        self.strict = strict
        sites = delta_model.host.sites
        self.delta_model = delta_model
        if sites.num_stacks > 1:
            raise InputError(
                f"{sites.model_type} has two stacks of blocks; states can be kept of one. Train "
                "without cache_frozen."
            )
        outputs = self._outputs(batch)
        if not all(isinstance(o, Tensor) or len(o) == 1 for o in outputs):
            raise InputError(
                f"the blocks of {sites.model_type} hand more than the state to the next one, so "
                "they cannot be left out; train without cache_frozen."
            )
        if len(outputs) != len(sites.blocks):
            raise InputError(
                f"a pass of {sites.model_type} has {len(outputs)} calls of its {len(sites.blocks)} "
                "blocks, so that a block has not one state; train without cache_frozen."
            )
        layers = [sites.layer_of(path) for path in delta_model.host.state_path.values()]
        lowest = min((layer for layer in layers if layer is not None), default=len(outputs))
        free = [not first_tensor(output).requires_grad for output in outputs]
        self.num_frozen = min(lowest, (free + [False]).index(False))
        if not self.num_frozen:
            raise InputError(
                "a control acts in the first block or before it, so all hidden states change "
                "while it is trained; train without cache_frozen, or give the deltas layers, such "
                f"as layers={(len(outputs) - 1,)}."
            )
        self.width = first_tensor(outputs[self.num_frozen - 1]).shape[-1]
        self._template = with_first_tensor(outputs[self.num_frozen - 1], torch.empty(0))
        self._states: dict[int, Tensor] = {}
        self._num_rows: int | None = None  # of a prompt, in front of the tokens
        self.steady = True
        self._trained = frozenset(delta_model.trainable())
        self._versions = self._fixed_controls()

    def __len__(self) -> int:
        """How many examples have their state here."""
        return len(self._states)

    @property
    def num_bytes(self) -> int:
        """Memory of the states."""
        return sum(state.nbytes for state in self._states.values())

    def forget(self) -> None:
        """Begin anew, with no state."""
        self._states.clear()

    @contextmanager
    def passing(self, examples: Tensor, mask: Tensor) -> Iterator[None]:
        """Passes of these examples: from their states where all are known, else learning them.

        Args:
            examples: a number for each row of the batch, (rows,), always the same for an example.
            mask: the batch's attention mask, (rows, tokens), padded on the right.

        Raises:
            InputError: more controls are trained than before; and where it is `strict`, the padding
                is not on the right, or the rows beside the tokens are not `steady`.
        """
        self._check_controls()
        if not self.steady:
            yield
            return
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            if not self.strict:
                yield
                return
            raise InputError(
                "states are kept for examples that are padded on the right, but this batch has "
                "padding before tokens; set tokenizer.padding_side = 'right', or train without "
                "cache_frozen."
            )
        numbers = examples.tolist()
        if all(number in self._states for number in numbers):
            with self._from_states(self._padded(numbers, mask)):
                yield
            return
        block = self.delta_model.host.sites.blocks[self.num_frozen - 1]

        def learn(_module: nn.Module, _args: tuple, output: Any) -> None:
            states = first_tensor(output).detach()
            rows = states.shape[1] - mask.shape[1]
            if self._num_rows not in (None, rows):
                self._give_up()
                return
            self._num_rows = rows
            for number, state, length in zip(numbers, states, mask.sum(1).tolist(), strict=True):
                self._states[number] = state[: rows + length].clone()

        handle = block.register_forward_hook(learn)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def learn(self, examples: Tensor, batch: Mapping[str, Any]) -> None:
        """Pass a batch through the frozen blocks, unless all its states are known.

        Raises:
            InputError: as in `passing`.
        """
        mask = batch["attention_mask"]
        known = all(number in self._states for number in examples.tolist())
        in_front = not self.strict and bool((mask[:, 1:] > mask[:, :-1]).any())
        if known or in_front or not self.steady:
            return

        def enough(*_: Any) -> None:
            raise _EnoughError

        with self.passing(examples, mask):
            block = self.delta_model.host.sites.blocks[self.num_frozen - 1]
            handle = block.register_forward_hook(enough)
            try:
                self.delta_model(**batch)
            except _EnoughError:
                pass
            finally:
                handle.remove()

    def _give_up(self) -> None:
        """Keep no state any more, as the rows beside the tokens are other ones than before.

        Raises:
            InputError: where that is `strict`.
        """
        self.steady = False
        self.forget()
        if self.strict:
            raise InputError(
                f"{self.delta_model.host.sites.model_type} pads by itself, so that its states are "
                "not those of the tokens alone; train without cache_frozen."
            )

    def _fixed_controls(self) -> dict[str, int]:
        """Controls that are not trained, each with the count of its changes in place."""
        controls = self.delta_model.controls.state_dict(keep_vars=True)
        return {n: c._version for n, c in controls.items() if n not in self._trained}

    def _check_controls(self) -> None:
        """Forget the states where controls that made them were changed.

        Raises:
            InputError: controls are trained now that were not when this was made.
        """
        more = self.delta_model.trainable().keys() - self._trained
        if more:
            raise InputError(
                f"{min(more)} was not trained when the states were first kept, and is now; make "
                "the FrozenStates behind train_only(), or train without cache_frozen."
            )
        if self._fixed_controls() != self._versions:
            self._states.clear()
            self._versions = self._fixed_controls()

    def _padded(self, numbers: list[int], mask: Tensor) -> Tensor:
        first = self._states[numbers[0]]
        rows, tokens = mask.shape
        states = first.new_zeros(rows, (self._num_rows or 0) + tokens, first.shape[-1])
        for row, number in zip(states, numbers, strict=True):
            state = self._states[number]
            row[: len(state)] = state
        return states

    @contextmanager
    def _from_states(self, states: Tensor) -> Iterator[None]:
        """Without the frozen blocks: the last of them gives the states, the others do nothing."""
        sites = self.delta_model.host.sites
        container = sites.modules[sites.block_paths[0].rpartition(".")[0]]
        frozen = [path.rpartition(".")[2] for path in sites.block_paths[: self.num_frozen]]
        blocks = {name: container._modules[name] for name in frozen}
        given = with_first_tensor(self._template, states)
        for name, block in blocks.items():
            container._modules[name] = _Given(block, given)
        try:
            yield
        finally:
            container._modules.update(blocks)

    def _outputs(self, batch: Mapping[str, Any]) -> list[Any]:
        """What each block returns in one pass."""
        outputs: list[Any] = []
        handles = [
            block.register_forward_hook(lambda _module, _args, output: outputs.append(output))
            for block in self.delta_model.host.sites.blocks
        ]
        try:
            with torch.enable_grad():
                self.delta_model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


class _EnoughError(Exception):
    """The states are there; the blocks above are not needed."""


class _Given(nn.Module):
    """Stands in for a block and returns a given output; the block's attributes show through."""

    def __init__(self, block: nn.Module | None, output: Any) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.__dict__["_output"]
