"""A frozen model with its controls: what it computes, what is trained, what is saved."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import card as cards
from deltacontrol.deltas import fitting, guards, saved_folder
from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.merging import check_merges, merged_values
from deltacontrol.deltas.editing.requests import Losses
from deltacontrol.deltas.summary import Attachment, as_html, as_text, summary
from deltacontrol.theory.errors import InputError, unknown

Request = TypeVar("Request")


class DeltaModel(nn.Module):
    """A frozen base model and the controls beside it.

    ``forward`` takes what the base model takes. Only ``controls`` is trained; parameter names of
    the base stay as they are, so that DDP and accelerate see an ordinary module. ``state_dict``
    holds the controls alone, so that the checkpoints of ``transformers.Trainer(model=tuned)`` do.
    What a `DeltaModel` does not define (``num_parameters``, ``main_input_name``, …) is the base's.
    Made by :func:`attach`, in the training or evaluation mode of the base. Copying it is refused,
    because the hooks of a copy would still read the controls of the original: detach, copy the
    base, attach to the copy and ``load(state())``.

    Attributes:
        model: the base model, with the controls acting in it.
        controls: the trainable part; keys read ``<delta>.<module path>.<parameter>``.
        attachments: what each delta put on the model, in the order in which it acts.
    """

    def __init__(self, host: Host, attachments: tuple[Attachment, ...], num_base: int) -> None:
        super().__init__()
        self.model = host.model
        self.controls = host.controls
        self.attachments = attachments
        self.num_base = num_base
        self._host: Host | None = host
        self._has_acted = False
        self._active = frozenset(attachment.namespace for attachment in attachments)
        self.controls.train(host.model.training)
        self.training = host.model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, under control; `attach` gives it the base's signature."""
        host = self.host  # fails when detached
        if self._has_acted or host.edits.is_suspended or torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        with guards.first_pass(host.edits, lambda: self.model(*args, **kwargs)):
            output = self.model(*args, **kwargs)
        self._has_acted = True
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``, under control.

        Raises:
            InputError: the base generates nothing.
        """
        self.host  # noqa: B018 - fails when detached
        if not self.model.can_generate():
            raise InputError(
                f"{self._get_name()} does not generate; attach to a model with a head of language "
                "modelling, such as AutoModelForCausalLM gives."
            )
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Let the base act alone inside: its outputs are those of the detached model, bit for bit.

        May be nested, and an exception leaves the deltas acting again. Under gradient checkpointing
        a backward pass has to happen on the same side of the block's end as its forward pass.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> from deltacontrol.deltas import PromptTuning, attach
            >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            ...                     intermediate_size=64, vocab_size=100)
            >>> base, tokens = BertModel(config).eval(), torch.tensor([[5, 6, 7]])
            >>> before = base(tokens).last_hidden_state
            >>> tuned = attach(base, PromptTuning(length=2))
            >>> with tuned.disable():
            ...     torch.equal(tuned(tokens).last_hidden_state, before)
            True
        """
        with self.host.edits.suspended():
            yield

    def train(self, mode: bool = True) -> DeltaModel:
        """As of any module; the base's own ``train`` is refused while deltas act in it."""
        self.training = mode
        self.controls.train(mode)
        type(self.model).train(self.model, mode)
        return self

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model."""
        return self.model.dtype

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Compute activations again in the backward pass; options of `torch.utils.checkpoint`."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.model.activation_checkpointing_disable()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss takes the number of items; transformers' Trainer asks it first.

        Raises:
            InputError: the deltas ask the training for something that the Trainer does not do.
        """
        asked = self.host.requests
        requests = [*asked.preparations, *asked.penalties, *asked.after_step]
        asking = {namespace for namespace, _ in requests}
        asking |= {name.partition(".")[0] for name in asked.rate_factors}
        if names := [a.namespace for a in self.attachments if a.namespace in asking & self._active]:
            raise InputError(
                f"{' and '.join(names)} ask the training for more than gradients (a look at the "
                "data, a penalty, a schedule, or learning rates of their own), which transformers' "
                "Trainer does not do. Train with deltacontrol.experiments.training.finetune, or in "
                "a loop of your own that calls prepare(), penalty() and after_step() and heeds "
                "rate_factors."
            )
        own = getattr(self.model, "accepts_loss_kwargs", None)
        if own is not None:
            return own
        kinds = [p.kind for p in inspect.signature(self.model.forward).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def __getattr__(self, name: str) -> Any:
        """What neither this class nor `nn.Module` defines is the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "model" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.model, name)

    def _get_name(self) -> str:
        return type(self.model).__name__  # by which a Trainer knows how labels are shifted

    def summary(self) -> pd.DataFrame:
        """A table of the deltas: sites, parameters, share of the base."""
        return summary(self.attachments, self.num_base)

    def _headline(self) -> str:
        state = "frozen" if self._host else "detached"
        return f"DeltaModel of {self._get_name()} ({self.num_base:,} parameters, {state})"

    def __repr__(self) -> str:
        """The table of the deltas."""
        return f"{self._headline()}\n{as_text(self.summary())}"

    def _repr_html_(self) -> str:
        return f"<p>{self._headline()}</p>\n{as_html(self.summary())}"

    @property
    def host(self) -> Host:
        """The record of what was attached where.

        Raises:
            InputError: the deltas were detached.
        """
        if self._host is None:
            raise InputError("these deltas were detached; call attach(model, ...) again.")
        return self._host

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """The configurations, in order."""
        return tuple(attachment.delta for attachment in self.attachments)

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.controls.parameters())

    @property
    def num_total(self) -> int:
        """Parameters of the base model, tied ones once."""
        return self.num_base

    def trainable(self) -> dict[str, nn.Parameter]:
        """The controls by name, without those that `train_only` has frozen."""
        return {n: p for n, p in self.controls.named_parameters() if p.requires_grad}

    def train_only(self, namespaces: Iterable[str] | None) -> None:
        """Freeze the controls of all other deltas, which go on acting; None frees all.

        Args:
            namespaces: of the deltas to train, as in ``attachments``.

        Raises:
            InputError: there is no such delta, or none is left to train.
        """
        known = [attachment.namespace for attachment in self.attachments]
        named = isinstance(namespaces, Iterable) and not isinstance(namespaces, str)
        chosen = known if namespaces is None else list(namespaces) if named else [namespaces]
        for namespace in chosen:
            if namespace not in known:
                raise unknown("delta of this model", namespace, known)
        if not chosen:
            raise InputError(f"nothing is left to train; choose from {', '.join(known)}.")
        self._active = frozenset(chosen)
        for name, parameter in self.controls.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] in self._active)

    def variables(self) -> dict[str, Tensor]:
        """What training may change: the controls, and buffers such as masks that it sets."""
        fixed = {name for name, _ in self.controls.named_buffers() if fitting.is_fixed(name)}
        state = self.controls.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name not in fixed}

    @property
    def needs_data(self) -> bool:
        """Whether `prepare` has something to do."""
        return bool(self._asked(self.host.requests.preparations))

    @property
    def needs_examples(self) -> bool:
        """Whether `prepare` wants each loss to be of one example alone, not of a batch."""
        return any(one.examples for one in self._asked(self.host.requests.preparations))

    def prepare(self, losses: Losses) -> None:
        """Let controls that depend on the data (a Fisher mask, say) see it, before training.

        Args:
            losses: gives the loss of the model on one batch after another, or on one example after
                another where `needs_examples` says so; anew at each call.

        Raises:
            InputError: there is no loss, one is not finite, or the data do not tell what a delta
                wants to know.
        """
        with self.host.requests.looking() as requests:
            for preparation in self._asked(requests.preparations):
                preparation.act(losses)

    @property
    def is_penalised(self) -> bool:
        """Whether a delta adds something to the training loss."""
        return bool(self._asked(self.host.requests.penalties))

    def penalty(self) -> Tensor:
        """What the deltas add to the training loss, a scalar; zero where they add nothing."""
        found = [penalty() for penalty in self._asked(self.host.requests.penalties)]
        return torch.stack(found).sum() if found else torch.zeros(())

    def after_step(self, step: int, num_steps: int) -> bool:
        """To be called after update ``step`` of 1..num_steps, while the gradients still stand.

        Returns:
            Whether to forget the optimiser's moments and the best evaluation so far, because
            controls were put elsewhere.
        """
        return any([act(step, num_steps) for act in self._asked(self.host.requests.after_step)])

    def _asked(self, requests: list[tuple[str, Request]]) -> list[Request]:
        """What the deltas in training have asked for."""
        return [request for namespace, request in requests if namespace in self._active]

    @property
    def rate_factors(self) -> dict[str, float]:
        """Controls that are trained at a multiple of the learning rate, and that multiple."""
        return dict(self.host.rate_factors)

    def merge(self) -> PreTrainedModel:
        """Make the controls part of the base weights, and give back the plain model.

        The sum is formed in float64 and rounded once, so that an entry is off by at most half a
        unit in the last place of its dtype.

        Raises:
            InputError: a delta cannot be merged, or would change a tied weight at a place where
                the control does not act; nothing is changed then.
        """
        for attachment in self.attachments:
            if attachment.delta.unmergeable:
                raise InputError(
                    f"{attachment.namespace} cannot be merged: {attachment.delta.unmergeable}. "
                    "Keep it attached, or detach() it."
                )
        check_merges(self.host.merges, self.host.tied, self.host.original)
        training = self.controls.training
        self.controls.eval()  # without what training draws at random
        try:
            merged = merged_values(self.host.merges, self.host.original)
        finally:
            self.controls.train(training)
        model = self.detach()
        with torch.no_grad():
            for name, value in merged.items():
                parameter = model.get_parameter(name)
                parameter.copy_(value)
        return model

    def state(self) -> dict[str, Tensor]:
        """A copy of the controls, on the CPU, to be saved."""
        return {k: v.detach().cpu().clone() for k, v in self.controls.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put saved controls in place.

        Raises:
            InputError: keys, shapes or a seed of the delta differ; nothing is changed then.
        """
        own = self.controls.state_dict()
        fixed = [name for name, _ in self.controls.named_buffers() if name in own]
        fitting.require_fit(
            state,
            own,
            [name for name in fixed if fitting.is_fixed(name)],
            [attachment.namespace for attachment in self.attachments],
        )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """The controls alone, named ``controls.<delta>.<module path>.<parameter>``."""
        return self.controls.state_dict(*args, prefix=f"{prefix}controls.", **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Put the controls of a ``state_dict`` in place; always strict, as `load`."""
        prefix = "controls."
        other = [name for name in state_dict if not name.startswith(prefix)]
        if other:
            raise InputError(
                f"these are no controls: {', '.join(other[:3])}; expected names that start with "
                f"{prefix!r}, as state_dict() of a DeltaModel gives them."
            )
        self.load({name.removeprefix(prefix): value for name, value in state_dict.items()})
        return nn.modules.module._IncompatibleKeys([], [])

    @property
    def base_identity(self) -> dict[str, Any]:
        """What tells the base from others; parameters that controls stand for do not count."""
        with self.disable():
            return saved_folder.identity(self.model, self.host.queries.originals)

    def card(self, place: str) -> cards.Card:
        """What a README.md says of the deltas at `place`, a folder's name or an id of the hub."""
        return cards.described(self.attachments, self.model, self.num_base, place)

    def save(self, folder: str | Path, *, card: str = "") -> None:
        """Write the deltas and their controls into a folder, for `deltacontrol.deltas.load`.

        Args:
            folder: a new or empty one, or one that was written by `save`, which is replaced.
            card: text of its README.md; by default what is known without a record, `card`.

        Raises:
            InputError: there is something else at that place.
        """
        deltas = [delta.to_dict() for delta in self.deltas]
        saved = saved_folder.Saved(deltas, self.host.seed, self.base_identity, self.state())
        text = card or self.card(Path(folder).name or ".").text
        saved_folder.write(folder, saved, text)

    def __deepcopy__(self, memo: dict) -> DeltaModel:
        """Refused: the copy's hooks would act with the original's controls."""
        raise InputError(guards.COPIED)

    def detach(self) -> PreTrainedModel:
        """Take all deltas off and give the base model back, bit for bit."""
        self.host.undo()
        self._host = None
        return self.model
