"""The files of a figure, and what the pictures show."""

import re
from dataclasses import replace
from pathlib import Path

import matplotlib.style
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures import base
from deltacontrol.paper_figures.export import Exported, export, to_csv, to_latex
from deltacontrol.theory.errors import InputError
from tests.paper_figures.looking import words
from tests.paper_figures.synthetic import MODULES


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, name: str, records: list[Record]
) -> Exported:
    return export(name, base.load(name), records, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def picture(name: str, records: list[Record]) -> Figure:
    figure = base.load(name)
    with matplotlib.style.context(["default", base.STYLE]):
        drawn = figure.draw(figure.table(records), figure.curves(records))
        FigureCanvasAgg(drawn).draw()
    return drawn


def file(exported: Exported, ending: str) -> Path:
    return next(path for path in exported.files if path.name.endswith(ending))


def test_all_files_are_there_and_nothing_else(name: str, exported: Exported) -> None:
    endings = {".pdf", ".png", ".csv", "-curves.csv", ".tex", ".txt"}
    assert {path.name.removeprefix(name) for path in exported.files} == endings
    assert set(exported.files[0].parent.iterdir()) == set(exported.files)


@pytest.mark.slow
def test_a_redraw_gives_the_same_bytes(
    name: str, records: list[Record], exported: Exported, tmp_path: Path
) -> None:
    again = export(name, base.load(name), records[::-1], tmp_path)
    for one, two in zip(exported.files, again.files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_csv_equals_table(name: str, records: list[Record], exported: Exported) -> None:
    figure = base.load(name)
    for ending, table in ((f"{name}.csv", figure.table), ("-curves.csv", figure.curves)):
        path, expected = file(exported, ending), table(records)
        assert path.read_bytes() == to_csv(expected)
        pd.testing.assert_frame_equal(
            pd.read_csv(path), expected, check_dtype=False, check_exact=False, rtol=1e-9
        )


def test_pdf_has_truetype_fonts_and_no_date(exported: Exported) -> None:
    pdf = file(exported, ".pdf").read_bytes()
    assert b"/Type42" in pdf or b"/FontFile2" in pdf
    assert b"/Type3" not in pdf and b"/CreationDate" not in pdf


def test_png_is_as_wide_as_a_column_or_a_page(exported: Exported) -> None:
    width = imread(file(exported, ".png")).shape[1]
    assert width in (round(300 * base.COLUMN_WIDTH), round(300 * base.PAGE_WIDTH))


@pytest.mark.slow
def test_no_text_is_cut(picture: Figure) -> None:
    page, renderer = picture.bbox.padded(1.0), FigureCanvasAgg(picture).get_renderer()
    for text in words(picture):
        box = text.get_window_extent(renderer)
        inside = all((page.containsx(x) and page.containsy(y)) for x, y in box.corners())
        assert inside, f"{text.get_text()!r} leaves the page: {box}"


def test_captions_take_their_numbers_from_the_table(name: str, records: list[Record]) -> None:
    figure = base.load(name)
    table = figure.table(records)
    caption = figure.caption(table)
    assert re.search("[0-9]", caption)
    if name in MODULES:
        assert MODULES[name].caption(table) in caption


@pytest.mark.parametrize("name", ["performance"], indirect=True, scope="module")
def test_a_diverged_run_has_no_accuracy_and_is_counted(name: str, records: list[Record]) -> None:
    result = records[0].result | {"accuracy": None}
    diverged = [replace(records[0], result=result, status="diverged"), *records[1:]]
    figure = base.load(name)
    table = figure.table(diverged)
    assert "1 of 42 runs diverged" in figure.caption(table)
    assert table["accuracy"].isna().sum() == 1
    figure.draw(table, figure.curves(diverged))


def test_latex_is_escaped() -> None:
    table = to_latex(pd.DataFrame({"a_b (%)": ["82.6 ± 0.5"], "c": ["x & y"]}))
    assert r"a\_b (\%) & c \\" in table
    assert r"82.6 $\pm$ 0.5 & x \& y \\" in table


def test_latex_has_no_character_without_a_meaning(exported: Exported) -> None:
    text = file(exported, ".tex").read_text(encoding="utf-8")
    assert text.isascii(), {character for character in text if not character.isascii()}
    assert not re.search(r"\\\\\s*[\[*]", text)  # an argument of the line end
    words = re.sub(r"\$[^$]*\$", "", text.replace(r"\$", ""))  # without the mathematics
    assert not re.search(r"[<>|^~]", words)
    assert not re.search(r"(?<!\\)[%#_]", words)


def test_latex_of_laws_and_names() -> None:
    table = to_latex(pd.DataFrame({"λ": ["[P; x] |θ₀| >= 1"], "name": ["é"]}))
    assert r"$\lambda$ & name \\" in table
    assert r"{[}P; x{]} $|$$\theta$$_0$$|$ $>$= 1 & é \\" in table
    with pytest.raises(InputError, match="'日' has no LaTeX form"):
        to_latex(pd.DataFrame({"task": ["日"]}))
