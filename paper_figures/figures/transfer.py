"""What the control of one task is worth for another, by kinds of tasks and by nearness of controls.

Points are 100 × test accuracy, and a gain is what the model without a control has not; a training
that diverged has the accuracy of the majority class. Some controls help every task, and some tasks
are helped by every control, so that a gain y of source s and target t is taken apart,

    y_st = a_s + b_t + c · [s and t are of one kind] + rest,

and c is tested by permuting the kinds among the tasks (Freedman & Lane, J. Bus. Econ. Stat. 1(4),
1983: what a_s and b_t explain is taken out of both sides first). For nearness the cosine of the two
tasks' updates stands in the place of the kinds, and the tasks are permuted (Mantel, Cancer Research
27(2), 1967). Pairs of tasks of one corpus, a task with itself among them, take no part: texts of
the target may have been seen in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.studies.transfer.grid import TASKS
from deltacontrol.paper_figures.agreement import Agreement
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.marks import beside, counted, joined, letter, number
from deltacontrol.theory.errors import InputError

TITLE = "Controls of one task on others"
STUDY = "transfer"

PERMUTATIONS = 9999
LEVEL = 0.05
WAYS = {"probe": "under a new head", "tuned": "as a start"}
COLORS = {True: "#0072B2", False: "#999999"}
INK = "#222222"


@dataclass(frozen=True)
class Tested:
    """A number, and the share of permutations that reach it on either side.

    Attributes:
        value: of the data.
        above: P(permuted ≥ value), the data counted too.
        below: P(permuted ≤ value).
    """

    value: float
    above: float
    below: float

    def text(self, digits: int = 1) -> str:
        """The value, and the smaller of the two shares doubled."""
        return f"{self.value:+.{digits}f} (p = {self.p:.2g})"

    @property
    def p(self) -> float:
        """Of both sides."""
        return min(1.0, 2 * min(self.above, self.below))


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per source, target and seed: accuracies, and gains on the model without a control.

    Raises:
        InputError: the runs without a source are lacking.
    """
    labels = [str(record.config["source"]) for record in records]
    check_replicates(records, labels)
    rows = [
        {
            "source": source,
            "target": target,
            "seed": record.config["seed"],
            **{way: 100 * _accuracy(found, way) for way in WAYS},
            "diverged": found["tuned"] is None,
            "majority": 100 * found["majority_share"],
            "own": 100 * number(record.result["own"]),
            "norm": record.result.get("norm", math.nan),
            "model": record.config["model"],
            "delta": record.config["delta"]["name"],
            "steps": record.config["steps"],
            "tune_steps": record.config["tune_steps"],
            "run": record.id,
        }
        for record, source in zip(records, labels, strict=True)
        for target, found in record.result["targets"].items()
    ]
    frame = pd.DataFrame(rows)
    base = frame[frame["source"] == ""].set_index(["target", "seed"])
    keys = [tuple(key) for key in frame[["target", "seed"]].to_numpy()]
    if missing := set(keys) - set(base.index):
        raise InputError(f"the run without a source is lacking, such as for {sorted(missing)[0]}")
    for way in WAYS:
        frame[f"{way}_gain"] = frame[way] - base[way].loc[keys].to_numpy()
    places = {task: place for place, task in enumerate(["", *TASKS])}
    return frame.sort_values(
        ["source", "target", "seed"],
        key=lambda column: column if column.name == "seed" else column.map(places),
    ).reset_index(drop=True)


