"""Subsets of adapter, BitFit and prompt tuning beside the adapter alone, and deltas in turn.

Points are 100 × accuracy on test rows, the mean over seeds of a task. Every task is of a corpus of
its own, so that intervals are taken over tasks. A run that diverged has the points of the majority
class. In turn, a stage is measured on validation rows. What a template gains is over a head on the
same model, rows and seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.studies.combination import grid as study
from deltacontrol.paper_figures.agreement import (
    Agreement,
    no_gain,
    same_order,
    same_side,
    same_size,
)
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.clusters import Clusters, Estimate
from deltacontrol.paper_figures.marks import counted, joined, letter, number

TITLE = "Adapter, BitFit and prompt tuning, together and in turn"
STUDY = "combination"

REFERENCE = "houlsby"
SHORT = {"houlsby": "AP", "bitfit": "BF", "prompt": "PT", "head": "none"}
# Ding et al., Nature Machine Intelligence 5, 2023, Table 2: averages over GLUE, RoBERTa-large, all
# rows, no template. Without a delta nothing is trained there, and the head is trained here.
PUBLISHED = {
    **{"houlsby": 87.4, "bitfit": 86.6, "houlsby+bitfit": 87.1, "prompt": 77.7},
    **{"houlsby+prompt": 86.6, "bitfit+prompt": 86.5, "houlsby+bitfit+prompt": 87.0},
}
# The same with manual templates.
PUBLISHED_TEMPLATE = {
    **{"houlsby": 87.4, "bitfit": 86.8, "houlsby+bitfit": 87.3, "prompt": 77.4},
    **{"houlsby+prompt": 86.9, "bitfit+prompt": 86.9, "houlsby+bitfit+prompt": 86.8},
}
# SST-2, 16 rows a class, without templates.
PUBLISHED_FEW = {"houlsby": 92.7, "houlsby+bitfit": 93.1, "prompt": 74.9, "houlsby+prompt": 91.7}
PUBLISHED_FEW |= {"houlsby+bitfit+prompt": 91.6}
MARGIN = 1.0  # points: a gain below it is none
ALL, FEW, IN_TURN = "all rows", "16 rows a class", "in turn"
FORM_BLOCKS = [f"{rows}, {form}" for rows in (ALL, FEW) for form in (study.HEAD, study.TEMPLATE)]
BLOCKS = (ALL, FEW, IN_TURN, *FORM_BLOCKS)
COLORS = {ALL: "#0072B2", FEW: "#D55E00"}
INK = "#222222"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run, and one per stage of a sequence."""
    labels = [_label(record) for record in records]
    check_replicates(records, labels)
    rows = []
    for record, (block, task, method) in zip(records, labels, strict=True):
        result, config = record.result, record.config
        majority = number(result["majority_share"])
        for stage, accuracy in _accuracies(record):
            found = number(accuracy)
            rows.append(
                {
                    "block": block,
                    "task": task,
                    "category": study.TASKS[task],
                    "method": method,
                    "stage": stage,
                    "seed": config["seed"],
                    "points": 100 * (majority if np.isnan(found) else found),
                    "majority": 100 * majority,
                    "loss_gap": number(result["loss"]) - number(result["final_train_loss"]),
                    "learning_rate": config["learning_rate"],
                    "trainable_share": result["trainable_share"],
                    "model": config["model"],
                    "steps": config["steps"],
                    "batch_size": config["batch_size"],
                    "status": record.status,
                    "run": record.id,
                }
            )
    return pd.DataFrame(sorted(rows, key=_place))


def _place(row: Mapping[str, Any]) -> tuple:
    """Blocks, tasks and subsets in the order of the study."""
    known = {label: place for place, label in enumerate(map(study.name, study.subsets()))}
    place = known.get(row["method"], len(known))
    task = list(study.TASKS).index(row["task"])
    return BLOCKS.index(row["block"]), task, place, row["method"], row["seed"], row["stage"]


def _label(record: Record) -> tuple[str, str, str]:
    config = record.config
    deltas = [delta["name"] for delta in config["deltas"]]
    if config.get("sequential"):
        return IN_TURN, config["task"], " > ".join(deltas)
    rows, form = FEW if config.get("shots") else ALL, study.form_of(config)
    return f"{rows}, {form}" if form else rows, config["task"], study.name(deltas)


