"""Manual templates: a text within a sentence, in which a word stands for the text's class.

    "{text} It was [MASK]."     for a masked language model, which fills the mask in
    "{text} It was"             for a causal one, which goes on; "{text} It was [MASK]" is the same

A verbaliser v names each class c by a word of one token. With T(x) the text x in its template, and
s(w | T(x)) the language model's logit of the word w at that place,

    p(c | x) = exp s(v(c) | T(x)) / Σ_c' exp s(v(c') | T(x)),

so that the model's own head tells the classes apart, and none is drawn (Schick and Schütze, EACL
2021, Section 3; Gao et al., ACL 2021, Equation 1). A text that is too long is cut; what the
template says around it never is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import Formatter
from typing import TYPE_CHECKING

from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

MASK = "[MASK]"
PLACES = ("text", "text_pair")
SPACES = "Ġ▁ "  # how tokenizers write the space before a word
EXAMPLE = "{text} It was [MASK].", "negative=terrible positive=great"
_WORDS = EXAMPLE[1]
_FORM = f'"{EXAMPLE[0]}" (a masked language model) or "{{text}} It was" (a causal one)'


@dataclass(frozen=True)
class Template:
    """A template with its verbaliser.

    Attributes:
        text: has the place {text}, for pairs {text_pair} too, and at most one [MASK]; any other
            brace is written twice.
        verbaliser: "class=word" for each class; kept in the order of the classes' names.

    Raises:
        InputError: the text has no place for the text or another one, two masks, or a class has no
            word or two.

    Example:
        >>> Template("{text} It was [MASK].", ("positive=great", "negative=terrible")).words
        {'negative': 'terrible', 'positive': 'great'}
    """

    text: str
    verbaliser: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check both, and order the verbaliser."""
        if not isinstance(self.text, str):
            raise InputError(f"template is {self.text!r}; expected a text such as {_FORM}")
        places = [place for _, place in _pieces(self.text) if place is not None]
        if "text" not in places or len(set(places)) < len(places):
            raise InputError(
                f"the template {self.text!r} has the places {places or 'none'}; expected {{text}} "
                f"once, as in {_FORM}, and {{text_pair}} where rows are pairs"
            )
        if (masks := self.text.count(MASK)) > 1:
            raise InputError(
                f"the template {self.text!r} has {masks} times {MASK}; expected one: a class is "
                "one word at one place"
            )
        object.__setattr__(self, "verbaliser", _ordered(self.verbaliser))

    @property
    def words(self) -> dict[str, str]:
        """The word of each class."""
        return dict(_split(pair) for pair in self.verbaliser)

    def bound(
        self, tokenizer: PreTrainedTokenizerBase, kind: str, labels: Sequence[str], name: str
    ) -> BoundTemplate:
        """The template in the tokens of a model.

        Args:
            tokenizer: of the model.
            kind: "masked-lm" or "causal-lm".
            labels: names of the task's classes in the order of their numbers.
            name: of the task, for errors.

        Raises:
            InputError: the task has no classes, or others than the verbaliser; the template has no
                mask where one is needed, or goes on behind it where the model does not read that
                far; or a word is not one token there, or that of two classes.
        """
        words = self.words
        if not labels:
            raise InputError(
                f"{name} has no classes, and a template tells classes apart; leave template and "
                "verbaliser out, or choose a classification such as movie"
            )
        without = [label for label in labels if label not in words]
        others = [label for label in words if label not in labels]
        if without or others:
            wrong = f"no word for {_listed(without)}" if without else ""
            wrong += " and " if without and others else ""
            wrong += f"words for {_listed(others)}, which are no classes" if others else ""
            raise InputError(
                f"the verbaliser has {wrong}; {name} has the classes {_listed(labels)}, and each "
                f"needs its word, as in --verbaliser {_WORDS}"
            )
        text, gap = self._masked(tokenizer) if kind == "masked-lm" else self._going_on()
        made = BoundTemplate(tokenizer, _pieces(text), kind == "masked-lm")
        tokens = {label: made.token_of(words[label], gap, label) for label in labels}
        for label in labels:
            same = [other for other in labels if tokens[other] == tokens[label]]
            if len(same) > 1:
                raise InputError(
                    f"the words of the classes {_listed(same)} are the same token of this model; "
                    "give each class a word of its own"
                )
        return replace(made, tokens=tuple(tokens.values()))

    def _masked(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """The text with the tokenizer's own mask, and nothing before the word."""
        if MASK not in self.text:
            raise InputError(
                f"the template {self.text!r} has no {MASK}, where a masked language model is read; "
                'write it in the place of the word, as in "{text} It was [MASK]."'
            )
        if tokenizer.mask_token is None:
            raise InputError(
                "the tokenizer of the model has no mask token, at which the template is read; "
                "choose a model that was trained with one, or a causal one"
            )
        return self.text.replace(MASK, str(tokenizer.mask_token)), ""

    def _going_on(self) -> tuple[str, str]:
        """The text up to the word, and the space between them."""
        before, mask, behind = self.text.partition(MASK)
        if behind.strip():
            raise InputError(
                f"the template {self.text!r} goes on behind {MASK}, and a causal language model is "
                f"read before what follows; end it with {MASK}, or with what stands before it"
            )
        text = before.rstrip()
        return text, " " if not mask or before != text else ""


@dataclass(frozen=True, eq=False)
class BoundTemplate:
    """A template in the tokens of one model; made by `Template.bound`.

    Attributes:
        tokenizer: of the model.
        pieces: what stands before each place, and the place's name; None behind the last one.
        masked: whether the word stands at the mask; otherwise it follows the last token.
        tokens: of the classes' words, in the order of the classes.
    """

    tokenizer: PreTrainedTokenizerBase
    pieces: tuple[tuple[str, str | None], ...]
    masked: bool
    tokens: tuple[int, ...] = ()

    @property
    def mask(self) -> int | None:
        """The token at which the word is read; None where that is behind the last one."""
        return int(self.tokenizer.mask_token_id) if self.masked else None  # type: ignore[arg-type]

    @cached_property
    def places(self) -> list[str]:
        """Columns of a task that the template takes."""
        return [place for _, place in self.pieces if place is not None]

    def rows(self, frame: pd.DataFrame, max_length: int | None, name: str) -> list[list[int]]:
        """Tokens of each row's text in the template, special ones included.

        Args:
            frame: the columns `text` and, for a pair, `text_pair`.
            max_length: tokens of a row at most; of longer ones the text is cut, of a pair the
                longer text first. None cuts none.
            name: of the task, for errors.

        Raises:
            InputError: the task has pairs and the template no place for the second text, or the
                other way round; or the template alone is as long as `max_length`.
        """
        if ("text_pair" in frame) != ("text_pair" in self.places):
            has = "pairs of texts" if "text_pair" in frame else "one text a row"
            raise InputError(
                f"{name} has {has}, and the template the places {_listed(self.places)}; give it "
                "{text}, and {text_pair} where rows are pairs"
            )
        texts = [self._plain(frame[place].tolist(), name) for place in self.places]
        rows = [list(row) for row in zip(*texts, strict=True)]
        found = self._encoded(rows)
        if max_length is not None:
            bare = len(self._encoded([[""] * len(self.places)])[0])
            if bare >= max_length:
                raise InputError(
                    f"max_length={max_length} leaves no room for text: the template alone is "
                    f"{bare} tokens; give {bare + 8} or more"
                )
            while long := [i for i, ids in enumerate(found) if len(ids) > max_length]:
                excess = [len(found[i]) - max_length for i in long]
                shorter = self._cut([rows[i] for i in long], excess)
                for i, row, ids in zip(long, shorter, self._encoded(shorter), strict=True):
                    rows[i], found[i] = row, ids
        wrong = [i for i, ids in enumerate(found) if self.masked and ids.count(self.mask or 0) != 1]
        if wrong:
            raise InputError(
                f"{name}: the text {frame['text'].iloc[wrong[0]][:40]!r} holds what the tokenizer "
                f"takes for its mask, {self.tokenizer.mask_token}; take it out of the text"
            )
        return found

    def token_of(self, word: str, gap: str, label: str) -> int:
        """The token that a word is in the template.

        Args:
            word: of a class.
            gap: what stands before a word that follows.
            label: the class, for errors.

        Raises:
            InputError: it is not one token, or none that the model knows.
        """
        probe = self._filled(["a"] * len(self.places))
        (with_probe,) = self._ids([probe])
        if self.masked:
            (with_word,) = self._ids([probe.replace(str(self.tokenizer.mask_token), word)])
            place = with_probe.index(self.mask or 0)
            same = with_word[:place] == with_probe[:place] and self._alike(
                with_word[place + 1 :], with_probe[place + 1 :]
            )
        else:
            (with_word,) = self._ids([probe + gap + word])
            place, same = len(with_probe), with_word[:-1] == with_probe
        token = with_word[place] if same and len(with_word) > place else None
        if token is None or token == self.tokenizer.unk_token_id:
            pieces = self.tokenizer.tokenize(gap + word)
            raise InputError(
                f"the word {word!r} of the class {label} is not one token of this model there, but "
                f"{pieces}; give the class a shorter or more common word, and the template a space "
                "before it where words have one"
            )
        return token

    def _alike(self, one: list[int], other: list[int]) -> bool:
        """Whether tokens are the same but for a space before the first: one follows a mask."""

        def bare(ids: list[int]) -> list[str]:
            first, *rest = map(str, self.tokenizer.convert_ids_to_tokens(ids))
            first = first.lstrip(SPACES)
            return [first, *rest] if first else rest

        return bare(one) == bare(other) if one and other else one == other

    def _plain(self, texts: list[str], name: str) -> list[str]:
        """The texts, in which no mask stands but the template's; it is said where one did."""
        mask, other = str(self.tokenizer.mask_token), str(self.tokenizer.unk_token or "")
        having = sum(mask in text for text in texts) if self.masked else 0
        if not having:
            return texts
        warnings.warn(
            f"{having} texts of {name} hold {mask}, at which the template is read; it is taken for "
            f"{other or 'nothing'} there",
            stacklevel=2,
        )
        return [text.replace(mask, other) for text in texts]

    def _filled(self, texts: Sequence[str]) -> str:
        given = iter(texts)
        parts = ((before, "" if place is None else next(given)) for before, place in self.pieces)
        return "".join(before + text for before, text in parts)

    def _encoded(self, rows: Iterable[Sequence[str]]) -> list[list[int]]:
        return self._ids([self._filled(row) for row in rows])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        from deltacontrol.experiments.tasks.encoding import token_ids  # imports torch

        return token_ids(self.tokenizer, texts)

    def _cut(self, rows: list[list[str]], excess: list[int]) -> list[list[str]]:
        """Each row's texts without so many tokens at the end, the longer text's first."""
        from deltacontrol.experiments.tasks.encoding import token_starts

        columns = zip(*rows, strict=True)
        starts = [token_starts(self.tokenizer, list(column)) for column in columns]
        cut = []
        for number, row in enumerate(rows):
            begins = [column[number] for column in starts]
            kept = _kept([len(places) for places in begins], excess[number])
            # Up to the first token that goes: one letter may be several tokens.
            cut.append(
                [
                    text[: places[count]].rstrip() if count < len(places) else text
                    for text, places, count in zip(row, begins, kept, strict=True)
                ]
            )
        return cut


def _kept(lengths: Sequence[int], excess: int) -> list[int]:
    """How many tokens of each text stay when so many go, the longer text's first.

    Example:
        >>> _kept([9], 4), _kept([3, 9], 4), _kept([7, 9], 6), _kept([1, 1], 5)
        ([5], [3, 5], [5, 5], [0, 0])
    """
    left = max(sum(lengths) - excess, 0)
    if len(lengths) == 1:
        return [left]
    short = min(min(lengths), left // 2)
    first_is_short = lengths[0] <= lengths[1]
    return [short, left - short] if first_is_short else [left - short, short]


def texts_of(verbaliser: object) -> tuple[str, ...]:
    """A verbaliser as texts "class=word", from such texts or from a dictionary.

    Raises:
        InputError: it is neither.
    """
    if isinstance(verbaliser, Mapping):
        return tuple(f"{label}={word}" for label, word in verbaliser.items())
    if isinstance(verbaliser, list | tuple) and all(isinstance(pair, str) for pair in verbaliser):
        return tuple(verbaliser)
    raise InputError(
        f"verbaliser is {verbaliser!r}; expected class=word for each class, such as {_WORDS}, or a "
        "dictionary"
    )


def _pieces(text: str) -> tuple[tuple[str, str | None], ...]:
    """What stands before each place, and the name of the place."""
    try:
        found = list(Formatter().parse(text))
    except ValueError as error:
        raise InputError(
            f"the template {text!r} cannot be read: {error}; write a brace that is no place twice, "
            f"and places as in {_FORM}"
        ) from None
    for _, place, form, conversion in found:
        if place is not None and (place not in PLACES or form or conversion):
            behind = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise InputError(
                f"the template {text!r} has the place {{{place}{behind}}}; expected "
                f"{' or '.join(f'{{{known}}}' for known in PLACES)}, as in {_FORM}"
            )
    return tuple((before, place) for before, place, _, _ in found)


def _ordered(verbaliser: object) -> tuple[str, ...]:
    pairs = texts_of(verbaliser)
    words: dict[str, str] = {}
    for pair in pairs:
        label, word = _split(pair)
        if not label or not word:
            raise InputError(f"{pair!r} in the verbaliser; expected class=word, such as {_WORDS}")
        if label in words:
            raise InputError(
                f"the verbaliser has two words for the class {label}, {words[label]} and {word}; "
                "expected one: give its class with the other one"
            )
        words[label] = word
    if not words:
        raise InputError(f"the verbaliser is empty; expected class=word, such as {_WORDS}")
    return tuple(f"{label}={words[label]}" for label in sorted(words))


def _split(pair: str) -> tuple[str, str]:
    """Class and word; a class may have the sign in its name, a word may not."""
    label, _, word = pair.rpartition("=")
    return label.strip(), word.strip()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