def _accuracy(found: Mapping[str, Any], way: str) -> float:
    return float(found["majority_share"] if found[way] is None else found[way])


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Per source and target the mean gains, whether they are of one kind, and the cosine of ΔW."""
    frame, near = table(records), _cosines(records)
    rows = []
    tuned = frame[frame["source"] != ""]
    for (source, target), runs in tuned.groupby(["source", "target"], sort=False):
        rows.append(
            {
                "source": source,
                "target": target,
                "same_kind": TASKS[str(source)].kind == TASKS[str(target)].kind,
                "same_corpus": TASKS[str(source)].corpus == TASKS[str(target)].corpus,
                "cosine": near.get((str(source), str(target)), math.nan),
                **{f"{way}_gain": runs[f"{way}_gain"].mean() for way in WAYS},
            }
        )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a source: mean gains of itself, of its kind and of others, of other corpora."""
    rows = []
    for source, runs in table[table["source"] != ""].groupby("source", sort=False):
        own = TASKS[str(source)]
        kinds = np.array([TASKS[t].kind == own.kind for t in runs["target"]])
        others = np.array([TASKS[t].corpus != own.corpus for t in runs["target"]])
        itself = (runs["target"] == source).to_numpy()
        row = {"source": source, "kind": own.kind, "own": f"{runs['own'].mean():.1f}"}
        for way, words in WAYS.items():
            gains = runs[f"{way}_gain"].to_numpy(float)
            for name, chosen in (
                ("itself", itself), ("its kind", kinds & others), ("others", ~kinds & others)
            ):  # fmt: skip
                told = f"{gains[chosen].mean():+.1f}" if chosen.any() else ""
                row[f"{words}: {name}"] = told
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Both matrices; below, gains within and between kinds, and against nearness."""
    figure = Figure(figsize=(PAGE_WIDTH, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=[1.35, 1.0])
    for ax, way in zip(axes[0], WAYS, strict=True):
        _draw_matrix(ax, curves, way)
    _draw_kinds(axes[1, 0], curves)
    _draw_nearness(axes[1, 1], curves)
    letter(axes.flat)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What tasks of one kind gain from each other, and how it was measured."""
    first, kinds = table.iloc[0], {way: kinds_apart(table, way) for way in WAYS}
    told = [f"{kinds[way].text()} points {words}" for way, words in WAYS.items()]
    diverged = int(table["diverged"].sum())
    seeds = counted(table["seed"].nunique(), "seed")
    return (
        f"The control of a task of the same kind gains {' and '.join(told)} more than that of "
        f"another kind. As a start it gains, within a kind, {joined(_by_kind(table))} points. "
        f"{TITLE}: {first['delta']} on {first['model']}, "
        f"{counted(table['target'].nunique(), 'task')}, means over {seeds}, in points of test "
        "accuracy above the model without a control. (a) The control stays and a linear head is "
        f"fitted to the target's rows. (b) Control and head are trained for {first['tune_steps']} "
        "updates. Rows: the task whose control it is; squares: tasks of one kind. (c) The same by "
        "kind, pairs of different corpora; bars are means. (d) Gain under a new head against the "
        "cosine of the weight updates of the two tasks, of different corpora. What a control gains "
        "on all tasks, and a task from all controls, is taken out of what is tested; p: "
        "permutations of the tasks."
        + (f" {diverged} of {len(table)} trainings diverged." if diverged else "")
    )


def _by_kind(table: pd.DataFrame) -> list[str]:
    """Mean gain as a start of the tasks of a kind from each other, of those with two corpora."""
    gains, names = _matrix(table, "tuned")
    kinds = np.array([TASKS[name].kind for name in names])
    told = []
    for kind in dict.fromkeys(kinds):
        inside = (kinds[:, None] == kind) & (kinds[None, :] == kind) & _apart(names)
        if inside.any():
            told.append(f"{gains[inside].mean():+.1f} ({kind})")
    return told


def agreement(table: pd.DataFrame) -> list[Agreement]:
    """The published finding on kinds beside ours."""
    found = []
    for way, words in WAYS.items():
        tested = kinds_apart(table, way)
        agrees = True if tested.above < LEVEL / 2 else False if tested.below < LEVEL / 2 else None
        text = f"a control {words} transfers better within a kind of tasks"
        ours = f"{tested.text()} points"
        found.append(Agreement("transfer", text, "better within", ours, agrees))
    return found


def kinds_apart(table: pd.DataFrame, way: str) -> Tested:
    """c: what tasks of one kind gain more, the kinds permuted among the tasks."""
    gains, names = _matrix(table, way)
    kinds = np.array([TASKS[name].kind for name in names])
    same = (kinds[:, None] == kinds[None, :]).astype(float)
    return _permuted(gains, same, _apart(names))


def nearness(curves: pd.DataFrame, way: str) -> Tested:
    """The same for the cosine of the updates: points per unit, the tasks permuted."""
    names = [task for task in TASKS if task in set(curves["source"])]
    gains, cosines = (
        curves.pivot(index="source", columns="target", values=what)
        .loc[names, names]
        .to_numpy(float)
        for what in (f"{way}_gain", "cosine")
    )
    return _permuted(gains, cosines, _apart(names))


def _permuted(gains: np.ndarray, explains: np.ndarray, used: np.ndarray) -> Tested:
    """The coefficient of what explains, with effects of sources and targets taken out of both.

    Args:
        gains: (tasks, tasks).
        explains: (tasks, tasks), whose tasks are permuted.
        used: which cells take part (tasks, tasks).
    """
    count = len(gains)
    sources, targets = np.nonzero(used)
    effects = np.zeros((len(sources), 2 * count))
    effects[np.arange(len(sources)), sources] = 1.0
    effects[np.arange(len(sources)), count + targets] = 1.0
    left = np.linalg.svd(effects, full_matrices=False)
    basis = left.U[:, left.S > 1e-9 * left.S[0]]
    y = gains[used] - basis @ (basis.T @ gains[used])

    def coefficients(orders: np.ndarray) -> np.ndarray:
        """One for each order of the tasks (orders, tasks)."""
        x = explains[orders[:, sources], orders[:, targets]]
        x = x - (x @ basis) @ basis.T
        sizes = (x * x).sum(1)
        known = np.where(sizes > 1e-12, sizes, np.nan)
        return (x @ y) / known

    value = float(coefficients(np.arange(count)[None])[0])
    if not math.isfinite(value):  # nothing is explained, or a gain is no number
        return Tested(value, 1.0, 1.0)
    generator = np.random.default_rng(0)
    orders = np.array([generator.permutation(count) for _ in range(PERMUTATIONS)])
    drawn = coefficients(orders)
    drawn = drawn[np.isfinite(drawn)]
    tolerance = 1e-9 * max(1.0, abs(value))  # sums in another order are the same number
    above, below = ((drawn >= value - tolerance).sum(), (drawn <= value + tolerance).sum())
    return Tested(value, float(above + 1) / (len(drawn) + 1), float(below + 1) / (len(drawn) + 1))


