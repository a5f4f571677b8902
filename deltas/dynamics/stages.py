"""The stages of a controlled Transformer, run one at a time.

A stage is what the model computes between the entries of two blocks: the part before the first
block, each block, the part between an encoder and its decoder, and the part behind the last block.
A block is called by itself. Every other part is a run of the whole model, in which blocks that
belong to other stages are stood in for, and which ends at the block where the stage ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deltacontrol.deltas.dynamics.block_calls import (
    HIDDEN,
    BlockCall,
    Messages,
    follow,
    is_message,
    set_places,
    take_places,
)
from deltacontrol.deltas.dynamics.state_layout import StateLayout
from deltacontrol.deltas.editing.passes import counted_as_pass
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.errors import InputError

LOGITS = "logits"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: "input", "block.i", "decoder.input" or "readout".
        block: the block that it is; None where it is what lies between blocks.
        until: for the latter, the block at whose entry it ends; None ends with the model.
    """

    name: str
    block: int | None = None
    until: int | None = None


class Stages(nn.Module):
    """A module, so that ``functional_call`` can exchange the controls.

    Args:
        delta_model: the controlled model.
        main: name of the argument that is x_0.
        inputs: the other arguments.

    Attributes:
        stages: in order.
        entries: the layout of what enters each stage; the last is that of the logits.
        acting: after `record`, the names of the controls that act in each stage.
    """

    def __init__(self, delta_model: DeltaModel, main: str, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.delta_model = delta_model
        self.main = main
        self.inputs = dict(inputs)
        if "use_cache" in inputs or getattr(delta_model.model.config, "use_cache", False):
            self.inputs["use_cache"] = False  # a recorded cache would change the second call
        sites = delta_model.host.sites
        stacks = [path.rpartition(".")[0] for path in sites.block_paths]
        self._first = {i for i, stack in enumerate(stacks) if i == 0 or stacks[i - 1] != stack}
        self.stages: list[Stage] = []
        for i in range(len(stacks)):
            if i in self._first:
                self.stages.append(Stage("decoder.input" if i else "input", until=i))
            self.stages.append(Stage(f"block.{i}", block=i))
        self.stages.append(Stage("readout"))
        self.entries: list[StateLayout] = []
        self.acting: list[set[str]] = []
        self._calls: list[BlockCall] = []
        self._messages = Messages()
        self._tokens = torch.empty(0)

    def forward(self, stage: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the next state."""
        now, after = self.stages[stage], self.entries[stage + 1].parts
        kept = {name: value for name, value in values.items() if name in after}
        if now.block is None:
            return kept | self._between(now, values)
        call, host = self._calls[now.block], self.delta_model.host
        leaves = {k: values[name] for k, name in self._messages.read[now.block].items()}
        args, kwargs = call.with_arguments({call.hidden: values[HIDDEN], **leaves})
        with counted_as_pass(host.model):
            set_places(host.edits.carried, values)
            result = pytree.tree_leaves(host.sites.blocks[now.block](*args, **kwargs))
            left = take_places(host.edits.carried, after)
        made = {name: result[k] for name, k in self._messages.made[now.block].items()}
        return kept | made | left | {HIDDEN: result[0]}

    def run(self, tokens: Tensor) -> Tensor:
        """The logits of one ordinary forward pass."""
        output = self.delta_model(**{self.main: tokens}, **self.inputs)
        return output.logits if hasattr(output, "logits") else output[0]

    def record(self, tokens: Tensor) -> Tensor:
        """Learn from one forward pass what enters each stage, and which controls act in it.

        Raises:
            InputError: not all blocks were called, or they receive what cannot be a state.
        """
        self._tokens, self._calls = tokens, []
        blocks, places = self.delta_model.host.sites.blocks, self.delta_model.host.edits.carried

        def enter(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = BlockCall(block, args, kwargs, places)
            changed = None
            if not self._calls and not is_message(call.arguments[call.hidden]):
                # What follows from the state is found by its gradient.
                state = call.arguments[call.hidden].detach().requires_grad_().clone()
                changed = call.with_arguments({call.hidden: state})
                call = BlockCall(block, *changed, places)
            self._calls.append(call)
            return changed

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            self._calls[-1].end(output, places)

        handles = [
            b.register_forward_pre_hook(enter, with_kwargs=True, prepend=True) for b in blocks
        ]
        handles += [b.register_forward_hook(leave) for b in blocks]
        try:
            with torch.enable_grad():
                logits = self.run(tokens)
        except (InputError, torch.OutOfMemoryError):
            raise
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(
                f"{name} {tuple(value.shape)}"
                for name, value in ((self.main, tokens), *self.inputs.items())
                if isinstance(value, Tensor)
            )
            raise InputError(
                f"the model cannot run on this batch ({str(error).partition(chr(10))[0]}), which "
                f"has {shapes}; expected what its own forward pass takes, such as tokens "
                "(batch, length)."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if len(self._calls) != len(blocks):
            raise InputError(
                f"the forward pass called {len(self._calls)} blocks, expected {len(blocks)}, "
                "each once: a model that drops layers, or calls one several times, is not layered."
            )
        for index, call in enumerate(self._calls):
            call.check_cache(index)
        self._messages = follow(self._calls, self._first)
        self._note_stages(tokens, logits)
        for call in self._calls:
            call.release()
        return logits.detach()

    def called_alike(self, first: int, block: int) -> bool:
        """Whether two blocks of one stack, recorded, receive and give the same beside the state."""
        stacks = [max(i for i in self._first if i <= k) for k in (first, block)]
        calls, found = (self._calls[first], self._calls[block]), self._messages
        return (
            stacks[0] == stacks[1]
            and calls[0].has_constants_of(calls[1])
            and found.read[first] == found.read[block]
            and found.made[first] == found.made[block]
        )

    def _note_stages(self, tokens: Tensor, logits: Tensor) -> None:
        """The layout of what enters each stage, and the controls in the graph of each stage."""
        names = {id(p): name for name, p in self.delta_model.trainable().items()}
        entering = {self.main: tokens}
        self.entries, self.acting = [StateLayout.of(entering)], []
        for stage in self.stages:
            leaving = self._leaving(stage, logits)
            self.entries.append(StateLayout.of(leaving))
            found = _leaves(leaving.values(), entering.values())
            self.acting.append({names[number] for number in found if number in names})
            entering = leaving

    def _leaving(self, stage: Stage, logits: Tensor) -> dict[str, Tensor]:
        """What a stage gave in the recorded pass."""
        if stage.block is None and stage.until is None:
            return {LOGITS: logits}
        following = stage.until if stage.block is None else stage.block + 1
        assert following is not None
        if stage.block is None or (following < len(self._calls) and following not in self._first):
            call = self._calls[following]
            return {HIDDEN: call.arguments[call.hidden]} | self._messages.entering[following]
        call = self._calls[stage.block]
        if following == len(self._calls):
            return {HIDDEN: call.result[0]}
        return {HIDDEN: call.result[0]} | self._messages.surviving[following] | call.left

    def _between(self, stage: Stage, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the model from behind the blocks that are done to where the stage ends."""
        done = len(self._calls) if stage.until is None else stage.until
        tokens = values[self.main] if self.main in values else self._tokens
        host, reached = self.delta_model.host, dict[str, Tensor]()
        after = self.entries[self.stages.index(stage) + 1].parts

        def stop(block: nn.Module, args: tuple, kwargs: dict) -> None:
            call = BlockCall(block, args, kwargs, ())
            given = {n: call.arguments[k] for n, k in self._messages.given[done].items()}
            reached.update(given | take_places(host.edits.carried, after))
            reached[HIDDEN] = call.arguments[call.hidden]
            raise _Reached

        with self._standing_in(done, values.get(HIDDEN)):
            if stage.until is None:
                return {LOGITS: self.run(tokens)}
            block = host.sites.blocks[stage.until]
            handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
            set_places(host.edits.carried, values)
            try:
                self.run(tokens)
            except _Reached:
                pass
            finally:
                handle.remove()
        return reached

    @contextmanager
    def _standing_in(self, done: int, state: Tensor | None) -> Iterator[None]:
        """Without the first blocks: the last of them gives the state, the others give NaN."""
        sites, model = self.delta_model.host.sites, self.delta_model.model
        places = []
        for i, (path, block) in enumerate(zip(sites.block_paths, sites.blocks, strict=True)):
            if i < done:
                call, is_last = self._calls[i], i == done - 1
                given = state if is_last and state is not None else call.result[0]
                container, _, name = path.rpartition(".")
                stand_in = _StandIn(block, call.result_with(given))
                places.append((sites.modules[container]._modules, name, block, stand_in))

        def put(*_: Any) -> None:
            for container, name, _block, stand_in in places:
                container[name] = stand_in

        # Within the pass, because what begins with a pass may look for parameters in the blocks.
        handle = model.register_forward_pre_hook(put)
        try:
            yield
        finally:
            handle.remove()
            for container, name, block, _stand_in in places:
                container[name] = block


class _Reached(Exception):
    """Ends a forward pass at a block."""


class _StandIn(nn.Module):
    """Stands in for a block and returns a given result; the block's attributes show through."""

    def __init__(self, block: nn.Module, result: Any) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _result=result)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.__dict__["_result"]


def _leaves(results: Iterable[Tensor], inputs: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors that need a gradient and that results depend on past the inputs."""
    inputs, results = list(inputs), list(results)
    seen: set[Any] = {x.grad_fn for x in inputs if x.grad_fn is not None}
    found = {id(x) for x in results if x.requires_grad and x.grad_fn is None}
    waiting = [x.grad_fn for x in results if x.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))  # a leaf of the graph has one
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found - {id(x) for x in inputs}
