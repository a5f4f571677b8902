"""A controlled Transformer as a discrete dynamical system.

The stages t = 0 … L+1 of a model with L blocks are

    "input"     tokens → the state that enters the first block (embeddings, prompt)
    "block.i"   hidden states → hidden states
    "readout"   hidden states → logits (final norm, pooler, head)

so that x_0 is the tensor of tokens (or pixels), x_{L+2} the logits, and Φ the task's loss of them.
u_t holds the controls of stage t, flattened in the order of ``DeltaModel.trainable()``.

One ordinary forward pass records what every block receives beside the hidden state (masks, rotary
angles); a step calls the block alone with another state. That is exact where those arguments do not
depend on state or control, which is checked when the dynamics are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache, PreTrainedModel

from deltacontrol.deltas.editing.passes import first_tensor, with_first_tensor
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.control.costs import CrossEntropyCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost, Dynamics
from deltacontrol.theory.errors import InputError


class TransformerDynamics(Dynamics):
    """The stages of a :class:`deltacontrol.deltas.model.DeltaModel` on one batch.

    Args:
        delta_model: the controlled model; it is put into evaluation mode (no dropout).
        batch: the model's keyword arguments; ``labels`` are left out.

    Attributes:
        delta_model: the controlled model.
        stage_names: "input", "block.0", …, "readout".
        x0: the tokens, x_0.
        replay_error: largest difference between the logits of the stages and of the model, relative
            to the largest logit; 0.0 wherever the arithmetic is deterministic.

    Raises:
        InputError: a control acts on several stages at once, the architecture hands more than the
            hidden state from block to block, or replaying the stages does not give the model's
            logits.
    """

    def __init__(self, delta_model: DeltaModel, batch: Mapping[str, Any]) -> None:
        if delta_model.host.shared:
            raise InputError(
                f"the control {delta_model.host.shared[0]} acts on the whole model at once, so it "
                "has no layer of its own; the layered dynamics take layer-wise deltas such as lora."
            )
        if delta_model.host.sites.num_stacks > 1:
            raise InputError(
                "the layered dynamics take encoders and decoders; give the encoder of an "
                "encoder-decoder, for example T5EncoderModel."
            )
        self.delta_model = delta_model.eval()
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        main = getattr(delta_model.model, "main_input_name", "input_ids")
        if main not in inputs:
            raise InputError(f"the batch has no {main!r}; it has {', '.join(inputs)}.")
        self.x0: Tensor = inputs.pop(main)
        self._stages = _Stages(delta_model, main, inputs)
        blocks = len(delta_model.host.sites.blocks)
        self.stage_names = ("input", *(f"block.{i}" for i in range(blocks)), "readout")
        self.horizon = blocks + 2
        recorded, order = self._stages.record(self.x0)
        self._names = self._assign(delta_model, order)
        self._shapes = [
            {name: parameter.shape for name, parameter in stage.items()} for stage in self._names
        ]
        self.control_sizes = tuple(
            sum(parameter.numel() for parameter in stage.values()) for stage in self._names
        )
        self.replay_error = self._replay_error(recorded)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """x_{t+1} = f_t(x_t, u_t); u of shape (m_t,), shared by the batch."""
        if u.shape[-1:] != (self.control_sizes[t],) or u.dim() != 1:
            raise InputError(
                f"stage {self.stage_names[t]}: the control has shape {tuple(u.shape)}, expected "
                f"({self.control_sizes[t]},), one control for the whole batch."
            )
        shapes = self._shapes[t]
        pieces = u.split([shape.numel() for shape in shapes.values()]) if shapes else ()
        parameters = {  # cloned, because the rounding of a matrix product depends on its alignment
            f"delta_model.controls.{name}": piece.view(shape).clone()
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
        return functional_call(self._stages, parameters, (t, x))

    def logits(self) -> Tensor:
        """Logits of one ordinary forward pass of the model, differentiable in its parameters."""
        return self._stages.run(self.x0)

    def live_controls(self) -> Controls:
        """u_0 … u_{L+1} as differentiable functions of the model's own parameters."""
        like = next(self._stages.delta_model.controls.parameters())
        return tuple(
            torch.cat([p.reshape(-1) for p in stage.values()]) if stage else like.new_zeros(0)
            for stage in self._names
        )

    def controls(self) -> Controls:
        """The model's present controls, u_0 … u_{L+1}, copied."""
        return tuple(u.detach().clone() for u in self.live_controls())

    def load_controls(self, u: Controls) -> None:
        """Write u into the model.

        Raises:
            InputError: u has not one flat control of the right size for every stage; the model is
                unchanged then.
        """
        shapes = [tuple(control.shape) for control in u]
        if shapes != [(size,) for size in self.control_sizes]:
            raise InputError(
                f"the controls have shapes {shapes}, expected one flat control a stage of sizes "
                f"{list(self.control_sizes)}."
            )
        with torch.no_grad():
            for stage, control in zip(self._names, u, strict=True):
                pieces = control.split([p.numel() for p in stage.values()]) if stage else ()
                for parameter, piece in zip(stage.values(), pieces, strict=True):
                    parameter.copy_(piece.view_as(parameter))

    def control_names(self, t: int) -> tuple[str, ...]:
        """Names of the controls of stage t, in the order in which u_t holds them."""
        return tuple(self._names[t])

    def _assign(self, delta_model: DeltaModel, order: dict[str, set[int]]) -> list[dict]:
        """The controls of every stage, by where the module that they act at runs."""
        host = delta_model.host
        stages: list[dict[str, nn.Parameter]] = [{} for _ in range(self.horizon)]
        owners: dict[int, set[int]] = {}
        for path, module in host.sites.modules.items():
            layer = host.sites.layer_of(path)
            where = {layer + 1} if layer is not None else order.get(path, set())
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), set()).update(where)
        for name, parameter in delta_model.trainable().items():
            path = host.state_path[name]
            layer = host.sites.layer_of(path)
            where = {layer + 1} if layer is not None else order.get(path, {self.horizon - 1})
            where = where | owners.get(id(parameter), set())
            if len(where) > 1:
                ends = " and ".join(self.stage_names[t] for t in sorted(where))
                raise InputError(
                    f"the control {name} acts in the stages {ends} (a tied weight), so it is not "
                    "the control of one layer; untie the model or use another delta."
                )
            stages[where.pop()][name] = parameter
        return stages

    def _replay_error(self, recorded: Tensor) -> float:
        with torch.no_grad():
            x = self.x0
            for t, u in enumerate(self.controls()):
                x = self.step(t, x, u)
        scale = recorded.abs().max().clamp_min(torch.finfo(recorded.dtype).tiny)
        error = float((x - recorded).abs().max() / scale)
        if not error <= 100 * torch.finfo(recorded.dtype).eps:
            raise InputError(
                f"replaying the stages gives logits that differ by {error:.1e}; the blocks of "
                f"{type(self._stages.delta_model.model).__name__} are not functions of the hidden "
                "state alone, so it is not a layered system."
            )
        return error


