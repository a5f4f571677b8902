"""``attach`` lays deltas on a frozen model."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from deltacontrol.deltas import guards
from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.deltas.quantised import num_values
from deltacontrol.deltas.summary import Attachment
from deltacontrol.theory.errors import InputError

_MARK = "deltacontrol_attached"


@cache
def _class_for(base: type[PreTrainedModel]) -> type[DeltaModel]:
    """The class of `DeltaModel` with the signature of the base's ``forward``.

    A Trainer reads it to see which columns of a data set, and which labels, the model takes.
    """

    def forward(self: DeltaModel, *args: Any, **kwargs: Any) -> Any:
        return DeltaModel.forward(self, *args, **kwargs)

    forward.__doc__ = DeltaModel.forward.__doc__
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "__module__": __name__, "__doc__": DeltaModel.__doc__}
    return type(f"DeltaModel[{base.__name__}]", (DeltaModel,), members)


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
            both ends, the model has deltas already or offloaded weights, or the controls are larger
            than the memory. The model is then as before.

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
                f"attach takes deltas such as LoRA(rank=8), not {delta!r}; "
                "deltacontrol.deltas.parse makes one of a text."
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
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InputError(f"the seed is {seed!r}; expected a whole number from 0 to 2^63 - 1.")
    guards.refuse_offloaded(model)
    num_base = sum(num_values(p) for p in model.parameters())
    host = Host(model, seed)
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore_flags() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    attachments: list[Attachment] = []
    host.edits.on_undo(restore_flags)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        for delta in deltas:
            taken = sum(a.delta.name == delta.name for a in attachments)
            host.namespace = delta.name.replace(".", "_") + (f"_{taken + 1}" if taken else "")
            before = {name for name, _ in host.controls.named_parameters()}
            if getattr(delta, "sites", None) == () and not getattr(delta, "input_sites", ()):
                raise InputError(f"{delta.name} acts nowhere: sites is empty; name a module.")
            expected = delta.num_parameters(host)
            guards.require_memory(delta.name, expected, model)
            with guards.allocating(delta.name):
                delta.build(host)
            added = {n: p for n, p in host.controls.named_parameters() if n not in before}
            count = sum(p.numel() for p in added.values())
            if count != expected:
                raise AssertionError(
                    f"{delta.name}: {count} parameters, its formula "
                    f"{delta.num_parameters_formula} gives {expected}."
                )
            if not count:
                raise InputError(
                    f"{delta.name} acts nowhere on this {type(model).__name__}, with no parameter; "
                    "give it sites, or leave its options as they are by default."
                )
            places = {host.state_path[name] for name in added}
            attachments.append(Attachment(delta, host.namespace, count, len(places)))
    except BaseException:
        host.undo()
        raise
    guards.guard(host.edits)
    host.edits.override(_MARK, True)
    return _class_for(type(model))(host, tuple(attachments), num_base)