def _matrix(table: pd.DataFrame, way: str) -> tuple[np.ndarray, list[str]]:
    """Mean gains (sources, targets), and the names of the tasks."""
    tuned = table[table["source"] != ""]
    wide = tuned.groupby(["source", "target"])[f"{way}_gain"].mean().unstack("target")
    names = [task for task in TASKS if task in wide.index]
    return wide.loc[names, names].to_numpy(float), names


def _apart(names: Sequence[str]) -> np.ndarray:
    """Pairs of tasks of different corpora."""
    corpora = np.array([TASKS[name].corpus for name in names])
    return corpora[:, None] != corpora[None, :]


def _cosines(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Mean over seeds of the cosine of two tasks' updates, from their sketches."""
    by_seed: dict[int, dict[str, np.ndarray]] = {}
    for record in records:
        if "sketch" in record.result:
            vector = np.asarray(record.result["sketch"], dtype=float)
            tasks = by_seed.setdefault(int(record.config["seed"]), {})
            tasks[str(record.config["source"])] = vector / max(float(np.linalg.norm(vector)), 1e-30)
    pairs: dict[tuple[str, str], list[float]] = {}
    for _, vectors in sorted(by_seed.items()):
        for one in vectors:
            for other in vectors:
                pairs.setdefault((one, other), []).append(float(vectors[one] @ vectors[other]))
    return {pair: float(np.mean(values)) for pair, values in pairs.items()}


def _draw_matrix(ax: Axes, curves: pd.DataFrame, way: str) -> None:
    wide = curves.pivot(index="source", columns="target", values=f"{way}_gain")
    names = [task for task in TASKS if task in wide.index]
    gains = wide.loc[names, names].to_numpy(float)
    top = max(1.0, float(np.nanquantile(np.abs(gains), 0.97)))
    shown = ax.imshow(gains, cmap="RdBu", vmin=-top, vmax=top)
    ax.figure.colorbar(shown, cax=beside(ax), extend="both")
    kinds = [TASKS[name].kind for name in names]
    for kind in dict.fromkeys(kinds):
        first, count = kinds.index(kind), kinds.count(kind)
        x = np.array([0, 0, 1, 1, 0]) * count + first - 0.5
        y = np.array([0, 1, 1, 0, 0]) * count + first - 0.5
        ax.plot(x, y, color=INK, linewidth=1.0)
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(names)), names, fontsize=6, **turned)  # type: ignore[arg-type]
    ax.set_yticks(range(len(names)), names if way == "probe" else [], fontsize=6)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.set_title(f"gain {WAYS[way]} (points)")


def _draw_kinds(ax: Axes, curves: pd.DataFrame) -> None:
    others = curves[~curves["same_corpus"]]
    generator = np.random.default_rng(0)
    labels = []
    for place, (way, same) in enumerate((w, s) for w in WAYS for s in (True, False)):
        gains = others.loc[others["same_kind"] == same, f"{way}_gain"].to_numpy(float)
        heights = place + generator.uniform(-0.25, 0.25, len(gains))
        ax.scatter(gains, heights, s=5, color=COLORS[same], linewidths=0, alpha=0.8)
        mean = float(gains.mean())
        ax.plot([mean, mean], [place - 0.35, place + 0.35], color=INK, linewidth=1.6)
        labels.append(f"{WAYS[way]},\n{'one kind' if same else 'other kinds'}")
    ax.axvline(0, color=INK, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("gain (points)")
    ax.set_title("within and between kinds")


def _draw_nearness(ax: Axes, curves: pd.DataFrame) -> None:
    others = curves[~curves["same_corpus"]]
    for same, rows in others.groupby("same_kind"):
        ax.scatter(
            rows["cosine"], rows["probe_gain"], s=8, color=COLORS[bool(same)], linewidths=0
        )  # fmt: skip
    found = nearness(curves, "probe")
    ax.axhline(0, color=INK, linewidth=0.8, zorder=0)
    ax.set_xlabel("cosine of the updates")
    ax.set_ylabel("gain (points)")
    ax.set_title(f"nearness: {found.text()} per unit")
