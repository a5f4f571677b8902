"""Made-up claims of the figure scoreboard: each verdict once, and a control without power."""

from __future__ import annotations

from typing import Any

import pandas as pd

from deltacontrol.theory.claims import Claim, Part, Threshold
from deltacontrol.theory.evidence import Evidence
from deltacontrol.theory.judging import judge
from tests.paper_figures.made_up import Grid, Synthetic

EXACT = Threshold("<=", 1e-12, "relative difference")
AT_LEAST = Threshold(">=", 0.5, "correlation")
WITHIN = Threshold("within", (0.5, 1.5), "slope")


def part(
    name: str, threshold: Threshold, measured: Evidence, control: float, passing: float | None
) -> Part:
    case = None if passing is None else (lambda prediction: Evidence(passing))
    return Part(
        name, f"Part {name} of a claim", threshold, lambda prediction: measured,
        lambda prediction: Evidence(control), case, "random network",
    )  # fmt: skip


def outcome(number: int, *parts: Part, revised: bool = False) -> dict[str, Any]:
    claim = Claim(
        id=number, name=f"made-up-{number}", title="made up", statement="", source="",
        predict=dict, parts=parts,
    )  # fmt: skip
    return judge(claim).to_dict() | {"revised": revised}


def grid() -> Grid:
    met = Evidence.mean([0.9, 1.0, 1.1], "seed", assumptions={"converged": False})
    outcomes = [
        outcome(1, part("", EXACT, Evidence(1e-16), 0.3, 0.0)),
        outcome(
            2,
            part("a", AT_LEAST, Evidence.mean([0.7, 0.8, 0.75], "seed"), 0.1, 0.9),
            part("b", AT_LEAST, Evidence.mean([0.2, 0.1, 0.15], "seed"), 0.1, 0.9),
            part("c", AT_LEAST, Evidence.mean([0.4, 0.9, 0.5], "seed"), 0.6, 0.9),
            revised=True,
        ),
        outcome(3, part("", WITHIN, met, 4.0, None)),
    ]
    return [
        (Synthetic({"claim": place}), result, pd.DataFrame({"step": [0]}))
        for place, result in enumerate(outcomes)
    ]


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return (
        "5 parts: 2 hold, 1 fails, 1 is inconclusive, 1 whose assumptions were not met. Each number"
    )
