"""Claim 22: optimal controls in a box are mostly at its bounds, and binary ones lose little."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

DEPTHS = (4, 8, 16, 32)
SEEDS = range(20, 28)  # networks that no earlier check has seen; eight by cost alone
EXAMPLES, WIDTH, CONTROL = 4, 4, 4
BOUND = 0.5
TOLERANCE = 1e-7  # of the solver
SWITCHED = 10 * TOLERANCE  # a switching function above it is told from zero
NO_DECAY, DECAY, SLIGHT_DECAY = 0.0, 1.0, 1e-9
REACHED = 0.3  # size of the controls that make a target within reach, in shares of the bound


def _predict() -> dict[str, Any]:
    """With ``d`` outputs an extreme optimal point of the linearised problem leaves ``d`` inside."""
    outputs = EXAMPLES * WIDTH
    return {
        "fraction_at_bounds": {
            str(depth): max(0.0, 1 - outputs / (depth * CONTROL)) for depth in DEPTHS
        }
    }


def _problem(depth: int, seed: int, weight_decay: float) -> Any:
    """One control for four examples, a squared error at the end, ``|u| ≤ 1/2``."""
    import torch

    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.problem import Box, ControlProblem
    from deltacontrol.theory.control.systems import ResidualNetwork

    generator = torch.Generator().manual_seed(700 + seed)
    x0, target = torch.randn(2, EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return ControlProblem(
        ResidualNetwork.random(depth, WIDTH, 2 * WIDTH, CONTROL, seed=seed),
        SquaredErrorCost(target, weight_decay=weight_decay),
        x0,
        Box(-BOUND, BOUND),
    )


def _flipped(problem: Any, signs: Any) -> tuple[Any, float]:
    """Flip single binary controls, the best first, until no flip lowers ``J``."""
    import torch

    def objective(z: Any) -> Any:
        return problem.objective(tuple(z.reshape(-1, CONTROL)))

    every = torch.func.vmap(objective)
    flips = 1 - 2 * torch.eye(signs.numel(), dtype=signs.dtype)
    value = float(objective(BOUND * signs))
    while True:
        values = every(BOUND * signs * flips)
        best = int(values.argmin())
        if not float(values[best]) < value:
            return BOUND * signs, value
        signs, value = signs * flips[best], float(values[best])


def _optimum(problem: Any, start: Any) -> Any:
    from deltacontrol.theory.solvers.ilqr import DDP
    from deltacontrol.theory.solvers.solving import solve

    return solve(problem, DDP(), start, max_steps=100, tol=TOLERANCE)


def _at_bounds(u: Any) -> float:
    return float((u.abs() >= BOUND * (1 - 1e-6)).double().mean())


@cache
def _solved(depth: int, seed: int, weight_decay: float) -> dict[str, float]:
    """The optimum in the box, the binary controls nearest to it, and what they lose."""
    import torch

    problem = _problem(depth, seed, weight_decay)
    zero = problem.zero_controls()
    first = _optimum(problem, zero)
    rounded = torch.where(torch.cat(first.controls) >= 0, 1.0, -1.0).double()
    binary, value = _flipped(problem, rounded)
    # The binary point may lie in the basin of a better optimum; then that one is the reference.
    second = _optimum(problem, tuple(binary.reshape(-1, CONTROL)))
    best = min(first, second, key=lambda solution: solution.objective)
    u = torch.cat(best.controls)
    # Without the running cost: the switching function of a Hamiltonian that has none.
    switching = torch.cat(_problem(depth, seed, NO_DECAY).gradient(best.controls))
    switched = switching.abs() > SWITCHED
    distance = (u + BOUND * switching.sign()).abs() / BOUND
    gain = float(problem.objective(zero)) - best.objective
    return {
        "distance from the bound": float((distance * switched).max()),
        "entries with a switching function": int(switched.sum()),
        "fraction at bounds": _at_bounds(u),
        "gap": (value - best.objective) / gain,
        "objective": best.objective,
        "gain": gain,
        "residual": best.residual.norm,
    }


@cache
def _table(weight_decay: float) -> dict[int, list[dict[str, float]]]:
    return {depth: [_solved(depth, seed, weight_decay) for seed in SEEDS] for depth in DEPTHS}


def _converged(weight_decay: float) -> dict[str, bool]:
    worst = max(row["residual"] for rows in _table(weight_decay).values() for row in rows)
    return {f"stationary: projected gradient at most {TOLERANCE:g}": worst <= TOLERANCE}


def _switches(weight_decay: float, least: bool, note: str, prediction: Mapping[str, Any]):
    """How far entries with a switching function are from the bound that it names."""
    cases = {
        f"{depth} layers, seed {seed}": row["distance from the bound"]
        for depth, rows in _table(weight_decay).items()
        for seed, row in zip(SEEDS, rows, strict=True)
    }
    counts = [
        row["entries with a switching function"]
        for rows in _table(weight_decay).values()
        for row in rows
    ]
    met = {**_converged(weight_decay), "some entries have a switching function": min(counts) > 0}
    return Evidence.worst(
        cases,
        least=least,
        note=note,
        assumptions=met,
        details={"least number of entries": min(counts)},
    )


def _misses(shares: Mapping[int, list[float]], note: str, prediction: Mapping[str, Any], met=None):
    """The largest difference between the share at the bounds and the predicted one, by seed."""
    predicted = prediction["fraction_at_bounds"]
    values = [
        max(abs(shares[depth][i] - predicted[str(depth)]) for depth in DEPTHS)
        for i in range(len(SEEDS))
    ]
    means = {f"mean share, {depth} layers": sum(row) / len(row) for depth, row in shares.items()}
    return Evidence.mean(values, "network", details=means, note=note, assumptions=met or {})


def _share(weight_decay: float, note: str, prediction: Mapping[str, Any]) -> Evidence:
    table = _table(weight_decay)
    shares = {depth: [row["fraction at bounds"] for row in rows] for depth, rows in table.items()}
    return _misses(shares, note, prediction, _converged(weight_decay))


def _extreme_share(prediction: Mapping[str, Any]) -> Evidence:
    """Where the target is within reach: an extreme point of the linearised problem's optima."""
    shares = {depth: [_at_extreme_point(depth, seed) for seed in SEEDS] for depth in DEPTHS}
    note = "targets within reach, the optimum moved to an extreme point of the linearised problem"
    return _misses(shares, note, prediction)


