"""Serving: one batch whose rows carry different deltas.

Row i of a batch acts under the adapter that it names. A frozen map is one matrix product over all
rows, as in `deltacontrol.deltas.ensemble.stack`; what a control does is computed with its row's own
values,

    y_i ↦ law(u_{a(i)}; x_i, y_i),        a(i) the adapter of row i.

Source: the way of multi-LoRA serving (Chen et al., *Punica*, MLSys 2024; Sheng et al., *S-LoRA*,
MLSys 2024), here by gathered values and ``torch.func.vmap`` for every delta that can be stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import hub, saved_folder
from deltacontrol.deltas.editing.copies import Copies
from deltacontrol.deltas.ensemble.stack import DeltaStack, UnstackableError, tensors_of, unstackable
from deltacontrol.deltas.loading import load
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown

__all__ = ["Server", "serve"]


class Server(nn.Module):
    """A frozen model with several saved deltas, of which each row of a batch names one.

    Made by :func:`serve`. ``server(which, input_ids=…)`` is the model's output; inside
    ``server.rows(which)`` any pass of ``server.model`` acts so, ``generate`` too.

    Attributes:
        stack: the deltas, a copy an adapter.
        names: of the adapters, in the order of the copies.
    """

    def __init__(self, stack: DeltaStack, names: Sequence[str]) -> None:
        super().__init__()
        self.stack, self.names = stack, tuple(names)
        self.eval()

    @property
    def model(self) -> DeltaModel:
        """What acts under the rows' deltas inside `rows`."""
        return self.stack.single

    def forward(self, which: Sequence[str], **batch: Any) -> Any:
        """The model's output, row i under the adapter ``which[i]``.

        Args:
            which: a name a row.
            batch: the model's arguments.

        Raises:
            InputError: an adapter is unknown, or the batch has another number of rows.
        """
        _require_list(which)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.dim() > 1 and len(value) not in (1, len(which)):
                raise InputError(
                    f"{len(which)} adapters are named and {name} has {len(value)} rows; name one "
                    "for each row"
                )
        with self.rows(which) as model:
            return model(**batch)

    @contextmanager
    def rows(self, which: Sequence[str]) -> Iterator[DeltaModel]:
        """Let row i of every pass inside act under the adapter ``which[i]``.

        Passes have as many rows as names are given: beams and several answers a row multiply rows,
        and names have to be repeated as the rows are.

        Raises:
            InputError: an adapter is unknown, or none is named.
        """
        _require_list(which)
        places = {name: place for place, name in enumerate(self.names)}
        for name in which:
            if name not in places:
                raise unknown("adapter", str(name), self.names)
        index = torch.tensor([places[name] for name in which], device=self.model.device)
        own = {**self.stack.trainable(), **self.stack.constants()}
        values = {name: value.index_select(0, index) for name, value in own.items()}
        copies = Copies(values, self.stack.places, len(which), len(which), self.stack.used)
        with copies.acting(self.model.host.edits):
            yield self.model

    def detach(self) -> PreTrainedModel:
        """Take the deltas off and give the base model back, bit for bit."""
        return self.stack.detach()


@typed
def serve(model: PreTrainedModel, folders: Mapping[str, str | Path]) -> Server:
    """Load several saved deltas of one kind, for batches whose rows name theirs.

    Args:
        model: the base that they were saved with, without deltas.
        folders: that `DeltaModel.save` wrote, by the name of the adapter; ids of the hub serve too.

    Raises:
        UnstackableError: such deltas cannot act row by row.
        InputError: there is no folder; a folder cannot be loaded; the deltas differ in more than
            their values. The model is then as before.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from deltacontrol.deltas import LoRA, attach
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                     intermediate_size=64, vocab_size=100)
        >>> base, folders = BertModel(config), {}
        >>> for name in ("film", "news"):
        ...     folders[name] = tempfile.mkdtemp()
        ...     tuned = attach(base, LoRA(rank=2))
        ...     tuned.save(folders[name])
        ...     _ = tuned.detach()
        >>> server = serve(base, folders)
        >>> server(["news", "film", "film"], input_ids=torch.ones(3, 5).long())[0].shape
        torch.Size([3, 5, 32])
    """
    if not folders:
        raise InputError('serve needs a folder of deltas at least, such as {"film": "runs/film"}')
    folders = {name: hub.folder(place, saved_folder.FILES) for name, place in folders.items()}
    _require_one_kind(folders)
    states: list[dict[str, Tensor]] = []
    for place, (name, folder) in enumerate(folders.items()):
        single = load(model, folder)
        reason = unstackable(single.host)
        state = {key: value.detach().clone() for key, value in tensors_of(single).items()}
        if not reason and states:
            reason = _difference(state, states[0], name, next(iter(folders)))
        if reason:
            single.detach()
            raise UnstackableError(f"{reason}; serve these deltas apart, one batch each")
        states.append(state)
        if place < len(folders) - 1:
            single.detach()
    return Server(DeltaStack(single, range(len(states)), states), tuple(folders))


def _require_list(which: Sequence[str]) -> None:
    if isinstance(which, str) or not isinstance(which, Sequence) or not which:
        raise InputError(f"which is {which!r}; expected a list with a name for each row")


def _require_one_kind(folders: Mapping[str, str | Path]) -> None:
    """Refuse deltas of different settings: the law of one would act with the values of another.

    Raises:
        InputError: naming the first two that differ, and in what.
    """
    kinds = {name: saved_folder.read(folder).deltas for name, folder in folders.items()}
    first, own = next(iter(kinds.items()))
    for name, deltas in kinds.items():
        if deltas != own:
            raise InputError(
                f"the adapters {first} and {name} differ in more than their values: {own} against "
                f"{deltas}; serve them apart, one batch each"
            )


def _difference(state: Mapping[str, Tensor], other: Mapping[str, Tensor], *names: str) -> str:
    """What of two adapters has not one name, size and type; empty where all has."""
    for key in [*state, *other]:
        one, two = state.get(key), other.get(key)
        if one is None or two is None:
            return f"{key} is part of one of the adapters {names[0]} and {names[1]} alone"
        if one.shape != two.shape or one.dtype != two.dtype:
            told = (f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (one, two))
            return f"{key} is {next(told)} in {names[0]} and {next(told)} in {names[1]}"
    return ""
