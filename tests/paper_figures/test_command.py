"""`deltacontrol figures`: what it computes, what it refuses, what it prints."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import deltacontrol.experiments.runs.sweep
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base, collect, readme
from deltacontrol.paper_figures.command import Figures
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, Grid, write


# The command is the same for every figure, so it is tested on the one that draws fastest.
@pytest.fixture(scope="module", params=["threshold"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def synthetic_studies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(collect, "study", lambda name, preset: [e for e, *_ in GRIDS[name]()])
    monkeypatch.setattr(collect, "COMMITTED", tmp_path / "records")
    monkeypatch.setattr(provenance, "modified_files", lambda: [])
    monkeypatch.setattr(provenance, "project_commit", lambda: {"commit": "0", "modified": False})
    monkeypatch.setattr(base, "GALLERY", tmp_path / "gallery")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Replace the sweep by one that writes the made-up records; lists how many it was asked for."""
    asked: list[int] = []
    answers = {e.to_config().__repr__(): row for row in GRIDS[name]() for e in row[:1]}

    def run_all(
        wanted: Sequence[Experiment],
        store: RunStore,
        workers: int | None = None,
        limit_minutes: float = 1.0,
    ) -> list[Record]:
        asked.append(len(wanted))
        return write(store, [answers[repr(e.to_config())] for e in wanted])

    monkeypatch.setattr(deltacontrol.experiments.runs.sweep, "run_all", run_all)
    return asked


def figures(name: str, folder: Path, **options: object) -> Figures:
    return Figures(only=(name,), out=folder / "out", runs=folder / "runs", **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_quick_computes_what_is_missing_once(
    name: str, grid: Grid, sweep: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(RunStore(tmp_path / "runs"), grid[:1])
    figures(name, tmp_path).run()
    assert sweep == [len(grid) - 1]
    printed = capsys.readouterr().out
    assert base.load(name).TITLE in printed and f"wrote {tmp_path / 'out' / name}.pdf" in printed
    figures(name, tmp_path).run()
    assert len(sweep) == 1
    figures(name, tmp_path, recompute=True).run()
    assert sweep == [len(grid) - 1, len(grid)]


@pytest.mark.slow
def test_paper_redraws_published_records_without_computing(
    name: str, grid: Grid, sweep: list[int], tmp_path: Path
) -> None:
    figures(name, tmp_path, preset="paper", recompute=True, publish=True).run()
    first = (tmp_path / "out" / f"{name}.pdf").read_bytes()
    figures(name, tmp_path / "elsewhere", preset="paper").run()
    assert sweep == [len(grid)]
    assert (tmp_path / "elsewhere" / "out" / f"{name}.pdf").read_bytes() == first
    assert (tmp_path / "gallery" / f"{name}.png").exists()
    published = tmp_path / "records" / "figures" / base.load(name).STUDY
    files = {p.name for p in published.rglob("*") if p.is_file()}
    assert files == {"run.json", "curve.parquet", "grid.json"}


def test_paper_says_which_records_are_missing(
    name: str, grid: Grid, sweep: list[int], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no committed records.*--recompute"):
        figures(name, tmp_path, preset="paper").run()
    study = base.load(name).STUDY
    records = write(RunStore(tmp_path / "runs"), grid)
    collect.publish(study, records)
    for record in records[:2]:
        shutil.rmtree(tmp_path / "records" / "figures" / study / record.id)
    with pytest.raises(InputError, match=f"2 of {len(grid)} runs .*--recompute"):
        figures(name, tmp_path, preset="paper").run()
    assert not sweep and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"limit_minutes": 0.0}, {"limit_minutes": float("nan")}, {"limit_minutes": float("inf")},
     {"workers": 0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("preset", ["quick", "paper"])
@pytest.mark.one_in(4)
def test_limits_are_read_where_nothing_is_left_to_compute(
    name: str, grid: Grid, sweep: list[int], tmp_path: Path, preset: str, wrong: dict[str, float]
) -> None:
    records = write(RunStore(tmp_path / "runs"), grid)
    collect.publish(base.load(name).STUDY, records)
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*; expected a"):
        figures(name, tmp_path, preset=preset, **wrong).run()
    assert not sweep and not (tmp_path / "out").exists()


def test_publishing_drops_stale_records(name: str, grid: Grid, tmp_path: Path) -> None:
    records = write(RunStore(tmp_path / "runs"), grid[:3])
    root = tmp_path / "published"
    collect.publish("toys", records, root)
    collect.publish("toys", records[:0:-1], root)
    folders = [p.name for p in (root / "figures" / "toys").iterdir() if p.is_dir()]
    assert sorted(folders) == sorted(r.id for r in records[1:])
    assert collect.committed("toys", root) == records[:0:-1]  # in the order of the grid


def test_a_run_that_is_committed_stays_and_that_is_said(
    name: str, grid: Grid, tmp_path: Path
) -> None:
    """Another measurement of the same runs is neither published in silence nor drawn."""
    root = tmp_path / "published"
    first = write(RunStore(tmp_path / "runs"), grid[:2])
    assert collect.publish("toys", first, root) == 0
    experiment, result, curve = grid[0]
    anew = [(experiment, result | {"measured": "anew"}, curve), grid[1]]
    second = write(RunStore(tmp_path / "other"), anew)
    assert collect.publish("toys", second, root) == 1
    assert [r.result for r in collect.committed("toys", root)] == [r.result for r in first]


def test_nothing_is_published_from_a_dirty_checkout(
    name: str, sweep: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "modified_files", lambda: ["theory/claims.py"])
    with pytest.raises(InputError, match="clean checkout.*theory/claims.py"):
        figures(name, tmp_path, preset="paper", publish=True).run()
    assert not sweep and not (tmp_path / "records").exists()
    assert not (tmp_path / "gallery").exists()


def test_quick_runs_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="paper"):
        figures("performance", tmp_path, publish=True).run()


@pytest.mark.slow
def test_a_figure_without_records_does_not_keep_the_others_from_being_drawn(
    name: str, grid: Grid, tmp_path: Path
) -> None:
    collect.publish(base.load(name).STUDY, write(RunStore(tmp_path / "runs"), grid))
    with pytest.raises(InputError, match="1 of 2 figures could not be drawn: performance: "):
        Figures(preset="paper", only=("performance", name), out=tmp_path / "out").run()
    assert (tmp_path / "out" / f"{name}.png").exists()
