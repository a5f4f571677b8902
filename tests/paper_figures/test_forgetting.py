"""What the figure of forgetting computes."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import forgetting
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    store = RunStore(tmp_path_factory.mktemp("forgetting"))
    return write(store, GRIDS["forgetting"](seeds=2))


def test_the_distance_at_a_loss_is_read_between_two_looks() -> None:
    path = pd.DataFrame({"loss": [5.0, 4.0, 3.0], "kl": [0.0, 0.1, 0.4]})
    assert forgetting.distance(path, 3.5) == pytest.approx(0.25)
    assert forgetting.distance(path, 5.0) == 0.0
    assert math.isnan(forgetting.distance(path, 2.9))


def test_every_method_reaches_the_common_loss_with_a_rate(records) -> None:
    table = forgetting.table(records)
    reached = table.groupby("method")["kl_at_common"].apply(lambda kl: kl.notna().any())
    assert reached.all()
    least = table.groupby(["method", "learning_rate"])["least_loss"].mean()
    hardest = least.groupby("method").min().max()
    assert table["common_loss"].iloc[0] == pytest.approx(hardest + 1e-3)


def test_runs_of_two_settings_are_not_averaged(records) -> None:
    other = replace(records[0], config=records[0].config | {"steps": 7, "seed": 99})
    with pytest.raises(InputError, match="differ in more than their seed"):
        forgetting.table([*records, other])
