"""The text of the pre-training: no row that a task is tested on, nothing twice, the same always."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deltacontrol.experiments import tasks
from deltacontrol.experiments.tasks import corpus
from deltacontrol.experiments.training.pretraining import tokens
from deltacontrol.theory.errors import InputError
from tests.experiments import tiny_text


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTACONTROL_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("CORPORA", "TASKS", "HELD_OUT_SHARE"):
            patch.setattr(corpus, name, getattr(corpus, name))
        patch.setattr(tasks, "_packaged_tasks", lambda: {"small": tiny_text.TASK})
        tiny_text.install()
        yield


@pytest.fixture(scope="module")
def text() -> corpus.Text:
    return corpus.text()


def rows_of_the_task() -> list[str]:
    task = tasks.load("small")
    return [*task.validation["text"], *task.test["text"]]


def test_documents_with_tested_rows_are_left_out(text: corpus.Text) -> None:
    """Against a search for every row in every document, letter by letter."""
    joined = [corpus.key(d) for d in (*text.training, *text.held_out)]
    rows = [corpus.key(row) for row in rows_of_the_task()]
    assert rows and not any(row in document for row in rows for document in joined)
    assert text.counts["tiny"]["with_tested_rows"] == tiny_text.NUM_LEAKS
    kept = len(text.training) + len(text.held_out)
    assert kept == tiny_text.NUM_DOCUMENTS - tiny_text.NUM_LEAKS


def test_what_a_corpus_holds_out_is_left_out(
    text: corpus.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    (only,) = corpus.CORPORA
    document = next(d for d in text.training if len(corpus.key(d)) >= corpus.SHORT)
    holds = replace(only, held_out=lambda contents: [document.upper()])
    monkeypatch.setattr(corpus, "CORPORA", (holds,))
    assert corpus.text().counts["tiny"]["with_tested_rows"] == tiny_text.NUM_LEAKS + 1


def test_held_out_text_is_not_in_training(text: corpus.Text) -> None:
    training, held_out = ({corpus.key(d) for d in part} for part in (text.training, text.held_out))
    assert training and held_out and not training & held_out
    assert len(training) == len(text.training)
    share = len(held_out) / (len(held_out) + len(training))
    assert share == pytest.approx(1 / corpus.HELD_OUT_SHARE, abs=0.05)
    assert text == corpus.text()


def test_the_text_changes_with_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = corpus.digest()
    monkeypatch.setattr(corpus, "TASKS", ())
    assert corpus.digest() != before


@pytest.mark.parametrize(
    ("document", "there"),
    [
        ("So: A rather long row; of a TASK, it is!", True),
        ("a rather long row of a task it is", True),
        ("a rather long row of a task, it was", False),
        ("he said\nwell, now.\nand left", True),  # a short row that is a whole line
        ("he said well now and left", False),
        ("Well -- now", True),
    ],
)
def test_a_row_is_found_in_a_document(document: str, there: bool) -> None:
    rows = corpus.Rows(["a rather long row of a task it is", "well now", "..."])
    assert rows.within(document) == there


# ---- tokens


def test_the_tokenizer_is_a_function_of_the_text(text: corpus.Text) -> None:
    one, two = (tokens.train_tokenizer(text.training) for _ in range(2))
    assert one.to_str() == two.to_str()
    assert one.to_str() != tokens.train_tokenizer(text.training[:20]).to_str()
    odd = "The FILM: naïve, ☃ 42!"
    assert one.decode(one.encode(odd).ids).strip() == odd.lower()


def test_rows_are_the_documents_in_order(text: corpus.Text) -> None:
    inner = tokens.train_tokenizer(text.training)
    rows = tokens.packed(inner, text.training)
    stream = [t for document in text.training for t in (*inner.encode(document).ids, tokens.SEP)]
    assert rows.shape[1] == tokens.BODY and rows.size > len(stream) - tokens.BODY
    np.testing.assert_array_equal(rows.ravel(), stream[: rows.size])
    kept = tokens.tokens()
    np.testing.assert_array_equal(kept.rows["training"], rows)
    assert kept.counts["rows"]["held_out"] == len(kept.rows["held_out"]) > 0


def test_too_little_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = corpus.Text(("a film",), ("a story",), {})
    monkeypatch.setattr(corpus, "text", lambda: short)
    with pytest.raises(InputError, match="too few training documents"):
        tokens._build(tmp_path)
