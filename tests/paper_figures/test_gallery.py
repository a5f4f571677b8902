"""The gallery and the README show what the committed records draw today."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from deltacontrol.paper_figures import base, collect, readme
from deltacontrol.paper_figures.command import Figures
from deltacontrol.paper_figures.export import source_digest
from deltacontrol.theory.markdown import rows_table

# Share of pixels that may differ visibly. The fonts come with matplotlib and nothing is random, so
# that on one version of it none does; a marker elsewhere is some five times as many.
TOLERANCE = 2e-5


def differing(one: np.ndarray, other: np.ndarray) -> float:
    """Share of pixels of which some channel differs by a tenth of its range; 1 for other sizes."""
    if one.shape != other.shape:
        return 1.0
    return float((np.abs(one - other).max(-1) > 0.1).mean())


@pytest.mark.parametrize("name", base.names())
@pytest.mark.one_in(2)
def test_the_gallery_is_drawn_from_todays_tables_and_code(name: str) -> None:
    figure = base.load(name)
    records = collect.committed(figure.STUDY)
    with Image.open(base.GALLERY / f"{name}.png") as picture:
        drawn_from = picture.info.get("Source")
    assert drawn_from == source_digest(figure, figure.table(records), figure.curves(records)), (
        f"paper_figures/gallery/{name}.png is stale; put the one there that "
        f"`deltacontrol figures --preset paper --only {name}` draws"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", base.names())
def test_the_gallery_is_a_redraw(name: str, tmp_path: Path) -> None:
    Figures(preset="paper", only=(name,), out=tmp_path).run()
    drawn, shown = imread(tmp_path / f"{name}.png"), imread(base.GALLERY / f"{name}.png")
    assert differing(drawn, shown) <= TOLERANCE, (
        f"paper_figures/gallery/{name}.png is stale; put the one there that "
        f"`deltacontrol figures --preset paper --only {name}` draws"
    )


def test_a_moved_marker_is_seen() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = []
    for x in (0.5, 0.52):
        figure = Figure(figsize=(base.PAGE_WIDTH, 4.5), dpi=300)
        figure.subplots().scatter([x, 0, 1], [0.5, 0, 1], s=14, color="black")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()) / 255)
    assert differing(pictures[0], pictures[0].copy()) == 0.0
    assert differing(*pictures) > 4 * TOLERANCE
    assert differing(pictures[0], pictures[1][:-1]) == 1.0


@pytest.mark.parametrize("name", readme.own())
@pytest.mark.one_in(2)
def test_the_readme_says_what_the_figure_shows(name: str) -> None:
    rows = gallery().splitlines()
    assert rows_table((), [readme.cells(name)]).splitlines()[-1] in rows, (
        f"the gallery in README.md is stale at {name}; put what "
        "deltacontrol.paper_figures.readme.markdown() returns between its markers"
    )


def test_the_readme_shows_each_figure_once_and_in_order() -> None:
    shown = re.findall(r'href="paper_figures/gallery/(\w+)\.png"', gallery())
    assert shown == readme.own()


def test_only_a_readme_with_markers_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "markdown", lambda: "the gallery\n")
    path = tmp_path / "README.md"
    assert not readme.update(path)
    path.write_text("no markers", encoding="utf-8")
    assert not readme.update(path) and path.read_text(encoding="utf-8") == "no markers"
    path.write_text(f"before\n{readme.BEGIN}old\n{readme.END}\nafter\n", encoding="utf-8")
    assert readme.update(path)
    text = f"before\n{readme.BEGIN}the gallery\n{readme.END}\nafter\n"
    assert path.read_text(encoding="utf-8") == text


def gallery() -> str:
    return readme.README.read_text(encoding="utf-8").split(readme.BEGIN)[1].split(readme.END)[0]
