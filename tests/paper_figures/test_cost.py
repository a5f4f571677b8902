"""The figure of costs: drawn from a benchmark's record, with numbers that are the record's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures import base, collect, readme
from deltacontrol.paper_figures.command import Figures
from deltacontrol.paper_figures.export import Exported
from deltacontrol.paper_figures.figures import cost
from deltacontrol.theory.errors import InputError
from tests.paper_figures.grids.cost import caption, record


def written(root: Path, document: dict[str, Any]) -> list[Record]:
    """The record, as figures read it."""
    path = root / "benchmarks" / "growth.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return collect.committed(cost.STUDY, root)


def drawn(records: list[Record]) -> Figure:
    with matplotlib.style.context(["default", base.STYLE]):
        picture = cost.draw(cost.table(records), cost.curves(records))
        picture.canvas.draw()
    return picture


def test_each_growth_has_a_panel_that_says_its_exponent(tmp_path: Path) -> None:
    records = written(tmp_path, record())
    texts = [[text.get_text() for text in ax.texts] for ax in drawn(records).axes]
    assert texts[:6] == [
        ["slope 1.00 (0.98–1.03)\nexpected 1"],
        ["slope 1.50 (1.48–1.53)\nexpected 1 to 2"],
        ["slope 1.00\nexpected 1"],
        ["slope 1.50\nexpected 1 to 2"],
        ["slope 2.50 (2.48–2.53)\nexpected 3"],
        ["slope 1.05 (1.03–1.08)\nexpected 1"],
    ]
    assert not any(texts[6:])


def test_the_caption_tells_what_the_record_says(tmp_path: Path) -> None:
    document = record(turns=11, load=[3.5, 0.1], clock="wall")
    text = cost.caption(cost.table(written(tmp_path, document)))
    assert "seconds of the clock of 1 thread, medians and quartiles of 11 turns" in text
    assert "made-up processor, 2 cores, load up to 3.5" in text
    assert (
        "No fitted median is further than 25 % from its line (list of runs, read over records)"
        in text
    )
    assert caption(cost.table(written(tmp_path, document))) in text and "quick run" not in text
    document["growths"][4]["exponent"] = 2.95
    document |= {"quick": True}
    text = cost.caption(cost.table(written(tmp_path, document)))
    assert "Of 4 exponents of time, 4 are within 0.1 of the expected." in text
    assert "a quick run over small sizes" in text


def test_lines_have_their_slopes_and_meet_in_the_middle_of_the_fit(tmp_path: Path) -> None:
    lines = cost.curves(written(tmp_path, record()))
    for _, panel in lines.groupby("panel"):
        exponent, expected, levels = {}, {}, set()
        for line, rows in panel.groupby("line"):
            logs = np.log(rows[["size", "cost"]].to_numpy(dtype=float))
            slope, level = np.polyfit(*logs.T, 1)
            exponent[line] = slope
            levels.add(round(float(level + slope * np.log(2**5.5)), 9))
        assert len(levels) == 1  # the sizes of the fit are 16 to 128
        expected = next(
            g
            for g in record()["growths"]
            if (g["name"], g["quantity"]) == tuple(panel.iloc[0, 1:3])
        )
        assert exponent["fitted"] == pytest.approx(expected["exponent"], abs=1e-12)
        ends = [exponent[f"expected {end}"] for end in ("low", "high")]
        assert ends == pytest.approx(expected["expected"], abs=1e-12)


def test_a_record_that_is_absent_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no committed record.*benchmarks.growth --out"):
        collect.committed(cost.STUDY, tmp_path)
    written(tmp_path, record())
    (tmp_path / "benchmarks" / "growth.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"growth\.json is damaged"):
        collect.committed(cost.STUDY, tmp_path)


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Record]]:
    """Only a benchmark's record is committed; lists the records of each figure that is written."""
    exported: list[list[Record]] = []

    def export(name: str, figure: Any, records: list[Record], out: Path) -> Exported:
        exported.append(records)
        return Exported((), pd.DataFrame({"exponent": ["1"]}), "caption")

    monkeypatch.setattr("deltacontrol.paper_figures.export.export", export)
    monkeypatch.setattr(collect, "COMMITTED", tmp_path)
    written(tmp_path, record())
    return exported


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_no_preset_measures_a_benchmark(
    preset: Any,
    committed: list[list[Record]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Figures(preset=preset, only=("cost",), recompute=True, out=tmp_path / "out").run()
    assert [[r.id for r in records] for records in committed] == [["growth"]]
    printed = capsys.readouterr().out
    assert "committed evidence" in printed
    assert "python -m deltacontrol.experiments.benchmarks.growth --out" in printed


@pytest.mark.usefixtures("committed")
def test_publishing_shows_the_picture_and_leaves_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(provenance, "require_clean", lambda: None)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(collect, "show", lambda picture, gallery: shown.append(picture.name))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    Figures(preset="paper", only=("cost",), publish=True, out=tmp_path / "out").run()
    assert shown == ["cost.png"]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
