"""Feedback laws on a Transformer: corrections of its hidden states at inference.

A delta is one open-loop control for all data. A feedback law
(`deltacontrol.theory.feedback.laws.FeedbackLaw`) looks at each example's states instead and has
nothing to train, so it is attached by a function of its
own:

    law = ProjectionCorrection(calibrate(model, batches).subspaces(rank=256), 0.5)
    with attach_feedback(model, law):
        logits = model(**batch).logits

The law's steps are the sites in the order of the model. ``site="state"`` means the states
``(batch, tokens, width)`` of the layered system, x_1 … x_{L+1} of
`deltacontrol.deltas.dynamics.transformer`: what enters the first block, then the output of every
block. ``"block"`` leaves the former out; other names are those of
`deltacontrol.deltas.editing.sites`, and their modules' outputs are corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.correction import StateFeedback
from deltacontrol.theory.feedback.laws import FeedbackLaw

Model = PreTrainedModel | DeltaModel


class StateTaps:
    """Functions of the hidden states, put in at the sites of a model.

    Args:
        model: the model, with or without deltas; they act before the taps at the same module.
        site: see the module's documentation.

    Attributes:
        paths: where the taps are, in the order of the model; "input:PATH" is what enters a block.

    Raises:
        InputError: the site matches nothing.
    """

    def __init__(self, model: Model, site: str = "state") -> None:
        if isinstance(model, DeltaModel):
            model.host  # noqa: B018 - fails when detached
            model = model.model
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"expected a model of transformers or a DeltaModel, not {type(model).__name__}."
            )
        self._host = Host(model)
        sites = self._host.sites
        if site == "state":
            starts = {p.rpartition(".")[0]: p for p in reversed(sites.block_paths)}.values()
            paths = [q for p in sites.block_paths for q in ((f"input:{p}",) * (p in starts) + (p,))]
            if not paths:
                raise InputError(f"{type(model).__name__} has no blocks that this project knows.")
        else:
            paths = [found.path for found in self._host.find([site])]
        self.paths = tuple(paths)

    def put(self, change: Callable[[int, Tensor], Tensor]) -> None:
        """Let ``change(t, x)`` take the place of the state x at site t."""
        for t, path in enumerate(self.paths):
            module = self._host.sites.modules[path.removeprefix("input:")]
            if path.startswith("input:"):
                self._host.on_call(module, _on_input(t, change))
            else:
                self._host.on_output(module, lambda _inputs, x, t=t: change(t, x))

    def remove(self) -> None:
        """Take all taps off."""
        self._host.undo()


def _on_input(
    t: int, change: Callable[[int, Tensor], Tensor]
) -> Callable[[tuple, dict], tuple[tuple, dict]]:
    def law(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(t, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(t, kwargs["hidden_states"])}

    return law


class AttachedFeedback:
    """A law that acts on a model until `detach`, or until the end of a ``with`` block.

    Attributes:
        law: the law.
        paths: where its steps are; see `StateTaps`.
    """

    def __init__(self, law: FeedbackLaw, taps: StateTaps) -> None:
        self.law = law
        self.paths = taps.paths
        self._taps = taps
        taps.put(self._correct)

    def _correct(self, t: int, x: Tensor) -> Tensor:
        if isinstance(self.law, StateFeedback):
            correction = self.law.correction(t, x)
            return x if correction is None else x + correction
        u = self.law.control(t, x)
        if u.numel() not in (x.numel(), x[0].numel()):
            raise InputError(
                f"the law's control at {self.paths[t]} has shape {tuple(u.shape)}; expected one "
                f"entry for each entry of the state {tuple(x.shape)}, or of one example of it."
            )
        return x + (u.reshape(x.shape) if u.numel() == x.numel() else u.reshape(x.shape[1:]))

    def detach(self) -> None:
        """Take the law off; the model is as before, bit for bit."""
        self._taps.remove()

    def __enter__(self) -> AttachedFeedback:
        """The handle itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()


@typed
def attach_feedback(model: Model, law: FeedbackLaw, site: str = "state") -> AttachedFeedback:
    """Let a law correct the hidden states: x_t + law(t, x_t) at every site, for each example.

    Deltas that are attached already act first at the same module; several laws act in the order in
    which they were attached. Gradients flow through the law.

    Args:
        model: the model, with or without deltas.
        law: its control has the size of the state, as a
        `deltacontrol.theory.feedback.correction.StateFeedback`'s.
        site: where; see the module's documentation.

    Raises:
        InputError: the site matches nothing, or the law was made for another number of steps.
    """
    taps = StateTaps(model, site)
    if isinstance(law, StateFeedback) and law.horizon != len(taps.paths):
        raise InputError(
            f"the law has {law.horizon} steps, but {site!r} has {len(taps.paths)} sites here: "
            f"{', '.join(taps.paths)}."
        )
    return AttachedFeedback(law, taps)


def run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The model's output on a batch, without its labels and without a cache."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    base = model.model if isinstance(model, DeltaModel) else model
    if getattr(base.config, "use_cache", False):
        inputs["use_cache"] = False
    return model(**inputs)


def attended(batch: Mapping[str, Any], state: Tensor) -> Tensor:
    """Which tokens of a state are text, (batch, tokens): all but the padding.

    Rows that a prompt put in front of the text count as text.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(state.shape[:-1], dtype=torch.bool, device=state.device)
    return pad(mask.bool(), (state.shape[1] - mask.shape[1], 0), value=True)


def in_evaluation_mode(model: nn.Module) -> None:
    """Refuse a model with dropout on.

    Raises:
        InputError: the model is in training mode.
    """
    if model.training:
        raise InputError("the model is in training mode, so its states are random; call .eval().")
