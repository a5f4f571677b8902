"""Claim 22: optimal controls in a box are mostly at its bounds, and binary ones lose little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

DEPTHS = (4, 8, 16, 32)
SEEDS = range(5)
EXAMPLES, WIDTH, CONTROL = 4, 4, 4
BOUND = 0.5
LEAST_FRACTION, LARGEST_GAP = 0.5, 0.05


def _predict() -> dict[str, Any]:
    """With ``d`` outputs an extreme optimal point of the linearised problem leaves ``d`` inside."""
    outputs = EXAMPLES * WIDTH
    return {
        "fraction_at_bounds": {
            str(depth): max(0.0, 1 - outputs / (depth * CONTROL)) for depth in DEPTHS
        }
    }


def _problem(depth: int, seed: int, weight_decay: float):
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


def _solved(depth: int, seed: int, weight_decay: float) -> dict[str, float]:
    """The optimum in the box, the binary controls nearest to it, and what they lose."""
    import torch

    from deltacontrol.theory.solvers.ilqr import DDP
    from deltacontrol.theory.solvers.solving import solve

    problem = _problem(depth, seed, weight_decay)
    zero = problem.zero_controls()

    def optimum(start: Any) -> Any:
        return solve(problem, DDP(), start, max_steps=100, tol=1e-7)

    first = optimum(zero)
    rounded = torch.where(torch.cat(first.controls) >= 0, 1.0, -1.0).double()
    binary, value = _flipped(problem, rounded)
    # The binary point may lie in the basin of a better optimum; then that one is the reference.
    second = optimum(tuple(binary.reshape(-1, CONTROL)))
    best = min(first, second, key=lambda solution: solution.objective)
    u = torch.cat(best.controls)
    gain = float(problem.objective(zero)) - best.objective
    return {
        "fraction_at_bounds": float((u.abs() >= BOUND * (1 - 1e-6)).double().mean()),
        "gap": (value - best.objective) / gain,
        "objective": best.objective,
        "gain": gain,
        "residual": best.residual.norm,
    }


def _score(found: Mapping[str, float]) -> float:
    """The worse of both conditions, each over its bound: at most 1 if both hold."""
    half_a_control = 0.5 / (DEPTHS[-1] * CONTROL)
    fraction = max(found["fraction_at_bounds"], half_a_control)
    return max(found["gap"] / LARGEST_GAP, LEAST_FRACTION / fraction)


def _evidence(weight_decay: float, note: str) -> Evidence:
    from statistics import median

    table = {str(depth): [_solved(depth, seed, weight_decay) for seed in SEEDS] for depth in DEPTHS}
    scores = [_score(found) for found in table[str(DEPTHS[-1])]]
    medians = {
        depth: {name: median(row[name] for row in rows) for name in rows[0]}
        for depth, rows in table.items()
    }
    return Evidence(
        value=median(scores),
        details={"medians": medians, "scores": scores},
        assumption_met=all(row["residual"] <= 1e-6 for rows in table.values() for row in rows),
        note=note,
        spread=(min(scores), max(scores)),
    )


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Terminal cost alone: nothing in ``H`` keeps a control away from the bounds."""
    return _evidence(0.0, "residual networks of 4 to 32 layers, median of 5 seeds at 32 layers")


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """A running cost that is strictly convex in the control: optima lie inside the box."""
    return _evidence(1.0, "the same with weight decay 1")


CLAIM = Claim(
    id=22,
    name="bang-bang",
    title="Box-constrained optima are bang-bang, binary controls lose little",
    statement=(
        "without a running cost at least half of the optimal controls in a box lie at its bounds, "
        "and in deep networks the best binary controls lose at most 5 % of what the box gains"
    ),
    source="Zhang et al., ECCV 2024; bang-bang principle of discrete Pontryagin conditions",
    notebook="22_bang_bang",
    threshold=Threshold(
        "<=", 1.0, "larger of gap/0.05 and 0.5/fraction at bounds, 32 layers, median of 5 seeds"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