class _Reached(Exception):
    """Ends a forward pass at the first block."""


class _Stages(nn.Module):
    """Runs one stage at a time; a module, so that ``functional_call`` can exchange the controls."""

    def __init__(self, delta_model: DeltaModel, main: str, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.delta_model = delta_model
        self.main = main
        self.inputs = dict(inputs)
        if "use_cache" in inputs or getattr(delta_model.model.config, "use_cache", False):
            self.inputs["use_cache"] = False  # a recorded cache would change the second call
        self.calls: list[tuple[tuple, dict]] = []
        self.outputs: list[Any] = []
        self.tokens = torch.empty(0)

    def forward(self, t: int, x: Tensor) -> Tensor:
        blocks = self.delta_model.host.sites.blocks
        if t == 0:
            return self._input(x)
        if t == len(blocks) + 1:
            return self._readout(x)
        args, kwargs = self.calls[t - 1]
        return first_tensor(blocks[t - 1](x, *args, **kwargs))

    def run(self, tokens: Tensor) -> Tensor:
        output = self.delta_model(**{self.main: tokens}, **self.inputs)
        return output.logits if hasattr(output, "logits") else output[0]

    def record(self, tokens: Tensor) -> tuple[Tensor, dict[str, set[int]]]:
        """One forward pass; the logits, and in which stages modules outside the blocks run."""
        sites = self.delta_model.host.sites
        self.tokens = tokens
        progress = [0]
        order: dict[str, set[int]] = {}
        self.calls, self.outputs = [], []

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            kwargs = dict(kwargs)
            if not args:
                kwargs.pop("hidden_states")
            self.calls.append((args[1:], kwargs))
            progress[0] += 1

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            self.outputs.append(output)
            if len(self.outputs) == len(sites.blocks):
                progress[0] += 1

        def note(path: str) -> Callable[..., None]:
            return lambda *_: order.setdefault(path, set()).add(progress[0])

        handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in sites.blocks]
        handles += [b.register_forward_hook(leave) for b in sites.blocks]
        for path, module in sites.modules.items():
            if sites.layer_of(path) is None:
                handles.append(module.register_forward_pre_hook(note(path)))
        try:
            with torch.enable_grad():
                logits = self.run(tokens)
        finally:
            for handle in handles:
                handle.remove()
        self._check_side_channels()
        self.outputs = [_detached(output) for output in self.outputs]
        return logits.detach(), order

    def _check_side_channels(self) -> None:
        for index, (args, kwargs) in enumerate(self.calls):
            named = {**{f"argument {i + 1}": a for i, a in enumerate(args)}, **kwargs}
            for name, value in named.items():
                if isinstance(value, Cache):
                    raise InputError(
                        f"block {index} receives a cache as {name!r}, which would change its next "
                        "call; set model.config.use_cache = False."
                    )
                if any(tensor.requires_grad for tensor in _tensors(value)):
                    raise InputError(
                        f"block {index} receives {name!r}, which depends on the controls, beside "
                        "the hidden state; leave that weight out of the delta (for T5: the "
                        "relative position bias)."
                    )
        if len(self.calls) != len(self.delta_model.host.sites.blocks):
            raise InputError(
                f"the forward pass called {len(self.calls)} blocks, expected "
                f"{len(self.delta_model.host.sites.blocks)}; is the model in training mode with "
                "layer dropping?"
            )

    def _input(self, tokens: Tensor) -> Tensor:
        reached: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            reached.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        first = self.delta_model.host.sites.blocks[0]
        handle = first.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            self.run(tokens)
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]

    def _readout(self, x: Tensor) -> Tensor:
        sites = self.delta_model.host.sites
        passes = [_Pass(b, o, x) for b, o in zip(sites.blocks, self.outputs, strict=True)]
        lists = [sites.modules[path.rpartition(".")[0]] for path in sites.block_paths]
        try:
            for container, path, bypass in zip(lists, sites.block_paths, passes, strict=True):
                container._modules[path.rpartition(".")[2]] = bypass
            return self.run(self.tokens)
        finally:
            for container, path, block in zip(lists, sites.block_paths, sites.blocks, strict=True):
                container._modules[path.rpartition(".")[2]] = block


