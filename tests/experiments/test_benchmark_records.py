"""What is said of speed and memory is what the committed records measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deltacontrol.experiments.benchmarks.growing import GROWTHS, upper_half
from deltacontrol.experiments.benchmarks.growth import fit
from deltacontrol.experiments.runs.store import COMMITTED

RECORDS = COMMITTED / "benchmarks"


def record(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def test_riccati_beside_other_implementations() -> None:
    found = record("solvers")
    ratios = {row["n"]: row["time_over_deltacontrol"] for row in found["single"]}
    assert all(ratios[n]["numpy"]["median"] >= 1.0 for n in (8, 37, 512))
    assert all(ratios[n]["crocoddyl"]["median"] >= 1.0 for n in (37, 128, 512))
    batch = found["batch"]
    assert (batch["problems"], batch["n"], batch["m"], batch["horizon"]) == (256, 8, 4, 50)
    # Beside loops over single problems: our own, whose kernel is compiled too, and NumPy's.
    assert batch["time_over_deltacontrol"]["loop"]["median"] >= 3.0
    assert batch["time_over_deltacontrol"]["numpy loop"]["median"] >= 20.0
    differences = [*found["single"], *found["scan"], batch]
    assert all(d < 1e-10 for row in differences for d in row["gain_difference"].values())


def test_the_recursion_is_quicker_than_the_scan_on_a_processor() -> None:
    found = record("solvers")["scan"]
    ratios = {
        (row["n"], row["horizon"]): row["time_over_recursion"]["scan"]["median"] for row in found
    }
    assert min(ratios.values()) > 1.0


def test_a_gauss_newton_step_on_twelve_layers_of_gpt2_size() -> None:
    found = record("gauss_newton")
    assert found["state_entries"] == 98_304 and found["layers"] == 12
    assert found["gauss_newton"]["products"] <= 50 and found["peak_bytes_ratio"] <= 3.0


@pytest.mark.parametrize("threads", [1, 2])
def test_projections_in_copies_of_their_vector(threads: int) -> None:
    found = record("projections")[f"threads_{threads}"]
    fast = found["products"]["fastfood 1000"]
    assert max(fast["lift"]["median"], fast["adjoint"]["median"]) <= 25.0
    assert found["reference"]["speed_up"]["median"] >= 8.0
    for name, numbers in found["products"].items():
        if name.startswith("fastfood"):
            assert numbers["held"] < 1.0 and numbers["at_work"] < 1.0
    steps = record("projections_step")[f"threads_{threads}"]["step"]  # more turns
    assert max(steps[f"{kind}_ratio"]["median"] for kind in ("did", "said")) <= 1.5


def test_growths_are_those_of_today() -> None:
    found = record("growth")
    assert not found["quick"] and found["clock"] == "cpu" and found["threads"] == 1
    rows = {(row["name"], row["quantity"]): row for row in found["growths"]}
    wanted = {(name, "seconds") for name in GROWTHS}
    wanted |= {(name, "kept_bytes") for name, growth in GROWTHS.items() if growth.kept}
    assert set(rows) == wanted
    for (name, quantity), row in rows.items():
        growth = GROWTHS[name]
        sizes = [point["size"] for point in row["points"]]
        if name != "gauss-newton":  # whose sizes are widths, and their points parameters
            assert sizes == list(growth.sizes)
        assert row["fitted_from"] == upper_half(sizes)[0]
        assert (row["work"], row["along"], row["at"]) == (growth.work, growth.along, growth.at)
        line = fit(
            *zip(
                *(
                    (p["size"], p["median"])
                    for p in row["points"]
                    if p["size"] >= row["fitted_from"]
                ),
                strict=True,
            )
        )
        assert row["exponent"] == pytest.approx(line.exponent, rel=1e-12)
        if quantity == "kept_bytes":  # counted, whatever the machine does
            assert row["exponent"] == pytest.approx(1.0, abs=0.05)


def test_a_step_beside_peft() -> None:
    found = record("deltas")
    assert (found["precision"], found["device"], found["threads"]) == ("fp32", "cpu", 2)
    for numbers in found["peft"].values():
        for memory in (numbers["kept_bytes"], numbers["peak_bytes"]):
            assert memory["ours"] <= 1.05 * memory["peft"]
    lora = found["peft"]["lora"]["time_ratio"]
    assert lora["median"] <= 1.0
    compiled = found["compiled"]
    assert compiled["ours compiled"]["time_ratio"]["median"] <= 1.0
    assert compiled["ours compiled"]["compile_seconds"] > 0


def test_a_step_of_a_language_model_beside_peft() -> None:
    found = record("training")
    assert found["peak_is"] == "measured"
    contestants = found["contestants"]
    assert set(contestants) == {"ours", "peft", "ours compiled", "peft compiled"}
    for numbers in contestants.values():
        seconds = numbers["seconds"]["median"]
        assert numbers["mfu"] == pytest.approx(
            found["flops_per_step"] / seconds / found["peak_flops"]
        )
        assert 0 < numbers["mfu"] < 1
    assert contestants["ours"]["time_ratio"]["median"] <= 1.0
    assert contestants["ours"]["peak_bytes"] <= contestants["peft"]["peak_bytes"]


def test_iterations_of_all_steps_at_once() -> None:
    """Both forms walk the same iterates; what they cost beside each other, and where they end."""
    found = record("iterations")
    for row in found["iteration"]:
        for solver in ("ilqr", "ddp"):
            assert row[solver]["ratio"]["median"] < 1.0
            assert row[solver]["difference"] < 1e-12
    for row in found["to_residual"]:
        for name in ("ilqr", "ddp", "newton-cg"):
            assert row[name]["status"] == "converged" and row[name]["residual"] <= 1e-8
        assert row["ddp"]["milliseconds"]["median"] < row["ilqr"]["milliseconds"]["median"]


def test_rows_that_carry_different_deltas() -> None:
    """All contestants give one output; with many adapters one mixed batch is the quickest."""
    rows = {row["adapters"]: row for row in record("serving")["adapters"]}
    for row in rows.values():
        assert max(row[name]["difference"] for name in ("mixed", "apart", "peft")) < 1e-5
        assert row["adapters"] == 1 or row["adapters_differ"] > 1e-3
    for name in ("apart", "peft"):
        assert rows[16][name]["time_over_mixed"]["q25"] > 1.0
