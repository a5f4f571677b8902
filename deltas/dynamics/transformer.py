"""A controlled Transformer as a discrete dynamical system.

The stages t = 0, 1, … of a model are

    "input"          tokens → the state that enters the first block (embeddings, prompt)
    "block.i"        state → state; the blocks of an encoder, then those of its decoder
    "decoder.input"  of an encoder-decoder, between the two: what the blocks of the encoder give →
                     the encoder's output, and the state that enters the decoder
    "readout"        hidden states → logits (final norm, pooler, head)

so that x_0 is the tensor of tokens (or pixels), x_L the logits, and Φ the task's loss of them.
u_t holds the controls of stage t, flattened in the order of ``DeltaModel.trainable()``.

Controls that act in several stages (the coordinates of a subspace, a rule that all layers share, a
weight that the embedding and the head share) are the control of a stage of their own,

    "shared"         tokens → (tokens, w) with w = u_0

which is then the first, and w is a part of every later state up to the readout's. So the costate of
w at the end of that stage is the sum of what all stages contribute to ∂J/∂u_0.

The state. Where only the hidden states go from stage to stage, x_t is that tensor. Where more
does, x_t is a vector (n_t,): its parts, end to end. `TransformerDynamics.parts` gives them by name:

    "hidden"                 (batch, tokens, d), in each state between two stages
    "shared"                 (m_0,), the shared controls
    "encoder_hidden_states"  (batch, tokens, d), the encoder's output, from "decoder.input" on
    "position_bias" and      what the blocks hand on beside the hidden states, where it depends on a
    others of the kind       control; it has the name of the blocks' argument
    "carried.k"              what a control leaves for the next block, such as a ladder's own state

Where the blocks run one by one, one ordinary forward pass tells what each receives beside its state
(masks, rotary angles); that is constant. All of it is checked when the dynamics are made: replaying
the stages must give the model's logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from deltacontrol.deltas.dynamics.alike_blocks import AlikeBlocks, BlockFace, alike_blocks
from deltacontrol.deltas.dynamics.stages import Stages
from deltacontrol.deltas.dynamics.state_layout import Part, StateLayout
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.costs import (
    BinaryCrossEntropyCost,
    CrossEntropyCost,
    SquaredErrorCost,
)
from deltacontrol.theory.control.dynamics import Alike, Dynamics
from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost
from deltacontrol.theory.errors import InputError

SHARED = "shared"


class TransformerDynamics(Dynamics):
    """The stages of a :class:`deltacontrol.deltas.model.DeltaModel` on one batch.

    Args:
        delta_model: the controlled model; it is put into evaluation mode (no dropout).
        batch: the model's keyword arguments; ``labels`` are left out.

    Attributes:
        delta_model: the controlled model.
        stage_names: "input", "block.0", …, "readout"; see the module.
        x0: the tokens, x_0.
        replay_error: largest difference between the logits of the stages and of the model, relative
            to the largest logit; 0.0 wherever the arithmetic is deterministic.

    Raises:
        InputError: a value that depends on the state is computed between two blocks, a block
            receives a cache, tokens cannot be kept beside the shared controls in their number
            format, or replaying the stages does not give the model's logits.
    """

    def __init__(self, delta_model: DeltaModel, batch: Mapping[str, Any]) -> None:
        delta_model.host  # noqa: B018 - fails when detached
        self.delta_model = delta_model.eval()
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        main = getattr(delta_model.model, "main_input_name", "input_ids")
        if main not in inputs:
            raise InputError(f"the batch has no {main!r}; it has {', '.join(inputs)}.")
        self.x0: Tensor = inputs.pop(main)
        if not isinstance(self.x0, Tensor):
            raise InputError(f"the batch's {main} is {self.x0!r}; expected a tensor.")
        self._stages = Stages(delta_model, main, inputs)
        recorded = self._stages.record(self.x0)
        self._names = self._assign(delta_model)
        self._shapes = [{name: p.shape for name, p in stage.items()} for stage in self._names]
        self._found_places: dict[bool, dict[str, list[str]]] = {}
        self._alike_blocks: tuple[AlikeBlocks | None] | None = None  # as long as unknown
        self.control_sizes = tuple(
            sum(parameter.numel() for parameter in stage.values()) for stage in self._names
        )
        names = tuple(stage.name for stage in self._stages.stages)
        self._layouts = list(self._stages.entries)
        self._has_shared = len(self._names) > len(names)
        if self._has_shared:
            self._carry_shared(main)
        self.stage_names = (SHARED, *names) if self._has_shared else names
        self.horizon = len(self.stage_names)
        self.replay_error = self._replay_error(recorded)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """x_{t+1} = f_t(x_t, u_t); u of shape (m_t,), shared by the batch."""
        if u.shape[-1:] != (self.control_sizes[t],) or u.dim() != 1:
            raise InputError(
                f"stage {self.stage_names[t]}: the control has shape {tuple(u.shape)}, expected "
                f"({self.control_sizes[t]},), one control for the whole batch."
            )
        return self._run({}, t, x, u)

    def _run(self, constants: Mapping[str, Tensor], t: int, x: Tensor, u: Tensor) -> Tensor:
        """The step with other tensors in the places of frozen ones."""
        values = self._layouts[t].unpack(x)
        if self._has_shared and t == 0:
            return self._layouts[1].pack(values | {SHARED: u})
        controls = {**constants, **self._cut(t, u)}
        if self._has_shared:
            shared = values.pop(SHARED)
            controls |= self._cut(0, shared)
        stage = t - 1 if self._has_shared else t
        # Torch would look through the whole model for the other places of each control, every time.
        values = functional_call(self._stages, controls, (stage, values), tie_weights=False)
        if self._has_shared:
            values[SHARED] = shared
        return self._layouts[t + 1].pack(values)

    def alike(self) -> Alike | None:
        """The longest row of blocks that compute one function of different tensors, or None.

        See `deltacontrol.deltas.dynamics.alike_blocks`. The blocks' frozen tensors are copied, once
        and again where they have changed.
        """
        if self.delta_model.host.edits.is_suspended:
            return None
        if self._alike_blocks is None:
            self._alike_blocks = (alike_blocks(self._stages, self._faces(), self._run),)
        (blocks,) = self._alike_blocks
        return None if blocks is None else blocks.steps()

    def _faces(self) -> list[BlockFace]:
        """How each block looks from outside."""
        faces, places = [], self._places()
        for block in range(len(self.delta_model.host.sites.blocks)):
            t = self.stage_names.index(f"block.{block}")
            own = [(places[name], shape) for name, shape in self._shapes[t].items()]
            faces.append(BlockFace(t, self._layouts[t], self._layouts[t + 1], own))
        return faces

    def parts(self, t: int, x: Tensor) -> dict[str, Tensor]:
        """The parts of the state x_t by name, such as "hidden"; see the module."""
        return self._layouts[t].unpack(x)

    def _cut(self, t: int, u: Tensor) -> dict[str, Tensor]:
        """The parameters that u_t holds, in all places where they lie."""
        shapes, places = self._shapes[t], self._places()
        pieces = u.split([shape.numel() for shape in shapes.values()]) if shapes else ()
        controls = {}
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
            # Cloned, because the rounding of a matrix product depends on its alignment.
            value = piece.view(shape).clone()
            controls |= dict.fromkeys(places[name], value)
        return controls

    def _places(self) -> dict[str, list[str]]:
        """Where each control lies in the stages: among the controls, and wherever it is tied to.

        A control that stands for a weight lies in the model too, though not while it is suspended.
        """
        suspended = self.delta_model.host.edits.is_suspended
        if suspended not in self._found_places:
            found: dict[int, list[str]] = {}
            for place, parameter in self._stages.named_parameters(remove_duplicate=False):
                found.setdefault(id(parameter), []).append(place)
            self._found_places[suspended] = {
                name: found[id(parameter)]
                for stage in self._names
                for name, parameter in stage.items()
            }
        return self._found_places[suspended]

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

    def initial_controls(self, x0: Tensor) -> Controls:
        """Where a solver starts: the present controls, as zeros are stationary for many deltas."""
        return self.controls()

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

    def _assign(self, delta_model: DeltaModel) -> list[dict[str, nn.Parameter]]:
        """The controls of every stage; those that act in several come first, where there are any.

        One that acts nowhere, such as a mask's token without masks, is with its block, or else with
        the input.
        """
        sites, stages = delta_model.host.sites, self._stages.stages
        of_block = {stage.block: s for s, stage in enumerate(stages) if stage.block is not None}
        shared: dict[str, nn.Parameter] = {}
        own: list[dict[str, nn.Parameter]] = [{} for _ in stages]
        for name, parameter in delta_model.trainable().items():
            where = [s for s, acting in enumerate(self._stages.acting) if name in acting]
            if len(where) > 1:
                shared[name] = parameter
                continue
            layer = sites.layer_of(delta_model.host.state_path[name])
            unused = 0 if layer is None else of_block[layer]
            own[where[0] if where else unused][name] = parameter
        return [shared, *own] if shared else own

    def _carry_shared(self, main: str) -> None:
        """Make the shared controls a part of the states from the second to the last but one."""
        like = next(iter(self._names[0].values()))
        part = Part(torch.Size([self.control_sizes[0]]), like.dtype)
        *entries, last = self._layouts
        later = [StateLayout({**entry.parts, SHARED: part}) for entry in entries]
        self._layouts = [entries[0], *later, last]
        if not later[0].holds({main: self.x0, SHARED: like.new_zeros(part.shape)}):
            raise InputError(
                f"the controls {', '.join(list(self._names[0])[:3])} act in several stages and are "
                f"kept beside {main!r} in a state of {like.dtype}, which cannot hold numbers up to "
                f"{self.x0.max()} exactly; load the model in float32 or float64."
            )

    def _replay_error(self, recorded: Tensor) -> float:
        kind = type(self._stages.delta_model.model).__name__
        x = self.x0
        try:
            with torch.no_grad():
                for t, u in enumerate(self.controls()):
                    x = self.step(t, x, u)
        except InputError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise InputError(
                f"running the stages of {kind} one by one fails ({error}), though the whole model "
                "runs: what a block or the readout needs is not what the one before gives, so it "
                "is not a layered system."
            ) from error
        scale = recorded.abs().max().clamp_min(torch.finfo(recorded.dtype).tiny)
        error = float((x - recorded).abs().max() / scale)
        if not error <= 100 * torch.finfo(recorded.dtype).eps:
            raise InputError(
                f"replaying the stages gives logits that differ by {error:.1e}; the blocks of "
                f"{kind} are not functions of what they receive alone, or something behind them "
                "reads more than the last one gives, so it is not a layered system."
            )
        return error


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether the labels of a model are its tokens, shifted by one position."""
    if model.config.is_encoder_decoder:  # its decoder's tokens are the labels, shifted already
        return False
    return model.get_output_embeddings() is not None and model.loss_type != "ForMaskedLM"


