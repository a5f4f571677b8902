"""``deltacontrol solve``: a solver of the theory on a model and a few rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from deltacontrol.experiments import tasks
from deltacontrol.experiments.measures.solving import Solve
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import Record, RunStore
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class SolveCommand(Solve):
    """Solve the optimal-control problem of a delta on a few rows, and record the solution.

    The layers of the model are the steps, the delta is the control, and the loss of the first rows
    of the task, with a running cost of the control, is minimised in float64. Printed is the
    residual of Pontryagin's condition, the norm of grad_u H, of every layer before and after.

    newton-cg, gauss-newton, shooting and lbfgs serve states of any size, ddp and ilqr small ones,
    of a few rows of a small model, and adamw, sgd and the other optimisers of torch any.

    With --certify a bound is printed of what any controls at the same sites could still gain within
    a radius: proved for a head alone, and for the linearised model of any other delta, beside an
    estimate of what linearising leaves out.

    The run is recorded; the same command again prints the record, and a killed one goes on.

    For example

        deltacontrol solve --model minilm-l3 --task movie --delta lora:rank=4 --rows 8
        deltacontrol solve --solver gauss-newton --rows 16 --weight-decay 0.001 --tol 1e-6
        deltacontrol solve --solver adamw:lr=0.01 --steps 200
        deltacontrol solve --delta head --rows 32 --weight-decay 0.001 --certify
    """

    runs: Path = Path("runs")
    """Folder in which the run is recorded."""
    limit_minutes: float = LIMIT_MINUTES
    """How long the run may take, the time that it waits for another process not counted. At the
    limit it is saved, and the same command with a larger one goes on."""
    certify: bool = False
    """Print what controls within the radius could still gain; on a recorded solve as well."""
    radius: float | None = None
    """Of the certificate, in the Euclidean norm of all controls; by default the distance between
    the start and the solution."""

    def __post_init__(self) -> None:
        """Check nothing yet: `run` makes the experiment, whose errors are messages of their own."""

    def run(self) -> int:
        """Solve, record, print; exit code 1 where the solver did not converge."""
        from deltacontrol.experiments.runs.running import run

        require_minutes(self.limit_minutes)
        if self.radius is not None and not (self.certify and 0 < self.radius < math.inf):
            raise InputError(
                f"radius is {self.radius}; it is that of a certificate, a positive length: give "
                "--certify --radius 0.5, or leave it out"
            )
        experiment = Solve(**{f.name: getattr(self, f.name) for f in fields(Solve)})
        store = RunStore(self.runs)
        known = store.find(experiment) is not None
        if not known and (told := tasks.reading_of(experiment)):
            print(told)
        record = run(experiment, store, limit_minutes=self.limit_minutes)
        if record is None:  # another process of the launch writes and prints
            return 0
        print_record(record)
        print(f"{'found' if known else 'recorded'} {store.path(experiment)}")
        if self.certify:
            from deltacontrol.experiments.certifying import certificate_of

            told = "as far as the solve went" if self.radius is None else f"within {self.radius:g}"
            print(f"what other controls {told} could gain: seconds for a head, minutes for others")
            print(certificate_of(record, self.radius))
        return 0 if record.status == "converged" else 1


def print_record(record: Record) -> None:
    """The residual of every layer before and after, and how the solve ended."""
    result, config = record.result, record.config
    names = " + ".join(delta["name"] for delta in config["deltas"])
    print(f"{config['solver']}: {names} on {config['rows']} rows of {config['task']}, "
          f"{config['model']}, seed {config['seed']}")  # fmt: skip
    width = max(len("all"), *map(len, result["stages"]))
    print(f"  {'residual':{width}} {'controls':>10} {'before':>10} {'after':>10}")
    rows = zip(
        result["stages"],
        result["num_controls"],
        result["residuals"]["before"],
        result["residuals"]["after"],
        strict=True,
    )
    for name, count, before, after in rows:
        print(f"  {name:{width}} {count:10,d} {_number(before)} {_number(after)}")
    count, before, after = (
        sum(result["num_controls"]),
        result["initial_residual"],
        result["residual"],
    )
    print(f"  {'all':{width}} {count:10,d} {_number(before)} {_number(after)}")
    print(f"  {'J':{width}} {'':10} {_number(result['initial_objective'])} "
          f"{_number(result['objective'])}")  # fmt: skip
    print(f"{record.status}: {record.message}")
    print(f"{result['iterations']} iterations, {result['sweeps']:.0f} passes through the model, "
          f"{result['seconds']:.1f} s")  # fmt: skip


def _number(value: float | None) -> str:
    """A number in ten places; one that was not finite is recorded as None."""
    return f"{'not finite':>10}" if value is None else f"{value:10.3e}"


COMMAND = SolveCommand
