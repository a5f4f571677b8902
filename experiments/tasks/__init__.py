"""Tasks: packaged ones, one file each, families of them, and the user's own files.

`load("movie")` fetches and converts once; `load("20ng:sci.space-vs-rec.autos")` derives a task of
it (see `families`); `load("reviews.csv")` reads a file of yours. `digest`
identifies what `load` would give without fetching anything, so that finished runs are found without
the data.
"""

import importlib
import pkgutil
from functools import cache

from deltacontrol.experiments.tasks import packaged
from deltacontrol.experiments.tasks.base import Kind, PackagedTask, Task
from deltacontrol.experiments.tasks.families import Derived, chosen, derive
from deltacontrol.experiments.tasks.files import file_digest, is_file_name, load_file
from deltacontrol.theory import plugins
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown

__all__ = [
    "Derived",
    "Kind",
    "PackagedTask",
    "Task",
    "available",
    "corpus_of",
    "digest",
    "load",
    "reading_of",
    "study_tasks",
]


def available() -> dict[str, PackagedTask]:
    """The packaged tasks by name: whatever modules of `packaged`, or users', define a `TASK`."""
    return plugins.merged(
        "task", _packaged_tasks(), ((x.name, x) for _, x in plugins.values("TASK"))
    )


def study_tasks(count: int = 120) -> list[PackagedTask | Derived]:
    """The tasks of the study of many tasks, as in `families.chosen`."""
    return chosen(_packaged_tasks(), count)


@cache
def _packaged_tasks() -> dict[str, PackagedTask]:
    modules = (
        importlib.import_module(f"{packaged.__name__}.{found.name}")
        for found in pkgutil.iter_modules(packaged.__path__)
    )
    tasks = [module.TASK for module in modules if hasattr(module, "TASK")]
    return {task.name: task for task in sorted(tasks, key=lambda task: task.name)}


@typed
def load(
    name: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    kind: Kind | None = None,
) -> Task:
    """Return the packaged task `name`, or the task in the file of that path.

    Args:
        name: one of `available()`, one derived of it (see `families`), or a path to a file (see
            `reading`).
        text_column: the file's column of texts.
        label_column: the file's column of labels.
        kind: what the file's labels are; inferred when not given (see `files.load_file`).

    Raises:
        InputError: no such task, or what `sources.fetch` and `files.load_file` raise.
    """
    if is_file_name(name):
        return load_file(name, text_column=text_column, label_column=label_column, kind=kind)
    return _packaged(name, kind, text_column, label_column).load()


def reading_of(experiment: object) -> str:
    """How the task file of an experiment is read: rows, columns, labels, splits.

    Empty where its task is a packaged one.

    Raises:
        InputError: as in `load`.
    """
    given = {
        name: getattr(experiment, name)
        for name in ("text_column", "label_column")
        if hasattr(experiment, name)
    }
    name = getattr(experiment, "task", None)
    if not (isinstance(name, str) and is_file_name(name)):
        return ""
    return load(name, kind=getattr(experiment, "task_kind", None), **given).reading


def digest(
    name: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    kind: Kind | None = None,
) -> str:
    """Return `load(...).digest` without fetching or converting; arguments and errors of `load`."""
    if is_file_name(name):
        return file_digest(name, text_column=text_column, label_column=label_column, kind=kind)
    return _packaged(name, kind, text_column, label_column).digest


def corpus_of(name: str) -> str:
    """Whose texts a task has: tasks of one corpus are not independent of each other.

    A file is a corpus of its own, and so is a task that names none.

    Raises:
        InputError: there is no such task.
    """
    if is_file_name(name):
        return name
    return _packaged(name, None, "text", "label").corpus or name


def _packaged(
    name: str, kind: Kind | None, text_column: str, label_column: str
) -> PackagedTask | Derived:
    tasks = available()
    task: PackagedTask | Derived
    if ":" in name:
        task = derive(name, tasks)
    elif name in tasks:
        task = tasks[name]
    else:
        raise unknown("task", name, [*tasks, "a path to a file such as reviews.csv"])
    if (text_column, label_column) != ("text", "label"):
        raise InputError(
            f"{name} is a packaged task, whose columns are known; text_column and label_column go "
            "with a file of your own: leave them out."
        )
    if kind not in (None, task.kind):
        raise InputError(f"{name} is a {task.kind} task, not {kind}; leave kind out.")
    return task
