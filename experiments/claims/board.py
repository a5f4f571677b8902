"""The board: a row for every part of every claim, as text, Markdown, HTML, LaTeX and CSV.

Importing this module does not import torch.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deltacontrol.experiments.claims import scoreboard
from deltacontrol.experiments.runs.store import COMMITTED
from deltacontrol.theory import plugins
from deltacontrol.theory.claims import Claim, Part, Verdict
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import CONFIDENCE, Evidence
from deltacontrol.theory.judging import Judgement, Outcome
from deltacontrol.theory.markdown import rewritten

README = COMMITTED.parents[1] / "README.md"
BEGIN, END = "<!-- scoreboard:begin -->\n", "<!-- scoreboard:end -->"
MANY = 2  # digits that are shown at least


def rows(own: Path | None = None) -> list[dict[str, Any]]:
    """One row a part: number, title, ground, condition, measured, control, verdict.

    Args:
        own: A folder of the user's results, shown beside the committed ones as ``own``; of a
            damaged one the others tell, with a warning.
    """
    table = []
    for claim in scoreboard.available().values():
        outcome = scoreboard.stored(claim)
        mine, damaged = _own(claim, own)
        for part in claim.parts:
            judged = None if outcome is None else outcome.part(part.name)
            row = {
                "#": f"{claim.id}{part.name}",
                "claim": _title(claim, part),
                "part": part.title,
                "source": claim.source,
                "on": part.on,
                "condition": str(part.threshold),
                "bound": part.threshold.condition,
                "measured": shown(judged.evidence, part) if judged else "",
                "negative control": shown(judged.control, part) if judged else "",
                "verdict": verdict(claim, judged) if judged else "not judged",
            }
            if own is not None:
                found = None if mine is None else mine.part(part.name)
                row["own"] = "damaged" if damaged else ""
                if mine is not None and found is not None:
                    row["own"] = f"{shown(found.evidence, part)}, {found.verdict.text}"
                    row["own"] += ", stale" * scoreboard.is_stale(claim, mine)
                if found and scoreboard.is_quick(claim, own):
                    row["own"] += ", quick"
            table.append(row)
    return table


def _own(claim: Claim, folder: Path | None) -> tuple[Outcome | None, bool]:
    """The user's own result, and whether there is one that is damaged."""
    try:
        return None if folder is None else scoreboard.stored(claim, folder), False
    except InputError as error:
        warnings.warn(str(error), stacklevel=3)
        return None, True


def _title(claim: Claim, part: Part) -> str:
    return f"{claim.title}: {part.title}" if part.name else part.title


def shown(evidence: Evidence, part: Part) -> str:
    """Value and interval, with as many digits as show on which side of the threshold they are."""
    if evidence.interval is None:
        return number(evidence.value, part)
    low, high = (number(end, part) for end in evidence.bounds())
    return f"{number(evidence.value, part)} [{low}, {high}]"


def number(value: float, part: Part) -> str:
    """Two digits, or as many as show on which side of the threshold the value is."""
    passes = part.threshold.passes(value)
    texts = (f"{value:.{digits}g}" for digits in range(MANY, 18))
    return next((t for t in texts if part.threshold.passes(float(t)) == passes), repr(value))


def verdict(claim: Claim, judged: Judgement) -> str:
    """The verdict, whether the check is another one than before, and whether the row is stale."""
    outcome, text = scoreboard.stored(claim), judged.verdict.text
    if scoreboard.history(claim):
        text += ", revised"
    if outcome is not None and scoreboard.is_stale(claim, outcome):
        text += ", stale"
    return text


def chance() -> str:
    """How many verdicts a board of false claims would get right by chance, in a sentence.

    A part whose number has an interval, of a claim that is false by the smallest margin, is told to
    hold with a chance of at most half of what the interval leaves out; by Holm's rule that is the
    bound for all parts of one claim together. An exact number has no such chance.
    """
    judged = [o for c in scoreboard.available().values() if (o := scoreboard.stored(c)) is not None]
    parts = [part for outcome in judged for part in outcome.parts]
    told = [p for p in parts if p.verdict in (Verdict.HOLDS, Verdict.FAILS)]
    drawn = [o for o in judged if any(p.evidence.interval is not None for p in o.parts)]
    expected = len(drawn) * (1 - CONFIDENCE) / 2
    exact = sum(part.evidence.interval is None for part in parts)
    return (
        f"{len(parts)} parts of {len(judged)} claims, {len(told)} of them decided. If all of the "
        f"{len(drawn)} claims that are judged by intervals were false, at most {expected:.1f} of "
        f"them would be expected to have a part that holds by chance; the {exact} parts that are "
        "exact have no such chance."
    )


