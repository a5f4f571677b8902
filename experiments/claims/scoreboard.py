"""The scoreboard: every claim of ``experiments/claims``, its verdict and the numbers behind it.

A judged claim is one JSON file with provenance in ``experiments/claims/results``. The table in the
README is generated from these files; importing this module does not import torch.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
from functools import cache
from pathlib import Path
from typing import Any

from deltacontrol.experiments import claims
from deltacontrol.experiments.runs import provenance
from deltacontrol.theory.claims import Claim, Outcome, judge
from deltacontrol.theory.errors import InputError, unknown

RESULTS = Path(claims.__path__[0]) / "results"
README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- scoreboard:begin -->\n", "<!-- scoreboard:end -->"


@cache
def available() -> dict[int, Claim]:
    """All claims by number."""
    names = (info.name for info in pkgutil.iter_modules(claims.__path__))
    modules = (f"{claims.__name__}.{name}" for name in names if name[0].isdigit())
    found = (importlib.import_module(name).CLAIM for name in modules)
    return {claim.id: claim for claim in sorted(found, key=lambda claim: claim.id)}


def find(number: int) -> Claim:
    """The claim of a number; raises `InputError` naming the known ones."""
    if number not in available():
        raise unknown("claim", str(number), map(str, available()))
    return available()[number]


def result_path(claim: Claim) -> Path:
    """Where the judged claim is kept."""
    return RESULTS / f"{claim.id:02d}_{claim.name.replace('-', '_')}.json"


def evaluate(claim: Claim) -> Outcome:
    """Judge a claim now and keep the result."""
    began = time.perf_counter()
    outcome = judge(claim)
    document = {
        "outcome": outcome.to_dict(),
        "wall_seconds": time.perf_counter() - began,
        "packages": provenance.package_versions(),
        "project": provenance.project_commit(),
        "hardware": provenance.hardware(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = result_path(claim)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return outcome


def stored(claim: Claim) -> Outcome | None:
    """The kept result, or None where the claim was not judged since its statement changed.

    Raises:
        InputError: the file is damaged.
    """
    path = result_path(claim)
    if not path.exists():
        return None
    try:
        outcome = Outcome.from_dict(json.loads(path.read_text(encoding="utf-8"))["outcome"])
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it and run the claim again"
        ) from error
    same = outcome.statement == claim.statement and outcome.threshold == claim.threshold
    return outcome if same else None


def rows() -> list[dict[str, Any]]:
    """One row a claim: number, title, source, condition, measured, control, verdict."""
    table = []
    for claim in available().values():
        outcome = stored(claim)
        table.append(
            {
                "#": claim.id,
                "claim": claim.title,
                "source": claim.source,
                "condition": str(claim.threshold),
                "measured": _shown(outcome.evidence.value, claim) if outcome else "",
                "negative control": _shown(outcome.control.value, claim) if outcome else "",
                "verdict": outcome.verdict.text if outcome else "not judged",
            }
        )
    return table


def _shown(value: float, claim: Claim) -> str:
    """Two digits, or as many as show on which side of the threshold the value is."""
    passes = claim.threshold.passes(value)
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return next((t for t in texts if claim.threshold.passes(float(t)) == passes), repr(value))


def render_table() -> str:
    """The scoreboard as a Markdown table."""
    table = rows()
    if not table:
        return ""
    head = list(table[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in table:
        claim = available()[row["#"]]
        row = row | {
            "claim": f"[{row['claim']}](proofs_notebooks/{claim.notebook}.py)",
            "verdict": f"**{row['verdict']}**",
        }
        cells = (str(value).replace("|", r"\|") for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def update_readme(readme: Path = README) -> bool:
    """Put the table between the README's markers; False where there is no README with them."""
    if not readme.exists():
        return False
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return False
    before, rest = text.split(BEGIN)
    readme.write_text(before + BEGIN + render_table() + END + rest.split(END)[1], encoding="utf-8")
    return True
