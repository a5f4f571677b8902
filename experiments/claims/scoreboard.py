"""The scoreboard: every claim of ``experiments/claims``, its verdicts and the numbers behind them.

A judged claim is one JSON file under a digest, with the ids of the runs it rests on, a digest of
the code that measured and its provenance: the committed ones in ``experiments/records/claims``, a
user's own in ``claims`` of their folder of runs. `deltacontrol.experiments.claims.board` draws the
table; importing this module does not import torch.

A row is stale where the code that measures is no longer the code that measured. Where a published
result takes the place of another one whose check or verdict differs, the older one is kept beside
it as *history*: its condition, its numbers, its verdict, its commit.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deltacontrol.experiments import claims
from deltacontrol.experiments.claims import quick as quick_preset
from deltacontrol.experiments.claims.code_digest import code_digest
from deltacontrol.experiments.claims.court import STATEMENTS, Statement
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.publishing import publish as publish_records
from deltacontrol.experiments.runs.record import Record, digest_of, sealed
from deltacontrol.experiments.runs.store import CLAIMS, COMMITTED, RunStore, configuration
from deltacontrol.theory import plugins
from deltacontrol.theory.claims import Claim, Threshold
from deltacontrol.theory.errors import InputError, unknown
from deltacontrol.theory.judging import Outcome, judge, judgements

RESULTS = COMMITTED / CLAIMS
RUNS = f"{CLAIMS}/runs"  # in the committed records: runs that no figure has


def available() -> dict[int, Claim]:
    """All claims by number, users' own among them.

    Raises:
        InputError: a user's claim has the number or the name of another one.
    """
    added = ((f"{c.id:04d}", c) for _, c in plugins.values("CLAIM"))
    own = _own() | {number: claim for number, (_, claim) in _statements().items()}
    found = plugins.merged("claim", {f"{n:04d}": c for n, c in own.items()}, added)
    names: dict[str, Claim] = {}
    for claim in found.values():
        if names.setdefault(claim.name, claim) is not claim:
            raise InputError(
                f"claims {names[claim.name].id} and {claim.id} have one name, {claim.name!r}; give "
                "yours another one"
            )
    return {claim.id: claim for claim in found.values()}


@cache
def _own() -> dict[int, Claim]:
    modules = (i.name for i in pkgutil.iter_modules(claims.__path__) if i.name[0].isdigit())
    found = (importlib.import_module(f"{claims.__name__}.{name}").CLAIM for name in modules)
    return {claim.id: claim for claim in sorted(found, key=lambda claim: claim.id)}


@cache
def _statements() -> dict[int, tuple[Path, Claim]]:
    """The statements of papers that are judged: those of this project with a committed result.

    One that cannot be read, or whose result is damaged or of another statement, is left out with a
    warning, so that the others have their rows, and it can be judged anew.
    """
    found: dict[int, tuple[Path, Claim]] = {}
    for path in sorted(STATEMENTS.glob("*.toml")):
        try:
            statement = Statement.read(path)
            document = _document(RESULTS / f"{_named(statement.id, statement.name)}.json")
            if document is None:
                continue
            claim = statement.judged(document)
            if (other := found.get(statement.id)) is not None:
                raise InputError(f"{path} has the number {statement.id} of {other[0]}")
        except InputError as error:
            warnings.warn(f"no row for the statement {path.stem}: {error}", stacklevel=3)
        else:
            found[statement.id] = path, claim
    return dict(sorted(found.items()))


def forget_statements() -> None:
    """Look again which statements are judged, after one was."""
    _statements.cache_clear()


def find(number: int) -> Claim:
    """The claim of a number; raises `InputError` naming the known ones."""
    if number not in available():
        raise unknown("claim", str(number), map(str, available()))
    return available()[number]


def find_name(name: str) -> Claim:
    """The claim of a name; raises `InputError` naming the known ones."""
    named = {claim.name: claim for claim in available().values()}
    if name not in named:
        raise unknown("claim", name, named)
    return named[name]


def source(claim: Claim) -> Path:
    """The claim's file; a user's is where they have it."""
    for module in plugins.modules():
        if getattr(module, "CLAIM", None) is claim and module.__file__ is not None:
            return Path(module.__file__)
    path, statement = _statements().get(claim.id, (None, None))
    if path is not None and statement is claim:
        return path
    return Path(claims.__path__[0]) / f"{_stem(claim)}.py"


def result_path(claim: Claim, folder: Path | None = None) -> Path:
    """Where the judged claim is kept; the committed one unless a folder is given."""
    return (folder or RESULTS) / f"{_stem(claim)}.json"


def stored(claim: Claim, folder: Path | None = None) -> Outcome | None:
    """The kept result, or None where the claim was not judged since its check changed.

    Raises:
        InputError: the file is damaged.
    """
    document = document_of(claim, folder)
    if document is None or "parts" not in document["outcome"]:  # as earlier versions kept it
        return None
    outcome = Outcome.from_dict(document["outcome"])
    return outcome if _check(outcome) == _check(claim) else None


def history(claim: Claim) -> list[dict[str, Any]]:
    """Published results of the claim whose check or verdict was another one, oldest first."""
    return list((document_of(claim, None) or {}).get("history", ()))


def is_stale(claim: Claim, outcome: Outcome) -> bool:
    """Whether the code that measures differs from what measured, or is not known to be the same."""
    return outcome.code != code_digest(source(claim))


@dataclass(frozen=True)
class Judged:
    """A judged claim with the provenance of its measurement: what a result's file holds."""

    outcome: Outcome
    provenance: Mapping[str, Any]