def markdown() -> str:
    """The board as a Markdown table; users' own claims are not on it."""
    table = _committed()
    if not table:
        return ""
    head = list(table[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in table:
        claim = claim_of(row)
        told, _, remark = row["verdict"].partition(", ")
        row = row | {
            "claim": f"[{row['claim']}]({_derivation(claim)})",
            "verdict": f"**{told}**" + (f", {remark}" if remark else ""),
        }
        cells = (str(value).replace("|", r"\|") for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{chance()}\n"


def overview() -> str:
    """The board in short, as a Markdown table: one row a claim, with its parts by verdict."""
    lines = ["| # | claim | source | on | verdicts |", "| --- | --- | --- | --- | --- |"]
    by_claim: dict[int, list[dict[str, Any]]] = {}
    for row in _committed():
        by_claim.setdefault(claim_of(row).id, []).append(row)
    for number_, parts in by_claim.items():
        claim = scoreboard.find(number_)
        named: dict[str, list[str]] = {}
        for row in parts:
            told = row["verdict"].partition(", ")[0]
            named.setdefault(told, []).append(row["#"].removeprefix(str(number_)))
        verdicts = "; ".join(
            f"{', '.join(names)} **{_several(told) if len(names) > 1 else told}**".strip()
            for told, names in named.items()
        )
        grounds = ", ".join(dict.fromkeys(str(row["on"]) for row in parts))
        cells = (str(number_), f"[{claim.title}]({_derivation(claim)})", claim.source, grounds)
        shown_cells = [cell.replace("|", r"\|") for cell in (*cells, verdicts)]
        lines.append("| " + " | ".join(shown_cells) + " |")
    return "\n".join(lines) + "\n" if by_claim else ""


def _several(told: str) -> str:
    """What several parts do: they hold, they fail."""
    return told.removesuffix("s") if told in ("holds", "fails") else told


def folded() -> str:
    """The board as the README has it: in short, and all parts in a table that opens."""
    table, _, told = markdown().strip().rpartition("\n\n")
    return (
        f"{overview()}\n{told}\n\n<details><summary>Every part: condition, number with its "
        f"interval, negative control</summary>\n\n{table}\n\n</details>\n"
    )


def _derivation(claim: Claim) -> str:
    """The file that a row opens: the notebook, or the statement as it was written down."""
    if claim.notebook:
        return f"proofs_notebooks/{claim.notebook}.py"
    return scoreboard.source(claim).relative_to(COMMITTED.parents[1]).as_posix()


def latex() -> str:
    """The board as a LaTeX table of the package booktabs."""
    import pandas as pd

    table = pd.DataFrame(_committed())
    escape = {"#": r"\#", "%": r"\%", "&": r"\&", "_": r"\_", "^": r"\^{}", "$": r"\$",
              "{": r"\{", "}": r"\}", "~": r"\~{}", "\\": r"\textbackslash{}"}  # fmt: skip
    for name in table:
        table[name] = [_escaped(str(value), escape) for value in table[name]]
    table.columns = [_escaped(str(name), escape) for name in table.columns]
    lines = [" & ".join(table.columns) + r" \\"]
    body = [" & ".join(row) + r" \\" for row in table.itertuples(index=False)]
    wide = "p{0.12\\linewidth}" * len(table.columns)
    return "\n".join(
        [f"\\begin{{tabular}}{{{wide}}}", r"\toprule", *lines, r"\midrule", *body, r"\bottomrule",
         r"\end{tabular}", ""]
    )  # fmt: skip


def _escaped(text: str, escape: Mapping[str, str]) -> str:
    return "".join(escape.get(letter, letter) for letter in text)


def csv() -> str:
    """The board as CSV."""
    import pandas as pd

    return pd.DataFrame(_committed()).to_csv(index=False)


def web() -> str:
    """The board as one HTML page without anything from elsewhere: sortable, a row opens its claim.

    A click on a heading sorts by it, one on a row shows statement, numbers, controls and history.
    """
    table = _committed()
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table[0]) if table else ""
    body = []
    for row in table:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values())
        kind = row["verdict"].partition(",")[0].replace(" ", "-")
        page = html.escape(page_of(claim_of(row)))
        body.append(
            f'<tbody><tr class="{kind}">{cells}</tr>'
            f'<tr class="page" hidden><td colspan="{len(row)}"><pre>{page}</pre></td></tr></tbody>'
        )
    return _PAGE.format(head=head, body="\n".join(body), chance=html.escape(chance()))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scoreboard of claims</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font-family: sans-serif; margin: 1em; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.3em 0.6em; }}
