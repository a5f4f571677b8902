"""``deltacontrol export-peft``: a run's deltas as a peft adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from deltacontrol.experiments.runs.store import both_homes
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class ExportPeft:
    """Write what a run trained as an adapter that peft loads, with the same outputs.

    What peft has no word for is rewritten where that is exact (LoRA on a slice of a fused matrix,
    several ranks, a principal start), and refused with the reason where it is not. A README.md
    beside it is the model card: task, scores, method, settings, what to cite.

    For example

        deltacontrol export-peft 3f2a --out adapter/
        deltacontrol export-peft 3f2a --push me/lora-movie

    Attributes:
        run_id: Id of a run, or its beginning.
        out: Folder to write; by default <run id>-adapter.
        runs: Your folder of records; those that come with the package are found too, and say so
            where they were published without their trained controls.
        base_model: Base model named in the adapter, an id on the hub or a folder; by default that
            of the run, a packaged one by the folder it was unpacked to (with --push by its name).
        push: Put the adapter on the hub as well, at this owner/name. It needs a token: `hf auth
            login`, or HF_TOKEN.
        private: With --push, make a new place there private; by default as your account says.
    """

    run_id: tyro.conf.Positional[str]
    out: Path | None = None
    runs: Path = Path("runs")
    base_model: str | None = None
    push: str | None = None
    private: bool = False

    def run(self) -> None:
        """Restore the model, write the adapter."""
        from deltacontrol.experiments.sharing import export_peft

        if self.private and self.push is None:
            raise InputError("--private goes with --push; give both, or leave it out")
        record = both_homes(self.runs).get(self.run_id)
        out = self.out or Path(f"{record.id}-adapter")
        controlled = export_peft(
            record, out, base_model=self.base_model, push_to=self.push, private=self.private or None
        )
        names = " + ".join(delta.name for delta in controlled.deltas)
        there = f" and {self.push} on the hub" if self.push else ""
        print(f"wrote {out}{there}: {names}, {controlled.num_trainable:,d} parameters")


COMMAND = ExportPeft
