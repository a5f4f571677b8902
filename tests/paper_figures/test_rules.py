"""Rules that every figure keeps, held against the pictures that readers see."""

from itertools import combinations

import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deltacontrol.paper_figures import base
from deltacontrol.paper_figures.marks import apart, end_labels, share_interval
from tests.paper_figures.looking import axes, boxes, drawn_in, legends, words
from tests.paper_figures.synthetic import committed

LEAST = 6.0  # points: what can be read in print


@pytest.fixture(scope="module")
def shown(name: str) -> Figure:
    """Each figure, drawn from its committed records."""
    figure, records = base.load(name), committed(name)
    with matplotlib.style.context(["default", base.STYLE]):
        picture = figure.draw(figure.table(records), figure.curves(records))
        FigureCanvasAgg(picture).draw()
    return picture


def test_no_legend_lies_on_data(shown: Figure) -> None:
    for legend in legends(shown):
        box = legend.get_window_extent(FigureCanvasAgg(shown).get_renderer())
        for ax in axes(shown):
            found = drawn_in(ax, box)
            assert not found, f"{ax.get_title(loc='left')}: a legend lies on {found}"


def test_no_words_lie_on_words(shown: Figure) -> None:
    for (one, its_box), (two, other) in combinations(boxes(shown), 2):
        assert not its_box.padded(-1.0).overlaps(other.padded(-1.0)), f"{one!r} lies on {two!r}"


def test_words_can_be_read_and_are_whole(shown: Figure) -> None:
    page = shown.bbox.padded(1.0)
    for text in words(shown):
        assert text.get_fontsize() >= LEAST, text.get_text()
        assert "…" not in text.get_text() and "..." not in text.get_text(), text.get_text()
    for text, box in boxes(shown):
        inside = all(page.containsx(x) and page.containsy(y) for x, y in box.corners())
        assert inside, f"{text!r} leaves the page"


def test_no_legend_shows_error_bars(shown: Figure) -> None:
    for legend in legends(shown):
        bars = [h for h in legend.legend_handles if isinstance(h, Collection)]
        assert not bars, f"{[t.get_text() for t in legend.get_texts()]} show error bars"


@pytest.mark.parametrize("drawn", ["line", "dots", "bars", "band", "nothing"])
def test_a_legend_on_data_is_seen(drawn: str) -> None:
    picture = Figure(figsize=(3.5, 2.0))
    ax = picture.subplots()
    x = np.linspace(0, 1, 2 if drawn == "line" else 9)
    if drawn == "line":
        ax.plot(x, x)
    elif drawn == "dots":
        ax.scatter(x, x)
    elif drawn == "bars":
        ax.errorbar(x, x, yerr=0.1, fmt="none")
    elif drawn == "band":
        ax.fill_between(x, x - 0.1, x + 0.1)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.legend(handles=[Line2D([], [], label="a legend in the middle")], loc="center")
    FigureCanvasAgg(picture).draw()
    (legend,) = legends(picture)
    box = legend.get_window_extent(FigureCanvasAgg(picture).get_renderer())
    assert bool(drawn_in(ax, box)) is (drawn != "nothing")


@pytest.mark.parametrize("name", ["performance"], indirect=True, scope="module")
@pytest.mark.slow
def test_no_mark_of_an_accuracy_leaves_0_to_1(shown: Figure) -> None:
    panels = [ax for ax in axes(shown) if "accuracy" in ax.get_title(loc="left")]
    drawn = np.concatenate(
        [np.asarray(line.get_xdata(), dtype=float) for ax in panels for line in ax.lines]
    )
    assert len(drawn) > 20 and (drawn >= 0).all() and (drawn <= 1).all()


@pytest.mark.parametrize("name", base.names())
@pytest.mark.one_in(2)
def test_a_caption_begins_with_what_the_figure_shows(name: str) -> None:
    figure = base.load(name)
    found = base.finding(figure.caption(figure.table(committed(name))))
    assert any(character.isdigit() for character in found) and figure.TITLE not in found
    assert 30 < len(found) < 400, found


def test_an_interval_of_shares_stays_within_0_and_1() -> None:
    for shares in ((0.60, 0.81, 0.82), (0.99, 1.0, 1.0), (0.0, 0.01), (0.5, float("nan"), 0.9)):
        ends = share_interval(shares)
        assert ends is not None and 0 < ends[0] <= ends[1] < 1
        kept = [s for s in shares if s == s]
        assert ends[0] <= np.mean(kept) <= ends[1]
    assert share_interval((0.4,)) is None
    # Of log-odds -x and x the mean is 0, and Student's t with one degree has the quantile 12.706.
    odds = np.log(0.6 / 0.4)
    low, high = share_interval((0.4, 0.6)) or (0.0, 0.0)
    assert high == pytest.approx(1 / (1 + np.exp(-12.7062047362 * odds)), rel=1e-9)
    assert low == pytest.approx(1 - high, rel=1e-9)


def test_places_are_moved_apart_and_no_further() -> None:
    assert apart([3.0, 1.0], 0.5).tolist() == [3.0, 1.0]
    assert apart([1.0, 1.0, 1.0], 0.5) == pytest.approx([0.5, 1.0, 1.5])
    moved = apart([0.0, 0.1, 5.0], 1.0)
    assert moved == pytest.approx([-0.45, 0.55, 5.0])
    assert apart([], 1.0).tolist() == []
    assert apart([0.9, 1.0], 0.5, 0.0, 1.0) == pytest.approx([0.5, 1.0])
    assert apart([0.1, 0.0, 0.05], 0.2, 0.0, 1.0) == pytest.approx([0.4, 0.0, 0.2])


def test_names_of_lines_that_end_at_one_place_do_not_meet() -> None:
    picture = Figure(figsize=(3.5, 2.0), layout="constrained")
    ax = picture.subplots()
    for name in "abc":
        ax.plot([1, 2], [1, 10], label=name)
    ax.set_yscale("log")
    end_labels(ax, [(2.0, 10.0, name, "black") for name in ("a line", "another", "a third")])
    FigureCanvasAgg(picture).draw()
    found = [box for text, box in boxes(picture) if text in ("a line", "another", "a third")]
    assert len(found) == 3
    assert not any(one.overlaps(two) for one, two in combinations(found, 2))
    assert all(box.x0 > ax.get_window_extent().x1 for box in found)
