"""What is called where a run is made, by whatever executor."""

from __future__ import annotations

from deltacontrol.experiments import tracking
from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.experiments.runs.running import OverLimitError, run_together
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError


def begin(sources: tuple[str, ...], trackers: tuple[str, ...], threads: int) -> None:
    """Load what the sweep has loaded of users' files, track as it does, use so many threads."""
    import torch

    plugins.load_sources(sources)
    tracking.use(trackers)
    torch.set_num_threads(threads)


def record(
    experiments: list[Experiment],
    names: list[str],
    store: RunStore,
    checkpoint_seconds: float,
    limit_minutes: float,
) -> list[bool | str]:
    """Whether each run is recorded, or why it was stopped; else another process computes it.

    Raises:
        InputError: As `run`, or the files here are not those from which the sweep took the names.
    """
    for experiment, name in zip(experiments, names, strict=True):
        if store.path(experiment).name != name:
            raise InputError(
                f"the files of its model, its data or your classes are others for its worker than "
                f"they were where the sweep began, so that {experiment.label} would be another "
                "run; let both read the same files, and leave these as they are meanwhile"
            )
    try:
        records = run_together(
            experiments,
            store,
            progress=False,
            block=False,
            checkpoint_seconds=checkpoint_seconds,
            limit_minutes=limit_minutes,
        )
    except OverLimitError as error:  # not tried again by themselves: that would be more time
        return [store.find(one) is not None or str(error) for one in experiments]
    return [record is not None for record in records]