class _Pass(nn.Module):
    """Stands in for a block and returns a given state."""

    def __init__(self, block: nn.Module, output: Any, state: Tensor) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _output=output, _state=state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return with_first_tensor(self._output, self._state)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(item) if isinstance(item, Tensor | tuple) else item for item in output)


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether the labels of a model are its tokens, shifted by one position."""
    return model.get_output_embeddings() is not None and model.loss_type != "ForMaskedLM"


def control_problem(
    delta_model: DeltaModel, batch: Mapping[str, Any], *, weight_decay: float = 0.0
) -> ControlProblem:
    """The fine-tuning of a delta on one batch, as an optimal-control problem.

    J(u) = loss(logits, labels) + λ/2 Σ_t ‖u_t‖² with the loss averaged over the batch:
    cross-entropy for integer labels (shifted by one position for causal language models), half the
    mean squared error for real ones.

    Args:
        delta_model: the controlled model.
        batch: the model's arguments, with ``labels``.
        weight_decay: λ.
    """
    labels = batch.get("labels")
    if labels is None:
        raise InputError(f"the batch has no 'labels'; it has {', '.join(batch)}.")
    dynamics = TransformerDynamics(delta_model, batch)
    cost: Cost
    if labels.is_floating_point():
        cost = SquaredErrorCost(labels.reshape(len(labels), -1), weight_decay=weight_decay)
    elif labels.dim() == 2 and is_causal_lm(delta_model.model):
        shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        cost = CrossEntropyCost(shifted, weight_decay=weight_decay)
    else:
        cost = CrossEntropyCost(labels, weight_decay=weight_decay)
    return ControlProblem(dynamics, cost, dynamics.x0)