def _accuracies(record: Record) -> list[tuple[int, float | None]]:
    """Accuracy after each stage of a sequence, from 1; else that on test rows, as stage 0."""
    if not record.config.get("sequential"):
        return [(0, record.result["accuracy"])]
    found = record.curve().reindex(columns=["stage", "validation_accuracy"]).dropna()
    ends = found.groupby("stage", sort=False)["validation_accuracy"].last()
    accuracies = [ends.get(delta["name"]) for delta in record.config["deltas"]]
    return list(enumerate(accuracies, start=1))


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Every number that is drawn as a mean with its interval."""
    frame = table(records)
    rows = []
    for block in _blocks(frame):
        for what, wide in (
            ("points above AP", _above(frame, block)),
            ("loss gap", _wide(frame, block, "loss_gap")),
        ):
            for method, found in _averages(wide.dropna()).items():
                rows.append({"block": block, "what": what, "method": method, **vars(found)})
    for rows_seen in _with_forms(frame):
        for method, found in _averages(_gained(frame, rows_seen)).items():
            what = {"block": rows_seen, "what": "template less head", "method": method}
            rows.append(what | vars(found))
    for (method, stage), runs in groups(frame[frame["block"] == IN_TURN], ["method", "stage"]):
        mean = runs.groupby("task")["points"].mean().mean()
        rows.append({"block": IN_TURN, "what": f"stage {stage}", "method": method, "value": mean})
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a subset: its averages, and what it gains on the adapter alone."""
    rows = []
    for block in _blocks(table):
        points, above = _averages(_wide(table, block, "points")), _averages(_above(table, block))
        gains = _averages(_gained(table, block)) if block in _with_forms(table) else {}
        for method in points:
            runs = table[(table["block"] == block) & (table["method"] == method)]
            published = PUBLISHED.get(method) if block == ALL else None
            rows.append(
                {
                    "rows": block,
                    "subset": _short(method),
                    "trained (%)": f"{100 * runs['trainable_share'].median():.2g}",
                    "average": points[method].text(),
                    "above AP": "" if method == REFERENCE else above[method].text(sign="+"),
                    "published average": "" if published is None else f"{published:.1f}",
                    "template less head": gains[method].text(sign="+") if method in gains else "",
                    "learning rate": f"{runs['learning_rate'].iloc[0]:g}",
                }
            )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """What subsets gain on the adapter; gap of the losses, and sequences; what templates gain."""
    templates = _with_forms(table)
    figure = Figure(figsize=(PAGE_WIDTH, 7.2 if templates else 5.0), layout="constrained")
    grid = figure.add_gridspec(3 if templates else 2, 2)
    axes = np.array([[figure.add_subplot(grid[i, j]) for j in (0, 1)] for i in (0, 1)])
    blocks = _blocks(table)
    for ax, block in zip(axes[0], (ALL, FEW), strict=True):
        if block in blocks:
            _draw_above(ax, table, block)
    _draw_gaps(axes[1, 0], curves, blocks)
    _draw_in_turn(axes[1, 1], curves)
    last = [figure.add_subplot(grid[2, j]) for j, _ in enumerate(templates)]
    for ax, rows_seen in zip(last, templates, strict=True):
        _draw_gained(ax, table, rows_seen)
    letter([*axes.flat, *last])
    return figure


def caption(table: pd.DataFrame) -> str:
    """What subsets gain on the adapter alone, and how it was measured."""
    block = _blocks(table)[0]
    above, first = _averages(_above(table, block)), table.iloc[0]
    added = _added(_above(table, block))
    seeds = table.groupby(["block", "task", "method"])["seed"].nunique()
    sentences = [
        f"With {block}, adding to an adapter gains {added.text(sign='+')} points in the mean over "
        f"what is added, and prompt tuning alone is {above['prompt'].text(sign='+')} from it.",
        f"{TITLE}: AP adapter (Houlsby), BF BitFit, PT prompt, none the head alone; "
        f"{first['model']}, {first['steps']} updates of {first['batch_size']} rows, "
        f"{counted(seeds.min(), 'seed')}, {counted(table['task'].nunique(), 'task')} of as many "
        "corpora. (a, b) Points of test accuracy above the adapter alone: a dot is a task, the "
        "diamond the mean over tasks with its 95 % interval, drawn from tasks; crosses are the "
        "published averages of GLUE with RoBERTa-large (Ding et al., 2023, Table 2). (c) Loss on "
        "test rows less the mean training loss of the last ten updates; with all rows each is seen "
        "once. (d) Accuracy on validation rows after each stage of a sequence, mean over "
        f"{joined(_in_turn(table))}; the text names the order.",
    ]
    templates = _with_forms(table)
    if templates:
        gains = [f"{_template_gain(table, rows).text(sign='+')} with {rows}" for rows in templates]
        forms = table[table["block"].isin(FORM_BLOCKS)]
        panels = " and ".join(f"({letter})" for letter in "ef"[: len(templates)])
        sentences.append(
            f"A template with a word for each class gains {joined(gains)} points on a head, in the "
            f"mean over subsets ({forms['model'].iloc[0]}, "
            f"{counted(forms['task'].nunique(), 'task')}); {panels} show it by subset."
        )
    constant = int((table["status"] == "diverged").sum())
    if constant:
        sentences.append(f"{constant} of {len(table)} rows are of runs that diverged.")
    return " ".join(sentences)


