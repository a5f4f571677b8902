"""`deltacontrol figures`: compute what is missing, then draw every figure.

Importing this module does not import torch.
"""

from __future__ import annotations

import textwrap
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.executors.registry import DEFAULT, executor_of, using
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base, collect, readme, source
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Figures:
    """Draw the figures, each with its table and its caption.

    The preset quick runs a small grid on this machine, skipping what is finished; paper redraws
    from the records that come with the package and computes nothing. Figures of a benchmark and of
    the claims are always drawn from what is committed; a command of its own measures that anew.

    Attributes:
        preset: The grid: quick (minutes on two cores) or paper (hours).
        recompute: With quick, discard the finished runs of the chosen figures and run them again.
            With paper, run the grid here, skipping what --runs has, instead of reading the records
            that come with the package.
        only: Names of the figures to draw; all when empty.
        out: Where the pictures, tables and captions go.
        workers: Runs at a time; by default one a core, or what the cluster has room for.
        executor: Who makes the runs: in-process, processes, ray or slurm, with options behind the
            name, such as ray:gpus=1.
        plan: Only say what would be run for each figure, and about how long it takes.
        runs: Where finished runs are kept.
        limit_minutes: How long one run may take before it is stopped and saved.
        publish: Put the records that were drawn among the committed ones, for preset paper to
            read, the pictures into the gallery, and what they show into the README; from a clean
            checkout only.
    """

    preset: Literal["quick", "paper"] = "quick"
    recompute: bool = False
    only: tuple[str, ...] = ()
    out: Path = Path("figures")
    workers: int | None = None
    executor: str = DEFAULT
    plan: bool = False
    runs: Path = Path("runs")
    limit_minutes: float = LIMIT_MINUTES
    publish: bool = False

    def run(self) -> None:
        """Draw the chosen figures, one after another, and print each table as it is there.

        A figure that cannot be drawn does not keep the others from it.

        Raises:
            InputError: A figure is unknown, records are missing, or a folder cannot be written.
        """
        require_minutes(self.limit_minutes)
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers is {self.workers}; expected a whole number >= 1")
        if self.publish and self.preset != "paper":
            raise InputError("--publish is for --preset paper: quick runs are not published")
        if self.publish:
            provenance.require_clean()
        chosen = dict.fromkeys(self.only or base.names())
        figures = {name: base.load(name) for name in chosen}
        if self.publish and (own := base.added().keys() & chosen.keys()):
            raise InputError(
                f"--publish is for this project's figures; {', '.join(sorted(own))} is yours"
            )
        executor_of(self.executor)
        failures: dict[str, InputError] = {}
        with using(self.executor, self.workers) if self._computes else nullcontext():
            for name, figure in figures.items():
                try:
                    self._plan(name, figure) if self.plan else self._draw(name, figure)
                except InputError as error:
                    failures[name] = error
        if self.publish and not (self.plan or failures) and readme.update():
            source.update()
            print("the gallery in README.md is up to date")
        if failures:
            reasons = "; ".join(f"{name}: {error}" for name, error in failures.items())
            raise InputError(
                f"{len(failures)} of {len(figures)} figures could not be drawn: {reasons}"
            )

    @property
    def _computes(self) -> bool:
        return self.preset == "quick" or self.recompute

    def _plan(self, name: str, figure: base.FigureModule) -> None:
        fixed = collect.is_fixed(figure.STUDY)
        if fixed or (not self._computes and collect.is_published(figure.STUDY)):
            print(f"{name}: drawn from committed records, nothing to do")
            return
        if not self._computes:
            print(f"{name}: no committed records to draw from; --recompute makes its runs")
            return
        from deltacontrol.experiments.runs.sweep import plan

        wanted = collect.study(figure.STUDY, self.preset)
        print(f"{name}: {plan(wanted, RunStore(self.runs), self.workers).text}")

    def _draw(self, name: str, figure: base.FigureModule) -> None:
        from deltacontrol.paper_figures.export import export

        fixed = collect.is_fixed(figure.STUDY)
        if fixed or not self._computes:
            records = collect.committed(figure.STUDY)
        else:
            records = collect.computed(
                RunStore(self.runs),
                collect.study(figure.STUDY, self.preset),
                discard=self.recompute and self.preset == "quick",
                workers=self.workers,
                limit_minutes=self.limit_minutes,
            )
        if self.publish and not fixed:
            # What is shown is what is committed: a record that was there already stays.
            kept = collect.publish(figure.STUDY, records)
            records = collect.committed(figure.STUDY)
            if kept:
                print(
                    f"{name}: {kept} runs are committed already with other results, and stay; to "
                    f"publish those of now, remove them from experiments/records/figures first"
                )
        done = export(name, figure, records, self.out)
        if self.publish:
            collect.show(self.out / f"{name}.png", base.GALLERY)
        origin = "committed evidence" if fixed else f"{len(records)} runs"
        print(f"\n{name}: {figure.TITLE} ({origin})\n")
        print(done.summary.to_string(index=False))
        print(f"\n{textwrap.fill(done.caption, 100)}\n")
        print("\n".join(f"wrote {path}" for path in done.files))
        if fixed:
            print(f"to measure it anew: {collect.how_to_measure(figure.STUDY)}")
