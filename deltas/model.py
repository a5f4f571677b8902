"""``attach`` lays deltas on a frozen model; ``DeltaModel`` is the model with its controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host, Losses
from deltacontrol.deltas.editing.merging import check_ties, merged_values
from deltacontrol.theory.errors import InputError, unknown

_MARK = "deltacontrol_attached"
Request = TypeVar("Request")


@dataclass(frozen=True)
class Attachment:
    """What one delta put on the model.

    Attributes:
        delta: the configuration.
        namespace: the first part of the names of its controls.
        num_parameters: counted; equals the method's formula.
        num_sites: how many modules it acts at.
    """

    delta: Delta
    namespace: str
    num_parameters: int
    num_sites: int


class DeltaModel(nn.Module):
    """A frozen base model and the controls beside it.

    ``forward`` takes what the base model takes. Only ``controls`` is trained; parameter names of
    the base stay as they are, so that DDP, accelerate and ``state_dict`` see an ordinary module.
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
        self._active = frozenset(attachment.namespace for attachment in attachments)
        self.controls.train(host.model.training)
        self.training = host.model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, under control."""
        self.host  # noqa: B018 - fails when detached
        return self.model(*args, **kwargs)

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
        chosen = known if namespaces is None else list(namespaces)
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
        fixed = {name for name, _ in self.controls.named_buffers() if _is_fixed(name)}
        state = self.controls.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name not in fixed}

    @property
    def needs_data(self) -> bool:
        """Whether `prepare` has something to do."""
        return bool(self._asked(self.host.preparations))

    def prepare(self, losses: Losses) -> None:
        """Let controls that depend on the data (a Fisher mask, say) see it, before training.

        Args:
            losses: gives the loss of the model, one example after another, anew at each call.
        """
        for prepare in self._asked(self.host.preparations):
            prepare(losses)

    @property
    def is_penalised(self) -> bool:
        """Whether a delta adds something to the training loss."""
        return bool(self._asked(self.host.penalties))

    def penalty(self) -> Tensor:
        """What the deltas add to the training loss, a scalar."""
        return torch.stack([penalty() for penalty in self._asked(self.host.penalties)]).sum()

    def after_step(self, step: int, num_steps: int) -> bool:
        """To be called after update ``step`` of 1..num_steps, while the gradients still stand.

        Returns:
            Whether to forget the optimiser's moments and the best evaluation so far, because
            controls were put elsewhere.
        """
        return any([act(step, num_steps) for act in self._asked(self.host.after_step)])

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
        check_ties(self.host)
        training = self.controls.training
        self.controls.eval()  # without what training draws at random
        try:
            merged = merged_values(self.host)
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
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise InputError(
                f"these controls do not fit: {len(missing)} missing {missing[:3]}, {len(extra)} "
                f"unknown {extra[:3]}. Attach the deltas that they were saved with: this model has "
                f"{', '.join(a.namespace for a in self.attachments)}."
            )
        for key, value in own.items():
            if state[key].shape != value.shape:
                raise InputError(
                    f"control {key} has shape {tuple(state[key].shape)}, expected "
                    f"{tuple(value.shape)}: the delta was saved with other dimensions."
                )
        for key, value in self.controls.named_buffers():
            if key not in own or not _is_fixed(key):
                continue
            if not torch.equal(state[key].cpu(), value.cpu()):
                remedy = (
                    "the same seed draws another projection now, so that the controls mean nothing "
                    "here; train them again."
                    if key.endswith("fixed_draws")
                    else "attach with the seed that the controls were saved with."
                )
                raise InputError(
                    f"{key} is {state[key].tolist()}, but this model has {value.tolist()}: {remedy}"
                )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])

    def __deepcopy__(self, memo: dict) -> DeltaModel:
        """Refused: the copy's hooks would act with the original's controls."""
        raise InputError(
            "a model with deltas cannot be copied: detach(), copy the base, attach to the copy and "
            "load(state())."
        )

    def detach(self) -> PreTrainedModel:
        """Take all deltas off and give the base model back, bit for bit."""
        self.host.undo()
        self.model.__dict__.pop(_MARK, None)
        self._host = None
        return self.model


def _is_fixed(name: str) -> bool:
    """Whether a buffer is a constant of the attached delta, such as the seed of a projection."""
    leaf = name.rpartition(".")[2]
    return leaf == "seed" or leaf.startswith("fixed_")


def attach(model: PreTrainedModel, *deltas: Delta, seed: int = 0) -> DeltaModel:
    """Lay deltas on a model; the model is frozen, the controls are trainable.

    Several deltas act together; where two act at one site they do so in the order given.

    Args:
        model: any transformers model.
        deltas: one or more configurations, such as ``LoRA(rank=8)``.
        seed: seed of the initial values.

    Returns:
        The controlled model. ``detach()`` on it restores ``model`` bit for bit.

    Raises:
        InputError: a target matches nothing, a size is impossible, a tied weight would change on
            both ends, or the model has deltas already. The model is then as before.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from deltacontrol.deltas import LoRA, attach
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                     intermediate_size=64, vocab_size=100)
        >>> attach(BertModel(config), LoRA(rank=2)).num_trainable == 2 * 2 * 2 * (32 + 32)
        True
    """
    if not deltas:
        raise InputError("attach needs at least one delta, such as LoRA(rank=8).")
    for delta in deltas:
        if not isinstance(delta, Delta):
            raise InputError(
                f"attach takes deltas such as LoRA(rank=8), not {delta!r}; deltas.parse makes one "
                "of a text."
            )
    if not isinstance(model, PreTrainedModel | DeltaModel):
        raise InputError(
            f"attach takes a model of transformers (PreTrainedModel), not {type(model).__name__}."
        )
    if isinstance(model, DeltaModel) or _MARK in model.__dict__:
        raise InputError(
            "this model has deltas already: call .detach() on its DeltaModel first, or give all "
            "deltas to one attach(model, A, B)."
        )
    num_base = sum(p.numel() for p in model.parameters())
    host = Host(model, seed)
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore_flags() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    attachments: list[Attachment] = []
    host._undo.append(restore_flags)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        for delta in deltas:
            taken = sum(a.delta.name == delta.name for a in attachments)
            host.namespace = delta.name.replace(".", "_") + (f"_{taken + 1}" if taken else "")
            before = {name for name, _ in host.controls.named_parameters()}
            expected = delta.num_parameters(host)
            delta.build(host)
            added = {n: p for n, p in host.controls.named_parameters() if n not in before}
            count = sum(p.numel() for p in added.values())
            if count != expected:
                raise AssertionError(
                    f"{delta.name}: {count} parameters, its formula "
                    f"{delta.num_parameters_formula} gives {expected}."
                )
            places = {host.state_path[name] for name in added}
            attachments.append(Attachment(delta, host.namespace, count, len(places)))
    except BaseException:
        host.undo()
        raise
    model.__dict__[_MARK] = True
    return DeltaModel(host, tuple(attachments), num_base)
