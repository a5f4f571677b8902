"""Templates and verbalisers that cannot be, or do not fit the task or the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from deltacontrol.experiments import models
from deltacontrol.theory.errors import InputError
from tests.experiments.word_models import (
    VERBALISER,
    setting_of,
    tiny,
    write,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write(tmp_path_factory.mktemp("places"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "It was [MASK]."}, r"expected \{text\} once"),
        ({"template": "{text} {text} [MASK]"}, r"expected \{text\} once"),
        ({"template": "{text} [MASK] [MASK]"}, r"2 times \[MASK\]"),
        ({"template": "{tekst} [MASK]"}, r"has the place \{tekst\}"),
        ({"template": "{text:>3} [MASK]"}, "has the place"),
        ({"template": "{text} { [MASK]"}, "write a brace that is no place twice"),
        ({"template": None}, "a verbaliser and no template"),
        ({"verbaliser": ()}, "a template and no verbaliser"),
        ({"verbaliser": ("positive", "negative=bad")}, "'positive' in the verbaliser"),
        ({"verbaliser": ("a=good", "a=bad")}, "two words for the class a, good and bad"),
        ({"verbaliser": 3}, "verbaliser is 3"),
    ],
)
def test_a_template_that_cannot_be(
    places: dict[str, str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        tiny(places, "masked", **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("masked", {"text": "{text} It was"}, r"has no \[MASK\]"),
        ("causal", {"text": "{text} It was [MASK] ."}, r"goes on behind \[MASK\]"),
        ("masked", {"verbaliser": ("negative=very bad", "positive=great")}, "is not one token"),
        ("causal", {"verbaliser": ("negative=very bad", "positive=great")}, "is not one token"),
        ("masked", {"verbaliser": ("negative=awful", "positive=great")}, "'awful' of the class"),
        ("causal", {"verbaliser": ("negative=awful", "positive=great")}, "'awful' of the class"),
        ("masked", {"verbaliser": ("positive=great",)}, "no word for negative"),
        ("masked", {"verbaliser": (*VERBALISER, "so=so")}, "words for so, which are no classes"),
        ("masked", {"verbaliser": ("negative=great", "positive=Great")}, "the same token"),
        ("masked", {"max_length": 6}, "the template alone is 6 tokens"),
        ("causal", {"max_length": 2}, "the template alone is 2 tokens"),
        ("masked", {"task": "pairs"}, "has pairs of texts"),
        ("masked", {"text": "{text} {text_pair} [MASK]"}, "has one text a row"),
        ("masked", {"task": "numbers"}, "has no classes"),
        ("headless", {"text": "{text} is [MASK]."}, "no head that fills .*smollm2-135m"),
        ("masked", {"max_length": 30}, "choose max_length <= 24"),
    ],
)
def test_a_template_that_does_not_fit(
    places: dict[str, str], kind: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        _ = setting_of(places, kind, **options).encoded


def test_a_missing_head_is_told_by_one_message(places: dict[str, str]) -> None:
    """Not by what transformers says of the same weights."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    with pytest.raises(InputError, match="have no head that fills masked tokens in"):
        models.load(places["headless"], kind="masked-lm")
    logger.removeHandler(handler)
    assert not told


def test_a_template_needs_no_other_head(places: dict[str, str]) -> None:
    with pytest.raises(InputError, match="leave out the head 'fitted'"):
        replace(setting_of(places, "masked"), head="fitted")


def test_literal_braces_are_written_twice(places: dict[str, str]) -> None:
    setting = setting_of(places, "causal", text="{{ {text} }} It was")
    frame = pd.DataFrame({"text": ["{good} film"], "label": [0]})
    ids = setting.encode(frame).batch()["input_ids"][0].tolist()
    expected = setting.tokenizer("{ {good} film } It was")["input_ids"]
    assert ids == expected
