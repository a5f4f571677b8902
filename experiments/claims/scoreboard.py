"""The scoreboard: every claim of ``experiments/claims``, its verdict and the numbers behind it.

A judged claim is one JSON file under a digest, with the ids of the runs it rests on, a digest of
the code that measured and its provenance: the committed ones in ``experiments/records/claims``, a
user's own in ``claims`` of their folder of runs. The table in the README is generated from the
committed ones; importing this module does not import torch.

A row is stale where the code that measures is no longer the code that measured.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deltacontrol.experiments import claims
from deltacontrol.experiments.claims.code_digest import code_digest
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.publishing import publish as publish_records
from deltacontrol.experiments.runs.record import Record, digest_of, sealed
from deltacontrol.experiments.runs.store import CLAIMS, COMMITTED, RunStore, configuration
from deltacontrol.theory import plugins
from deltacontrol.theory.claims import Claim, Outcome, judge, verdict_of
from deltacontrol.theory.errors import InputError, unknown

RESULTS = COMMITTED / CLAIMS
RUNS = f"{CLAIMS}/runs"  # in the committed records: runs that no figure has
README = COMMITTED.parents[1] / "README.md"
BEGIN, END = "<!-- scoreboard:begin -->\n", "<!-- scoreboard:end -->"


def available() -> dict[int, Claim]:
    """All claims by number, users' own among them.

    Raises:
        InputError: a user's claim has the number of another one.
    """
    added = ((f"{c.id:04d}", c) for _, c in plugins.values("CLAIM"))
    found = plugins.merged("claim", {f"{n:04d}": c for n, c in _own().items()}, added)
    return {claim.id: claim for claim in found.values()}


@cache
def _own() -> dict[int, Claim]:
    modules = (i.name for i in pkgutil.iter_modules(claims.__path__) if i.name[0].isdigit())
    found = (importlib.import_module(f"{claims.__name__}.{name}").CLAIM for name in modules)
    return {claim.id: claim for claim in sorted(found, key=lambda claim: claim.id)}


def find(number: int) -> Claim:
    """The claim of a number; raises `InputError` naming the known ones."""
    if number not in available():
        raise unknown("claim", str(number), map(str, available()))
    return available()[number]


def source(claim: Claim) -> Path:
    """The claim's file; a user's is where they have it."""
    for module in plugins.modules():
        if getattr(module, "CLAIM", None) is claim and module.__file__ is not None:
            return Path(module.__file__)
    return Path(claims.__path__[0]) / f"{_stem(claim)}.py"


def result_path(claim: Claim, folder: Path | None = None) -> Path:
    """Where the judged claim is kept; the committed one unless a folder is given."""
    return (folder or RESULTS) / f"{_stem(claim)}.json"


def stored(claim: Claim, folder: Path | None = None) -> Outcome | None:
    """The kept result, or None where the claim was not judged since its statement changed.

    Raises:
        InputError: the file is damaged.
    """
    document = _document(claim, folder)
    if document is None:
        return None
    outcome = Outcome.from_dict(document["outcome"])
    same = outcome.statement == claim.statement and outcome.threshold == claim.threshold
    return outcome if same else None


def is_stale(claim: Claim, outcome: Outcome) -> bool:
    """Whether the code that measures differs from what measured, or is not known to be the same."""
    return outcome.code != code_digest(source(claim))


@dataclass(frozen=True)
class Judged:
    """A judged claim with the provenance of its measurement: what a result's file holds."""

    outcome: Outcome
    provenance: Mapping[str, Any]


def evaluate(claim: Claim, store: RunStore) -> Judged:
    """Measure and judge a claim anew; what it needs of runs is trained where it is not recorded."""
    began, worked = time.perf_counter(), time.process_time()
    if claim.runs is not None:
        _train(claim, store)
    return _judged(claim, store, began, worked)


