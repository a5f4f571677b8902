"""``deltacontrol tasks``: the tasks by name."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass

from deltacontrol.experiments import tasks
from deltacontrol.theory.errors import InputError

_WITHOUT_CLASSES = {"regression": "a number", "causal-lm": "the text", "classification": "?"}


@dataclass(frozen=True)
class Tasks:
    """List the packaged tasks and their sizes.

    A file of CSV, TSV, JSON Lines, Parquet, Arrow or text is a task too.

    Attributes:
        show: A task to load, fetching it if needed: sizes, classes and a few rows.
        study: List the tasks of the study of many tasks, with corpus and category.
        text_column: Column of the texts in a task file.
        label_column: Column of the labels in a task file.
    """

    show: str | None = None
    study: bool = False
    text_column: str = "text"
    label_column: str = "label"

    def run(self) -> None:
        """Print the list, or one task.

        Raises:
            InputError: The task cannot be read, or an option goes with a task file and there is
                none.
        """
        if self.study:
            if self.show is not None:
                raise InputError("--study lists tasks and --show loads one; give one of them")
            for task in tasks.study_tasks():
                print(f"{task.category:15} {task.corpus:11} {task.name}")
            return
        if self.show is None:
            if (self.text_column, self.label_column) != ("text", "label"):
                raise InputError("--text-column and --label-column go with --show FILE; name one")
            for line in _lines(list(tasks.available().values())):
                print(line)
            print(
                "\nA corpus asks more questions, by a name of two parts:\n"
                "  20ng:is-sci.space  20ng:sci.space-vs-rec.autos  trec6:same-class\n"
                "  intensity:more-positive  intensity:beyond-1  bbc:text\n"
                "and `deltacontrol tasks --study` lists those of the study of 120 tasks.\n"
                "\nA file with a column of texts and one of labels is a task too:\n"
                "  deltacontrol finetune --task FILE.csv --text-column TEXT --label-column LABEL"
            )
            return
        task = tasks.load(self.show, text_column=self.text_column, label_column=self.label_column)
        print(f"{task.name}: {task.kind}, {task.source}")
        if task.reading:
            print(f"  {task.reading}")
        for split in ("train", "validation", "test"):
            print(f"  {split:10} {len(getattr(task, split)):6,d} rows")
        if task.labels:
            shares = task.train["label"].value_counts(normalize=True)
            shown = sorted(shares.items(), key=lambda item: -item[1])[:10]
            print("  classes    " + ", ".join(f"{task.labels[i]} {s:.1%}" for i, s in shown))  # type: ignore[index]
        for _, row in task.train.head(3).iterrows():
            label = row.get("label", "")
            print(
                f"  {task.labels[int(label)] if task.labels else label!s:>10}  {row['text'][:90]}"
            )


def _lines(listed: list[tasks.PackagedTask]) -> list[str]:
    """A table of the tasks in the width of the terminal, descriptions wrapped."""
    rows = [("task", "classes", "train", "test", "MB")]
    for task in listed:
        sizes = task.rows_of_splits()
        train = f"{sizes['train']:,d}" if "train" in sizes else ""
        kinds = f"{len(task.labels)}" if task.labels else _WITHOUT_CLASSES[task.kind]
        size = f"{task.package.megabytes}"
        rows.append((task.name, kinds, train, f"{sizes['test']:,d}", size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(20, shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths))
    found = []
    texts = ["what it asks", *(task.description for task in listed)]
    for row, text in zip(rows, texts, strict=True):
        name, *numbers = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        start = "  ".join([name, *numbers])
        for line in textwrap.wrap(text, room):
            found.append(f"{start}  {line}")
            start = " " * len(start)
    if any(row[2] == "" for row in rows):
        found.append("\nThe rows for training are known once a task is fetched (--show TASK).")
    return found


COMMAND = Tasks
