"""Trackers that follow runs while they go on: TensorBoard, Weights & Biases, trackio and others.

    with using("tensorboard"):
        run(experiment, store)                 # and sweeps, whose workers are told

They are accelerate's, and those that a file of yours registers with
`accelerate.tracking.register_tracker_class`. A tracker gets the configuration, loss and rate of
each step, every evaluation, and at the end the result. It is no part of a run: neither its
configuration nor its identity knows of it, and one that fails is left out of the rest, with one
warning. What lies on this machine lies in the folder `FOLDER` beside the records.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.errors import InputError, first_lines, unknown

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "deltacontrol"
FOLDER = "tracking"
# What a tracker calls the name of a run within a project.
_NAMES = {
    "clearml": "task_name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
    "wandb": "name",
}
_CHOSEN: ContextVar[tuple[str, ...]] = ContextVar("trackers", default=())


def used() -> tuple[str, ...]:
    """Names of the trackers that follow the runs of this process."""
    return _CHOSEN.get()


def use(names: str | Sequence[str]) -> None:
    """Let trackers follow the runs of this process from here on.

    Raises:
        InputError: as `require`.
    """
    _CHOSEN.set(require(names))


@contextmanager
def using(names: str | Sequence[str]) -> Iterator[None]:
    """Let trackers follow the runs that are made inside, also by workers of a sweep.

    Args:
        names: of the trackers, such as "tensorboard"; none leaves things as they are.

    Raises:
        InputError: as `require`.
    """
    found = require(names)
    token = _CHOSEN.set(found or used())
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def require(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, each once.

    Raises:
        InputError: there is no tracker of a name, or its package is missing.
    """
    found = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    if not found:
        return ()
    from accelerate import tracking
    from accelerate.utils import LoggerType

    needing = {str(kind.value) for kind in LoggerType} & set(tracking.LOGGER_TYPE_TO_CLASS)
    here = {str(getattr(kind, "value", kind)) for kind in tracking.get_available_trackers()}
    for name in found:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", str(name), tracking.LOGGER_TYPE_TO_CLASS)
        if name in needing - here:
            raise InputError(
                f"the tracker {name} needs a package that is not installed: "
                f"pip install {name.replace('_', '-')}"
            )
    return found


@contextmanager
def following(
    run: str, label: str, config: Mapping[str, Any], store: Path | None
) -> Iterator[Trackers]:
    """The trackers of one run, closed at its end, whatever that is.

    Args:
        run: its name in the store.
        label: its name for people.
        config: its configuration.
        store: the folder of the records; without one there are no trackers.
    """
    first = os.environ.get("RANK", "0") == "0"  # under `accelerate launch` one process tells
    names = used() if first and store is not None else ()
    found = Trackers(names, run, label, config, (store or Path()) / FOLDER)
    try:
        yield found
    finally:
        found.close()


class Trackers:
    """The trackers of one run; they begin with the first numbers.

    Args:
        names: of the trackers.
        run: name of the run in the store.
        label: its name for people.
        config: its configuration.
        folder: for files of the trackers.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: str,
        label: str,
        config: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self._waiting, self._run, self._label = list(names), run, label
        self._config, self._folder = config, folder
        self._trackers: dict[str, GeneralTracker] = {}
        self._step = 0

    def row(self, row: Mapping[str, Any], before: int = 0) -> None:
        """Tell a step of the training: a row of its curve.

        Args:
            row: with the number of the step.
            before: steps of earlier stages.
        """
        self._step = before + int(row["step"])
        self._tell({name: value for name, value in row.items() if name not in ("step", "timed")})

    def evaluated(
        self, evaluate: Callable[[Any], dict[str, float]]
    ) -> Callable[[Any], dict[str, float]]:
        """The same evaluation of a model on validation rows, which is told as well."""

        def tell(model: Any) -> dict[str, float]:
            metrics = evaluate(model)
            self._tell({f"validation_{name}": value for name, value in metrics.items()})
            return metrics

        return tell

    def end(self, result: Mapping[str, Any]) -> None:
        """Tell the result."""
        self._tell({f"result_{name}": value for name, value in result.items()})

    def close(self) -> None:
        """Let the trackers write what they hold, and end."""
        self._each("finish", lambda tracker: tracker.finish())
        self._trackers.clear()
        self._waiting.clear()

    def _tell(self, values: Mapping[str, Any]) -> None:
        if not self._trackers and not self._waiting:
            return
        while self._waiting:
            self._begin(self._waiting.pop(0))
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, Real) and not isinstance(value, bool)
        }
        self._each("log", lambda tracker: tracker.log(numbers, step=self._step))

    def _begin(self, name: str) -> None:
        """Start a tracker: not before the training, whose accelerator decides on the devices."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        title = f"{self._label} ({self._run})"

        def begin() -> GeneralTracker:
            if kind.requires_logging_directory:
                self._folder.mkdir(parents=True, exist_ok=True)
                made = kind(self._run, str(self._folder))
            else:
                named = {_NAMES[name]: title} if name in _NAMES else {}
                if name == "wandb":  # an interrupted run goes on in its place
                    named |= {"id": self._run, "resume": "allow"}
                made = kind(PROJECT, **named)
            made.start()
            made.store_init_configuration({"run": title, **flat(self._config)})
            return made

        try:
            self._trackers[name] = begin()
        except Exception as error:
            self._leave_out(name, "start", error)

    def _each(self, what: str, act: Callable[[GeneralTracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._trackers[name]
                self._leave_out(name, what, error)

    def _leave_out(self, name: str, what: str, error: Exception) -> None:
        warnings.warn(
            f"the tracker {name} failed ({what}: {first_lines(error, 2)}) and follows "
            f"{self._label} no further; the run goes on",
            stacklevel=2,
        )


def flat(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A configuration as trackers take it: one level, without what is not set.

    Example:
        >>> flat({"steps": 3, "deltas": [{"name": "lora", "rank": 8}], "shots": None})
        {'steps': 3, 'deltas.0.name': 'lora', 'deltas.0.rank': 8}
    """
    found: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, list | tuple):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": item for inner, item in flat(value).items()}
        elif value is not None:
            found[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