def rejudge(claim: Claim, store: RunStore) -> Judged:
    """Judge a claim from evidence that is there: nothing is trained.

    A claim that rests on runs is computed from their records, any other judged by its committed
    measurement and control, whose provenance stays.

    Raises:
        InputError: runs are missing, or there is no committed measurement.
    """
    if claim.runs is not None:
        return _judged(claim, store, time.perf_counter(), time.process_time())
    document, outcome = _document(claim, None), stored(claim)
    if document is None or outcome is None:
        raise InputError(
            f"claim {claim.id} has no committed measurement; `deltacontrol claims run {claim.id}` "
            "measures it"
        )
    verdict, reason = verdict_of(claim.threshold, outcome.evidence, outcome.control)
    kept = {name: value for name, value in document.items() if name not in ("outcome", "digest")}
    return Judged(replace(outcome, verdict=verdict, reason=reason), kept)


def keep(claim: Claim, judged: Judged, folder: Path | None = None) -> Path:
    """Write a result, among the committed ones unless a folder is given; returns its file."""
    path = result_path(claim, folder)
    document = sealed({"outcome": judged.outcome.to_dict(), **judged.provenance})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


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


def rows(own: Path | None = None) -> list[dict[str, Any]]:
    """One row a claim: number, title, source, condition, measured, control, verdict.

    Args:
        own: A folder of the user's results, shown beside the committed ones as ``own``.
    """
    table = []
    for claim in available().values():
        outcome = stored(claim)
        row = {
            "#": claim.id,
            "claim": claim.title,
            "source": claim.source,
            "condition": str(claim.threshold),
            "measured": _shown(outcome.evidence.value, claim) if outcome else "",
            "negative control": _shown(outcome.control.value, claim) if outcome else "",
            "verdict": _verdict(claim, outcome) if outcome else "not judged",
        }
        if own is not None:
            mine = stored(claim, own)
            shown = f"{_shown(mine.evidence.value, claim)}, {_verdict(claim, mine)}" if mine else ""
            row["own"] = shown
        table.append(row)
    return table


def render_table() -> str:
    """The scoreboard as a Markdown table; users' own claims are not on it."""
    users = [claim.id for _, claim in plugins.values("CLAIM")]
    table = [row for row in rows() if row["#"] not in users]
    if not table:
        return ""
    head = list(table[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in table:
        claim = available()[row["#"]]
        verdict, _, remark = row["verdict"].partition(", ")
        row = row | {
            "claim": f"[{row['claim']}](proofs_notebooks/{claim.notebook}.py)",
            "verdict": f"**{verdict}**" + (f", {remark}" if remark else ""),
        }
        cells = (str(value).replace("|", r"\|") for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def update_readme(readme: Path | None = None) -> bool:
    """Put the table between the README's markers; False where there is no README with them."""
    readme = readme or README
    if not readme.exists():
        return False
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return False
    before, rest = text.split(BEGIN)
    readme.write_text(before + BEGIN + render_table() + END + rest.split(END)[1], encoding="utf-8")
    return True


def _stem(claim: Claim) -> str:
    return f"{claim.id:02d}_{claim.name.replace('-', '_')}"


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
            "hardware": provenance.hardware(),
        },
    )


def _train(claim: Claim, store: RunStore) -> None:
    from deltacontrol.experiments.runs.sweep import run

    wanted = list(claim.runs()) if claim.runs is not None else []
    own = replace(store, keep_controls=False)
    for experiment, record in zip(wanted, store.lookup(wanted), strict=True):
        if record is None:
            run(experiment, own)


def _verdict(claim: Claim, outcome: Outcome) -> str:
    return outcome.verdict.text + ", stale" * is_stale(claim, outcome)


def _shown(value: float, claim: Claim) -> str:
    """Two digits, or as many as show on which side of the threshold the value is."""
    passes = claim.threshold.passes(value)
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return next((t for t in texts if claim.threshold.passes(float(t)) == passes), repr(value))


def _document(claim: Claim, folder: Path | None) -> dict[str, Any] | None:
    path = result_path(claim, folder)
    try:
        if not path.exists():
            return None
    except OSError as error:  # of a name that no file can have
        raise InputError(f"the folder of results cannot be read: {error.strerror}") from error
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        why = "" if document["digest"] == digest_of(document) else "its digest is of other contents"
        Outcome.from_dict(document["outcome"])
    except (ValueError, KeyError, TypeError) as error:
        why = str(error)
    if why:
        raise InputError(f"{path} is damaged ({why}); restore it, or delete it and run the claim")
    return document