def has_many_labels(model: PreTrainedModel, labels: Tensor) -> bool:
    """Whether each class of a model is a question of its own, answered by yes or no.

    As its own loss decides: by ``problem_type``, or, where that is not set, by real labels of
    several classes.
    """
    if model.loss_type not in ("ForSequenceClassification", "ForImageClassification"):
        return False
    kind = model.config.problem_type
    if kind is None and labels.is_floating_point():
        return (model.config.num_labels or 1) > 1
    return kind == "multi_label_classification"


@typed
def control_problem(
    delta_model: DeltaModel, batch: Mapping[str, Any], *, weight_decay: float = 0.0
) -> ControlProblem:
    """The fine-tuning of a delta on one batch, as an optimal-control problem.

    J(u) = loss(logits, labels) + λ/2 Σ_t ‖u_t‖² with the loss averaged over the batch:
    cross-entropy for integer labels (shifted by one position for causal language models), the
    binary one where an example has several labels (`has_many_labels`), half the mean squared error
    for other real ones.

    The problem's ``dynamics`` are `TransformerDynamics`, and ``x0`` is the batch of tokens. Between
    two stages the state is the hidden states (batch, tokens, d), or, where more goes from stage to
    stage, a vector of them and the rest; the module tells the stages and the parts of their states,
    ``dynamics.stage_names`` and ``dynamics.parts(t, x)`` those of this problem. The last state is
    the logits.

    Args:
        delta_model: the controlled model.
        batch: the model's arguments, with ``labels``. An encoder-decoder's ``decoder_input_ids``
            are made of the labels where the model does so itself and the batch has none.
        weight_decay: λ.

    Raises:
        InputError: the batch has no labels, or lacks an encoder-decoder's ``decoder_input_ids``; or
            as `TransformerDynamics` does.
    """
    if not isinstance(delta_model, DeltaModel):
        raise InputError(
            f"a control problem needs a model with deltas, from attach(model, LoRA(rank=8)), not a "
            f"{type(delta_model).__name__}."
        )
    labels = batch.get("labels")
    if labels is None:
        raise InputError(f"the batch has no 'labels'; it has {', '.join(map(str, batch))}.")
    if not isinstance(labels, torch.Tensor):
        raise InputError(f"the labels are {type(labels).__name__}; expected a tensor.")
    for name, value in batch.items():
        if type(value).__module__ == "numpy":
            raise InputError(f"{name} of the batch is {type(value).__name__}; expected a tensor.")
    tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
    if isinstance(tokens, torch.Tensor) and isinstance(mask, torch.Tensor):
        if mask.dim() == 2 and mask.shape != tokens.shape:
            raise InputError(
                f"the attention_mask has shape {tuple(mask.shape)} and the input_ids "
                f"{tuple(tokens.shape)}; expected one entry for each token."
            )
    dynamics = TransformerDynamics(delta_model, _with_decoder_tokens(delta_model.model, batch))
    cost: Cost
    if has_many_labels(delta_model.model, labels):
        cost = BinaryCrossEntropyCost(labels, weight_decay=weight_decay)
    elif labels.is_floating_point():
        cost = SquaredErrorCost(labels.reshape(len(labels), -1), weight_decay=weight_decay)
    elif labels.dim() == 2 and is_causal_lm(delta_model.model):
        shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        cost = CrossEntropyCost(shifted, weight_decay=weight_decay)
    else:
        cost = CrossEntropyCost(labels, weight_decay=weight_decay)
    return ControlProblem(dynamics, cost, dynamics.x0)


def _with_decoder_tokens(model: PreTrainedModel, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with what the decoder reads, which follows from the labels."""
    generates = model.config.is_encoder_decoder and model.get_output_embeddings() is not None
    if not generates or {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys():
        return batch
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise InputError(
            f"{type(model).__name__} decodes tokens, and the batch has no 'decoder_input_ids'; "
            "give them: the labels, shifted by one position behind the start token."
        )
    return {**batch, "decoder_input_ids": prepare(labels=batch["labels"])}
