"""``deltacontrol cite``: BibTeX of what was used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from deltacontrol.experiments.runs.citing import cite
from deltacontrol.experiments.runs.store import both_homes


@dataclass(frozen=True)
class Cite:
    """Print BibTeX of this software, of the article that it builds on, and of the methods used.

    For example

        deltacontrol cite --delta lora:rank=16 bitfit > references.bib
        deltacontrol cite 3f2a

    Attributes:
        run_id: Id of a run, or its beginning; its deltas are cited.
        delta: Delta methods to cite.
        runs: Your folder of records; those that come with the package are found too.
    """

    run_id: tyro.conf.Positional[str | None] = None
    delta: tuple[str, ...] = ()
    runs: Path = Path("runs")

    def run(self) -> None:
        """Print the entries."""
        record = [] if self.run_id is None else [both_homes(self.runs).get(self.run_id)]
        print(cite([*record, *self.delta]))


COMMAND = Cite
