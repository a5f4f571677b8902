"""A file of rows, read strictly: every cell is text or missing, and no row is lost or made up.

What each kind of file means, before any type is decided:

    .csv              RFC 4180: commas, fields in double quotes where they need them, the first line
                      names the columns; a field that is not quoted properly is refused
    .tsv              tabs; quotes are characters like any other, and a text has no tab or line end
    .jsonl .ndjson    one JSON object a line
    .json             an array of objects, or the same as .jsonl
    .parquet .arrow   a table; .arrow is an Arrow file or stream, as datasets' cache holds it
    .txt              one text a line in the column `text`; blank lines separate

Text is UTF-8, with or without a byte order mark. All but tables may be compressed, which a second
suffix says: ``reviews.csv.gz`` (gzip), ``.bz2`` or ``.xz``.

A cell is missing where a JSON value or a table's value is null, NaN or absent; the words "NA",
"None" and "null" are text. Numbers and truth values become the text that Python prints for them, so
that the same rows give the same cells from every kind of file; numbers of one column are printed as
decimals where one of them is, and zero has no sign.
"""

from __future__ import annotations

import csv
import json
import lzma
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TABLES = (".parquet", ".arrow")
LINES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
COMPRESSED = (".gz", ".bz2", ".xz")
SUFFIXES = (*LINES, *TABLES)

Cell = str | None
_PLAIN_NUMBER = r"\s*[+-]?[0-9]+(\.[0-9]+)?\s*"


