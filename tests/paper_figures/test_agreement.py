"""Published results beside ours: ranges decide, and one table holds all."""

from __future__ import annotations

import pytest

from deltacontrol.paper_figures import source
from deltacontrol.paper_figures.agreement import Agreement, Estimate, on_side
from deltacontrol.theory.errors import InputError

NAN = float("nan")


@pytest.mark.parametrize(
    ("low", "high", "above", "agrees"),
    [
        (1.1, 3.0, True, True),
        (0.2, 0.9, True, False),
        (0.9, 3.0, True, None),
        (0.2, 0.9, False, True),
        (1.1, 3.0, False, False),
        (0.9, 1.1, False, None),
        (NAN, NAN, False, None),
        (1.0, 2.0, True, None),
    ],
)
def test_a_whole_range_on_one_side_decides(
    low: float, high: float, above: bool, agrees: bool | None
) -> None:
    assert on_side(Estimate(0.5 * (low + high), low, high), 1.0, above=above) is agrees


def test_a_number_without_a_range_is_shown_alone() -> None:
    assert Estimate(1.25).text(1, "+") == "+1.2"


def test_the_table_counts_and_explains(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    found = [
        Agreement("one", "a|b", "+1.0", "+2.0", True),
        Agreement("one", "c", "+1.0", "+9.0", False, "Because of this."),
        Agreement("two", "d", "1", "0", None),
    ]
    monkeypatch.setattr(source, "agreements", lambda: found)
    text = source.markdown()
    assert text.startswith("Of 3 published results in 2 experiments, 1 agrees, 1 disagrees, 1")
    assert source.sentence(found[:1] * 2) == "Of 2 published results in 1 experiment, 2 agree."
    assert "a\\|b" in text and "**one: c.** Because of this." in text
    path = tmp_path / "README.md"
    path.write_text(f"before\n{source.BEGIN}BEFORE\n{source.END}\nafter\n", encoding="utf-8")
    assert source.update(path) and text in path.read_text(encoding="utf-8")
    assert "BEFORE" not in path.read_text(encoding="utf-8")


def test_a_figure_without_published_results_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="solvers has no published results"):
        source.agreements(["solvers"])
