"""The curves of several runs in one picture: the training loss, and a metric on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments.runs.listing import overview
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# The style sheet of all figures, which matplotlib reads as a file of that package.
STYLE = "deltacontrol.paper_figures.style"
STEPS, LOSSES = ("step", "iteration"), ("loss", "objective")
METRICS = ("validation_accuracy", "validation_pearson", "validation_loss")
PAGE_WIDTH, HEIGHT, LINE = 7.2, 2.4, 0.16  # inches; a line of the legend
MOST = 100  # lines of a picture


def table(rows: Sequence[overview.Row]) -> pd.DataFrame:
    """What is drawn: run, label, step, loss, mean, and metric with validation where there is one.

    ``mean`` is that of the losses of the last `window` steps, since each is of a batch alone.

    Raises:
        InputError: a run has no loss over steps, its curve is damaged, or there are too many.
    """
    import pandas as pd

    if len(rows) > MOST:
        raise InputError(
            f"{len(rows)} runs are too many for one picture; choose at most {MOST}, by --where or "
            "--limit"
        )
    parts = []
    for row in rows:
        record, curve = row[0], row[0].curve()
        step = next((name for name in STEPS if name in curve), None)
        loss = next((name for name in LOSSES if name in curve), None)
        if step is None or loss is None:
            raise InputError(
                f"run {record.id} ({record.kind}) has no loss over steps: its curve has "
                f"{', '.join(map(str, curve.columns[:6]))}; draw runs of deltacontrol finetune or "
                "solve"
            )
        metric = next((name for name in METRICS if name in curve), None)
        part = pd.DataFrame({"step": curve[step], "loss": curve[loss]})
        mean = part["loss"].rolling(window(len(part)), min_periods=1).mean()
        part = part.assign(run=record.id, label=overview.label(row, rows), mean=mean)
        if metric is not None:
            part = part.assign(metric=metric.removeprefix("validation_"), validation=curve[metric])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def window(steps: int) -> int:
    """Steps over which the loss is averaged: a twentieth of them."""
    return max(1, steps // 20)


def draw(rows: Sequence[overview.Row]) -> Figure:
    """One panel for the loss, and one for each validation metric that a run has; a line a run.

    Raises:
        InputError: as in `table`.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = table(rows)
    metrics = list(drawn["metric"].dropna().unique()) if "metric" in drawn else []
    with matplotlib.style.context(["default", STYLE]):
        height = HEIGHT + LINE * len(rows)
        size = (PAGE_WIDTH if metrics else PAGE_WIDTH / 2, height)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        dashes = ("-", "--", ":", "-.")
        for place, (record, _) in enumerate(rows):
            run = drawn[drawn["run"] == record.id]
            look = {
                "color": colours[place % len(colours)],
                "linestyle": dashes[place // len(colours) % len(dashes)],
            }
            axes[0].plot(run["step"], run["loss"], alpha=0.2, linewidth=0.6, **look)
            axes[0].plot(run["step"], run["mean"], label=_plain(run["label"].iloc[0]), **look)
            for ax, metric in zip(axes[1:], metrics, strict=True):
                if "metric" in run and run["metric"].iloc[0] == metric:
                    told = run.dropna(subset="validation")
                    ax.plot(told["step"], told["validation"], marker=".", **look)
        for ax, name in zip(axes, ["training loss", *metrics], strict=True):
            ax.set_xlabel("step")
            ax.set_ylabel(name if name == "training loss" else f"validation {name}")
        if (longest := window(int(drawn.groupby("run").size().max()))) > 1:
            axes[0].set_title(f"of batches, and its mean over {longest} steps")
        figure.legend(loc="outside lower left", ncols=1)
        figure.canvas.draw()  # laid out here, since a style counts while something is drawn
    return figure


def _plain(label: str) -> str:
    """A label that matplotlib takes as it is: no mathematics, and none that a legend leaves out."""
    return ("\u2009" if label.startswith("_") else "") + label.replace("$", r"\$")


def save(rows: Sequence[overview.Row], path: Path) -> None:
    """Draw into a file, in the form that its suffix says.

    Raises:
        InputError: as in `table`, or the file has a suffix that matplotlib does not write, or
            cannot be written.
    """
    import matplotlib.style

    picture = draw(rows)
    forms = picture.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in forms:
        raise InputError(
            f"{path} has no suffix of a picture; expected one of {', '.join(sorted(forms))}, such "
            "as curve.png"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.style.context(["default", STYLE]):
            picture.savefig(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