def suffix_of(path: Path | str) -> str | None:
    """The kind of file by its name, such as ".csv" also for ``a.CSV.gz``; None where unknown."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in LINES else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


@typed
def read_rows(path: Path, used: Collection[str] | None = None) -> pd.DataFrame:
    """Read all rows; cells are strings, or None where they are missing.

    Args:
        path: a file whose `suffix_of` is known.
        used: the columns that matter; what is no text or number in another one is passed over, and
            its cells are None. None means all columns.

    Raises:
        InputError: it cannot be read as what its name says; names the first line that is wrong.
    """
    import pandas as pd

    suffix = suffix_of(path)
    if suffix in TABLES:
        return _table(path, suffix, used)
    try:
        with _opened(path) as lines:
            if suffix in (".csv", ".tsv"):
                columns, rows = _delimited(path, lines, suffix)
                return pd.DataFrame(rows, columns=pd.Index(columns), dtype=object)
            if suffix == ".txt":
                texts = [line.rstrip("\r\n") for line in lines]
                return pd.DataFrame({"text": [t for t in texts if t.strip()]}, dtype=object)
            found = _objects(path, lines, whole=suffix == ".json")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text (a byte {error.object[error.start]:#04x}); save it as UTF-8"
        raise _unreadable(path, reason) from error
    # A damaged compressed file.
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(path, str(error)) from error
    names = list(dict.fromkeys(name for row in found for name in row))
    cells: dict[str, list[Cell]] = {}
    for name in names:
        values = [row.get(name) for row in found]
        read = used is None or name in used
        cells[name] = _cells(values, name, path) if read else [None] * len(values)
    return pd.DataFrame(cells, columns=pd.Index(names), dtype=object)


def refuse_swallowed(frame: pd.DataFrame, text: str, label: str | None, path: Path) -> None:
    """Refuse a cell of a .csv file that holds rows, because a quote before it was not closed.

    A quote that is opened and not closed takes in all rows up to the next quote, and what results
    is a proper file. Then the first line of the cell ends with the fields that follow it in its
    row, the last one begins with those before it in another row, and each line between is a whole
    row: as many fields as columns, with a label of the file in its place, or, without labels, going
    on as the columns of numbers or of few different words do.

    Raises:
        InputError: there is such a cell.
    """
    if suffix_of(path) != ".csv" or len(frame.columns) < 2:
        return
    broken = {c: frame[c][frame[c].str.contains("\n", regex=False, na=False)] for c in frame}
    if all(cells.empty for cells in broken.values()):
        return
    asked = [label] if label is not None else [c for c in frame if c != text and broken[c].empty]
    known = {c: test for c in asked if (test := _alike(frame[c], always=label is not None))}
    tests = [known.get(column) for column in frame]
    for place, (column, cells) in enumerate(broken.items()):
        for value in cells:
            if known and _holds_rows(value.splitlines(), place, tests):
                raise _unreadable(
                    path,
                    f"a cell of {column!r} holds whole rows, from {value.splitlines()[0][:40]!r} "
                    "on: a quote before it is not closed, so that rows are taken for one cell. "
                    "Write a quote inside of a cell twice; if it is meant so, write the file as "
                    ".jsonl",
                )


def _holds_rows(lines: list[str], place: int, tests: list[Callable[[str], bool] | None]) -> bool:
    """Whether the lines of a cell are the rest of a row, whole rows, and the begin of a row."""
    if len(lines) < 2:
        return False
    told = 0
    for number, line in enumerate(lines):
        first = place if not number else 0
        end = place + 1 if number == len(lines) - 1 else len(tests)
        fields = next(csv.reader([line]), [])
        if len(fields) != end - first:
            return False
        for test, field in zip(tests[first:end], fields, strict=True):
            if test is not None:
                if not test(field):
                    return False
                told += 1
    return told > 0


def _alike(cells: pd.Series, *, always: bool) -> Callable[[str], bool] | None:
    """Whether a field goes on as a column does; None where every cell is another word.

    ``always``: then one of its words, as many as there are.
    """
    known = cells.dropna()
    if known.empty:
        return None
    words = set(known)
    few = 2 * len(words) <= len(known)
    if not few and known.str.fullmatch(_PLAIN_NUMBER).all():
        return lambda field: re.fullmatch(_PLAIN_NUMBER, field) is not None
    return words.__contains__ if few or always else None


def _opened(path: Path) -> IO[str]:
    import bz2
    import gzip

    options: Any = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("IO[str]", openers.get(path.suffix.lower(), open)(path, **options))


def _delimited(
    path: Path, lines: Iterable[str], suffix: str
) -> tuple[list[str], list[Sequence[str]]]:
    """Columns and rows of comma or tab separated values."""
    csv.field_size_limit(2**31 - 1)  # a text may be as long as memory holds
    if suffix == ".csv":
        reader = csv.reader(lines, strict=True)
    else:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    columns: list[str] | None = None
    rows: list[Sequence[str]] = []
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            advice = ' (inside of "..." a quote is written twice)' if suffix == ".csv" else ""
            raise _unreadable(path, f"line {first}: {error}{advice}") from error
        if row is None:
            return columns or [], rows
        if not row:
            continue  # a blank line
        if columns is None:
            columns = _header(row, path)
        elif len(row) != len(columns):
            advice = (
                "a text of a .tsv file has no tab and no line end; write it as .csv or .jsonl"
                if suffix == ".tsv"
                else 'put a text with a comma between double quotes: "..."'
                if len(row) > len(columns)
                else "a text with a line end stands between double quotes, and no field is left out"
            )
            raise _unreadable(
                path,
                f"line {first} has {len(row)} fields where the first line names {len(columns)} "
                f"columns ({', '.join(columns)}); {advice}",
            )
        else:
            if [row[0].lstrip("\ufeff"), *row[1:]] == columns and len(columns) > 1:
                raise _unreadable(
                    path, f"line {first} repeats the names of the columns; leave it out"
                )
            if suffix == ".tsv":
                _refuse_quoted(row, first, path)
            rows.append(row)


def _header(row: list[str], path: Path) -> list[str]:
    name, times = Counter(row).most_common(1)[0] if row else ("", 1)
    if times > 1:
        raise _unreadable(path, f"two columns are named {name!r}; name them apart")
    return row


def _refuse_quoted(row: Sequence[str], line: int, path: Path) -> None:
    """Refuse a field with doubled quotes inside of quotes, as programs write .csv files."""
    for field in row:
        inner = field[1:-1]
        if len(field) > 2 and field[0] == field[-1] == '"' and '""' in inner:
            raise _unreadable(
                path,
                f"line {line}: a field is quoted as in a .csv file ({field[:40]}), while a .tsv "
                "file has no quoting; write it as .csv, or without the quotes",
            )


def _objects(path: Path, lines: IO[str], *, whole: bool) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line or in one array."""
    text = lines.read()
    if whole and text.lstrip()[:1] == "[":
        found = _parsed(text, "", path)
    else:  # split at line feeds alone: other ends of lines may stand within a string
        numbered = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        found = [_parsed(line, f"line {number}: ", path) for number, line in numbered]
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise _unreadable(
                path, f"row {number} is {_kind(row)}; expected one object a row, {{...}}"
            )
    return found


