"""``deltacontrol claims``: the scoreboard of predictions and measurements."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from deltacontrol.experiments.claims import scoreboard
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.store import RunStore, both_homes
from deltacontrol.theory.claims import Claim, Outcome, Verdict
from deltacontrol.theory.errors import InputError

LEAST_TITLE = 24  # columns of the list


@dataclass(frozen=True)
class Claims:
    """Print the scoreboard, judge or measure claims, or show one.

    A claim compares a prediction, made without training, with a measurement, against a threshold
    that was written down before. A negative control breaks an assumption on purpose: the check must
    fail there, or it proves nothing.

    For example

        deltacontrol claims judge
        deltacontrol claims run 1 2

    Attributes:
        action: list prints the scoreboard, with your own results beside the committed ones; judge
            gives every verdict anew from recorded evidence, without training; run measures anew and
            trains what is not recorded; show prints a claim in full.
        ids: Numbers of claims; none means all.
        runs: Your folder of runs; what run measures is kept in its folder claims.
        publish: With judge or run, from a clean checkout only: put the results, and the records
            of the runs behind them, among the committed ones, and the scoreboard into the README.
    """

    action: tyro.conf.Positional[Literal["list", "judge", "run", "show"]] = "list"
    ids: tyro.conf.Positional[tuple[int, ...]] = ()
    runs: Path = Path("runs")
    publish: bool = False

    def run(self) -> int:
        """Do the action; exit code 1 where a claim does not hold or could not be judged.

        Raises:
            InputError: A claim is unknown, or with --publish a claim is a user's own, or the
                checkout is not clean enough to publish from; nothing has been computed by then.
        """
        chosen = [scoreboard.find(i) for i in self.ids] or list(scoreboard.available().values())
        store = both_homes(self.runs)
        if self.action in ("list", "show"):
            if self.publish:
                raise InputError("--publish goes with judge or run: these have results to publish")
            return self._list(chosen) if self.action == "list" else self._show(chosen)
        if self.publish:
            for claim in chosen:
                scoreboard.require_publishable(claim)
            provenance.require_clean()
        judged, failures = {}, []
        for claim in chosen:
            try:
                judged[claim.id] = self._judged(claim, store)
            except InputError as error:
                print(f"claim {claim.id}: {error}\n", file=sys.stderr)
                failures.append(str(claim.id))
        if self.publish:
            for claim in (claim for claim in chosen if claim.id in judged):
                scoreboard.publish(claim, judged[claim.id], store)
            if scoreboard.update_readme():
                print("the scoreboard in README.md is up to date")
        if failures:
            print(f"not judged: {', '.join(failures)}")
        verdicts = [found.outcome.verdict for found in judged.values()]
        return int(bool(failures) or any(verdict is not Verdict.HOLDS for verdict in verdicts))

    def _judged(self, claim: Claim, store: RunStore) -> scoreboard.Judged:
        if self.action == "run":
            found = scoreboard.evaluate(claim, store)
            scoreboard.keep(claim, found, store.root / scoreboard.CLAIMS)
        else:
            found = scoreboard.rejudge(claim, store)
        print_outcome(found.outcome)
        return found

    def _list(self, chosen: list[Claim]) -> int:
        own = self.runs / scoreboard.CLAIMS
        rows = {row["#"]: row for row in scoreboard.rows(own if own.is_dir() else None)}
        for line in _lines([(claim, rows[claim.id]) for claim in chosen]):
            print(line)
        return 0

    def _show(self, chosen: list[Claim]) -> int:
        verdicts = []
        for claim in chosen:
            for home, folder in (("committed", None), ("own", self.runs / scoreboard.CLAIMS)):
                outcome = scoreboard.stored(claim, folder)
                if outcome is not None:
                    print(f"{home}{', stale' * scoreboard.is_stale(claim, outcome)}")
                    print_outcome(outcome)
                    verdicts.append(outcome.verdict)
                elif folder is None:
                    print(
                        f"claim {claim.id} was not judged yet: deltacontrol claims run {claim.id}"
                    )
        return int(any(verdict is not Verdict.HOLDS for verdict in verdicts))


def _lines(rows: Sequence[tuple[Claim, Mapping[str, Any]]]) -> list[str]:
    """The scoreboard in the width of the terminal, of which 80 columns are enough.

    The condition is the bound alone, where there is room; `deltacontrol claims show` has its words.
    """
    width = max(80, shutil.get_terminal_size().columns)
    cells = {
        "#": [str(row["#"]) for _, row in rows],
        "verdict": [row["verdict"] for _, row in rows],
        "measured": [row["measured"] for _, row in rows],
        "own": [row.get("own", "") for _, row in rows],
        "condition": [
            str(claim.threshold)[len(claim.threshold.description) + 1 :] for claim, _ in rows
        ],
    }
    if not any(cells["own"]):
        del cells["own"]
    sizes = {name: max(map(len, [name, *column])) for name, column in cells.items()}
    if width - sum(sizes.values()) - 2 * len(sizes) < LEAST_TITLE:
        del cells["condition"], sizes["condition"]
    room = max(LEAST_TITLE, width - sum(sizes.values()) - 2 * len(sizes))
    titles = [
        t if len(t) <= room else t[: room - 1].rstrip() + "…" for t in (c.title for c, _ in rows)
    ]
    sizes = {"#": sizes.pop("#"), "claim": max(map(len, ["claim", *titles])), **sizes}
    columns = {**cells, "claim": titles}
    lines = [{name: name for name in sizes}]
    lines += [{name: columns[name][i] for name in sizes} for i in range(len(rows))]
    return ["  ".join(line[name].ljust(sizes[name]) for name in sizes).rstrip() for line in lines]


def print_outcome(outcome: Outcome) -> None:
    """A judged claim, in full."""
    print(f"claim {outcome.id}: {outcome.title}")
    print(f"  {outcome.statement}")
    print(f"  source            {outcome.source}")
    if outcome.notebook:
        print(f"  derivation        proofs_notebooks/{outcome.notebook}.py")
    print(f"  condition         {outcome.threshold}")
    for name, evidence in (("measured", outcome.evidence), ("negative control", outcome.control)):
        print(f"  {name:17} {evidence.value:.3g}  ({evidence.note})")
        for key, value in evidence.details.items():
            print(f"  {'':17} {key}: {value:.3g}" if isinstance(value, float) else
                  f"  {'':17} {key}: {value}")  # fmt: skip
    print(f"  runs              {', '.join(outcome.runs) or 'none: measured directly'}")
    print(f"  verdict           {outcome.verdict.text}: {outcome.reason}\n")


COMMAND = Claims