def evaluate(claim: Claim, store: RunStore, *, quick: bool = False) -> Judged:
    """Measure and judge a claim anew; what it needs of runs is trained where it is not recorded.

    Args:
        claim: The claim.
        store: Of its runs.
        quick: By fewer cases: with the constants that the claim's module names in ``QUICK``.
    """
    began, worked = time.perf_counter(), time.process_time()
    with quick_preset.acting(claim) if quick else nullcontext():
        if claim.runs is not None:
            _train(claim, store)
        found = _judged(claim, store, began, worked)
    if not (quick and quick_preset.sizes(claim)):
        return found
    return replace(found, provenance={**found.provenance, "preset": "quick"})


def rejudge(claim: Claim, store: RunStore) -> Judged:
    """Judge a claim from evidence that is there: nothing is trained.

    A claim that rests on runs is computed from their records, any other judged by its committed
    measurement and control, whose provenance stays.

    Raises:
        InputError: runs are missing, or there is no committed measurement.
    """
    if claim.runs is not None:
        return _judged(claim, store, time.perf_counter(), time.process_time())
    document, outcome = document_of(claim, None), stored(claim)
    if document is None or outcome is None:
        raise InputError(
            f"claim {claim.id} has no committed measurement; `deltacontrol claims run {claim.id}` "
            "measures it"
        )
    found = [(part.evidence, part.control, part.passing) for part in outcome.parts]
    kept = {name: value for name, value in document.items() if name not in ("outcome", "digest")}
    return Judged(replace(outcome, parts=judgements(claim.parts, found)), kept)


def keep(claim: Claim, judged: Judged, folder: Path | None = None) -> Path:
    """Write a result, among the committed ones unless a folder is given; returns its file.

    One by fewer cases does not take the place of a user's full one, which stays beside it with the
    ending ``.paper.json``.
    """
    path = result_path(claim, folder)
    if "preset" in judged.provenance and path.exists():
        try:
            full = not is_quick(claim, folder)
        except InputError:  # damaged, and perhaps worth mending
            full = True
        if full:
            path.replace(path.with_suffix(".paper.json"))
    own = {name: value for name, value in judged.provenance.items() if name != "history"}
    known = _history(claim, judged.outcome) if folder is None else []
    if known:
        own["history"] = known
    document = sealed({"outcome": judged.outcome.to_dict(), **own})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def is_quick(claim: Claim, folder: Path | None) -> bool:
    """Whether the kept result is one of the quick preset, by fewer cases."""
    return (document_of(claim, folder) or {}).get("preset") == "quick"


def publish(claim: Claim, judged: Judged, store: RunStore) -> None:
    """Put a result among the committed ones, with the records of its runs.

    The caller has made sure that the checkout was clean when the claim was judged.

    Raises:
        InputError: the claim is a user's own, which stays beside their project.
    """
    require_publishable(claim)
    publish_records(list(records_of(claim, store).values()), RUNS, store.committed or COMMITTED)
    keep(claim, judged)


def require_publishable(claim: Claim) -> None:
    """Refuse to publish a user's own claim, which stays beside their project.

    Raises:
        InputError: the claim is a user's own.
    """
    if claim in (own for _, own in plugins.values("CLAIM")):
        raise InputError(
            f"claim {claim.id} is of your own file {source(claim)}, and only those of this project "
            "are published with it; leave out --publish: its result is kept beside your runs"
        )


