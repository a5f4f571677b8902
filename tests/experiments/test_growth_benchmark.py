"""The benchmark of growth: its fits are exact on power laws, and its smallest form runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deltacontrol.experiments.benchmarks.contest import alternate
from deltacontrol.experiments.benchmarks.growing import GROWTHS, store, upper_half
from deltacontrol.experiments.benchmarks.growth import Benchmark, fit, interval
from deltacontrol.theory.errors import InputError


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.75])
def test_a_power_law_is_fitted_exactly(exponent: float) -> None:
    sizes = [3, 8, 20, 100]
    line = fit(sizes, [0.25 * s**exponent for s in sizes])
    assert line.exponent == pytest.approx(exponent, abs=1e-13)
    assert line.coefficient == pytest.approx(0.25, rel=1e-12)
    assert line.misfit == pytest.approx(1.0, abs=1e-12)


def test_the_line_is_that_of_least_squares() -> None:
    sizes, costs = [1, 2, 4, 8], [1.0, 3.0, 3.5, 9.0]
    slope, level = np.polyfit(np.log(sizes), np.log(costs), 1)
    line = fit(sizes, costs)
    assert line.exponent == pytest.approx(slope, rel=1e-12)
    assert line.coefficient == pytest.approx(np.exp(level), rel=1e-12)
    rest = np.abs(np.log(costs) - level - slope * np.log(sizes)).max()
    assert line.misfit == pytest.approx(np.exp(rest), rel=1e-12)


def test_an_interval_is_a_point_without_noise_and_a_slow_machine_does_not_widen_it() -> None:
    sizes = np.array([4, 8, 16])
    slow = np.array([1.0, 3.0, 0.5, 7.0, 2.0])[:, None]  # a factor a turn, of all sizes alike
    low, high = interval(sizes, slow[:1] * sizes**1.5)
    assert low == pytest.approx(1.5, abs=1e-12) and high == pytest.approx(1.5, abs=1e-12)
    low, high = interval(sizes, slow * sizes**1.5)
    assert low == pytest.approx(1.5, abs=1e-12) and high == pytest.approx(1.5, abs=1e-12)


def test_intervals_hold_the_exponent_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    sizes = 2.0 ** np.arange(4)
    held = 0
    for trial in range(200):
        noise = np.exp(0.1 * generator.standard_normal((15, 4)))
        low, high = interval(sizes, 3.0 * sizes**2 * noise, seed=trial)
        held += low <= 2.0 <= high
    # A bootstrap of medians of 15 is near 95 %; three standard errors of 200 trials are 5 %.
    assert 0.90 <= held / 200 <= 1.0


@pytest.mark.parametrize("costs", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_what_determines_no_line_is_refused(costs: list[float]) -> None:
    with pytest.raises(InputError, match="at least two sizes, and positive numbers"):
        fit([1, 2][: len(costs)], costs)


def test_the_upper_half_is_at_least_half() -> None:
    assert upper_half([8, 1, 2, 4]) == [4, 8]
    assert upper_half([1, 2, 4, 8, 16]) == [4, 8, 16]
    for growth in GROWTHS.values():
        assert list(growth.sizes) == sorted(set(growth.sizes)) and len(growth.sizes) >= 5
        assert len(growth.small) == 3 and growth.small[0] < growth.small[1] < growth.small[2]
        low, high = growth.expected
        assert 1 <= low <= high and growth.why


def test_sizes_alternate_in_their_order_by_any_clock() -> None:
    order: list[int] = []
    ticks = iter(range(100))
    steps = {size: lambda size=size: order.append(size) for size in (2, 10)}
    seconds = alternate(steps, turns=2, warmup=1, now=lambda: float(next(ticks)))
    assert order == [2, 10, 10, 2, 2, 10] and seconds == {2: [1.0, 1.0], 10: [1.0, 1.0]}


def test_a_store_has_as_many_whole_records(tmp_path: Path) -> None:
    found = store(3, tmp_path).records()
    assert sorted(record.config["seed"] for record in found) == [0, 1, 2]
    assert found == store(3, tmp_path).listed()


def test_a_small_run_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "growth.json"
    result = Benchmark(quick=True, turns=2, warmup=0, least=0.0, out=out).run()
    assert result == json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["name"], row["quantity"]): row for row in result["growths"]}
    assert {name for name, _ in rows} == set(GROWTHS)
    assert {n for n, q in rows if q == "kept_bytes"} == {"layers", "tokens", "width", "copies"}
    for (_, quantity), row in rows.items():
        sizes = [point["size"] for point in row["points"]]
        assert len(sizes) == 3 and row["fitted_from"] == sizes[1]
        assert all(0 < p["q25"] <= p["median"] <= p["q75"] for p in row["points"])
        own = [(p["size"], p["median"]) for p in row["points"][1:]]
        assert row["exponent"] == fit(*zip(*own, strict=True)).exponent
        assert (row["interval"] is None) == (quantity == "kept_bytes")
    assert rows["layers", "kept_bytes"]["exponent"] == pytest.approx(1.0, abs=0.1)
    assert rows["copies", "kept_bytes"]["exponent"] == pytest.approx(1.0, abs=0.1)
    assert "expected 1: each block is passed once" in capsys.readouterr().out


def test_an_unknown_growth_names_the_nearest() -> None:
    with pytest.raises(InputError, match="tokens"):
        Benchmark(only=("token",)).run()
    with pytest.raises(InputError, match="turns is 0"):
        Benchmark(turns=0).run()
