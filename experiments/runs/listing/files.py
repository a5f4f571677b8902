"""Records as a file: CSV and Parquet with every plain field, LaTeX with the columns of the list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments.runs.listing import overview
from deltacontrol.experiments.runs.table import table
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tex", ".parquet")


def require_suffix(path: Path) -> None:
    """Refuse a file whose suffix says no form; raises `InputError`."""
    if path.suffix.lower() not in SUFFIXES:
        raise unknown("form of a table", path.suffix or path.name, SUFFIXES)


def write(path: Path, rows: Sequence[overview.Row], root: Path) -> None:
    """Write the rows in their order, in the form that the suffix of `path` says.

    Args:
        path: .csv and .parquet hold one row a record with the columns of `deltacontrol.runs`,
            .tex the columns that `deltacontrol runs` prints.
        rows: records with their fields.
        root: the user's folder of records.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    import pandas as pd

    require_suffix(path)
    if path.suffix.lower() == ".tex":
        columns = overview.table(rows) if rows else {}
        frame = pd.DataFrame({overview.title(n, rows): cells for n, cells in columns.items()})
    else:
        frame = table([record for record, _ in rows], root)
        if len(frame):
            frame = frame.set_index("id", drop=False).loc[[record.id for record, _ in rows]]
            frame = frame.reset_index(drop=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".tex":
            path.write_text(frame.to_latex(index=False, escape=True), encoding="utf-8")
        elif path.suffix.lower() == ".csv":
            frame.to_csv(path, index=False)
        else:
            _of_one_kind(frame).to_parquet(path, index=False)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _of_one_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns with words and numbers as words, since a column of Parquet is of one kind."""
    frame = frame.copy()
    for name in frame:
        kinds = {type(value) for value in frame[name].dropna()}
        if len(kinds - {int, float}) > 0 and len(kinds) > 1:
            frame[name] = [None if value != value or value is None else str(value)
                           for value in frame[name]]  # fmt: skip
    return frame
