"""Rows that make scores less than they seem are counted and said; options that are ignored are not.

Each case was once accepted in silence.
"""

from pathlib import Path

import pandas as pd
import pytest

from deltacontrol.experiments import tasks
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def rows() -> pd.DataFrame:
    texts = [f"{a} {b}" for a in WORDS for b in WORDS[:6]]
    return pd.DataFrame({"text": texts, "label": ["a", "b"] * 30})


def reading(frame: pd.DataFrame, folder: Path) -> str:
    frame.to_csv(folder / "rows.csv", index=False)
    return tasks.load(str(folder / "rows.csv")).reading


def test_clean_rows_raise_no_doubt(tmp_path: Path) -> None:
    told = reading(rows(), tmp_path)
    assert "several labels" not in told and "in training too" not in told


def test_equal_texts_with_several_labels_are_counted(tmp_path: Path) -> None:
    frame = rows()
    # Case and white space make no other text; the third repeats its label and contradicts nothing.
    more = pd.DataFrame({"text": ["ONE  one", "one two", "one three"], "label": ["b", "a", "a"]})
    told = reading(pd.concat([frame, more]), tmp_path)
    assert "2 equal texts have several labels (4 rows)" in told


def test_test_rows_that_training_has_are_counted(tmp_path: Path) -> None:
    frame = rows().assign(split=["train"] * 40 + ["test"] * 20)
    frame.loc[[57, 58], "text"] = frame.loc[[1, 2], "text"].to_numpy()
    frame.loc[[57, 58], "label"] = frame.loc[[1, 2], "label"].to_numpy()
    assert "2 of 20 test rows are in training too" in reading(frame, tmp_path)


def test_a_column_cannot_be_text_and_label(tmp_path: Path) -> None:
    rows().to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(InputError, match="both 'label'.*name two columns"):
        tasks.load(str(tmp_path / "rows.csv"), text_column="label")
    language = tasks.load(str(tmp_path / "rows.csv"), label_column="text", kind="causal-lm")
    assert language.kind == "causal-lm"


def test_columns_do_not_go_with_a_packaged_task() -> None:
    for load in (tasks.load, tasks.digest):
        with pytest.raises(InputError, match="packaged task.*leave them out"):
            load("movie", text_column="review")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["inspect", "--delta", "lora", "--delta", "bitfit"], "--delta is given twice"),
        (["runs", "--where", "task=a", "--where=seed=1"], "--where is given twice"),
        (["inspect", "--kind", "regression", "--num-labels", "3"], "--kind classification"),
        (["inspect", "--depth", "0"], "depth is 0"),
        (["tasks", "--text-column", "review"], "--show FILE"),
        (["runs", "--runs", __file__], "is a file"),
        (["runs", "--show", "abc", "--export", "x.csv"], "--export goes with the list"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._main(argv) == 2
    assert expected in capsys.readouterr().err


def test_a_batch_size_is_needed() -> None:
    with pytest.raises(InputError, match="batch_size is None"):
        FineTuning(batch_size=None)  # type: ignore[arg-type]
    assert FineTuning(max_grad_norm=None).max_grad_norm is None
    for name in ("warmup", "weight_decay"):
        with pytest.raises(InputError, match=f"{name} is None; expected a finite number >= 0"):
            FineTuning(**{name: None})  # type: ignore[arg-type]


def test_the_shares_of_the_split_stand_beside_it(tmp_path: Path) -> None:
    frame = pd.concat([rows(), pd.DataFrame({"text": ["one one"], "label": ["b"]})])
    assert ", stratified 50/5/6; 1 equal texts" in reading(frame, tmp_path)


@pytest.mark.parametrize("swallowed", [1, 2, 7])
@pytest.mark.parametrize("order", ["text,label", "label,text"])
def test_a_quote_that_is_not_closed_swallows_no_rows(
    tmp_path: Path, order: str, swallowed: int
) -> None:
    lines = [f"{text},{label}" for text, label in rows().itertuples(index=False)]
    lines[3] = '"' + lines[3]
    lines[3 + swallowed] = lines[3 + swallowed].replace(",", '",')
    if order == "label,text":
        lines = [",".join(line.split(",")[::-1]) for line in [f"{x},{y}" for x, y in rows().values]]
        lines[3] = lines[3].replace(",", ',"')
        lines[3 + swallowed] += '"'
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([order, *lines]) + "\n")
    with pytest.raises(InputError, match="a quote before it is not closed") as caught:
        tasks.load(str(path))
    assert "write the file as .jsonl" in str(caught.value)


