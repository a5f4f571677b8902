"""A figure with the study behind it: how fast the average of n throws of a die settles."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deltacontrol.experiments.runs.experiment import Experiment, Outcome

TITLE = "The average of a die's throws"
STUDY = "my_figure"


@dataclass(frozen=True)
class Throws(Experiment):
    num_throws: int = 1000
    seed: int = 0

    kind: ClassVar[str] = "throws"

    def to_config(self):
        return asdict(self)

    def execute(self, workspace):
        throws = np.random.default_rng(self.seed).integers(1, 7, self.num_throws)
        steps = np.arange(1, self.num_throws + 1)
        curve = pd.DataFrame({"step": steps, "average": np.cumsum(throws) / steps})
        return Outcome("completed", {"average": float(throws.mean())}, curve)


def experiments(preset):
    return [Throws(100 if preset == "quick" else 10_000, seed) for seed in range(2)]


def table(records):
    rows = [{**r.config, "average": r.result["average"]} for r in records]
    return pd.DataFrame(rows).sort_values("seed", ignore_index=True)


def curves(records):
    runs = [r.curve().assign(seed=r.config["seed"]) for r in records]
    return pd.concat(runs).sort_values(["seed", "step"], ignore_index=True)


def summary(table):
    return table.round(2)


def draw(table, curves):
    figure = Figure(figsize=(3.5, 2.5), layout="constrained")
    ax = figure.subplots()
    for seed, run in curves.groupby("seed"):
        ax.plot(run["step"], run["average"], label=f"seed {seed}")
    ax.set(xlabel="throws", ylabel="average", title=TITLE)
    ax.legend()
    return figure


def caption(table):
    return f"{TITLE}: {table['average'].mean():.2f} over {len(table)} seeds."