th {{ cursor: pointer; border-bottom: 2px solid #444; }}
tr:not(.page) {{ cursor: pointer; border-bottom: 1px solid #ccc; }}
.holds td:last-child {{ color: #00664d; font-weight: bold; }}
.fails td:last-child {{ color: #a33c00; font-weight: bold; }}
pre {{ white-space: pre-wrap; }}
</style></head><body><h1>Scoreboard of claims</h1><p>{chance}</p>
<div><table><thead><tr>{head}</tr></thead>
{body}
</table></div>
<script>
const table = document.querySelector("table");
table.addEventListener("click", event => {{
  const heading = event.target.closest("th");
  if (heading) {{
    const place = heading.cellIndex, back = heading.dataset.up === "1";
    heading.dataset.up = back ? "0" : "1";
    const key = body => body.rows[0].cells[place].textContent;
    const order = (a, b) => key(a).localeCompare(key(b), undefined, {{numeric: true}});
    [...table.tBodies].sort((a, b) => (back ? -1 : 1) * order(a, b))
      .forEach(body => table.append(body));
    return;
  }}
  const row = event.target.closest("tbody tr:not(.page)");
  if (row) row.nextElementSibling.hidden = !row.nextElementSibling.hidden;
}});
</script></body></html>
"""


def changes() -> list[dict[str, str]]:
    """The claims whose check is another one than before: verdicts before and now, and why."""
    found = []
    for claim in scoreboard.available().values():
        outcome = scoreboard.stored(claim)
        for entry in scoreboard.history(claim) if outcome else ():
            found.append(
                {
                    "claim": f"{claim.id} {claim.title}",
                    "before": _verdicts((old["name"], old["verdict"]) for old in entry["parts"]),
                    "now": _verdicts((part.name, part.verdict.value) for part in outcome.parts),
                    "why": str(entry["why"]),
                    "commit": str(entry["commit"])[:12],
                }
            )
    return found


def _verdicts(parts: Iterable[tuple[str, str]]) -> str:
    """``a, b hold; c fails``: parts of one verdict together, in their order."""
    names: dict[str, list[str]] = {}
    for name, verdict in parts:
        names.setdefault(verdict.replace("_", " "), []).append(name)
    plural = {"holds": "hold", "fails": "fail"}
    told = []
    for verdict, own in names.items():
        words = plural.get(verdict, verdict) if len(own) > 1 else verdict
        told.append(f"{', '.join(filter(None, own))} {words}".strip())
    return "; ".join(told)


FORMATS: dict[str, Callable[[], str]] = {
    "markdown": markdown,
    "html": web,
    "latex": latex,
    "csv": csv,
}


def page_of(claim: Claim, folder: Path | None = None) -> str:
    """A claim in full, as text: statement, conditions, numbers, controls, verdicts, history."""
    lines = [f"claim {claim.id}: {claim.title}", f"  {claim.statement}", ""]
    lines.append(f"  source            {claim.source}")
    if claim.notebook:
        lines.append(f"  derivation        proofs_notebooks/{claim.notebook}.py")
    outcome = scoreboard.stored(claim, folder)
    if outcome is None:
        for part in claim.parts:
            lines.append(f"  condition {part.name:8}{part.threshold}")
        return "\n".join([*lines, f"  not judged: deltacontrol claims run {claim.id}", ""])
    for part in outcome.parts:
        lines += ["", f"  {claim.id}{part.name} {part.title}".rstrip(), *_part(part)]
    lines += ["", f"  runs              {', '.join(outcome.runs) or 'none: measured directly'}"]
    document = scoreboard.document_of(claim, folder) or {}
    commit = document.get("project", {}).get("commit")
    protocol = document.get("protocol")
    if "preset" in document:
        lines.append(f"  preset            {document['preset']}: fewer cases, a weaker verdict")
    if protocol:
        lines.append(f"  check as of       commit {protocol[:12]}")
    if commit:
        lines.append(f"  measured at       commit {commit[:12]}")
    for entry in document.get("history", ()):
        lines.append(f"  before            commit {str(entry['commit'])[:12]}: {entry['why']}")
        for old in entry["parts"]:
            told = f"{old['name']} {old['verdict'].replace('_', ' ')}".strip()
            lines.append(f"  {'':17} {told}: measured {_short(old['measured'])}, control "
                         f"{_short(old['control'])}, required {old['condition']}")  # fmt: skip
    return "\n".join([*lines, ""])


def _part(part: Judgement) -> list[str]:
    lines = [f"  condition         {part.threshold}", f"  measured on       {part.on}"]
    pieces = (("measured", part.evidence), ("negative control", part.control),
              ("passing case", part.passing))  # fmt: skip
    for name, evidence in pieces:
        if evidence is None:
            lines.append(f"  {name:17} none is known")
            continue
        lines.append(f"  {name:17} {evidence.text}" + f"  ({evidence.note})" * bool(evidence.note))
        for assumption, met in evidence.assumptions.items():
            lines.append(f"  {'':17} assumption {'met' if met else 'NOT MET'}: {assumption}")
        if name == "measured" and evidence.interval is not None:
            least = evidence.interval.detectable(part.confidence)
            lines.append(f"  {'':17} tells a distance of {least:.3g} from the bound, four times of "
                         "five")  # fmt: skip
        lines += [f"  {'':17} {key}: {_short(value)}" for key, value in evidence.details.items()]
    lines.append(f"  verdict           {part.verdict.text}: {part.reason}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def update_readme(readme: Path | None = None) -> bool:
    """Put the board between the README's markers: in short, and all parts folded beneath.

    False where there is no README with the markers.
    """
    return rewritten(readme or README, BEGIN, END, folded)


def _committed() -> list[dict[str, Any]]:
    users = {claim.id for _, claim in plugins.values("CLAIM")}
    table = [row for row in rows() if claim_of(row).id not in users]
    hidden = ("bound", "part")
    return [{name: cell for name, cell in row.items() if name not in hidden} for row in table]


def claim_of(row: Mapping[str, Any]) -> Claim:
    """The claim that a row is of."""
    return scoreboard.find(int("".join(c for c in row["#"] if c.isdigit())))
