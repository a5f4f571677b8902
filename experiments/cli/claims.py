"""``deltacontrol claims``: the scoreboard of predictions and measurements."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from deltacontrol.experiments.claims import board, scoreboard, template
from deltacontrol.experiments.claims import quick as quick_preset
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.executors.registry import using
from deltacontrol.experiments.runs.store import RunStore, both_homes
from deltacontrol.theory.claims import Claim
from deltacontrol.theory.errors import InputError

IN_PROCESS = "in-process"  # runs of claims are few
LEAST_TITLE = 24  # columns of the list
Action = Literal["list", "judge", "run", "show", "changes", "new"]


@dataclass(frozen=True)
class Claims:
    """Print the scoreboard, judge or measure claims, show one, or begin one of your own.

    A claim compares a prediction, made without training, with a measurement, against a threshold
    that was written down before. A negative control breaks an assumption on purpose: the check must
    fail there, or it proves nothing. Whole intervals decide: a claim holds where all of its
    interval is on the good side, fails where all of it is on the bad side, and is inconclusive
    otherwise.

    For example

        deltacontrol claims judge
        deltacontrol claims show 15
        deltacontrol claims changes
        deltacontrol claims run 1 2
        deltacontrol claims run --preset quick
        deltacontrol claims list --format html > board.html
        deltacontrol claims new my_idea
        deltacontrol claims run my_idea

    Attributes:
        action: list prints the scoreboard, with your own results beside the committed ones; judge
            gives every verdict anew from recorded evidence, without training; run measures anew and
            trains what is not recorded; show prints a claim in full; changes tells which checks
            were revised, their verdicts before and now, and why; new writes the files of a
            claim of your own, which run at once.
        which: Numbers or names of claims, and of new ones the name; none means all. A name may be
            that of a file of yours here, without .py.
        runs: Your folder of runs; what run measures is kept in its folder claims.
        preset: With run: paper is what is published; quick takes fewer cases where a claim has
            sizes for it, and its verdicts are weaker; a result says that it is quick, and a full
            one of yours stays beside it.
        format: With list: text for the terminal, or the committed board as Markdown, as an HTML
            page, as a LaTeX table, or as CSV.
        publish: With judge or run, from a clean checkout only: put the results, and the records
            of the runs behind them, among the committed ones, and the scoreboard into the README.
        executor: With run, who makes runs: in-process, processes, ray or slurm, with options behind
            the name, such as ray:gpus=1.
        workers: With run, runs at a time.
    """

    action: tyro.conf.Positional[Action] = "list"
    which: tyro.conf.Positional[tuple[str, ...]] = ()
    runs: Path = Path("runs")
    preset: Literal["paper", "quick"] = "paper"
    format: Literal["text", "markdown", "html", "latex", "csv"] = "text"
    publish: bool = False
    executor: str = IN_PROCESS
    workers: int | None = None

    def run(self) -> int:
        """Do the action; exit code 1 where a claim does not hold or could not be judged.

        Raises:
            InputError: A claim is unknown, or with --publish a claim is a user's own, or the
                checkout is not clean enough to publish from; nothing has been computed by then.
        """
        if self.publish and self.action not in ("judge", "run"):
            raise InputError("--publish goes with judge or run: these have results to publish")
        if self.preset != "paper" and (self.action != "run" or self.publish):
            raise InputError("--preset quick goes with run, and is not published: it is weaker")
        if self.format != "text" and self.action != "list":
            raise InputError(f"--format {self.format} goes with list: the board has such a form")
        if self.format != "text" and self.which:
            raise InputError(
                f"--format {self.format} gives the whole board; leave out {' '.join(self.which)}, "
                "or use claims show"
            )
        asked = self.executor != IN_PROCESS or self.workers is not None
        if asked and self.action != "run":
            raise InputError("--executor and --workers go with run: nothing else makes runs")
        if self.action == "new":
            return self._new()
        chosen = [_chosen(text) for text in self.which]
        chosen = chosen or list(scoreboard.available().values())
        if self.action == "list":
            return self._list(chosen)
        if self.action == "show":
            return self._show(chosen)
        if self.action == "changes":
            return self._changes(chosen)
        with using(self.executor, self.workers) if self.action == "run" else nullcontext():
            return self._judge(chosen)

    def _judge(self, chosen: list[Claim]) -> int:
        store = both_homes(self.runs)
        if self.publish:
            for claim in chosen:
                scoreboard.require_publishable(claim)
            provenance.require_clean()
        quick = self.preset == "quick"
        ahead = [None if quick else self._expected(claim) for claim in chosen]
        if self.action == "run":
            print(f"plan: {len(chosen)} claims{_told(ahead)}\n")
        judged, failures, began = {}, [], time.perf_counter()
        for place, claim in enumerate(chosen):
            try:
                judged[claim.id] = self._judged(claim, store)
            except InputError as error:
                print(f"claim {claim.id}: {error}\n", file=sys.stderr)
                failures.append(str(claim.id))
            if self.action == "run" and place + 1 < len(chosen):
                spent, known = time.perf_counter() - began, [s or 0.0 for s in ahead]
                slower = spent / sum(known[: place + 1]) if sum(known[: place + 1]) else 1.0
                left = [None if s is None else s * slower for s in ahead[place + 1 :]]
                print(f"{place + 1} of {len(chosen)} claims{_told(left, 'left: ')}\n", flush=True)
        if self.publish:
            for claim in (claim for claim in chosen if claim.id in judged):
                scoreboard.publish(claim, judged[claim.id], store)
            if board.update_readme():
                print("the scoreboard in README.md is up to date")
        if failures:
            print(f"not judged: {', '.join(failures)}")
        return int(bool(failures) or not all(found.outcome.holds for found in judged.values()))

    def _expected(self, claim: Claim) -> float | None:
        """Seconds that the committed measurement took; None where there is none."""
        document = scoreboard.document_of(claim, None)
        return None if document is None else float(document["wall_seconds"])

    def _judged(self, claim: Claim, store: RunStore) -> scoreboard.Judged:
        if self.action == "run":
            quick = self.preset == "quick"
            if quick and not quick_preset.sizes(claim):
                print(f"claim {claim.id} has no quick sizes: it is measured in full")
            try:
                found = scoreboard.evaluate(claim, store, quick=quick)
            except (InputError, OSError):
                raise
            except Exception as error:  # in the code of the claim, which may be a user's
                last = traceback.extract_tb(error.__traceback__)[-1]
                raise InputError(
                    f"cannot be measured: {type(error).__name__}: {error}, in line {last.lineno} "
                    f"of {Path(last.filename).name}"
                ) from error
            folder = store.root / scoreboard.CLAIMS
            scoreboard.keep(claim, found, folder)
            print(board.page_of(claim, folder))
        else:
            found = scoreboard.rejudge(claim, store)
            outcome = found.outcome
            for part in outcome.parts:
                print(f"{claim.id}{part.name} {part.title}: {part.verdict.text}\n  {part.reason}")
        return found

    def _list(self, chosen: list[Claim]) -> int:
        if self.format != "text":
            print(board.FORMATS[self.format](), end="")
            return 0
        both_homes(self.runs)  # which refuses a file in its place
        own, ids = self.runs / scoreboard.CLAIMS, {claim.id for claim in chosen}
        rows = board.rows(own if own.is_dir() else None)
        for line in _lines([row for row in rows if board.claim_of(row).id in ids]):
            print(line)
        if len(chosen) == len(scoreboard.available()):
            print(f"\n{textwrap.fill(f'* revised. {board.chance()}', 80)}")
        return 0

    def _show(self, chosen: list[Claim]) -> int:
        holding = []
        for claim in chosen:
            for home, folder in (("committed", None), ("own", self.runs / scoreboard.CLAIMS)):
                outcome = scoreboard.stored(claim, folder)
                if outcome is not None:
                    print(f"{home}{', stale' * scoreboard.is_stale(claim, outcome)}")
                    holding.append(outcome.holds)
                if outcome is not None or folder is None:
                    print(board.page_of(claim, folder))
        return int(not all(holding))

    def _changes(self, chosen: list[Claim]) -> int:
        ids = {str(claim.id) for claim in chosen}
        rows = [row for row in board.changes() if row["claim"].partition(" ")[0] in ids]
        for row in rows:
            print(f"{row['claim']} (check of before: commit {row['commit']})")
            print(f"  before: {row['before']}\n  now:    {row['now']}")
            print(textwrap.fill(row["why"], 80, initial_indent="  why:    ",
                                subsequent_indent="          ") + "\n")  # fmt: skip
        print(f"{len(rows)} checks were revised")
        return 0

    def _new(self) -> int:
        if len(self.which) != 1:
            raise InputError(
                f"claims new takes one name, and got {len(self.which)}: deltacontrol claims new "
                "my_idea"
            )
        for path in template.write(self.which[0], Path()):
            print(f"wrote {path}")
        print(f"it runs: deltacontrol claims run {self.which[0]}")
        return 0


def _chosen(text: str) -> Claim:
    """The claim of a number or a name, or of a file here of that name."""
    if text.isdecimal() and len(text) < 10:
        return scoreboard.find(int(text))
    named = {claim.name: claim for claim in scoreboard.available().values()}
    if text in named:
        return named[text]
    return template.load(text) or scoreboard.find_name(text)


def _told(seconds: Sequence[float | None], words: str = "") -> str:
    """About how long, by what is committed, in words."""
    known = [s for s in seconds if s is not None]
    if not known:
        return ""
    minutes, rest = sum(known) / 60, len(seconds) - len(known)
    more = f", and {rest} not measured before" if rest else ""
    return f", {words}about {minutes:.0f} min by the committed measurements{more}"


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scoreboard in the width of the terminal, of which 80 columns are enough.

    A part has its own title. Where there is room the bound and the interval are told too;
    `deltacontrol claims show` has all. A revised row has a star.
    """
    width = max(80, shutil.get_terminal_size().columns)
    cells = {
        "#": [row["#"] for row in rows],
        "verdict": [row["verdict"].replace(", revised", " *") for row in rows],
        "measured": [row["measured"] for row in rows],
        "own": [row.get("own", "") for row in rows],
        "condition": [row["bound"] for row in rows],
    }
    if not any(cells["own"]):
        del cells["own"]
    titles = [row["part"] for row in rows]
    for leave_out in ("", "condition", " ["):
        if leave_out == " [":  # the value alone
            cells["measured"] = [text.partition(" [")[0] for text in cells["measured"]]
        elif leave_out:
            del cells[leave_out]
        sizes = {name: max(map(len, [name, *column])) for name, column in cells.items()}
        room = width - sum(sizes.values()) - 2 * len(sizes)
        if room >= max(LEAST_TITLE, min(40, *map(len, titles))):
            break
    room = max(LEAST_TITLE, room)
    titles = [t if len(t) <= room else t[: room - 1].rstrip() + "…" for t in titles]
    sizes = {"#": sizes.pop("#"), "claim": max(map(len, ["claim", *titles])), **sizes}
    columns = {**cells, "claim": titles}
    lines = [{name: name for name in sizes}]
    lines += [{name: columns[name][i] for name in sizes} for i in range(len(rows))]
    return ["  ".join(line[name].ljust(sizes[name]) for name in sizes).rstrip() for line in lines]


COMMAND = Claims