def _at_extreme_point(depth: int, seed: int) -> float:
    """The share at the bounds of a vertex of the controls with the optimum's linearised outputs."""
    from dataclasses import replace

    import numpy as np
    import torch
    from scipy.optimize import linprog

    problem = _problem(depth, seed, NO_DECAY)
    generator = torch.Generator().manual_seed(800 + seed)
    inside = 2 * torch.rand(depth, CONTROL, generator=generator, dtype=torch.float64) - 1
    target = problem.rollout(tuple(REACHED * BOUND * inside))[-1]
    problem = replace(problem, cost=replace(problem.cost, target=target))
    u = torch.cat(_optimum(problem, problem.zero_controls()).controls)

    def outputs(z: Any) -> Any:
        return problem.rollout(tuple(z.reshape(-1, CONTROL)))[-1].flatten()

    C = torch.func.jacrev(outputs)(u).detach().numpy()
    found = linprog(
        np.random.default_rng(seed).normal(size=len(u)),
        A_eq=C,
        b_eq=C @ u.numpy(),
        bounds=(-BOUND, BOUND),
        method="highs-ds",
    )
    return _at_bounds(torch.from_numpy(found.x)) if found.success else float("nan")


def _deepest(column: str, weight_decay: float, note: str, prediction: Mapping[str, Any]):
    """One number of the deepest networks."""
    values = [row[column] for row in _table(weight_decay)[DEPTHS[-1]]]
    met = _converged(weight_decay)
    return Evidence.mean(values, "network", details={"values": values}, note=note, assumptions=met)


_DECAYED = "the same with weight decay 1: H is strictly convex in the control"
_HARDLY = "the same with weight decay 1e-9"


def _deepest_part(letter: str, title: str, threshold: Threshold, column: str) -> Part:
    return Part(
        letter,
        title,
        threshold,
        partial(_deepest, column, NO_DECAY, "residual networks of 32 layers, terminal cost alone"),
        partial(_deepest, column, DECAY, _DECAYED),
        partial(_deepest, column, SLIGHT_DECAY, _HARDLY),
        "random network",
    )


CLAIM = Claim(
    id=22,
    name="bang-bang",
    title="Box-constrained optima are bang-bang, binary controls lose little",
    statement=(
        "without a running cost, optimal controls in a box are at the bound that their switching "
        "function names (a); with d outputs and M controls the share 1 - d/M of them is at a "
        "bound, as at an extreme point of the linearised problem (b); in deep networks at least "
        "half of them are (c), and the best binary controls lose at most 5 % of what the box "
        "gains (d)"
    ),
    source="Zhang et al., ECCV 2024; bang-bang principle of discrete Pontryagin conditions",
    notebook="22_bang_bang",
    predict=_predict,
    revised=(
        "the judge did not use the predicted shares and joined two conditions by a maximum of "
        "medians; each condition is now a part, the prediction one of them, over new networks"
    ),
    parts=(
        Part(
            "a",
            "bang-bang by the switching function",
            Threshold("<=", 1e-6, "largest distance from the bound that is named, over the bound"),
            partial(_switches, NO_DECAY, False, "residual networks of 4 to 32 layers"),
            partial(_switches, DECAY, True, _DECAYED),
            partial(_switches, SLIGHT_DECAY, False, _HARDLY),
            "random network",
        ),
        Part(
            "b",
            "the predicted share",
            Threshold("<=", 0.1, "mean over networks of the largest |share - predicted| of depths"),
            partial(_share, NO_DECAY, "residual networks of 4 to 32 layers, terminal cost alone"),
            partial(_share, DECAY, _DECAYED),
            _extreme_share,
            "random network",
        ),
        _deepest_part(
            "c",
            "half at the bounds",
            Threshold(">=", 0.5, "mean share of the controls at the bounds, 32 layers"),
            "fraction at bounds",
        ),
        _deepest_part(
            "d",
            "binary controls lose little",
            Threshold("<=", 0.05, "mean share of the gain that binary controls lose, 32 layers"),
            "gap",
        ),
    ),
)
