"""The records behind a figure: computed here, or the committed ones of the paper."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from deltacontrol.experiments import studies
from deltacontrol.experiments.runs.experiment import Experiment, canonical_json
from deltacontrol.experiments.runs.record import CURVE_FILE, RUN_FILE, Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory.errors import InputError


def study(name: str, preset: str) -> list[Experiment]:
    """The experiments of study `name` at `preset`.

    Raises:
        InputError: There is no such study, or it has no experiments at this preset.
    """
    experiments = studies.experiments(name, preset)
    if not experiments:
        raise InputError(f"study {name!r} has no experiments for preset {preset!r}")
    return list(experiments)


def committed(folder: Path, experiments: Sequence[Experiment]) -> list[Record]:
    """The records of `experiments` in `folder`, found by configuration: needs no model, no data.

    Raises:
        InputError: Some are missing, or one configuration has several records.
    """
    from deltacontrol.deltas.registry import completed  # imports torch

    found: dict[tuple[str, str], Record] = {}
    for record in RunStore(folder).records():
        key = (record.kind, canonical_json(completed(record.config)))
        if key in found:
            raise InputError(
                f"{folder} has two records of one configuration, {found[key].id} and {record.id}, "
                "from different model or data files; delete the one that is out of date"
            )
        found[key] = record
    keys = [(e.kind, canonical_json(completed(e.to_config()))) for e in experiments]
    missing = [e for e, key in zip(experiments, keys, strict=True) if key not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(experiments)} runs are not among the committed records in "
            f"{folder}, the first of them: {missing[0].label}. Nothing was computed. Add "
            "--recompute to compute them (hours), or use --preset quick (minutes)"
        )
    return [found[key] for key in keys]


def computed(
    store: RunStore,
    experiments: Sequence[Experiment],
    *,
    discard: bool = False,
    workers: int | None = None,
) -> list[Record]:
    """The records of `experiments` in `store`, after computing those that it lacks.

    Args:
        store: Where records are kept.
        experiments: What is wanted.
        discard: Remove the records of `experiments` from `store` first.
        workers: Processes, one run each; None lets the sweep choose.

    Raises:
        InputError: Some runs left no record.
    """
    if discard:
        for experiment in experiments:
            shutil.rmtree(store.path(experiment), ignore_errors=True)
    missing = [e for e in experiments if store.find(e) is None]
    if missing:
        from deltacontrol.experiments.runs.sweep import run_all  # imports torch

        run_all(missing, store, workers=workers)
    records = [store.find(e) for e in experiments]
    unfinished = [e for e, record in zip(experiments, records, strict=True) if record is None]
    if unfinished:
        raise InputError(
            f"{len(unfinished)} of {len(experiments)} runs left no record in {store.root}, the "
            f"first of them: {unfinished[0].label}; the same command goes on from here"
        )
    return [record for record in records if record is not None]


def show(picture: Path, gallery: Path) -> None:
    """Copy a picture into the gallery, which the README shows.

    Raises:
        InputError: `gallery` cannot be written.
    """
    try:
        gallery.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, gallery / picture.name)
    except OSError as error:
        raise InputError(f"cannot write to {gallery}: {error.strerror or error}") from error


def publish(records: Sequence[Record], folder: Path) -> None:
    """Make `folder` hold exactly `records`, without their trained controls.

    Raises:
        InputError: `folder` cannot be written.
    """
    wanted = {record.id for record in records}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.name not in wanted:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for record in records:
            target = folder / record.id
            target.mkdir(exist_ok=True)
            for name in (RUN_FILE, CURVE_FILE):
                shutil.copyfile(record.folder / name, target / name)
    except OSError as error:
        raise InputError(
            f"cannot publish records to {folder}: {error.strerror or error}"
        ) from error
