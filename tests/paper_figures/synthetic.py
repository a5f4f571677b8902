"""Synthetic records of the three studies, written as real runs are: through a `RunStore`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory.dimension.estimate import Baseline, estimate_dimension

STAGES = ["input", *(f"block.{i}" for i in range(6)), "readout"]


@dataclass(frozen=True)
class Synthetic(Experiment):
    """An experiment whose record is made up."""

    kind: ClassVar[str] = "synthetic"
    config: dict[str, Any] = field(default_factory=dict)

    def to_config(self) -> dict[str, Any]:
        return self.config

    def execute(self, workspace: Workspace) -> Outcome:
        raise AssertionError("the figures must not run this")


Grid = list[tuple[Synthetic, dict[str, Any], pd.DataFrame]]

#            accuracy, trainable share
METHODS = {
    "full": (0.83, 1.0),
    "lora": (0.82, 0.0065),
    "houlsby": (0.815, 0.013),
    "bitfit": (0.80, 0.0022),
    "prefix": (0.78, 0.0041),
    "prompt": (0.72, 0.0003),
    "head": (0.70, 0.00003),
}


def performance(seeds: int = 3) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(0)
    for task, shift, majority in (("movie", 0.0, 0.52), ("trec6", 0.08, 0.24)):
        for name, (accuracy, share) in METHODS.items():
            for seed in range(seeds):
                config = {
                    "model": "minilm-l6",
                    "task": task,
                    "deltas": [{"name": name}],
                    "seed": seed,
                    "learning_rate": 2e-4 if name == "full" else 1e-3,
                    "evaluate_on": "test",
                }
                result = {
                    "accuracy": accuracy + shift + random.normal(0, 0.006),
                    "majority_share": majority,
                    "num_trainable": int(22_700_000 * share),
                    "trainable_share": 0.0 if name == "head" else share,
                    "trainable_share_with_head": share,
                    "seconds_per_step": 0.2 + 0.1 * (name == "full"),
                    "peak_memory_bytes": 900_000_000,
                }
                step = np.arange(1, 201)
                floor = 1.0 - accuracy
                loss = floor + (0.7 - floor) * np.exp(-step / 60) + random.normal(0, 0.05, 200)
                curve = pd.DataFrame({"step": step, "loss": np.maximum(loss, 0.01)})
                grid.append((Synthetic(config), result, curve))
    return grid


def pontryagin(seeds: int = 2) -> Grid:
    grid: Grid = []
    for optimiser, rate, count in (("lbfgs", 0.12, 90), ("adamw", 0.03, 200)):
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            iteration = np.arange(count + 1)
            columns: dict[str, Any] = {
                "iteration": iteration,
                "objective": 0.05 + 0.65 * np.exp(-1.5 * rate * iteration) * (1 + 0.1 * seed),
            }
            parts = []
            for position, stage in enumerate(STAGES):
                noise = np.exp(random.normal(0, 0.3, count + 1))
                part = 0.02 * 1.5**position * np.exp(-rate * iteration) * noise
                parts.append(part if stage != "input" else 0 * part)
                columns[f"residual_{stage}"] = parts[-1]
                columns[f"costate_{stage}"] = 0.3 * 0.8**position * np.exp(-0.01 * iteration)
            columns["residual"] = np.sqrt(np.sum(np.square(parts), axis=0))
            config = {
                "delta": {"name": "lora", "rank": 8},
                "optimiser": optimiser,
                "seed": seed,
                "num_examples": 32,
            }
            result = {
                "identity_relative_difference": 3.2e-15,
                "stages": STAGES,
                "residual": float(columns["residual"][-1]),
                "status": "converged",
            }
            grid.append((Synthetic(config), result, pd.DataFrame(columns)))
    return grid


def d90() -> Grid:
    grid: Grid = []
    texts = [
        (model, task, method, pretrained, centre)
        for task in ("movie", "trec6")
        for model, method, pretrained, centre in (
            ("minilm-l3", "said", True, 2000.0),
            ("minilm-l3", "did", True, 4000.0),
            ("minilm-l6", "said", True, 500.0),
            ("minilm-l6", "said", False, 3e7),
        )
    ]
    for model, task, method, pretrained, centre in texts:
        config = {
            "model": model,
            "task": task,
            "method": method,
            "pretrained": pretrained,
            "target": None,
        }
        grid.append(_search(config, 0.8, 0.52, centre, (1000, 3162, 10_000, 100_000)))
    for net, centre in (("fc", 60.0), ("lenet", 25.0)):
        for target in (None, 0.9):
            config = {"net": net, "target": target}
            grid.append(_search(config, 0.95, 0.1, centre, (100, 200, 400, 800, 1600)))
    return grid


def _search(
    config: dict[str, Any], top: float, chance: float, centre: float, dimensions: tuple[int, ...]
) -> tuple[Synthetic, dict[str, Any], pd.DataFrame]:
    random, rows = np.random.default_rng(len(str(config))), []
    for dimension in (None, *dimensions):
        gain = 1.0 if dimension is None else dimension / (dimension + centre)
        for seed in range(2):
            accuracy = chance + (top - chance) * gain + random.normal(0, 0.004)
            row = {"dimension": dimension, "seed": seed, "performance": accuracy, "rate": 0.1}
            rows.append(row | {"used": True, "run": f"{dimension}-{seed}"})
        rows.append(row | {"used": False, "performance": chance, "run": f"{dimension}-lost"})
    curve = pd.DataFrame(rows).astype({"dimension": "Int64"})
    used = curve[curve["used"]]
    baseline = Baseline(tuple(used.loc[used["dimension"].isna(), "performance"]))
    tried = used[used["dimension"].notna()]
    goal = baseline if config["target"] is None else config["target"]
    found = estimate_dimension(
        tried["dimension"].to_numpy(float), tried["performance"].to_numpy(), goal, chance=chance
    )
    return Synthetic(config), found.to_dict() | {"chance": chance}, curve


def reachability(seeds: int = 2) -> Grid:
    grid: Grid = []
    sites = ("attention.query", "attention.value", "mlp.up")
    for model, pretrained, layers in (
        ("minilm-l6", True, 6),
        ("minilm-l6", False, 6),
        ("smollm2-135m", True, 12),
    ):
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            config = {"model": model, "pretrained": pretrained, "num_examples": 12, "seed": seed}
            parts, spectrum = [], []
            places = [(None, None), *((layer, None) for layer in range(layers))]
            places += [(None, site) for site in sites]
            places += [(layer, site) for layer in range(layers) for site in sites]
            for layer, site in places:
                size = 2.0 ** (layer or 0) * (1 + sites.index(site) if site else 6)
                size *= float(np.exp(random.normal(0, 0.2)))
                parts.append(
                    {
                        "layer": layer,
                        "site": site,
                        "trace": size,
                        "energy_one": 6 / size,
                        "energy_all": 90 / size,
                        "predicted_gain": 0.1 * size / (1 + size) if pretrained else 0.1 / size,
                        "unreachable": 1e-15,
                    }
                )
                for index in range(12):
                    row = {"layer": layer, "site": site, "index": index}
                    spectrum.append(row | {"eigenvalue": size * 0.6**index})
            curve = pd.DataFrame(spectrum).astype({"layer": "Int64", "site": "string"})
            grid.append((Synthetic(config), {"parts": parts, "num_layers": layers}, curve))
            if model == "minilm-l6" and pretrained:
                single = [part for part in parts if part["layer"] is not None and part["site"]]
                tuned = pd.DataFrame(
                    {
                        "layer": [part["layer"] for part in single],
                        "site": [part["site"] for part in single],
                        "loss_drop": [part["predicted_gain"] ** 1.5 for part in single],
                        "test_accuracy_gain": random.normal(0.01, 0.01, len(single)),
                    }
                )
                grid.append((Synthetic(config | {"steps": 15}), {"start": {}}, tuned))
    return grid


def selection(seeds: int = 2) -> Grid:
    grid: Grid = []
    names = [f"{layer}.{site}" for layer in range(3) for site in ("query", "value", "down")]
    share = np.geomspace(1.0, 0.1, 8)
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        entry = random.uniform(0.0, 1.0, len(names))
        paths = []
        for program in ("group lasso", "nuclear norm"):
            lasso = program == "group lasso"
            active = (entry[None] > share[:, None]).sum(1) if lasso else np.arange(8) // 2
            columns: dict[str, Any] = {
                "program": program,
                "weight": 0.003 * share,
                "share": share,
                "objective": 0.6 - 0.1 * (1 - share),
                "bound": 0.6 - 0.1 * (1 - share) - 1e-9,
                "gap": 1e-9 * random.uniform(0.0, 1.0, 8),
                "train_loss": 0.3 + 0.3 * share,
                "heldout_loss": 0.6 + 0.2 * np.square(np.log(share / 0.4)),
                "heldout_loss_real": 0.61 + 0.1 * np.square(np.log(share / 0.4)),
                "heldout_accuracy": np.full(8, 0.7),
                "heldout_accuracy_real": np.full(8, 0.69),
                "num_active": active if lasso else np.minimum(active, 1),
                "rank": active,
                "rank_bound": active + 1,
                "rounds": np.ones(8, dtype=int),
                "status": "optimal",
                "seconds": np.full(8, 0.2),
            }
            if lasso:
                for name, enters in zip(names, entry, strict=True):
                    columns[f"norm.{name}"] = np.maximum(enters - share, 0.0)
                    columns[f"bound.{name}"] = (enters > share).astype(int)
            paths.append(pd.DataFrame(columns))
        trained = [
            {
                "set": kind,
                "names": names[first : first + 2],
                "num_trainable": 6144,
                "train_loss": 0.4,
                "train_accuracy": 0.8,
                "test_loss": loss + random.normal(0, 0.01),
                "test_accuracy": 1.3 - loss + random.normal(0, 0.01),
            }
            for kind, first, loss in (
                ("selected", 0, 0.56),
                ("unused", 2, 0.6),
                ("unused", 4, 0.6),
                ("all", 0, 0.55),
            )
        ]
        result = {
            "names": names,
            "num_groups": len(names),
            "chosen": 3,
            "chosen_rank": 4,
            "rank_site": names[0],
            "selected": names[:2],
            "num_unused": 4,
            "head_weight": 0.01,
            "head_gap": 1e-12,
            "head_test_loss": 0.62,
            "head_test_accuracy": 0.66,
            "linearisation_error": 4.2e-14,
            "tolerance": 1e-6,
            "trained": trained,
        }
        config = {"model": "minilm-l6", "task": "movie", "num_examples": 160, "seed": seed}
        grid.append((Synthetic(config), result, pd.concat(paths, ignore_index=True)))
    return grid


def solvers(seeds: int = 3) -> Grid:
    grid: Grid = []
    #        contraction per iteration, gradients and seconds per iteration, iterations
    methods = {
        "gauss-newton": (0.75, 12.0, 2.0, 40),
        "newton-cg": (0.45, 25.0, 6.0, 22),
        "lbfgs": (0.96, 1.1, 0.2, 450),
        "msa": (0.99, 1.0, 0.15, 500),
        "adamw": (0.98, 1.0, 0.16, 500),
    }
    for solver, (factor, work, time, count) in methods.items():
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            iteration = np.arange(count + 1)
            wave = np.exp(random.normal(0, 0.1, count + 1))
            residual = 0.5 * factor**iteration * wave + 1e-11
            curve = pd.DataFrame(
                {
                    "iteration": iteration,
                    "objective": 0.02 + 0.001 * seed + residual**2 + 1e-12 * count,
                    "residual": residual,
                    "gradients": 1.0 + work * iteration,
                    "seconds": 0.2 + time * iteration,
                }
            )
            rates = [1.0, 0.3, 0.1] if solver in ("msa", "adamw") else []
            config = {
                "solver": solver,
                "model": "minilm-l6",
                "num_examples": 4,
                "max_length": 12,
                "weight_decay": 0.01,
                "gradients": 600,
                "seed": seed,
            }
            last = curve.iloc[-1]
            result = {
                "status": "converged" if last["residual"] < 1e-6 else "budget",
                "rate": rates[1 + seed % 2] if rates else None,
                "search": [
                    {"rate": rate, "status": "budget" if index == 1 + seed % 2 else "unstable"}
                    for index, rate in enumerate(rates[: 2 + seed % 2])
                ],
                "num_controls": 74_498,
                **{key: float(last[key]) for key in ("objective", "residual", "seconds")},
                "gradients": float(last["gradients"]),
                "iterations": count,
            }
            grid.append((Synthetic(config), result, curve))
    return grid


def spectra(seeds: int = 2) -> Grid:
    grid: Grid = []
    sites, ranks, steps = ("attention.query", "mlp.up"), (1, 4, 16), (10, 20)
    index = np.arange(1, 33)
    for task, decay in (("movie", 1.0), ("trec6", 0.7)):
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            modules, frames = [], []
            for layer in range(2):
                for site in sites:
                    values = index**-decay * np.exp(0.02 * random.normal(size=len(index)))
                    place = {"layer": layer, "site": site}
                    frames.append(
                        pd.DataFrame({**place, "index": index, "value": np.sort(values)[::-1]})
                    )
                    modules += [
                        {
                            **place,
                            "step": step,
                            "shape": [32, 64],
                            "stable_rank": 1.5 + 0.1 * step / 10,
                        }
                        for step in steps
                    ]
            rows = [
                {
                    "rank": rank,
                    "loss": 0.2 + 0.3 * rank**-0.5 + 0.01 * seed,
                    "truncated_loss": 0.2 + 0.3 * rank**-0.8,
                    "tail_share": rank**-0.5,
                }
                for rank in ranks
            ]
            overlaps = [
                {
                    "step": step,
                    "rank": rank,
                    "left": 0.2 + 0.01 * rank + 0.001 * step,
                    "right": 0.1 + 0.01 * rank,
                    "left_by_chance": rank / 32,
                    "right_by_chance": rank / 64,
                }
                for step in steps
                for rank in ranks
            ]
            ends = {"before": 0.7, "head": 0.5, "full": 0.2, "full_without_update": 0.5}
            result = {"losses": ends, "ranks": rows, "modules": modules, "overlaps": overlaps}
            config = {"model": "minilm-l3", "task": task, "seed": seed, "steps": steps[-1]}
            grid.append((Synthetic(config), result, pd.concat(frames, ignore_index=True)))
    return grid


def threshold(seeds: int = 2) -> Grid:
    grid: Grid = []
    deltas = {("head",): 0.8, ("bitfit", "head"): 9.0, ("selected-modules:sites=block",): 3.0}
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        for names, stretch in ((None, 1.0), (("lora", "head"), 1.0), *deltas.items()):
            tuned = (8, 32, 128) if names in deltas else ()
            config: dict[str, Any] = {"exponent": 1.0, "size": 400, "seed": seed}
            if names is not None:
                config = {"model": "minilm-l3", "task": "movie", "deltas": list(names)}
                config |= {"dimensions": list(tuned), "seed": seed}
            cases, frames = [], []
            for target, d in ((0.8, 15.0), (0.5, 40.0)):
                kinds = ["quadratic"] if names is None else ["linearised", "fine-tuned"]
                for kind in kinds[: 2 if tuned else 1]:
                    factor = stretch if kind == "fine-tuned" else 1.0
                    measured = d * factor * np.exp(random.normal(0, 0.03))
                    case = {"kind": kind, "target": target, "predicted": d, "width": 4.0}
                    case |= {"standard_error": 0.5, "published": 2 * d, "measured_width": 4.0}
                    case |= {"measured": measured if measured < 128 else None, "draws": 4}
                    case |= {"low": 0.9 * measured, "high": 1.1 * measured}
                    case |= {"cone": 0.8 * d, "cone_error": 1.0} if kind == "fine-tuned" else {}
                    cases.append(case)
                dimension = np.arange(4, 60, 2)
                share = 1 / (1 + np.exp(-(dimension - d) / 3))
                row = {"kind": kinds[0], "target": target, "dimension": dimension}
                frames.append(pd.DataFrame(row | {"predicted": share, "measured": share}))
            for dimension in tuned:
                for subspace in range(3):
                    row = {"kind": "training", "dimension": dimension, "seed": subspace}
                    loss = 0.7 * np.exp(-dimension / 40 / stretch) + random.uniform(0, 0.02)
                    row |= {"loss": loss, "expected": 0.7 * np.exp(-dimension / 40)}
                    frames.append(pd.DataFrame([row]))
            result = {"cases": cases, "start": 0.7, "least": 0.2, "rank": 48}
            grid.append((Synthetic(config), result, pd.concat(frames, ignore_index=True)))
    return grid


def taxonomy() -> Grid:
    grid: Grid = []
    random = np.random.default_rng(6)
    for task, shift, majority in (("movie", 0.0, 0.52), ("trec6", 0.08, 0.24)):
        for name, (accuracy, share) in {**METHODS, "mam": (0.818, 0.02)}.items():
            for seed in range(2):
                config = {
                    "model": "minilm-l3",
                    "task": task,
                    "deltas": [{"name": name, "sites": ["attention.query", "mlp.up"]}],
                    "seed": seed,
                    "learning_rate": 1e-3,
                    "steps": 60,
                }
                result = {
                    "accuracy": accuracy + shift + random.normal(0, 0.002),
                    "majority_share": majority,
                    "num_trainable": int(17_000_000 * share) + 770,
                    "num_head": 770,
                    "num_total": 17_000_000,
                    "seconds_per_step": 0.1,
                    "peak_memory_bytes": 700_000_000,
                }
                step = np.arange(1, 61)
                curve = pd.DataFrame({"step": step, "loss": 0.2 + 0.5 * np.exp(-step / 30)})
                grid.append((Synthetic(config), result, curve))
    return grid


GRIDS: dict[str, Callable[[], Grid]] = {
    "d90": d90,
    "performance": performance,
    "pontryagin": pontryagin,
    "reachability": reachability,
    "selection": selection,
    "solvers": solvers,
    "spectra": spectra,
    "threshold": threshold,
    "taxonomy": taxonomy,
}


def write(store: RunStore, grid: Grid) -> list[Record]:
    return [store.write(e, result, curve, status="completed") for e, result, curve in grid]
