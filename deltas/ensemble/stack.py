"""Many deltas at once: K copies of the same deltas over one frozen backbone.

The copies differ in their seeds and in what training makes of them. Copy k owns the rows
k·B … (k+1)·B of a batch of K·B rows, so that a frozen map, which is the same for all, is one matrix
product over all copies. What a control does is computed with each copy's own values: the laws of
the deltas are mapped (``torch.func.vmap``) over the copies,

    y ↦ vmap_k law(u_k; x_k, y_k),        x, y of shape (K·B, …) seen as (K, B, …).

That needs a law that is a function of its module's input and output, trained weights that belong to
linear maps and normalisations, and prefixes that are the same for all rows of a copy;
``unstackable`` says why other deltas must be trained one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.attaching import attach
from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.dynamics.transformer import has_many_labels, is_causal_lm
from deltacontrol.deltas.editing.control_tree import ControlTree
from deltacontrol.deltas.editing.copies import Copies, Place
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.errors import InputError

IGNORED = -100


class UnstackableError(InputError):
    """Copies of these deltas cannot share a pass."""


def unstackable(host: Host) -> str:
    """Why copies of what ``host`` carries cannot share a pass; empty where they can."""
    edits, requests = host.edits, host.requests
    if edits.is_reparametrised:
        return "weights of the base are functions of a control, other ones in each copy"
    if edits.carried:
        return "a control reads what another module left behind"
    if requests.preparations or requests.after_step or requests.penalties:
        return "a control asks more of the training than gradients"
    if any(hasattr(prefix, "gate") for prefix in edits.prefixes):
        return "a prefix has a gate of its own for each row"
    for name in host.replaced:
        module = host.sites.modules[name.rpartition(".")[0]]
        if not isinstance(module, nn.Linear | Conv1D) and "Norm" not in type(module).__name__:
            return f"{name} is trained, and is no part of a linear map or a normalisation"
    return ""


class DeltaStack(nn.Module):
    """K copies of deltas on one frozen model; made by :func:`attach_many`.

    Attributes:
        model: the base model.
        controls: the controls of all copies, each (K, …), under the names of a `DeltaModel`.
        seeds: of the copies.
        places: where modules keep the controls of one copy, by name.
        used: which of them each law uses, as far as a pass has shown.
    """

    single: DeltaModel

    def __init__(
        self, single: DeltaModel, seeds: Sequence[int], states: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__()
        self.__dict__["single"] = single  # no submodule: its controls are those of one copy
        self.model = single.model
        self.seeds = tuple(seeds)
        self.controls = ControlTree()
        self._constants: dict[str, Tensor] = {}
        trainable = single.trainable()
        for name in states[0]:
            values = torch.stack([state[name] for state in states])
            if name in trainable:
                self.controls.place(name, nn.Parameter(values))
            else:
                self._constants[name] = values
        self.places = _places(single)
        self.used: dict[Any, list[str]] = {}
        self._wrap_trained_modules(single.host)

    @property
    def num_copies(self) -> int:
        """K."""
        return len(self.seeds)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The stacked controls, each (K, …), by name."""
        return dict(self.controls.named_parameters())

    def constants(self) -> dict[str, Tensor]:
        """What no training changes and no file keeps alone, each (K, …), by name."""
        return dict(self._constants)

    @property
    def fixed_names(self) -> set[str]:
        """Of what `state` holds, the constants that no training changes."""
        return self.single.controls.state_dict().keys() - self.single.variables().keys()

    @property
    def rate_factors(self) -> dict[str, float]:
        """As `DeltaModel.rate_factors`."""
        return self.single.rate_factors

    def train(self, mode: bool = True) -> DeltaStack:
        """As of any module; the laws that act for each copy follow."""
        self.single.train(mode)
        self.training = mode
        self.controls.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> DeltaStack:
        """Move or convert all copies, their constants and the controls of the single model."""
        self._constants = {name: fn(value) for name, value in self._constants.items()}
        self.single.controls._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, start: int = 0, stop: int | None = None, **batch: Any) -> Any:
        """The model's output for the copies start … stop - 1 (all of them by default).

        Args:
            start: the first copy.
            stop: the one behind the last.
            batch: the model's arguments; tensors hold the copies' rows one after another.
        """
        stop = self.num_copies if stop is None else stop
        values = {name: p[start:stop] for name, p in self.trainable().items()}
        return self.run(values, start, stop, batch)

    def run(
        self, controls: Mapping[str, Tensor], start: int, stop: int, batch: Mapping[str, Any]
    ) -> Any:
        """As ``forward``, with other values (copies, …) of the controls."""
        constants = {name: value[start:stop] for name, value in self._constants.items()}
        values = {**controls, **constants}
        copies = Copies(values, self.places, stop - start, _rows(batch), self.used)
        with copies.acting(self.single.host.edits):
            return self.single(**batch)

    def losses(self, logits: Tensor, labels: Tensor, num_copies: int) -> Tensor:
        """The mean loss of each copy, (copies,), as the model's own forward computes it.

        Cross-entropy for integer labels, shifted by one position for causal language models; the
        binary one where an example has several labels; the mean squared error for other real ones.
        """
        if has_many_labels(self.model, labels):
            each = binary_cross_entropy_with_logits(logits, labels, reduction="none")
            return each.reshape(num_copies, -1).mean(1)
        if labels.is_floating_point():
            errors = mse_loss(logits.reshape(len(labels), -1).squeeze(-1), labels, reduction="none")
            return errors.reshape(num_copies, -1).mean(1)
        if labels.dim() == 2 and is_causal_lm(self.model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = logits.reshape(-1, logits.shape[-1])
        flat = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
        each = cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none")
        count = (labels != IGNORED).reshape(num_copies, -1).sum(1)
        return each.reshape(num_copies, -1).sum(1) / count

    def copy(self, index: int) -> DeltaModel:
        """The model under the controls of one copy: what evaluation and saving take.

        It is the same object for all, with that copy's values written into it.
        """
        own = tensors_of(self.single)
        with torch.no_grad():
            for name, value in {**self.trainable(), **self._constants}.items():
                own[name].copy_(value[index])
        return self.single

    def state(self, index: int) -> dict[str, Tensor]:
        """What `DeltaModel.state` gives for one copy."""
        own = self.single.controls.state_dict()
        values = {**self.trainable(), **self._constants}
        return {name: values[name][index].detach().cpu().clone() for name in own}

    def detach(self) -> PreTrainedModel:
        """Take all copies off and give the base model back, bit for bit."""
        return self.single.detach()

    def _wrap_trained_modules(self, host: Host) -> None:
        modules = {name.rpartition(".")[0] for name in host.replaced}
        for path in modules:
            host.edits.map_over_copies(host.sites.modules[path])


def attach_many(model: PreTrainedModel, *deltas: Delta, seeds: Sequence[int]) -> DeltaStack:
    """Lay K copies of deltas on a model, copy k with the initial values of ``seeds[k]``.

    Raises:
        UnstackableError: copies of these deltas cannot share a pass.
        InputError: as `attach` does.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from deltacontrol.deltas import LoRA, attach_many
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                     intermediate_size=64, vocab_size=100)
        >>> stack = attach_many(BertModel(config), LoRA(rank=2), seeds=(0, 1, 2))
        >>> {tuple(p.shape) for p in stack.trainable().values()} == {(3, 2, 32), (3, 32, 2)}
        True
    """
    if not seeds:
        raise InputError("attach_many needs at least one seed, such as seeds=(0, 1, 2).")
    states = []
    for seed in seeds:
        single = attach(model, *deltas, seed=seed)
        reason = unstackable(single.host)
        if reason:
            single.detach()
            raise UnstackableError(
                f"{' and '.join(delta.name for delta in deltas)} cannot be stacked: {reason}. "
                "Attach and train the copies one after another."
            )
        states.append({name: value.detach().clone() for name, value in tensors_of(single).items()})
        if len(states) < len(seeds):
            single.detach()
    return DeltaStack(single, seeds, states)


def tensors_of(single: DeltaModel) -> dict[str, Tensor]:
    """All tensors of the controls, those that are not saved as well."""
    return {**single.trainable(), **dict(single.controls.named_buffers())}


def _places(single: DeltaModel) -> dict[str, list[Place]]:
    """Where modules keep the controls: those of the deltas, and of the base where one stands in."""
    places: dict[str, list[Place]] = {}
    for path, module in single.controls.named_modules():
        for own in (module._parameters, module._buffers):
            for leaf, value in own.items():
                if value is not None:
                    places[f"{path}.{leaf}" if path else leaf] = [(own, leaf)]
    for name, control in single.host.replaced.items():
        path, _, leaf = name.rpartition(".")
        places[control].append((single.host.sites.modules[path]._parameters, leaf))
    return places


def _rows(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))
