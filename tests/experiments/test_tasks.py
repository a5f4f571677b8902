"""The packaged tasks as they are documented, splits, and the user's own files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deltacontrol.experiments import tasks
from deltacontrol.experiments.tasks import corpus, splits
from deltacontrol.experiments.tasks.base import Task
from deltacontrol.theory.errors import InputError

# Train (validation included) and test rows, classes, share of the largest class in the whole.
# Splits are stratified, so the test split has that share too, up to whole documents.
DOCUMENTED = {
    "movie": (8455, 2113, 2, 0.504),
    "rt": (10199, 2553, 2, 0.578),
    "nyt": (2813, 708, 2, 0.591),
    "amazon": (2492, 640, 2, 0.588),
    "trec6": (4306, 1076, 6, 0.231),
    "trec50": (4306, 1076, 50, 0.178),
    "sms": (3618, 904, 2, 0.875),
    "tweets": (2949, 738, 2, 0.6865),
    "bbc": (1699, 425, 5, 0.2368),
    "r8": (5419, 2176, 8, 0.5155),
    "r52": (6444, 2553, 52, 0.4351),
    "20ng": (11266, 7521, 20, 0.0532),
}
OFFICIAL = ("r8", "r52", "20ng")  # whose splits differ in the shares of classes, as published


def packaged(name: str) -> Task:
    try:
        return tasks.load(name)
    except InputError as error:
        pytest.skip(f"{name} cannot be had here: {error}")


def parts(task: Task) -> list[pd.DataFrame]:
    return [task.train, task.validation, task.test]


def test_every_documented_task_is_found() -> None:
    assert set(tasks.available()) >= set(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_packaged_task_is_as_documented(name: str) -> None:
    task = packaged(name)
    train_rows, test_rows, classes, majority = DOCUMENTED[name]
    assert len(task.train) + len(task.validation) == train_rows
    assert len(task.test) == test_rows
    assert len(task.labels) == classes
    labels = pd.concat(parts(task))["label"]
    assert labels.value_counts(normalize=True).max() == pytest.approx(majority, abs=5e-4)


@pytest.mark.parametrize("name", tasks.available())
def test_a_packaged_task_is_as_its_file_says(name: str) -> None:
    task, stated = packaged(name), tasks.available()[name]
    assert len(task.test) == stated.test_rows and task.labels == stated.labels
    train_rows, classes = len(task.train) + len(task.validation), len(stated.labels)
    tenth = min(1000, 0.1 * train_rows)
    assert 0.9 * tenth < len(task.validation) <= tenth
    assert task.digest == tasks.digest(name)
    for part in parts(task):
        columns = {"text"} if stated.kind == "causal-lm" else {"text", "label"}
        assert set(part) == columns and (part["text"].str.strip() != "").all()
    if stated.kind != "classification":
        assert stated.kind == "causal-lm" or task.test["label"].dtype == np.float64
        return
    labels = pd.concat(parts(task))["label"]
    majority = labels.value_counts(normalize=True).max()
    whole_documents = 0.02 if name in ("rt", "nyt", "amazon", *OFFICIAL) else 0.002
    assert task.test["label"].value_counts(normalize=True).max() == pytest.approx(
        majority, abs=whole_documents
    )
    assert all(part["label"].dtype == np.int64 for part in parts(task))
    assert set(task.train["label"]) == set(range(classes))


@pytest.mark.parametrize("name", tasks.available())
def test_no_text_is_in_two_splits(name: str) -> None:
    train, validation, test = (set(splits.normalised(p["text"])) for p in parts(packaged(name)))
    assert not train & validation and not train & test and not validation & test


def test_intensity_rates_the_snippets_of_movie() -> None:
    """Twice the sign of the rating is the class, and every snippet of movie has a rating."""
    rated, signed = (pd.concat(parts(packaged(name))) for name in ("intensity", "movie"))
    rating = rated.drop_duplicates("text").set_index("text")["label"]
    assert rating.between(-4, 4).all() and 0.5 < rating.std() < 3
    both = signed.drop_duplicates("text").set_index("text")["label"]
    assert len(both.index.intersection(rating.index)) == len(both)
    assert ((rating[both.index] > 0) == (both == 1)).all()


def test_official_test_rows_stay_test_rows() -> None:
    """The eight topics are among the fifty-two, on the same side of the split."""
    few, many = packaged("r8"), packaged("r52")
    assert set(few.labels) <= set(many.labels)
    train, test = (
        set(splits.normalised(getattr(many, name)["text"])) for name in ("train", "test")
    )
    assert not set(splits.normalised(few.train["text"])) & test
    assert not set(splits.normalised(few.test["text"])) & train


def test_the_two_trec_tasks_share_their_questions() -> None:
    coarse, fine = packaged("trec6"), packaged("trec50")
    names = [label.split(":")[0] for label in fine.labels]
    both = pd.concat(parts(fine)).assign(name=lambda f: f["label"].map(dict(enumerate(names))))
    other = pd.concat(parts(coarse)).assign(
        name=lambda f: f["label"].map(dict(enumerate(coarse.labels)))
    )
    columns = ["text", "name"]
    assert sorted(map(tuple, both[columns].values)) == sorted(map(tuple, other[columns].values))


@pytest.mark.slow
def test_no_task_is_tested_on_text_that_the_family_is_pre_trained_on() -> None:
    """A task whose rows are found here has to be added to `corpus.TASKS`, in a new recipe."""
    try:
        text = corpus.text()
    except InputError as error:
        pytest.skip(f"the text cannot be had here: {error}")
    joined = "\n".join(corpus.key(document) for document in (*text.training, *text.held_out))
    for name in tasks.available():
        task = tasks.load(name)
        rows = {corpus.key(r) for part in (task.validation, task.test) for r in part["text"]}
        long = sorted(row for row in rows if len(row) >= corpus.SHORT)
        leaks = [row for row in long[:: max(1, len(long) // 300)] if row in joined]
        assert long and not leaks, (name, len(leaks), leaks[:2])


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest: movie"):
        tasks.load("moive")
    with pytest.raises(InputError, match="nearest: movie"):
        tasks.digest("moive")


def test_a_packaged_task_has_its_kind() -> None:
    with pytest.raises(InputError, match="movie is a classification task, not regression"):
        tasks.load("movie", kind="regression")


def test_listing_and_digests_need_neither_torch_nor_pandas() -> None:
    code = (
        "import sys; from deltacontrol.experiments import models, tasks\n"
        "print(tasks.digest('movie'), models.digest('minilm-l6'))\n"
        "sys.exit(', '.join({'torch', 'transformers', 'pandas'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root / "src", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- splits


def rows(count: int = 400) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "text": [f"text number {i}" for i in range(count)],
            "label": generator.choice(3, count, p=[0.7, 0.25, 0.05]),
        }
    )


def test_a_split_is_exact_stratified_and_repeatable() -> None:
    frame = rows()
    done = splits.split(frame, test_rows=80)
    pd.testing.assert_frame_equal(done, splits.split(frame, test_rows=80))
    counts = done["split"].value_counts()
    assert counts.to_dict() == {"train": 288, "validation": 32, "test": 80}
    shares = frame["label"].value_counts(normalize=True)
    for name in splits.SPLITS:
        labels = done.loc[done["split"] == name, "label"]
        for size in (len(labels), len(labels) // 2):
            head = labels.head(size).value_counts().reindex(shares.index, fill_value=0)
            assert (np.abs(head - shares * size) <= 2).all()
    assert sorted(done["text"]) == sorted(frame["text"])


def test_groups_and_equal_texts_stay_together() -> None:
    frame = rows().assign(group=np.arange(400) // 7)
    # The same text, up to case and spaces, ties the groups 0 and 10 together.
    frame.loc[0, "text"], frame.loc[70, "text"] = "The same  text", "the SAME text "
    group = frame["group"].replace(10, 0).to_numpy()
    done = splits.split(frame, test_rows=80).merge(
        frame.assign(tied=group)[["text", "tied"]], on="text"
    )
    assert (done.groupby("tied")["split"].nunique() == 1).all()
    assert "group" not in done


def test_a_rare_class_stays_in_training() -> None:
    frame = rows(100).assign(label=["rare"] + ["common"] * 99)
    done = splits.split(frame)
    assert done.loc[done["label"] == "rare", "split"].tolist() == ["train"]


def test_real_valued_labels_are_stratified_by_quantile() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    done = splits.split(rows(1000).assign(label=values), test_rows=200)
    test = done.loc[done["split"] == "test", "label"]
    assert (
        np.abs(np.quantile(test, [0.1, 0.5, 0.9]) - np.quantile(values, [0.1, 0.5, 0.9])).max()
        < 0.1
    )


# ---- files


def reviews(count: int = 60) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": [f"review {i}, with a comma" for i in range(count)],
            "label": ["good", "bad", "good"] * (count // 3),
        }
    )


def write(frame: pd.DataFrame, path: Path) -> str:
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".json": lambda: frame.to_json(path, orient="records"),
        ".parquet": lambda: frame.to_parquet(path),
    }
    writers[path.suffix]()
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_each_format_gives_the_same_task(suffix: str, tmp_path: Path) -> None:
    name = write(reviews(), tmp_path / f"mine{suffix}")
    task = tasks.load(name)
    reference = tasks.load(write(reviews(), tmp_path / "reference.csv"))
    assert (task.name, task.kind, task.labels) == ("mine", "classification", ("bad", "good"))
    assert [len(p) for p in parts(task)] == [49, 5, 6]
    for part, other in zip(parts(task), parts(reference), strict=True):
        pd.testing.assert_frame_equal(part, other, check_dtype=False)
    assert task.digest == tasks.digest(name)


def test_the_digest_follows_content_columns_and_kind(tmp_path: Path) -> None:
    frame = reviews().assign(other=range(60), stars=[1, 2, 3] * 20)
    name = write(frame, tmp_path / "mine.csv")
    different = {
        tasks.digest(name),
        tasks.digest(name, label_column="stars"),
        tasks.digest(name, label_column="stars", kind="regression"),
        tasks.digest(write(frame.iloc[1:], tmp_path / "less.csv")),
    }
    assert len(different) == 4
    assert tasks.digest(name) == tasks.digest(write(frame, tmp_path / "renamed.csv"))


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([0, 1, 1] * 20, "classification", ("0", "1")),
        ([10, 9, 2] * 20, "classification", ("2", "9", "10")),
        ([True, False, True] * 20, "classification", ("False", "True")),
        ([1.0, 0.0, 1.0] * 20, "classification", ("0", "1")),
        ([0.5, 1.5, 2.5] * 20, "regression", ()),
        (list(range(60)), "regression", ()),
    ],
)
def test_the_kind_is_inferred(labels: list, kind: str, names: tuple, tmp_path: Path) -> None:
    task = tasks.load(write(reviews().assign(label=labels), tmp_path / "mine.parquet"))
    assert (task.kind, task.labels) == (kind, names)
    dtype = np.float64 if kind == "regression" else np.int64
    assert all(part["label"].dtype == dtype for part in parts(task))


def test_a_language_model_needs_only_text(tmp_path: Path) -> None:
    name = write(reviews()[["text"]].rename(columns={"text": "line"}), tmp_path / "mine.jsonl")
    task = tasks.load(name, text_column="line", kind="causal-lm")
    assert task.kind == "causal-lm" and task.labels == ()
    assert all(list(part) == ["text"] for part in parts(task))


def test_a_split_column_is_obeyed(tmp_path: Path) -> None:
    frame = reviews().assign(split=["Train"] * 40 + ["test"] * 20)
    task = tasks.load(write(frame, tmp_path / "mine.csv"))
    assert [len(p) for p in parts(task)] == [36, 4, 20]
    assert set(task.test["text"]) == set(frame["text"][40:])
    frame.loc[:9, "split"] = "validation"
    task = tasks.load(write(frame, tmp_path / "all.csv"))
    assert set(task.validation["text"]) == set(frame["text"][:10])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda f: f.rename(columns={"label": "lable"}),
            {},
            r"'label'; nearest: lable.*label_column",
        ),
        (lambda f: f, {"text_column": "review"}, "known: label, text.*text_column"),
        (lambda f: f.iloc[:0], {}, "has no rows"),
        (lambda f: f.assign(label="good"), {}, "every row has the label 'good'"),
        (lambda f: f.assign(label=[None] * 3 + ["a", "b", "c"] * 19), {}, "3 of 60 rows .*row 1"),
        (lambda f: f.assign(text=["a"] * 58 + ["", " "]), {}, "2 of 60 rows have no text"),
        (lambda f: f.assign(label=[f"id{i}" for i in range(60)]), {}, "60 different labels"),
        (lambda f: f, {"kind": "regression"}, "60 rows of 'label' are not finite"),
        (lambda f: f, {"kind": "ranking"}, "unknown kind of task 'ranking'"),
        (lambda f: f.head(9), {}, "split empty"),
        (lambda f: f.assign(split="dev"), {}, "'split' holds dev"),
        (lambda f: f.assign(split="train"), {}, "test split is empty"),
    ],
)
def test_a_file_that_is_wrong_is_explained(
    change, options: dict, message: str, tmp_path: Path
) -> None:
    name = write(change(reviews()), tmp_path / "mine.csv")
    with pytest.raises(InputError, match=message):
        tasks.load(name, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.parquet", b"not parquet", "cannot be read as parquet"),
        ("mine.jsonl", b'{"text": "a"\n', "cannot be read as jsonl"),
        ("mine.csv", b"\xff\xfe\x00text", "cannot be read as csv"),
        ("mine.csv", b'text,label\na,b,c,d\ne\n"', "cannot be read as csv"),
        ("mine.csv", b"", "has no rows"),
        ("data/mine.xlsx", b"", "the kind of file is not known"),
    ],
)
def test_a_damaged_file_is_explained(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        tasks.load(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for read in (tasks.load, tasks.digest):
        with pytest.raises(InputError, match="there is no file"):
            read(str(tmp_path / "absent.csv"))
        with pytest.raises(InputError, match="is a folder"):
            read(str(tmp_path))


def test_lines_of_json_keep_unicode(tmp_path: Path) -> None:
    lines = [{"text": f"naïve – {i}", "label": i % 2} for i in range(40)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    assert tasks.load(str(path)).train["text"].str.startswith("naïve – ").all()


def test_a_task_shows_name_kind_rows_and_classes() -> None:
    frame = pd.DataFrame({"text": ["a"], "label": [0]})
    many = pd.concat([frame] * 1200, ignore_index=True)
    task = Task("movie", "classification", ("no", "yes"), many, frame, frame, "", "")
    shown = (
        "Task(movie: classification, 2 classes (no, yes); rows: train 1,200, validation 1, test 1)"
    )
    assert repr(task) == shown
    html = replace(task, name="a<b")._repr_html_()
    assert "a&lt;b" in html and "1,200 rows" in html and "2 classes (no, yes)" in html
    plain = Task("talk", "causal-lm", (), frame, frame, frame, "", "")
    assert repr(plain) == "Task(talk: causal-lm; rows: train 1, validation 1, test 1)"
    letters = replace(task, labels=tuple("abcdefgh"))
    assert "8 classes (a, b, c, d, e, f, …)" in repr(letters)
