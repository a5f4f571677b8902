"""Files of rows are read as they were written: every cell, every row, from every kind of file."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacontrol.experiments import tasks
from deltacontrol.experiments.tasks.reading import read_rows, suffix_of
from deltacontrol.theory.errors import InputError

WORDS = ["good", "bad", "so so"]


def texts(count: int = 60) -> list[str]:
    return [f"text number {i}" for i in range(count)]


def put(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def written(columns: dict[str, list[Any]], folder: Path, *, tabs: bool) -> list[Path]:
    """The same rows as every kind of file."""
    frame = pd.DataFrame(columns)
    rows = frame.to_dict(orient="records")
    paths = [folder / f"rows{s}" for s in (".csv", ".jsonl", ".json", ".parquet", ".arrow")]
    with paths[0].open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(frame.columns)
        writer.writerows(frame.itertuples(index=False))
    put(paths[1], lines(rows))
    put(paths[2], json.dumps(rows, ensure_ascii=False))
    frame.to_parquet(paths[3])
    with pa.OSFile(str(paths[4]), "wb") as sink:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    if tabs:
        paths.append(folder / "rows.tsv")
        put(paths[-1], "\n".join("\t".join(map(str, row)) for row in [columns, *frame.values]))
    return paths


# No surrogates: no encoding has them. A NUL is no text.
CELLS = st.one_of(
    st.sampled_from(["NA", "None", "null", "n/a", "01", "1", "1.10", "1.1", "18_19", '"', "a,b"]),
    st.sampled_from(
        ['"quoted"', 'a "b" c', "a\tb", "a\nb", "a\r\nb", "\u2028", "\ufeff", "é", "😀"]
    ),
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_rows_read_are_rows_written(rows: list[tuple[str, str]]) -> None:
    import tempfile

    plain = not any(mark in cell for row in rows for cell in row for mark in '\t\n\r"')
    first = rows[0][0][0] != "\ufeff"
    columns = {"text": [a for a, _ in rows], "label": [b for _, b in rows]}
    with tempfile.TemporaryDirectory() as folder:
        for path in written(columns, Path(folder), tabs=plain and first):
            found = read_rows(path)
            assert list(found) == ["text", "label"], path.name
            assert [tuple(row) for row in found.itertuples(index=False)] == rows, path.name


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.lists(st.sampled_from(["01", "1", "1.10", "1.1", "NA", "None"]), min_size=3, max_size=3),
        st.lists(st.integers(-3, 99), min_size=3, max_size=3),
        st.lists(st.floats(-9, 9, allow_nan=False, width=32), min_size=3, max_size=3),
        st.lists(st.booleans(), min_size=3, max_size=3),
    )
)
def test_the_same_rows_are_the_same_task(labels: list[Any]) -> None:
    import tempfile

    labels = [*labels, labels[0]] * 15
    found = set()
    with tempfile.TemporaryDirectory() as folder:
        for path in written({"text": texts(), "label": labels}, Path(folder), tabs=True):
            try:
                task = tasks.load(str(path))
            except InputError as error:
                assert len(set(map(str, labels))) == 1 and "every row has the label" in str(error)
                found.add("one class")
            else:
                rows = pd.concat([task.train, task.validation, task.test])
                found.add((task.kind, task.labels, tuple(rows["text"]), tuple(rows["label"])))
    assert len(found) == 1


@pytest.mark.parametrize("mark", ['"', '""', "'", '" ', 'a"'])
def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path, mark: str) -> None:
    kept = [mark + t if i in (3, 9, 20, 31) else t for i, t in enumerate(texts())]
    content = "text\tlabel\n" + "\n".join(f"{t}\t{i % 2}" for i, t in enumerate(kept))
    assert read_rows(Path(put(tmp_path / "a.tsv", content)))["text"].tolist() == kept
    task = tasks.load(str(tmp_path / "a.tsv"))
    assert len(task.train) + len(task.validation) + len(task.test) == 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\ngood,1\nlong, but worth it,1\n", "line 3 has 3 fields.*quotes"),
        ("a.csv", "text,label\ngood,1\nshort\n", "line 3 has 1 fields"),
        ("a.csv", 'text,label\n"open,1\nnext,0\n', "line 2: unexpected end"),
        ("a.csv", 'text,label\n"a" b,1\n', "line 2: ',' expected after"),
        ("a.csv", "text,label,label\na,1,2\n", "two columns are named 'label'"),
        ("a.tsv", "text\tlabel\na\tb\t1\n", "line 2 has 3 fields.*no tab"),
        ("a.tsv", 'text\tlabel\n"he ""said"" no"\t1\n', "line 2: a field is quoted"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1: two values are named 'text'"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]\n', "row 2 is a list"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: "),
        ("a.json", '{"text": {"0": "a"}}', "row 1 has an object in 'text'"),
        ("a.jsonl", '{"text": ["a", "film"], "label": 1}\n', "row 1 has a list in 'text'"),
        ("a.jsonl", '{"text": "a", "label": [1, 2]}\n', "row 1 has a list in 'label'"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n',
            "both the text '1'",
        ),
        ("a.csv.gz", b"\x1f\x8bnot gzip", "cannot be read as csv"),
        ("a.csv.gz", gzip.compress(b"text,label\n" * 99, mtime=0)[:20], "cannot be read as csv"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        tasks.load(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1.10", "1.1"], ("1.1", "1.10")),
        (["18_19", "01", "1"], ("01", "1", "18_19")),
        (["01", "02"], ("01", "02")),
        (["None", "NA", "null"], ("NA", "None", "null")),
        (["+1", "-1"], ("-1", "1")),
        (["1e1", "10"], ("10", "1e1")),
        (["nan", "inf"], ("inf", "nan")),
    ],
)
def test_names_stay_names(tmp_path: Path, suffix: str, labels: list[str], classes: tuple) -> None:
    rows = [{"text": t, "label": labels[i % len(labels)]} for i, t in enumerate(texts())]
    rows[5]["text"] = "n/a"
    if suffix == ".jsonl":
        path = put(tmp_path / "a.jsonl", lines(rows))
    else:
        pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
        path = str(tmp_path / "a.csv")
    task = tasks.load(path)
    assert (task.kind, task.labels) == ("classification", classes)
    parts = pd.concat([task.train, task.validation, task.test])
    assert len(parts) == 60 and "n/a" in set(parts["text"])
    assert f"{len(classes)} classes ({', '.join(classes)})" in task.reading


def test_numbers_are_numbers_and_it_is_said(tmp_path: Path) -> None:
    rows = [f"{t},{i / 8:.3f}" for i, t in enumerate(texts())]
    task = tasks.load(put(tmp_path / "a.csv", "text,label\n" + "\n".join(rows)))
    assert task.kind == "regression"
    assert "60 rows" in task.reading and "numbers from 0 to 7.375 (regression)" in task.reading
    sizes = [len(task.train), len(task.validation), len(task.test)]
    assert sum(sizes) == 60 and task.reading.endswith("/".join(map(str, sizes)))


def given_split(test: list[Any], train: list[Any] = WORDS) -> str:
    rows = [{"text": t, "split": "train", "label": train[i % len(train)]}
            for i, t in enumerate(texts(40))]  # fmt: skip
    rows += [{"text": f"other {i}", "split": "test", "label": v} for i, v in enumerate(test)]
    return lines(rows)


@pytest.mark.parametrize(
    ("test", "train", "message"),
    [
        ([-1] * 20, [0, 1], r"test split has the class '-1', which no row of train"),
        (["fine", "bad"] * 10, WORDS, "the class 'fine'"),
        (["?"] * 20, WORDS, r"the class '\?'"),
        (
            [-1.0] * 20,
            [0.25 * i for i in range(40)],
            "every row of the test split has the label -1",
        ),
    ],
)
def test_labels_that_are_withheld_are_refused(
    tmp_path: Path, test: list, train: list, message: str
) -> None:
    path = put(tmp_path / "a.jsonl", given_split(test, train))
    with pytest.raises(InputError, match=message):
        tasks.load(path)


@pytest.mark.parametrize("other", ["good ", " good", "so  so", "bad\t"])
def test_classes_that_differ_in_white_space_are_refused(tmp_path: Path, other: str) -> None:
    rows = [{"text": t, "label": [*WORDS, other][i % 4]} for i, t in enumerate(texts())]
    with pytest.raises(InputError, match="differ only in white space"):
        tasks.load(put(tmp_path / "a.jsonl", lines(rows)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1", "1.0", "2"], "'1' and '1.0' are one number"),
        ([1, "1", 2], "both the text '1' and the number 1"),
        (["pos", "pos\u200b", "neg"], "not seen"),
        (["\u00e9", "e\u0301", "o"], "not seen"),
    ],
)
def test_one_label_in_two_ways_is_refused(tmp_path: Path, labels: list, message: str) -> None:
    rows = [{"text": t, "label": labels[i % 3]} for i, t in enumerate(texts())]
    with pytest.raises(InputError, match=message):
        tasks.load(put(tmp_path / "a.jsonl", lines(rows)))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["9007199254740993", "5"], ("5", "9007199254740993")),
        (["1e5", "2e3"], ("1e5", "2e3")),
        (["\u0663", "\u0664"], ("\u0663", "\u0664")),
        ([1, 1.0, 0], ("0", "1")),
        ([0.0, -0.0, 1], ("0", "1")),
    ],
)
def test_numbers_keep_their_value(tmp_path: Path, labels: list, classes: tuple) -> None:
    rows = [{"text": t, "label": labels[i % len(labels)]} for i, t in enumerate(texts())]
    assert tasks.load(put(tmp_path / "a.jsonl", lines(rows))).labels == classes


def test_columns_that_are_not_read_may_hold_anything(tmp_path: Path) -> None:
    rows = [
        {"text": t, "label": WORDS[i % 3], "meta": {"a": [1]}, "id": "1" if i else 1}
        for i, t in enumerate(texts())
    ]
    assert len(tasks.load(put(tmp_path / "a.jsonl", lines(rows))).labels) == 3
    frame = pd.DataFrame(rows).drop(columns=["id"]).assign(image=b"x")
    frame.to_parquet(tmp_path / "a.parquet")
    assert len(tasks.load(str(tmp_path / "a.parquet")).labels) == 3
    with pytest.raises(InputError, match="row 1 has an object in 'meta'"):
        tasks.load(str(tmp_path / "a.jsonl"), text_column="meta")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, suffix: str) -> None:
    content = "text,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(texts(400)))
    packed = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    spoilt = bytearray(packed(content.encode()))
    spoilt[len(spoilt) // 2 : len(spoilt) // 2 + 8] = b"\xff" * 8
    for wrong in (bytes(spoilt), b"plain text"):
        with pytest.raises(InputError, match="cannot be read as csv"):
            tasks.load(put(tmp_path / f"a.csv{suffix}", wrong))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label,Split\na,1,train\n", "the column 'Split' is not read"),
        ("text,label,Text_Pair\na,1,b\n", "the column 'Text_Pair' is not read"),
        ("text,label\na,1\ntext,label\nb,2\n", "line 3 repeats the names"),
        (
            "text,label,split\na,1,test\nb,2,test\nc,1,test\nd,2,test\n",
            "the train split is empty: no row",
        ),
    ],
)
def test_columns_and_headers(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tasks.load(put(tmp_path / "a.csv", content))


def test_classes_that_case_tells_apart_are_said(tmp_path: Path) -> None:
    rows = [{"text": t, "label": ["Pos", "pos", "neg"][i % 3]} for i, t in enumerate(texts())]
    with pytest.warns(UserWarning, match="'Pos' and 'pos', which only case tells apart"):
        tasks.load(put(tmp_path / "a.jsonl", lines(rows)))


@pytest.mark.parametrize("content", ['{"text": "\\ud83d", "label": 1}', "[" * 100_000])
def test_texts_that_are_none(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="half a character|cannot be read as jsonl"):
        tasks.load(put(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("classes", [3, 20])
def test_a_head_of_a_given_split_is_fair(tmp_path: Path, classes: int) -> None:
    count = 40 * classes
    rows = [
        {"text": f"{part} {i}", "split": part, "label": f"c{i * classes // count:02d}"}
        for part in ("train", "validation", "test")
        for i in range(count)
    ]
    task = tasks.load(put(tmp_path / "a.jsonl", lines(rows)))
    for part in (task.train, task.validation, task.test):
        head = part["label"].head(5 * classes).value_counts()
        assert len(head) == classes and head.min() >= 4 and head.max() <= 6


@pytest.mark.parametrize(
    ("suffix", "packed"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".tsv"])
def test_a_compressed_file_is_the_file(tmp_path: Path, suffix: str, packed, kind: str) -> None:
    rows = [{"text": t, "label": WORDS[i % 3]} for i, t in enumerate(texts())]
    between = "," if kind == ".csv" else "\t"
    content = "\n".join(
        [between.join(("text", "label"))] + [between.join(r.values()) for r in rows]
    )
    content = lines(rows) if kind == ".jsonl" else content
    plain = tasks.load(put(tmp_path / f"a{kind}", content))
    other = tasks.load(put(tmp_path / f"a{kind}{suffix}", packed(content.encode())))
    assert other.name == "a" and other.labels == plain.labels
    pd.testing.assert_frame_equal(plain.train, other.train)


def test_plain_text_is_for_language_models(tmp_path: Path) -> None:
    path = put(tmp_path / "book.txt", "\n\n".join(texts(30)) + "\n")
    task = tasks.load(path)
    assert task.kind == "causal-lm" and "30 rows" in task.reading
    assert set(task.train["text"]) <= set(texts(30))
    with pytest.raises(InputError, match="plain text, which has no labels"):
        tasks.load(path, kind="classification")


def test_a_second_text_stays_beside_the_first(tmp_path: Path) -> None:
    rows = [{"text": f"premise {i // 2}", "text_pair": f"hypothesis {i % 2}", "label": i % 2}
            for i in range(60)]  # fmt: skip
    task = tasks.load(put(tmp_path / "a.jsonl", lines(rows)))
    assert list(task.train) == ["text", "text_pair", "label"]
    assert "second text: 'text_pair'" in task.reading
    whole = pd.concat([task.train, task.validation, task.test])
    expected = {(r["text"], r["text_pair"], r["label"]) for r in rows}
    assert set(whole.itertuples(index=False, name=None)) == expected
    with pytest.raises(InputError, match="reads one text a row"):
        tasks.load(str(tmp_path / "a.jsonl"), kind="causal-lm")
    rows[7]["text_pair"] = None  # as an empty field of a .csv file
    task = tasks.load(put(tmp_path / "b.jsonl", lines(rows)))
    whole = pd.concat([task.train, task.validation, task.test])
    assert (whole["text_pair"] == "").sum() == 1


def test_what_a_table_may_hold(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "text": pd.Series(texts(), dtype="category"),
            "label": np.linspace(0, 1, 60, dtype=np.float32),
            "day": pd.Timestamp("2024-01-02"),
        }
    )
    frame.to_parquet(tmp_path / "a.parquet")
    found = read_rows(tmp_path / "a.parquet")
    assert found["text"].tolist() == texts() and found["label"][59] == "1.0"
    assert found["label"][1] == str(np.float32(1 / 59))
    frame.assign(text=[b"x"] * 60).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="'text' holds bytes"):
        read_rows(tmp_path / "b.parquet")
    frame.assign(text=[["x", "y"]] * 60).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(InputError, match="row 1 has a list in 'text'"):
        read_rows(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.csv", ".csv"), ("A.CSV.GZ", ".csv"), ("b.jsonl.xz", ".jsonl"), ("d.gz", None),
        ("c.parquet", ".parquet"), ("c.parquet.gz", None), ("movie", None), ("e.xlsx", None),
    ],
)  # fmt: skip
def test_the_name_says_the_kind(name: str, suffix: str | None) -> None:
    assert suffix_of(name) == suffix
