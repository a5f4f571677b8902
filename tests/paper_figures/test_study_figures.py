"""What the figures of combination, convergence, scale and forgetting compute."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base
from deltacontrol.paper_figures.figures import (
    combination,
    convergence,
    efficiency,
    forgetting,
    scale,
)
from deltacontrol.paper_figures.progress import nearly_done
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, write


class Made(dict[str, list[Record]]):
    """Synthetic records by figure, each made when it is asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, name: str) -> list[Record]:
        self[name] = write(RunStore(self.factory.mktemp(name)), GRIDS[name](seeds=2))
        return self[name]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory)


def test_a_gain_of_a_subset_is_over_the_adapter_of_the_same_task(records) -> None:
    table = combination.table(records["combination"])
    above = combination._above(table, combination.ALL)
    rows = table[table["block"] == combination.ALL]
    means = rows.groupby(["task", "method"])["points"].mean()
    for task in above.index:
        expected = means[task, "bitfit"] - means[task, "houlsby"]
        assert above.loc[task, "bitfit"] == pytest.approx(expected, abs=1e-12)
    assert (above["houlsby"] == 0).all() and above.shape == (6, 8)


def test_the_stages_of_a_sequence_are_in_its_own_order(records) -> None:
    table = combination.table(records["combination"])
    rows = table[table["block"] == combination.IN_TURN]
    assert rows["method"].nunique() == 6 and set(rows["stage"]) == {1, 2, 3}
    record = next(r for r in records["combination"] if r.config.get("sequential"))
    seen = record.curve()["validation_accuracy"].dropna().tolist()
    own = rows[rows["run"] == record.id].sort_values("stage")["points"].tolist()
    assert own == pytest.approx([100 * a for a in seen], abs=1e-9)


def test_a_combination_that_helps_disagrees_with_the_source(records) -> None:
    def verdict(found: list[Record]) -> bool | None:
        return combination.agreement(combination.table(found))[1].agrees

    assert verdict(records["combination"]) is True
    better = [
        replace(r, result=r.result | {"accuracy": r.result["accuracy"] + 0.05})
        if len(r.config["deltas"]) == 3 and not r.config.get("shots")
        else r
        for r in records["combination"]
    ]
    assert verdict(better) is False


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
    found = convergence.agreement(convergence.table(records["convergence"]))
    assert [one.agrees for one in found] == [True, True, True]
    averages = convergence._averages(convergence.table(records["convergence"]), "steps_95")
    assert averages["prompt"].value == pytest.approx(88, rel=0.1)


def test_slopes_are_those_that_the_points_have(records) -> None:
    table = scale.table(records["scale"])
    # lora: 3 points below, less by a third of them per ten times the size, beside 6 of all.
    assert scale.slope(table, "gap", "lora").value == pytest.approx(1.0, abs=0.3)
    assert scale.slope(table, "points", "full").value == pytest.approx(6.0, abs=0.3)
    expected = np.polyfit(
        np.log10(table.drop_duplicates("model")["parameters"].astype(float)),
        table[table["method"] == "prefix"].groupby("model", sort=False)["points"].mean(),
        1,
    )[0]
    assert scale.slope(table, "points", "prefix").value == pytest.approx(expected, abs=1e-9)
    assert scale.spread_slope(table).high < 0


def test_seeds_alone_spread_no_placements(records) -> None:
    """Placements that differ by noise alone have no spread, at every size."""
    table, random = scale.table(records["scale"]), np.random.default_rng(0)
    sizes = table["parameters"].rank(method="dense")
    noisy = table.assign(points=70 + random.normal(0, 3 / sizes))
    assert scale._spreads(noisy).mean().abs().max() < 2.0
    slope = scale.spread_slope(noisy)
    assert slope.low < 0 < slope.high


def test_the_distance_at_a_loss_is_read_between_two_looks() -> None:
    path = pd.DataFrame({"loss": [5.0, 4.0, 3.0], "kl": [0.0, 0.1, 0.4]})
    assert forgetting.distance(path, 3.5) == pytest.approx(0.25)
    assert forgetting.distance(path, 5.0) == 0.0
    assert math.isnan(forgetting.distance(path, 2.9))


def test_every_method_reaches_the_common_loss_with_a_rate(records) -> None:
    table = forgetting.table(records["forgetting"])
    reached = table.groupby("method")["kl_at_common"].apply(lambda kl: kl.notna().any())
    assert reached.all()
    least = table.groupby(["method", "learning_rate"])["least_loss"].mean()
    hardest = least.groupby("method").min().max()
    assert table["common_loss"].iloc[0] == pytest.approx(hardest + 1e-3)


def test_savings_are_ratios_of_the_same_setting(records) -> None:
    table = efficiency.table(records["efficiency"])
    assert efficiency.ratio(table, "lora", "seconds").value == pytest.approx(2 / 3)
    means = table.groupby(["model", "batch_size", "max_length", "method"])["memory_mb"].mean()
    wide = means.unstack("method")
    expected = np.exp(np.log(wide["lora"] / wide["full"]).mean())
    assert efficiency.ratio(table, "lora", "memory_mb").value == pytest.approx(expected)
    assert all(one.agrees for one in efficiency.agreement(table))
    middle = efficiency._middle(table).iloc[0]
    assert (middle["model"], middle["batch_size"], middle["max_length"]) == ("minilm-l6", 8, 64)


def test_what_a_correction_gives_back_is_of_what_was_lost(records) -> None:
    from deltacontrol.paper_figures.figures import robustness

    table = robustness.table(records["robustness"])
    found = robustness.recovered(table, "lora", "corrected")
    assert found.value == pytest.approx(0.5, abs=0.05) and found.low < found.value < found.high
    assert robustness.recovered(table, "lora", "random").value == pytest.approx(0.25, abs=0.05)
    worse = table.assign(accuracy=table["accuracy"].where(table["condition"] != "clean", 0.3))
    assert math.isnan(robustness.recovered(worse, "lora", "corrected").value)
    assert "nothing to tell" in robustness.caption(worse)


@pytest.mark.parametrize("name", ["combination", "convergence", "forgetting", "scale"])
def test_runs_of_two_settings_are_not_averaged(records, name: str) -> None:
    one = records[name][0]
    other = replace(one, config=one.config | {"steps": 7, "seed": 99})
    with pytest.raises(InputError, match="differ in more than their seed"):
        base.load(name).table([*records[name], other])
