"""The records behind a figure: computed here, or the committed ones of the paper.

Reading committed records imports no torch; computing does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from deltacontrol.experiments import studies
from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES
from deltacontrol.experiments.runs.publishing import publish as publish_records
from deltacontrol.experiments.runs.record import Record, digest_of
from deltacontrol.experiments.runs.store import COMMITTED, RunStore
from deltacontrol.theory.errors import InputError

FIGURES = "figures"  # the folder of studies in the committed records
BENCHMARKS = "benchmarks/"  # what the source of a figure begins with that shows a benchmark
SCOREBOARD = "claims"  # the source of a figure that shows the judged claims
GRID_FILE = "grid.json"  # in a study's folder: the ids of its runs, in the order of its grid


def study(name: str, preset: str) -> list[Experiment]:
    """The experiments of study `name` at `preset`.

    Raises:
        InputError: There is no such study, or it has no experiments at this preset.
    """
    experiments = studies.experiments(name, preset)
    if not experiments:
        raise InputError(f"study {name!r} has no experiments for preset {preset!r}")
    return list(experiments)


def is_fixed(study: str) -> bool:
    """Whether a figure's `STUDY` is committed evidence that no figure computes anew.

    That is a benchmark, ``benchmarks/NAME``, or the judged claims, ``claims``.
    """
    return study.startswith(BENCHMARKS) or study == SCOREBOARD


def how_to_measure(study: str) -> str:
    """The command that measures such evidence and puts it where figures read it."""
    if study == SCOREBOARD:
        return "deltacontrol claims run --publish"
    name = study.removeprefix(BENCHMARKS)
    return (
        f"python -m deltacontrol.experiments.benchmarks.{name} "
        f"--out experiments/records/{BENCHMARKS}{name}.json"
    )


def is_published(study: str, root: Path | None = None) -> bool:
    """Whether a study has committed records."""
    return ((root or COMMITTED) / FIGURES / study / GRID_FILE).exists()


def committed(study: str, root: Path | None = None) -> list[Record]:
    """The records that a study's figures were published with, in the order of its grid.

    They are found by the ids that `publish` wrote down, so that neither torch nor a model nor data
    is needed to redraw a figure. A benchmark, ``benchmarks/NAME``, has one record, and each judged
    claim is one.

    Raises:
        InputError: The study was never published, or some of its records are not there.
    """
    root = root or COMMITTED
    if study == SCOREBOARD:
        return _claims(root)
    if is_fixed(study):
        return [_benchmark(study, root)]
    path = root / FIGURES / study / GRID_FILE
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except FileNotFoundError as error:
        raise InputError(
            f"study {study!r} has no committed records: {path} does not exist. Nothing was "
            "computed. Add --recompute to compute them (hours), or use --preset quick (minutes)"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from error
    found = {record.id: record for record in RunStore(path.parent, committed=root).records()}
    missing = [identity for identity in ids if identity not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(ids)} runs are not among the committed records in {root}, the "
            f"first of them: {missing[0]}. Nothing was computed. Restore them, add --recompute to "
            "compute them (hours), or use --preset quick (minutes)"
        )
    return [found[identity] for identity in ids]


def _benchmark(study: str, root: Path) -> Record:
    """What a benchmark wrote, as the result of one record."""
    path = root / f"{study}.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        provenance = {name: result[name] for name in ("hardware", "packages")}
    except FileNotFoundError as error:
        raise InputError(
            f"the benchmark {study.removeprefix(BENCHMARKS)!r} has no committed record: {path} "
            f"does not exist. Measure it on a quiet machine: {how_to_measure(study)}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from error
    return Record(
        id=study.removeprefix(BENCHMARKS),
        kind="benchmark",
        config={},
        result=result,
        provenance=provenance,
        status="completed",
        folder=path.parent,
    )


def _claims(root: Path) -> list[Record]:
    """The judged claims in the order of their numbers, each outcome the result of a record."""
    found = []
    for path in sorted((root / SCOREBOARD).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["digest"] != digest_of(document):
                raise ValueError("its digest is of other contents")
            result = document["outcome"]
            if "parts" not in result:  # as earlier versions kept it
                continue
            provenance = {name: document[name] for name in ("hardware", "packages")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); restore it") from error
        result = {**result, "revised": bool(document.get("history"))}
        found.append(
            Record(
                id=str(result["id"]), kind="claim", config={}, result=result,
                provenance=provenance, status="completed", folder=path.parent,
            )
        )  # fmt: skip
    if not found:
        raise InputError(f"no judged claim is committed in {root / SCOREBOARD}")
    return sorted(found, key=lambda record: record.result["id"])


def computed(
    store: RunStore,
    experiments: Sequence[Experiment],
    *,
    discard: bool = False,
    workers: int | None = None,
    limit_minutes: float = LIMIT_MINUTES,
) -> list[Record]:
    """The records of `experiments` in `store`, after computing those that it lacks.

    Args:
        store: Where records are kept.
        experiments: What is wanted.
        discard: Remove the records of `experiments` from `store` first.
        workers: Processes, one run each; None lets the sweep choose.
        limit_minutes: How long one run may take before it is stopped and saved.

    Raises:
        InputError: Some runs left no record.
    """
    if discard:
        for experiment in experiments:
            shutil.rmtree(store.path(experiment), ignore_errors=True)
    missing = [e for e in experiments if store.find(e) is None]
    if missing:
        from deltacontrol.experiments.runs.sweep import run_all  # imports torch

        run_all(missing, store, workers=workers, limit_minutes=limit_minutes)
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


def publish(study: str, records: Sequence[Record], root: Path | None = None) -> int:
    """Make `records`, in their order, the committed ones of a study; trained controls stay out.

    A run that is committed already stays as it is; how many of these have other results than the
    given ones is returned.

    Raises:
        InputError: A record is damaged, or the folder cannot be written.
    """
    root = root or COMMITTED
    publish_records(records, f"{FIGURES}/{study}", root, exactly=True)
    text = json.dumps({"runs": [record.id for record in records]}, indent=1) + "\n"
    (root / FIGURES / study / GRID_FILE).write_text(text, encoding="utf-8")
    pairs = zip(records, committed(study, root), strict=True)
    return sum(one.result != other.result for one, other in pairs)
