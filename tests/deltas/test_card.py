"""The card beside deltas that no record tells of: what is known, escaped, in the hub's form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from deltacontrol.deltas import BitFit, LoRA, attach, card
from deltacontrol.theory.markdown import code, escape, fenced, rows_table

ODD = (
    "<b>bold</b>", "a|b", "`x` ``y``", "# no heading", "*a* _b_ [c](d)", "$x$", "~~~\n---", "\\|"
)  # fmt: skip
MARKDOWN = MarkdownIt("commonmark").enable("table")


def shown(text: str) -> list[str]:
    """The words that a reader sees, one of each block; fails where there is HTML or emphasis."""
    found = []
    for token in MARKDOWN.parse(text):
        for child in token.children or []:
            assert child.type in ("text", "code_inline", "text_special"), (child.type, text)
        if token.type == "inline":
            found.append("".join(child.content for child in token.children or []))
    return found


@pytest.mark.parametrize("text", ODD)
def test_markdown_shows_any_text_as_it_is(text: str) -> None:
    line = " ".join(text.split())
    assert shown(card.words(text)) == [line]
    assert shown(f"x {code(text)}") == [f"x {line}"]
    (block,) = (token for token in MARKDOWN.parse(fenced(text)) if token.type == "fence")
    assert block.content == f"{text.rstrip()}\n"
    assert shown(rows_table(("a", "b"), [(card.words(text), "2")])) == ["a", "b", line, "2"]
    assert escape("plain words") == "plain words"


def test_a_card_says_what_is_known_and_no_more(build: Any) -> None:
    tuned = attach(copy.deepcopy(build("bert")), LoRA(rank=2), BitFit())
    tuned.model.name_or_path = "google/bert_uncased"
    text = tuned.card("me/mine").text
    read = ModelCard(text)
    assert read.data.to_dict() == {
        "library_name": "deltacontrol",
        "tags": ["deltacontrol", "lora", "bitfit"],
        "base_model": "google/bert_uncased",
        "base_model_relation": "adapter",
    }
    for delta in tuned.deltas:
        assert code(delta.law) in text and card.words(delta.reference) in text
    assert f"{tuned.num_trainable:,d} trainable" in text and f"{tuned.num_total:,d}" in text
    assert 'tuned = dc.load(base, "me/mine")' in text
    assert "Scores" not in text and "license" not in text
    tuned.model.name_or_path = "C:\\Users\\someone\\my-bert"
    text = tuned.card("folder").text
    assert "my-bert" in text and "someone" not in text and ModelCard(text).data.base_model is None


def test_a_card_that_was_edited_is_told_from_one_that_was_not() -> None:
    text = card.Card(
        "A *title*", "Words.", {"One": "1", "Empty": ""}, card.head(["lora"], None)
    ).text
    assert card.is_own(text) and "## One" in text and "Empty" not in text
    assert r"# A \*title\*" in text
    for other in (text.replace("Words", "Other words"), text + "more\n", text[:-1], "", "# Mine\n"):
        assert not card.is_own(other)
    assert card.is_own(card.Card("\udcff", "", {}, {}).text), "what is no letter is replaced"
