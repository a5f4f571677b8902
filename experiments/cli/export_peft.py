"""``deltacontrol export-peft``: a run's deltas as a peft adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from deltacontrol.experiments import models
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import both_homes


@dataclass(frozen=True)
class ExportPeft:
    """Write what a run trained as an adapter that peft loads, with the same outputs.

    What peft has no word for is rewritten where that is exact (LoRA on a slice of a fused matrix,
    several ranks, a principal start), and refused with the reason where it is not.

    For example

        deltacontrol export-peft 3f2a --out adapter/

    Attributes:
        run_id: Id of a run, or its beginning.
        out: Folder to write; by default <run id>-adapter.
        runs: Your folder of records; those that come with the package are found too, and say so
            where they were published without their trained controls.
        base_model: Base model named in the adapter, an id on the hub or a folder; by default that
            of the run, a packaged one by the folder it was unpacked to.
    """

    run_id: tyro.conf.Positional[str]
    out: Path | None = None
    runs: Path = Path("runs")
    base_model: str | None = None

    def run(self) -> None:
        """Restore the model, write the adapter."""
        from deltacontrol.deltas.interop import export_peft

        record = both_homes(self.runs).get(self.run_id)
        out = self.out or Path(f"{record.id}-adapter")
        controlled = record.model()
        export_peft(controlled, out, base_model=self.base_model or _base(record))
        names = " + ".join(delta.name for delta in controlled.deltas)
        print(f"wrote {out}: {names}, {controlled.num_trainable:,d} parameters")


def _base(record: Record) -> str:
    """What peft finds the base by: an id on the hub, or a folder, also of a packaged model."""
    found = models.resolve(record.config["model"])
    return str(Path(found.location).resolve()) if found.digest else str(found.location)


COMMAND = ExportPeft
