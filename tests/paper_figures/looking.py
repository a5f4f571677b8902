"""What a reader sees of a drawn figure: its words, and what is drawn of the data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

__all__ = ["boxes", "drawn_in", "legends", "words"]


def words(picture: Figure) -> Iterator[Text]:
    """The texts that are seen: neither empty nor hidden, nor of ticks outside their axis."""
    hidden = {text for ax in axes(picture) for text in _off_scale(ax)}
    for text in picture.findobj(Text):
        assert isinstance(text, Text)
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            yield text


def boxes(picture: Figure) -> list[tuple[str, Bbox]]:
    """Each text that is seen, with the box that it fills, in pixels; an arrow does not count."""
    renderer = FigureCanvasAgg(picture).get_renderer()
    return [(text.get_text(), Text.get_window_extent(text, renderer)) for text in words(picture)]


def axes(picture: Figure) -> list[Axes]:
    return [ax for ax in picture.axes if ax.get_visible()]


def legends(picture: Figure) -> list[Legend]:
    return [*picture.legends, *(found for ax in axes(picture) if (found := ax.get_legend()))]


def drawn_in(ax: Axes, box: Bbox) -> list[str]:
    """What of the data of a panel lies in a box of pixels."""
    found = [f"{line} " for line in ax.lines if line.get_visible() and _meets(line, box)]
    for collection in ax.collections:
        if collection.get_visible() and any(p.intersects_bbox(box) for p in _paths(collection)):
            found.append(str(collection))
    return found


def _meets(line: Line2D, box: Bbox) -> bool:
    path = line.get_path().transformed(line.get_transform())
    joined = line.get_linestyle() not in ("None", "", " ")
    if joined and len(path.vertices) > 1 and path.intersects_bbox(box, filled=False):
        return True
    marked = line.get_marker() not in ("None", "", " ", None)
    return marked and any(box.contains(x, y) for x, y in path.vertices)


def _paths(collection: Collection) -> Iterator[Path]:
    """The paths of a collection in pixels; of dots, their middles."""
    places = np.ma.filled(collection.get_offsets(), np.nan)
    offsets = collection.get_offset_transform().transform(places)
    if len(collection.get_sizes() if hasattr(collection, "get_sizes") else ()):
        for x, y in offsets[np.isfinite(offsets).all(1)]:
            yield Path([(x, y), (x + 0.5, y + 0.5)])
        return
    for path in collection.get_paths():
        yield path.transformed(collection.get_transform())


def _off_scale(ax: Axes) -> Iterator[Text]:
    """Labels of ticks outside their axis, which matplotlib keeps and does not draw."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)
