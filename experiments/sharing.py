"""A run's deltas handed on: into a folder or onto the hub, with their model card.

record = dc.finetune(task="movie", deltas="lora")
dc.save(record, "lora-movie")                              # deltas.json, controls, README.md
dc.save(record, "lora-movie", push_to="me/lora-movie")     # and the same on the hub
tuned = dc.load(model, "me/lora-movie")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments import cards, models
from deltacontrol.experiments.runs.record import Record
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas import DeltaModel

__all__ = ["export_peft", "save"]


@typed
def save(
    what: DeltaModel | Record,
    folder: str | Path,
    *,
    push_to: str | None = None,
    private: bool | None = None,
) -> None:
    """Write deltas, their controls and a model card into a folder, and onto the hub if wanted.

    Args:
        what: a model with its deltas; or the record of a run, whose card then has the task, the
            scores with intervals, the settings and what to cite.
        folder: a new or empty one, or one that was written by `save`, which is replaced.
        push_to: an id of the hub, ``owner/name``, to which the files of the folder go as well. It
            is made where it is not there yet; files of the same names there are replaced, a card
            too that was edited there.
        private: whether a new place on the hub is private; None leaves that to the owner.

    Raises:
        InputError: there is something else in the folder; the record keeps no controls, or its
            model or data are not what they were; or nothing can be put on the hub, which is told
            before any work where it is known.
    """
    from deltacontrol.deltas import DeltaModel, hub, loading

    if push_to is not None:
        hub.require(push_to)
    if isinstance(what, DeltaModel):
        loading.save(what, folder, push_to=push_to, private=private)
        return
    if not isinstance(what, Record):
        raise InputError(
            f"save: {type(what).__name__} has no deltas; expected a DeltaModel or a record"
        )
    setting = what.setting()
    card = cards.of_run(what, setting, push_to or Path(folder).name or ".")
    loading.save(setting.controlled, folder, card=card.text, push_to=push_to, private=private)


@typed
def export_peft(
    record: Record,
    folder: str | Path,
    *,
    base_model: str | None = None,
    push_to: str | None = None,
    private: bool | None = None,
) -> DeltaModel:
    """Write a run's deltas as an adapter of peft with a model card, and onto the hub if wanted.

    Args:
        record: of the run.
        folder: it must not hold an adapter or a README.md yet.
        base_model: the base named in the adapter, an id on the hub or a folder; by default that of
            the run: a folder, also of a packaged model, where the adapter stays here, and its name
            alone where it goes to the hub.
        push_to: as in `save`.
        private: as in `save`.

    Returns:
        The model with the deltas that were written.

    Raises:
        InputError: as in `save`, and as in `deltacontrol.deltas.interop.export_peft`.
    """
    from deltacontrol.deltas import hub, interop
    from deltacontrol.deltas.interop.adapter import FILES

    if push_to is not None:
        hub.require(push_to)
    setting = record.setting()
    card = cards.of_run(record, setting, push_to or Path(folder).name or ".", peft=True)
    base = base_model or base_of(record)
    if push_to is not None:
        base = cards.public_model(base_model or record.config["model"])
    interop.export_peft(setting.controlled, folder, base_model=base, card=card.text)
    if push_to is not None:
        hub.push(Path(folder).expanduser(), push_to, FILES, private=private)
    return setting.controlled


def base_of(record: Record) -> str:
    """What peft finds the base by: an id on the hub, or a folder, also of a packaged model."""
    found = models.resolve(record.config["model"])
    return str(Path(found.location).resolve()) if found.digest else str(found.location)
