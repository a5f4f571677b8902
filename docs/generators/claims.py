"""A page for each claim, with the verdict of its committed result, and the scoreboard."""

from __future__ import annotations

from functools import cache
from typing import Any

from docs.generators import markdown
from docs.generators.markdown import ROOT, Pages, escape, inline, table, toctree

STATEMENTS = "experiments/claims/statements"


def pages() -> Pages:
    """A page for each claim and each statement of a paper, and the scoreboard."""
    found: Pages = {
        "claims/index.md": _index,
        "claims/statements.md": _statements,
        "claims/changes.md": _changes,
    }
    for claim in _available():
        found[f"claims/{stem(claim)}.md"] = lambda claim=claim: _page(claim)
    return found


def _available() -> list[Any]:
    from deltacontrol.experiments.claims import scoreboard

    return list(scoreboard.available().values())


def stem(claim: Any) -> str:
    """The name of a claim's page: that of its file."""
    from deltacontrol.experiments.claims import scoreboard

    return scoreboard.source(claim).stem


@cache
def by_notebook() -> dict[str, Any]:
    """Claims by the notebook that derives them."""
    return {claim.notebook: claim for claim in _available() if claim.notebook}


@cache
def _rows() -> list[dict[str, Any]]:
    from deltacontrol.experiments.claims import board

    return board.rows()


def _index() -> str:
    from deltacontrol.experiments.claims import board

    pages = {claim.id: stem(claim) for claim in _available()}
    rows = []
    for row in _rows():
        page = pages[board.claim_of(row).id]
        rows.append((
            f"[{row['#']}]({page}.md)", f"[{escape(row['claim'])}]({page}.md)", escape(row["on"]),
            escape(row["condition"]), escape(row["measured"]), escape(row["negative control"]),
            _verdict(row["verdict"]),
        ))  # fmt: skip
    return "\n\n".join([
        "# Claims",
        "A claim is a statement with a source and a threshold that was fixed before the "
        "measurement. Whole 95 % intervals decide. A claim that fails stays here. "
        "[How a claim is judged](../concepts/claims.md) has the rules.",
        escape(board.chance()),
        table(("#", "claim", "on", "condition", "measured", "negative control", "verdict"), rows),
        "[Revised checks](changes.md): their verdicts before and now, and why.",
        "[Statements of papers](statements.md) that `deltacontrol judge` decides by fine-tuning "
        "are written down as well, before anything is trained.",
        toctree([*pages.values(), "statements", "changes"], hidden=True),
        "",
    ])  # fmt: skip


def _changes() -> str:
    from deltacontrol.experiments.claims import board

    rows = [
        [escape(row["claim"]), row["before"], row["now"], inline(row["why"])]
        for row in board.changes()
    ]
    return "\n\n".join([
        "# Revised checks",
        "A check that changes after a result makes its row `revised`: the verdict of before stays, "
        "beside the one of now. Letters are parts.",
        table(("claim", "before", "now", "why"), rows),
        "",
    ])  # fmt: skip


def _verdict(text: str) -> str:
    """A verdict in the colour of the style sheet."""
    told, _, remark = text.partition(", ")
    css = told.replace(" ", "-")
    return f'<span class="verdict {css}">{told}</span>' + (f", {remark}" if remark else "")


def _page(claim: Any) -> str:
    from deltacontrol.experiments.claims import board, scoreboard

    page, outcome = f"claims/{stem(claim)}.md", scoreboard.stored(claim)
    result = scoreboard.result_path(claim).name
    number = claim.id
    told = {
        "Source": escape(claim.source),
        "Derivation": f"[notebook {claim.notebook}](../notebooks/{claim.notebook}.md)"
        if claim.notebook else "",
        "Code": markdown.code_link(page, _file(claim)),
        "Record": markdown.code_link(page, f"experiments/records/claims/{result}")
        if outcome else "not measured yet",
        "Runs": str(len(outcome.runs)) if outcome and outcome.runs else "",
        "Stale": "the code that measures changed since" if outcome
        and scoreboard.is_stale(claim, outcome) else "",
        "Revised": inline(claim.revised) if scoreboard.history(claim) else "",
    }  # fmt: skip
    out = [f"# {number}. {escape(claim.title)}", inline(claim.statement), markdown.facts(told)]
    for part in claim.parts:
        judged = outcome.part(part.name) if outcome else None
        title = f"{number}{part.name} {escape(part.title)}" if part.name else "Verdict"
        rows = {"Condition": escape(str(part.threshold)), "Measured on": part.on}
        if judged:
            rows |= {
                "Measured": _evidence(judged.evidence),
                "Negative control": _evidence(judged.control),
                "Passing case of the control": _evidence(judged.passing)
                if judged.passing else "none is known",
                "Verdict": f"{_verdict(board.verdict(claim, judged))}: {inline(judged.reason)}",
            }  # fmt: skip
        out += [f"## {title}", markdown.facts(rows)]
    out += [
        "## Commands",
        markdown.fenced(
            f"deltacontrol claims show {number}     # this page as text\n"
            f"deltacontrol claims judge {number}    # the verdict anew, from committed evidence\n"
            f"deltacontrol claims run {number}      # measure anew",
            "shell",
        ),
        f"## What `deltacontrol claims show {number}` prints",
        markdown.fenced(board.page_of(claim), "text", "wrapped"),
    ]
    return "\n\n".join([*out, ""])


def _file(claim: Any) -> str:
    from deltacontrol.experiments.claims import scoreboard

    file = scoreboard.source(claim)
    return f"{STATEMENTS if file.suffix == '.toml' else 'experiments/claims'}/{file.name}"


def _evidence(evidence: Any) -> str:
    note = f" ({evidence.note})" if evidence.note else ""
    met = "".join(
        f"; assumption {'met' if is_met else '**not met**'}: {escape(text)}"
        for text, is_met in evidence.assumptions.items()
    )
    return escape(evidence.text + note) + met


def _statements() -> str:
    out = [
        "# Statements of papers",
        "Each file is a statement of the form \"A beats B by so much\", with the tasks, the seeds "
        "and the margin fixed before any training. `deltacontrol judge FILE` trains what is "
        "missing and gives the verdict; [`judge`](../commands/judge.md) has the options.",
    ]  # fmt: skip
    for path in sorted((ROOT / STATEMENTS).glob("*.toml")):
        out += [
            f"## {path.stem}",
            markdown.fenced(path.read_text(encoding="utf-8"), "toml"),
            markdown.fenced(f"deltacontrol judge {STATEMENTS}/{path.name}", "shell"),
        ]
    return "\n\n".join([*out, ""])


def parts_by_verdict() -> dict[str, int]:
    """How many parts have each verdict, for the front page."""
    counts: dict[str, int] = {}
    for row in _rows():
        told = row["verdict"].partition(",")[0]
        counts[told] = counts.get(told, 0) + 1
    return counts