def agreement(table: pd.DataFrame) -> list[Agreement]:
    """The published table of combinations beside ours."""
    above, points = _above(table, ALL), _wide(table, ALL, "points")
    clusters, order = _clusters(points), sorted(PUBLISHED, key=lambda m: -PUBLISHED[m])
    names = [_short(method) for method in order]
    found = [same_order("combination, all rows", order, points, clusters, names=names)]
    text = "adding BitFit, prompt tuning or both to an adapter gains nothing"
    published = _gain(PUBLISHED)
    found.append(no_gain("combination, all rows", text, published, _added(above), MARGIN))
    pairs = [(m, f"{m}+prompt") for m in ("houlsby", "bitfit", "houlsby+bitfit")]
    added = pd.concat([points[more] - points[less] for less, more in pairs], axis=1)
    mean = clusters.of_means(added, lambda means: means.mean(axis=1))
    published = float(np.mean([PUBLISHED[more] - PUBLISHED[less] for less, more in pairs]))
    text = "adding prompt tuning to other deltas gains nothing"
    found.append(no_gain("combination, all rows", text, published, mean, MARGIN))
    prompt = clusters.of_means(above[["prompt"]])
    text = "prompt tuning alone is behind the adapter"
    less = PUBLISHED["prompt"] - PUBLISHED[REFERENCE]
    found.append(same_side("combination, all rows", text, less, prompt))
    if FEW in _blocks(table):
        found += _few(table)
    if ALL in _with_forms(table):
        change = [PUBLISHED_TEMPLATE[m] - PUBLISHED[m] for m in PUBLISHED]
        text = "templates move the averages of tuned deltas by less than a point"
        ours = _template_gain(table, ALL)
        row = "combination, templates"
        found.append(same_size(row, text, float(np.mean(change)), ours, MARGIN))
    return found


def _few(table: pd.DataFrame) -> list[Agreement]:
    """The same with few rows; the source's numbers are of one task, SST-2."""
    above, row = _above(table, FEW), "combination, 16 rows a class (theirs: SST-2)"
    clusters = _clusters(above)
    published, gain = _gain(PUBLISHED_FEW), _added(above)
    less = PUBLISHED_FEW["prompt"] - PUBLISHED_FEW[REFERENCE]
    text = "prompt tuning alone is behind the adapter"
    return [
        no_gain(row, "adding BitFit, prompt tuning or both to an adapter gains nothing",
                published, gain, MARGIN),
        same_side(row, text, less, clusters.of_means(above[["prompt"]])),
    ]  # fmt: skip


def _with_adapter(methods: Iterable[str]) -> list[str]:
    """The subsets with an adapter and something else."""
    return [m for m in methods if REFERENCE in m.split("+") and m != REFERENCE]


def _added(above: pd.DataFrame) -> Estimate:
    """The mean gain of these subsets on the adapter alone."""
    own = above[_with_adapter(map(str, above))]
    return _clusters(above).of_means(own, lambda means: means.mean(axis=1))


def _gain(published: Mapping[str, float]) -> float:
    """The same of published averages."""
    return float(np.mean([published[m] - published[REFERENCE] for m in _with_adapter(published)]))


def _short(method: str) -> str:
    return "+".join(SHORT[part] for part in method.split("+"))


def _blocks(table: pd.DataFrame) -> list[str]:
    return [block for block in (ALL, FEW) if block in set(table["block"])]


def _with_forms(table: pd.DataFrame) -> list[str]:
    """The amounts of rows with which both a head and a template were trained."""
    there = set(table["block"])
    return [rows for rows in (ALL, FEW) if f"{rows}, {study.TEMPLATE}" in there]


def _gained(table: pd.DataFrame, rows: str) -> pd.DataFrame:
    """Points of a template less those of a head: a row a task, a column a subset."""
    template = _wide(table, f"{rows}, {study.TEMPLATE}", "points")
    return template - _wide(table, f"{rows}, {study.HEAD}", "points")


def _template_gain(table: pd.DataFrame, rows: str) -> Estimate:
    """Its mean over subsets."""
    gained = _gained(table, rows)
    return _clusters(gained).of_means(gained, lambda means: means.mean(axis=1))


