"""Which layers and sites reach the output: Gramian spectra, least energies, predicted gains.

The outputs are the two-class margins of a few examples, one each; the control is LoRA at its
untrained start. W is the controllability Gramian of a layer, of a site, or of one site of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import SMALL, beside, end_labels, joined, letter, seed_dot

TITLE = "Reachability of the output from each layer and site of a frozen model"
STUDY = "reachability"

KEYS = ["model", "weights", "seed"]
ALL = "all"
NUM_LINES = 7  # layers whose spectrum is drawn: more tangle
NUMBERS = ("trace", "energy_one", "energy_all", "predicted_gain", "unreachable")
MEASURED = ("loss_drop", "test_accuracy_gain")
MODELS = {"minilm-l6": "MiniLM", "smollm2-135m": "SmolLM2"}
SITES = {
    "attention.query": ("query", "#0072B2", "o"),
    "attention.key": ("key", "#56B4E9", "s"),
    "attention.value": ("value", "#D55E00", "^"),
    "attention.output": ("attn. output", "#E69F00", "v"),
    "mlp.up": ("mlp up", "#009E73", "D"),
    "mlp.down": ("mlp down", "#CC79A7", "P"),
}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per model, seed and part: "all" stands for every layer, or every site."""
    check_replicates(records, [(record.kind, "parts" in record.result, *_key(record)[:2])
                               for record in records])  # fmt: skip
    rows, measured = [], []
    for record in records:
        key = dict(zip(KEYS, _key(record), strict=True))
        if "parts" in record.result:
            for part in record.result["parts"]:
                rows.append(
                    {
                        **key,
                        "layer": ALL if part["layer"] is None else str(part["layer"]),
                        "site": part["site"] or ALL,
                        "layers": int(record.result["num_layers"]),
                        "examples": int(record.config["num_examples"]),
                        **{name: part[name] for name in NUMBERS},
                    }
                )
        else:
            curve = record.curve().astype({"layer": str})
            measured.append(curve[["layer", "site", *MEASURED]].assign(**key))
    parts = pd.DataFrame(rows)
    if measured:
        parts = parts.merge(pd.concat(measured), how="left", on=[*KEYS, "layer", "site"])
    else:
        parts = parts.assign(**dict.fromkeys(MEASURED, np.nan))
    return _ordered(parts)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Eigenvalues of the Gramian of each layer, all its sites together."""
    frames = []
    for record in records:
        if "parts" in record.result:
            curve = record.curve()
            curve = curve[curve["layer"].notna() & curve["site"].isna()]
            key = dict(zip(KEYS, _key(record), strict=True))
            frames.append(curve[["layer", "index", "eigenvalue"]].assign(**key))
    lines = pd.concat(frames).astype({"layer": int})[[*KEYS, "layer", "index", "eigenvalue"]]
    return lines.sort_values([*KEYS, "layer", "index"]).reset_index(drop=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model and site: means over seeds, with their standard deviation."""
    rows = []
    for (model, weights, site), part in groups(table, ["model", "weights", "site"]):
        if weights != "pre-trained" or site == ALL:
            continue
        of_site = part[part["layer"] == ALL]
        single = part[part["layer"] != ALL]
        gains = single.groupby("seed")["loss_drop"].mean()
        accuracy = 100 * single.groupby("seed")["test_accuracy_gain"].mean()
        rows.append(
            {
                "model": MODELS.get(model, model),
                "site": _site(site)[0],
                "trace of W": _spread(of_site["trace"], "{:.3g}"),
                "energy, one margin": _spread(of_site["energy_one"], "{:.3g}"),
                "energy, all margins": _spread(of_site["energy_all"], "{:.3g}"),
                "predicted gain, one layer": _spread(
                    single.groupby("seed")["predicted_gain"].mean(), "{:.3f}"
                ),
                "measured loss drop": _spread(gains, "{:.3f}"),
                "test accuracy gain (%)": _spread(accuracy, "{:.1f}"),
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Spectra and energy maps of each model; energy by depth; predicted against measured gain."""
    models = list(_real(table)["model"].unique())[:2]
    rows = len(models) + 1
    figure = Figure(figsize=(PAGE_WIDTH, 2.5 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 2)
    # Two models side by side, spectra above maps; one model in one row.
    panels = axes[:-1].T if len(models) == 2 else axes[:-1]
    for (upper, lower), model in zip(panels, models, strict=True):
        title = MODELS.get(model) or str(model)
        _draw_spectra(upper, _of(curves, model), title)
        _draw_map(figure, lower, _of(table, model), title)
    _draw_depth(axes[-1, 0], _real(table))
    _draw_gains(axes[-1, 1], table)
    letter(axes.flat)
    return figure


def caption(table: pd.DataFrame) -> str:
    """Where energy is least, how predictions rank, all from the table."""
    real = _real(table)
    seeds, examples = real["seed"].nunique(), joined(_examples(real))
    sentences = [
        f"{'; '.join(_extremes(real))}.",
        f"{TITLE}. The outputs are the two-class margins of {examples}; the control is LoRA "
        f"at B = 0, shared by the examples; {seeds} "
        f"{'seed draws' if seeds == 1 else 'seeds draw'} A and the examples. Lines: eigenvalues of "
        f"the Gramian W of a layer, of at most {NUM_LINES} layers (median over seeds; shaded: "
        "range). Maps: least energy ½‖u‖² that moves the margin of one example by 1, by one site "
        "of one layer (mean over examples and seeds). "
        "Bottom left: the same for all sites of a layer, and for all margins at once, each "
        "towards its label (mean over seeds).",
    ]
    pairs = _pairs(table, "pre-trained")
    if len(pairs) > 2:
        rho = _rank_correlation(pairs)
        sentences.append(
            "Bottom right: gain that the linear-quadratic model predicts at the untrained delta "
            "and fall of the training loss when that site is really tuned alone, dots a seed, "
            f"marks their mean; rank correlation {rho:.2f} over {len(pairs)} sites."
        )
        random = _pairs(table, "random")
        if len(random) > 2:
            sentences.append(
                "Crosses: predictions of the same architecture with random weights, rank "
                f"correlation {_rank_correlation(random):.2f}."
            )
    return " ".join(sentences)


def _extremes(real: pd.DataFrame) -> list[str]:
    """Of each model, the site and layer of the least energy, and of the most."""
    found = []
    for model, part in real.groupby("model", sort=False):
        single = part[(part["layer"] != ALL) & (part["site"] != ALL)]
        means = single.groupby(["layer", "site"])["energy_one"].mean()
        rows = means.reset_index().sort_values("energy_one")
        cheap, dear = rows.iloc[0], rows.iloc[-1]
        found.append(
            f"{MODELS.get(str(model), str(model))}'s output moves with the least energy from the "
            f"{_site(cheap['site'])[0]} of layer {cheap['layer']} ({cheap['energy_one']:.3g}), "
            f"with the most from the {_site(dear['site'])[0]} of layer {dear['layer']} "
            f"({dear['energy_one']:.3g})"
        )
    return found


def _key(record: Record) -> tuple[str, str, int]:
    config = record.config
    weights = "pre-trained" if config["pretrained"] else "random"
    return str(config["model"]), weights, int(config["seed"])


def _site(site: str) -> tuple[str, str, str]:
    return SITES.get(site, (site, "#7A5C3E", "h"))


def _ordered(parts: pd.DataFrame) -> pd.DataFrame:
    sites = {name: index for index, name in enumerate([ALL, *SITES])}
    layer = [-1 if value == ALL else int(value) for value in parts["layer"].astype(str)]
    site = [sites.get(value, len(sites)) for value in parts["site"].astype(str)]
    keys = parts[KEYS].assign(layer=layer, site=site)
    return parts.loc[keys.sort_values([*KEYS, "layer", "site"]).index].reset_index(drop=True)


def _real(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["weights"] == "pre-trained"]


def _of(frame: pd.DataFrame, model: str) -> pd.DataFrame:
    return frame[(frame["model"] == model) & (frame["weights"] == "pre-trained")]


def _examples(table: pd.DataFrame) -> list[str]:
    found = table.drop_duplicates("model")
    return [
        f"{row.examples} examples ({MODELS.get(str(row.model), str(row.model))})"
        for row in found.itertuples()
    ]


def _pairs(table: pd.DataFrame, weights: str) -> pd.DataFrame:
    """Means over seeds of every single site whose tuning was measured."""
    single = table[(table["layer"] != ALL) & (table["site"] != ALL)]
    keys = ["model", "layer", "site"]
    measured = single.groupby(keys, sort=False)["loss_drop"].agg(["mean", "min", "max"])
    measured = measured.dropna().add_prefix("measured_")
    found = single[single["weights"] == weights]
    found = found.groupby(keys, sort=False)["predicted_gain"].agg(["mean", "min", "max"])
    return found.add_prefix("predicted_").join(measured, how="inner").reset_index()


def _rank_correlation(pairs: pd.DataFrame) -> float:
    return float(pairs["predicted_mean"].corr(pairs["measured_mean"], method="spearman"))


def _spread(values: pd.Series, form: str) -> str:
    """`mean ± sd`; empty where nothing was measured, the mean alone for one seed."""
    values = values.dropna()
    if values.empty:
        return ""
    text = form.format(values.mean())
    return text if len(values) < 2 else f"{text} ± {form.format(values.std())}"


def _draw_spectra(ax: Axes, curves: pd.DataFrame, title: str) -> None:
    num_layers = int(curves["layer"].max()) + 1
    shown = np.unique(np.linspace(0, num_layers - 1, NUM_LINES).round().astype(int))
    palette = colormaps["viridis"](np.linspace(0.0, 0.85, num_layers))
    over_seeds = curves.groupby(["layer", "index"])["eigenvalue"].agg(["median", "min", "max"])
    ends = []
    for layer in shown:
        values = over_seeds.loc[layer]
        values = values[values["min"] > 0]
        index, median = values.index.to_numpy() + 1, values["median"].to_numpy()
        color = to_hex(palette[layer])
        ax.plot(index, median, color=color, linewidth=1.1)
        low, high = values["min"].to_numpy(), values["max"].to_numpy()
        ax.fill_between(index, low, high, color=color, alpha=0.18, linewidth=0)
        ends.append((index[-1], median[-1], f"layer {layer}", color))
    ax.set_yscale("log")
    ax.set_xlabel("index $i$")
    ax.set_ylabel(r"eigenvalue $\lambda_i(W_t)$")
    some = "each layer" if len(shown) == num_layers else f"{len(shown)} of {num_layers} layers"
    ax.set_title(f"{title}: spectrum of {some}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    end_labels(ax, ends)


def _draw_map(figure: Figure, ax: Axes, table: pd.DataFrame, title: str) -> None:
    single = table[(table["layer"] != ALL) & (table["site"] != ALL)].astype({"layer": int})
    grid = single.pivot_table("energy_one", "site", "layer", "mean")
    grid = grid.loc[[site for site in SITES if site in grid.index]]
    image = ax.pcolormesh(
        np.arange(grid.shape[1] + 1) - 0.5,
        np.arange(grid.shape[0] + 1) - 0.5,
        grid.to_numpy(),
        norm=LogNorm(),
        cmap="viridis_r",
        edgecolors="white",
        linewidth=0.4,
    )
    ax.set_yticks(range(len(grid)), [_site(site)[0] for site in grid.index])
    ax.invert_yaxis()
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlabel("layer $t$")
    ax.set_title(f"{title}: least energy, one margin")
    bar = figure.colorbar(image, cax=beside(ax))
    bar.set_label(r"$\frac{1}{2}\|u\|^2$")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _draw_depth(ax: Axes, table: pd.DataFrame) -> None:
    whole = table[(table["layer"] != ALL) & (table["site"] == ALL)].astype({"layer": int})
    marks = {"energy_one": ("one margin", "white"), "energy_all": ("all margins", None)}
    looks = zip(whole["model"].unique(), ("#0072B2", "#D55E00"), ("o", "^"), strict=False)
    ends = []
    for model, color, marker in looks:
        part = whole[whole["model"] == model]
        depth = part["layers"].iloc[0] - 1
        for name, (label, face) in marks.items():
            values = part.groupby("layer")[name].agg(["mean", "min", "max"])
            mean, at = values["mean"].to_numpy(), values.index.to_numpy() / depth
            bars = None
            if part["seed"].nunique() > 1:
                bars = np.vstack([mean - values["min"], values["max"] - mean])
            ax.errorbar(
                at,
                mean,
                yerr=bars,
                color=color,
                marker=marker,
                markerfacecolor=face or color,
                markersize=3.2,
                linewidth=0.8,
                linestyle="-" if face is None else "--",
            )
            ends.append((at[-1], mean[-1], f"{MODELS.get(model, model)},\n{label}", color))
    ax.set_yscale("log")
    count = whole["seed"].nunique()
    ranges = f" (bars: range of {count} seeds)" * (count > 1)
    ax.set_xlabel(f"relative depth $t/(L-1)${ranges}")
    ax.set_ylabel(r"least energy $\frac{1}{2}\|u\|^2$")
    ax.set_title("least energy, all sites of a layer")
    end_labels(ax, ends, gap=0.16)


def _draw_gains(ax: Axes, table: pd.DataFrame) -> None:
    random = _pairs(table, "random")
    cross = {"linestyle": "", "marker": "x", "color": "#A0A0A0", "markersize": 3}
    if len(random):
        ax.plot(random["predicted_mean"], random["measured_mean"], **cross)
    pairs = _pairs(table, "pre-trained")
    single = _real(table)
    single = single[(single["layer"] != ALL) & (single["site"] != ALL)]
    for site, rows in pairs.groupby("site", sort=False):
        _, color, marker = _site(str(site))
        runs = single[single["site"] == site]
        ax.scatter(
            runs["predicted_gain"], runs["loss_drop"], s=4, color=color, alpha=0.45, linewidths=0
        )
        ax.plot(
            rows["predicted_mean"], rows["measured_mean"], color=color, marker=marker,
            markersize=4.2, linestyle="", markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
    ax.set_xlabel("predicted gain of one site")
    ax.set_ylabel("measured fall of the loss")
    ax.set_title("predicted and measured gain")
    handles = [
        Line2D([], [], linestyle="", marker=mark, color=color, label=label)
        for site, (label, color, mark) in SITES.items()
        if site in set(pairs["site"])
    ]
    if len(random):
        handles.append(Line2D([], [], label="predicted from random weights", **cross))
    handles.append(seed_dot())
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.2),
        ncols=3,
        handlelength=1.0,
        handletextpad=0.2,
        columnspacing=0.7,
        fontsize=SMALL,
    )
