"""``deltacontrol claims``: the scoreboard of predictions and measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from deltacontrol.experiments.claims import scoreboard
from deltacontrol.theory.claims import Outcome, Verdict


@dataclass(frozen=True)
class Claims:
    """Print the scoreboard, judge claims, or show one.

    A claim compares a prediction, made without training, with a measurement, against a threshold
    that was written down before. A negative control breaks an assumption on purpose: the check must
    fail there, or it proves nothing.

    For example

        deltacontrol claims run 1 2

    Attributes:
        action: list prints the scoreboard, run judges claims anew, show prints one in full.
        ids: Numbers of claims; none means all.
    """

    action: tyro.conf.Positional[Literal["list", "run", "show"]] = "list"
    ids: tyro.conf.Positional[tuple[int, ...]] = ()

    def run(self) -> int:
        """Do the action; exit code 1 where a judged claim does not hold."""
        chosen = [scoreboard.find(i) for i in self.ids] or list(scoreboard.available().values())
        if self.action == "list":
            import pandas as pd

            table = pd.DataFrame([row for row in scoreboard.rows()])
            wanted = [claim.id for claim in chosen]
            print(table[table["#"].isin(wanted)].drop(columns="source").to_string(index=False))
            return 0
        verdicts = []
        for claim in chosen:
            run = self.action == "run"
            outcome = scoreboard.evaluate(claim) if run else scoreboard.stored(claim)
            if outcome is None:
                print(f"claim {claim.id} was not judged yet: deltacontrol claims run {claim.id}")
                continue
            print_outcome(outcome)
            verdicts.append(outcome.verdict)
        if self.action == "run" and scoreboard.update_readme():
            print("the scoreboard in README.md is up to date")
        return int(any(verdict is not Verdict.HOLDS for verdict in verdicts))


def print_outcome(outcome: Outcome) -> None:
    """A judged claim, in full."""
    print(f"claim {outcome.id}: {outcome.title}")
    print(f"  {outcome.statement}")
    print(f"  source            {outcome.source}")
    print(f"  derivation        proofs_notebooks/{outcome.notebook}.py")
    print(f"  condition         {outcome.threshold}")
    for name, evidence in (("measured", outcome.evidence), ("negative control", outcome.control)):
        print(f"  {name:17} {evidence.value:.3g}  ({evidence.note})")
        for key, value in evidence.details.items():
            print(f"  {'':17} {key}: {value:.3g}" if isinstance(value, float) else
                  f"  {'':17} {key}: {value}")  # fmt: skip
    print(f"  verdict           {outcome.verdict.text}: {outcome.reason}\n")


COMMAND = Claims