def records_of(claim: Claim, store: RunStore) -> dict[str, Record]:
    """The records of the runs that a claim rests on, by `configuration`.

    Raises:
        InputError: some are in neither home; the message names them.
    """
    wanted = list(claim.runs()) if claim.runs is not None else []
    found = store.lookup(wanted)
    missing = [e.label for e, record in zip(wanted, found, strict=True) if record is None]
    if missing:
        raise InputError(
            f"claim {claim.id} rests on {len(wanted)} runs, of which {len(missing)} are recorded "
            f"neither in {store.root} nor with the package: {'; '.join(missing)}. "
            f"`deltacontrol claims run {claim.id}` trains them"
        )
    pairs = zip(wanted, found, strict=True)
    return {configuration(e): record for e, record in pairs if record is not None}


def _stem(claim: Claim) -> str:
    return _named(claim.id, claim.name)


def _named(number: int, name: str) -> str:
    return f"{number:02d}_{name.replace('-', '_')}"


def _judged(claim: Claim, store: RunStore, began: float, worked: float) -> Judged:
    found = records_of(claim, store)
    outcome = replace(
        judge(claim, lambda experiment: found[configuration(experiment)]),
        code=code_digest(source(claim)),
        runs=tuple(dict.fromkeys(record.id for record in found.values())),
    )
    return Judged(
        outcome,
        {
            "wall_seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - worked,
            "packages": provenance.package_versions(),
            "project": provenance.project_commit(),
            "protocol": provenance.last_change(source(claim)),
            "hardware": provenance.hardware(),
        },
    )


def _train(claim: Claim, store: RunStore) -> None:
    from deltacontrol.experiments.runs.executors.registry import chosen
    from deltacontrol.experiments.runs.sweep import run_all

    wanted = list(claim.runs()) if claim.runs is not None else []
    own = replace(store, keep_controls=False)
    missing = [e for e, record in zip(wanted, store.lookup(wanted), strict=True) if record is None]
    run_all(missing, own, executor=chosen(otherwise="in-process"))


def _check(claim: Claim | Outcome) -> tuple[Any, ...]:
    """What a result was judged by: a claim of which it differs was not judged yet."""
    return claim.statement, [(part.name, part.threshold) for part in claim.parts]


def _history(claim: Claim, outcome: Outcome) -> list[dict[str, Any]]:
    """The published results before this one: that of today is added where it says another thing."""
    document = document_of(claim, None)
    if document is None:
        return []
    old = document["outcome"]
    parts = old.get("parts") or [{**old, "name": ""}]  # as earlier versions kept a claim
    entries = [
        {
            "name": part["name"],
            "condition": _condition(part["threshold"]),
            "measured": part["evidence"]["value"],
            "control": part["control"]["value"],
            "verdict": part["verdict"],
        }
        for part in parts
    ]
    told = [(e["name"], e["condition"], e["verdict"]) for e in entries]
    known = list(document.get("history", ()))
    if told == [(p.name, str(p.threshold), p.verdict.value) for p in outcome.parts]:
        return [*known[:-1], {**known[-1], "why": claim.revised}] if known else []
    commit = document.get("project", {}).get("commit")
    return [*known, {"commit": commit, "why": claim.revised, "parts": entries}]


def _condition(threshold: Mapping[str, Any]) -> str:
    value = threshold["value"]
    bound = tuple(value) if isinstance(value, list) else value
    return str(Threshold(threshold["op"], bound, threshold["description"]))


def document_of(claim: Claim, folder: Path | None) -> dict[str, Any] | None:
    """The file of a result, whose digest is checked; None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    return _document(result_path(claim, folder))


def _document(path: Path) -> dict[str, Any] | None:
    try:
        if not path.exists():
            return None
    except OSError as error:  # of a name that no file can have
        raise InputError(f"the folder of results cannot be read: {error.strerror}") from error
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        why = "" if document["digest"] == digest_of(document) else "its digest is of other contents"
        if "parts" in document["outcome"]:
            Outcome.from_dict(document["outcome"])
    except (ValueError, KeyError, TypeError) as error:
        why = str(error)
    if why:
        raise InputError(f"{path} is damaged ({why}); restore it, or delete it and run the claim")
    return document