def _in_turn(table: pd.DataFrame) -> list[str]:
    found = table.loc[table["block"] == IN_TURN, "task"]
    return [task for task in study.TASKS if task in set(found)]


def _wide(table: pd.DataFrame, block: str, what: str) -> pd.DataFrame:
    """The mean over seeds: a row a task, a column a subset."""
    rows = table[table["block"] == block]
    wide = rows.pivot_table(index="task", columns="method", values=what, aggfunc="mean")
    tasks = [task for task in study.TASKS if task in wide.index]
    return wide.loc[tasks, [m for m in map(study.name, study.subsets()) if m in wide.columns]]


def _above(table: pd.DataFrame, block: str) -> pd.DataFrame:
    points = _wide(table, block, "points")
    return points.sub(points[REFERENCE], axis=0)


def _clusters(wide: pd.DataFrame) -> Clusters:
    """Every task is a corpus of its own."""
    return Clusters([str(task) for task in wide.index])


def _averages(wide: pd.DataFrame) -> dict[str, Estimate]:
    clusters = _clusters(wide)
    means = clusters.means(wide)
    return {str(method): clusters.estimate(means[:, i]) for i, method in enumerate(wide)}


def _draw_above(ax: Axes, table: pd.DataFrame, block: str) -> None:
    wide = _above(table, block)
    _draw_means(ax, wide, COLORS[block])
    for place, method in enumerate(map(str, wide)):
        if block == ALL and method in PUBLISHED:
            published = PUBLISHED[method] - PUBLISHED[REFERENCE]
            ax.plot([published], [place - 0.25], "x", color="#CC0000", markersize=4, zorder=4)
    ax.set(title=f"{block}: gain on the adapter alone", xlabel="points above the adapter alone")


def _draw_gained(ax: Axes, table: pd.DataFrame, rows: str) -> None:
    _draw_means(ax, _gained(table, rows), COLORS[rows])
    ax.set(title=f"{rows}: template instead of a head", xlabel="points above the head")


def _draw_means(ax: Axes, wide: pd.DataFrame, color: str) -> None:
    """A row a subset: a dot a task, the diamond their mean with its interval."""
    ax.axvline(0, color=INK, linewidth=0.8, zorder=1)
    for place, (method, found) in enumerate(_averages(wide).items()):
        heights = place + 0.25 + np.zeros(len(wide))
        ax.scatter(wide[method], heights, s=6, color=color, alpha=0.8, linewidths=0, zorder=2)
        ends = [found.low, found.high]
        ax.plot(ends, [place, place], color=INK, marker="|", markersize=4, linewidth=1.2)
        ax.plot([found.value], [place], "D", color=INK, markersize=4, zorder=4)
    ax.set_yticks(range(wide.shape[1]), [_short(str(method)) for method in wide])
    ax.set_ylim(wide.shape[1] - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def _draw_gaps(ax: Axes, curves: pd.DataFrame, blocks: Sequence[str]) -> None:
    for shift, block in zip((-0.15, 0.15), blocks, strict=False):
        gaps = curves[(curves["block"] == block) & (curves["what"] == "loss gap")]
        places = np.arange(len(gaps)) + shift
        for place, low, high in zip(places, gaps["low"], gaps["high"], strict=True):
            ax.plot([low, high], [place, place], color=COLORS[block], marker="|", markersize=3)
        marker = "o" if block == ALL else "s"
        ax.plot(gaps["value"], places, marker, color=COLORS[block], markersize=4, linestyle="")
        names = [_short(method) for method in gaps["method"]]
        ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axvline(0, color=INK, linewidth=0.8, zorder=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("test loss less training loss")
    ax.set_title("test loss beyond training loss")
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=COLORS[block], label=block)
        for marker, block in zip("os", blocks, strict=False)
    ]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=2)


def _draw_in_turn(ax: Axes, curves: pd.DataFrame) -> None:
    from deltacontrol.paper_figures.marks import end_labels

    lines = curves[curves["block"] == IN_TURN]
    colors = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#777777")
    ends = []
    for color, (method, rows) in zip(colors, lines.groupby("method", sort=False), strict=False):
        steps = [int(what.removeprefix("stage ")) for what in rows["what"]]
        ax.plot(steps, rows["value"], color=color, marker="o", markersize=3)
        parts = [SHORT[part] for part in str(method).split(" > ")]
        ends.append((steps[-1], float(rows["value"].iloc[-1]), ", ".join(parts), color))
    ax.set_xticks(range(1, len(study.PARTS) + 1))
    ax.set_xlabel("deltas trained")
    ax.set_ylabel("validation accuracy (%)")
    ax.set_title("one after another")
    end_labels(ax, ends)