@pytest.mark.parametrize("place", ["first", "last", "text_pair", "without labels"])
def test_no_column_swallows_rows(tmp_path: Path, place: str) -> None:
    """Whichever column the quote is opened in, the rows behind it are not lost in silence."""

    def cell(number: int, plain: str) -> str:
        return f'"{plain}' if number == 3 else f'{plain}"' if number == 9 else plain

    header, line = {
        "first": ("title,text,label", "{own},{text},{label}"),
        "last": ("text,label,comment", "{text},{label},{own}"),
        "text_pair": ("label,text,text_pair", "{label},{text},{own}"),
        "without labels": ("id,text", "{number},{own}"),
    }[place]
    lines = [
        line.format(number=i, own=cell(i, f"title {i}"), text=text, label=label)
        for i, (text, label) in enumerate(rows().itertuples(index=False))
    ]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    with pytest.raises(InputError, match="a quote before it is not closed"):
        tasks.load(str(path), kind="causal-lm" if place == "without labels" else None)


@pytest.mark.parametrize("withheld", ["a", "b"])
def test_a_test_split_of_one_class_is_said(tmp_path: Path, withheld: str) -> None:
    frame = rows().assign(split=["train"] * 40 + ["validation"] * 8 + ["test"] * 12)
    frame.loc[frame["split"] == "test", "label"] = withheld
    with pytest.warns(
        UserWarning, match=f"all 12 rows of the test split have the label '{withheld}'"
    ):
        reading(frame, tmp_path)


@pytest.mark.parametrize(
    ("header", "cell"),
    [
        ("label,text", '"Will you come?\nno, I will not\nsee you"'),
        ("text,label", '"I rate as follows:\nfood,5\nservice,4"'),
        ("text,label", '"log\nerror code,17\nend"'),
        ("text,label", '"she said\nyes,no"'),
        ("id,text", '"Sherlock Holmes\n221, Baker Street\nLondon"'),
        ("id,text", '"[\n1, 2\n]"'),
    ],
)
def test_cells_of_several_lines_that_look_like_rows_are_read(tmp_path, header, cell) -> None:
    labels, first = ("yes", "no"), header.split(",")[0]
    lines = []
    for i, (text, _) in enumerate(rows().itertuples(index=False)):
        shown = cell if i == 4 else text
        other = str(i) if "id" in header else labels[i % 2]
        lines.append(f"{shown},{other}" if first == "text" else f"{other},{shown}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    task = tasks.load(str(path), kind="causal-lm" if "id" in header else None)
    assert "60 rows" in task.reading


def test_texts_of_several_lines_are_read(tmp_path: Path) -> None:
    frame = rows()
    frame.loc[4, "text"] = 'Dear all,\nI liked it, a lot\n"really", b\nbye'
    told = reading(frame, tmp_path)
    assert "60 rows" in told and "1 texts of several lines" in told
    assert frame.loc[4, "text"] in set(tasks.load(str(tmp_path / "rows.csv")).train["text"]) | set(
        tasks.load(str(tmp_path / "rows.csv")).test["text"]
    ) | set(tasks.load(str(tmp_path / "rows.csv")).validation["text"])


def test_a_count_is_none_only_where_its_annotation_says_so() -> None:
    assert FineTuning(train_limit=None).train_limit is None
    with pytest.raises(InputError, match="batch_size is None; expected a whole number"):
        FineTuning(batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="start is None; expected a whole number"):
        FineTuningDimension(start=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [["runs"], ["claims", "list"]])
def test_a_file_is_no_folder_of_runs(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs"
    path.write_text("")
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--runs", str(path)])
    assert "is a file; --runs takes a folder" in capsys.readouterr().err
