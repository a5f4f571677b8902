"""When a training is nearly done, and what the figure of convergence says of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import convergence
from deltacontrol.paper_figures.progress import nearly_done
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    store = RunStore(tmp_path_factory.mktemp("convergence"))
    return write(store, GRIDS["convergence"](seeds=2))


def done(step, accuracy, majority: float = 0.5, rows: int = 10_000) -> float:
    return nearly_done(step, accuracy, majority, rows=rows, last=float(step[-1]))


@pytest.mark.parametrize("time", [5.0, 12.0, 30.0])
def test_nearly_done_is_where_the_curve_says(time: float) -> None:
    """On the interpolated curve of 1 - exp(-t/τ), within what running means leave."""
    step = np.arange(2, 401, 2)
    found = done(step, 0.5 + 0.3 * (1 - np.exp(-step / time)))
    assert found == pytest.approx(-time * math.log(0.05), rel=0.05)


def test_a_training_that_learns_nothing_takes_all_of_its_steps() -> None:
    assert done([4, 8, 12], [0.5, 0.5, 0.5]) == 12.0
    assert done([10, 20, 30, 40], [0.5, 0.4, 0.4, 0.4]) == 40.0
    assert nearly_done([], [], 0.5, rows=100, last=80) == 80.0
    # Within the first stretch the way begins at the majority's accuracy at step 0.
    assert done([10, 20, 30], [0.9, 0.9, 0.9]) == pytest.approx(9.5)


def test_noise_alone_is_never_nearly_done() -> None:
    """Looks at 200 rows of a training that learns nothing, and of one that learns slowly."""
    random, step = np.random.default_rng(0), np.arange(6, 121, 6)
    nothing = [done(step, random.binomial(200, 0.5, len(step)) / 200, rows=200) for _ in range(200)]
    assert np.mean(np.array(nothing) == 120) > 0.95
    truth = 0.5 + 0.3 * (1 - np.exp(-step / 30))
    slow = [done(step, random.binomial(200, truth) / 200, rows=200) for _ in range(200)]
    exact = done(step, truth, rows=200)
    assert np.exp(np.log(slow).mean()) == pytest.approx(exact, rel=0.35)


def test_slow_methods_stand_behind_in_the_order(records) -> None:
    found = convergence.agreement(convergence.table(records))
    assert [one.agrees for one in found] == [True, True, True]
    averages = convergence._averages(convergence.table(records), "steps_95")
    assert averages["prompt"].value == pytest.approx(88, rel=0.1)


def test_what_learns_nothing_or_diverges_is_compared_with_nothing(records) -> None:
    """Level times of two methods that learn nothing are no agreement."""
    tasks = sorted({str(r.config["task"]) for r in records})

    def idle(record: Record) -> bool:
        return record.config["deltas"][0]["name"] in ("lora", "houlsby")

    few = [
        replace(r, result=r.result | {"majority_share": 0.79})
        if idle(r) and r.config["task"] in tasks[:6]
        else replace(r, status="diverged")
        if idle(r)
        else r
        for r in records
    ]
    table = convergence.table(few)
    own = table[table["method"].isin(["lora", "houlsby"])]
    assert not own["learnt"].any() and (own["steps_95"] == own["steps"]).all()
    found = convergence.agreement(table)
    assert [one.agrees for one in found] == [None] * 3 and found[0].ours == "no such task"
    assert f"{len(own)} of {len(table)} trainings learn nothing" in convergence.caption(table)


def test_runs_of_two_settings_are_not_averaged(records) -> None:
    other = replace(records[0], config=records[0].config | {"steps": 7, "seed": 99})
    with pytest.raises(InputError, match="differ in more than their seed"):
        convergence.table([*records, other])