def _parsed(text: str, where: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _unreadable(path, f"{where}two values are named {twice!r}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"{where}{error}") from error


def _cells(values: list[Any], name: str, path: Path) -> list[Cell]:
    """The cells of a column.

    Raises:
        InputError: a value is no text or number, or the text "1" and the number 1 are both there,
            which would become the same cell.
    """
    decimal = any(isinstance(v, float) and not math.isnan(v) for v in values)
    cells = [_cell(v, name, number, path, decimal) for number, v in enumerate(values, 1)]
    pairs = list(zip(values, cells, strict=True))
    texts = {cell for value, cell in pairs if isinstance(value, str)}
    both = texts & {cell for value, cell in pairs if value is not None and type(value) is not str}
    if both:
        shown = min(both, key=str)
        raise InputError(
            f"{path}: '{name}' holds both the text {shown!r} and the number {shown}; write all "
            "rows one way."
        )
    return cells


def _cell(value: Any, name: str, row: int, path: Path, decimal: bool) -> Cell:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InputError(
                f"{path}: row {row} has half a character (a lone surrogate) in '{name}'; no "
                "encoding has it, so write the character whole."
            )
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        return str(float(value) + 0.0) if decimal and abs(value) < 2**53 else str(value)
    raise InputError(
        f"{path}: row {row} has {_kind(value)} in '{name}'; expected one text or number a row. "
        "Join words to one text; several labels of one row are not supported."
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")


def _table(path: Path, suffix: str | None, used: Collection[str] | None) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    columns: dict[str, list[Cell]] = {}
    try:
        table = _parquet(path) if suffix == ".parquet" else _arrow(path)
        _header(table.column_names, path)
        for name in table.column_names:
            read = used is None or name in used
            values = _values(table.column(name), name, path) if read else [None] * len(table)
            columns[name] = _cells(values, name, path)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable(path, str(error).strip().splitlines()[0]) from error
    return pd.DataFrame(columns, columns=pd.Index(table.column_names), dtype=object)


def _parquet(path: Path) -> pa.Table:
    import pyarrow.parquet

    # One file is meant: a name such as `split=a/part.parquet` adds no column.
    return pyarrow.parquet.ParquetFile(path).read()


def _arrow(path: Path) -> pa.Table:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()


def _values(column: pa.ChunkedArray, name: str, path: Path) -> list[Any]:
    """The values of a table's column as Python has them."""
    import numpy as np
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    short = {pa.float16(): np.float16, pa.float32(): np.float32}.get(kind)
    values: list[Any] = []
    for value in column.to_pylist():
        if isinstance(value, bytes):
            raise InputError(f"{path}: '{name}' holds bytes; expected texts or numbers.")
        if short is not None and value is not None:
            values.append(float(str(short(value))))  # 0.1, not 0.10000000149011612
        elif value is None or isinstance(value, str | bool | int | float | list | dict):
            values.append(value)
        else:
            values.append(str(value))  # dates and decimals
    return values


def _unreadable(path: Path, reason: str) -> InputError:
    kind = (suffix_of(path) or path.suffix)[1:]
    return InputError(f"{path} cannot be read as {kind}: {reason}.")
