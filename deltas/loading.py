"""Deltas into a folder or onto the hub, and back onto the base that they were saved with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import hub, saved_folder
from deltacontrol.deltas.attaching import attach
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.deltas.registry import from_dict
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError


@typed
def save(
    controlled: DeltaModel,
    folder: str | Path,
    *,
    card: str = "",
    push_to: str | None = None,
    private: bool | None = None,
) -> None:
    """Write the deltas, their controls and the base's identity, and put them on the hub if wanted.

    Args:
        controlled: the model with its deltas.
        folder: as in `DeltaModel.save`.
        card: as in `DeltaModel.save`.
        push_to: an id of the hub, ``owner/name``, to which the files of the folder go as well.
        private: as in `deltacontrol.deltas.hub.push`.

    Raises:
        InputError: as in `DeltaModel.save`; or nothing can be put on the hub, which is told before
            anything is written where it is known.
    """
    if push_to is not None:
        hub.require(push_to)
    controlled.save(folder, card=card or controlled.card(push_to or Path(folder).name or ".").text)
    if push_to is not None:
        hub.push(Path(folder), push_to, saved_folder.FILES, private=private)


@typed
def load(model: PreTrainedModel, folder: str | Path) -> DeltaModel:
    """Attach the deltas that `DeltaModel.save` wrote, with their controls.

    Args:
        model: the same base model, without deltas. Parameters that a control stands for, such as
            those of a trained head, may have any values.
        folder: that `DeltaModel.save` wrote, or the id of one on the hub, ``owner/name``.

    Returns:
        The controlled model, with the outputs of the one that was saved.

    Raises:
        InputError: the folder is damaged or of another kind, the hub has no such id or cannot
            be reached, the base is another one, a delta is unknown, or the controls' names, sizes
            or dtypes are others. The model is then as before.
    """
    folder = hub.folder(folder, saved_folder.FILES)
    saved = saved_folder.read(folder)
    try:
        deltas = [from_dict(config) for config in saved.deltas]
    except InputError as error:
        raise InputError(f"{folder / saved_folder.DESCRIPTION}: {error}") from error
    saved_folder.check_same_base(saved.base, saved_folder.architecture(model), folder)
    tuned = attach(model, *deltas, seed=saved.seed)
    try:
        saved_folder.check_same_base(saved.base, tuned.base_identity, folder)
        _take_dtype(tuned.controls, saved.controls)
        tuned.load(saved.controls)
    except BaseException:
        tuned.detach()
        raise
    return tuned


def _take_dtype(controls: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Convert controls to the dtype that they were saved in, which may be finer than the base's.

    Raises:
        InputError: several dtypes were saved, and they are not those of this model.
    """
    own = controls.state_dict()
    if all(saved[name].dtype == value.dtype for name, value in own.items() if name in saved):
        return
    kinds = {value.dtype for value in saved.values() if value.is_floating_point()}
    if len(kinds) > 1:
        here = {value.dtype for value in own.values() if value.is_floating_point()}
        raise InputError(
            f"the controls were saved as {_names(kinds)}, but this model has {_names(here)}; load "
            "the base in the dtype that it had."
        )
    controls.to(kinds.pop())


def _names(kinds: set) -> str:
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
