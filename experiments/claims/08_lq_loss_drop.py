"""Claim 8: the linear-quadratic model predicts the loss drop of a step, to second order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 8, 16
SEEDS = (0, 1, 2)
STEPS = tuple(2.0**-k for k in range(13))
FITTED = STEPS[4:]  # the slope is a statement about short steps
ELSEWHERE = 0.1  # how far away, relatively, the control's gradient is taken


def _predict() -> dict[str, Any]:
    """Taylor: the Gauss-Newton model errs at second order, the exact model at third."""
    return {"slope": 2.0, "slope_of_the_exact_model": 3.0, "steps": list(STEPS)}


def _line(seed: int, elsewhere: float) -> dict[str, Any]:
    """Predicted and actual decrease of J along one Gauss-Newton direction of the real model."""
    import numpy as np
    import torch

    from deltacontrol.experiments.measures.identities import perturbed
    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature, HessianCurvature
    from deltacontrol.theory.linear.operator import flatten, unflatten
    from deltacontrol.theory.solvers.gauss_newton import damped_step

    setting = Setting(
        MODEL, TASK, deltas=["lora:rank=8"], train_rows=EXAMPLES, max_length=TOKENS,
        dtype="float64", seed=seed,
    )  # fmt: skip
    problem: Any = setting.control_problem(weight_decay=1e-2)
    # Away from the start, where LoRA's second factor is zero.
    u = perturbed(problem.dynamics.controls(), 0.1, seed=seed)
    now = problem.evaluate(u)
    curvature = GaussNewtonCurvature(problem, u, now)
    gradient = curvature.gradient
    direction = damped_step(curvature, float(gradient.norm()), rtol=1e-6).step
    gauss_newton = float(direction @ (curvature @ direction))
    exact = float(direction @ (HessianCurvature(problem, u, now) @ direction))
    if elsewhere:
        gradient = flatten(problem.gradient(perturbed(u, elsewhere, seed=100 + seed)))
    slope = float(gradient @ direction)
    rows = []
    for s in STEPS:
        ahead = tuple(a + s * d for a, d in zip(u, unflatten(direction, u), strict=True))
        with torch.no_grad():
            drop = float(now.objective - problem.objective(ahead))
        first, second = -s * slope, 0.5 * s**2
        rows.append((s, drop, first - second * gauss_newton, first - second * exact))
    table = np.array(rows)
    fitted = table[:, 0] <= FITTED[0]
    logs = np.log(table[fitted, 0])

    def order(predicted: Any) -> float:
        error = np.abs(predicted[fitted] - table[fitted, 1])
        return float(np.polyfit(logs, np.log(error), 1)[0])

    errors = table[:, 2] - table[:, 1]
    return {
        "order": order(table[:, 2]),
        "order_of_the_exact_model": order(table[:, 3]),
        "actual_drop": table[:, 1].tolist(),
        "predicted_over_actual": (table[:, 2] / table[:, 1]).tolist(),
        "error_over_s_squared_at_the_shortest_step": float(errors[-1] / STEPS[-1] ** 2),
        "half_the_neglected_curvature": 0.5 * (exact - gauss_newton),
        "length_of_the_direction": float(direction.norm()),
    }


def _evidence(elsewhere: float, note: str) -> Evidence:
    lines = {seed: _line(seed, elsewhere) for seed in SEEDS}
    orders = [line["order"] for line in lines.values()]
    return Evidence(
        value=max(orders, key=lambda order: abs(order - 2.0)),
        details={"steps": list(STEPS)} | {f"seed {seed}": line for seed, line in lines.items()},
        note=note,
        spread=(min(orders), max(orders)),
    )


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """The real model and its own gradient; the seed whose slope is furthest from 2."""
    return _evidence(
        0.0,
        f"MiniLM-L6 with LoRA in float64, 8 snippets of movie, {len(SEEDS)} seeds, the slope "
        f"furthest from {prediction['slope']:g}; steps {FITTED[-1]:.2g} to {FITTED[0]:.2g} of the "
        "Gauss-Newton direction",
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The gradient of another trajectory: the model is wrong at first order."""
    return _evidence(
        ELSEWHERE, f"gradient of controls that are {ELSEWHERE:.0%} away; order 1 instead of 2"
    )


CLAIM = Claim(
    id=8,
    name="lq-loss-drop",
    title="The LQ model predicts a step's loss drop to second order",
    statement=(
        "along a Gauss-Newton direction d of a real fine-tuning, |J(u) - J(u + s d) - [predicted "
        "drop -s g'd - s²/2 d'Gd]| = O(s²); its share of the drop vanishes like s"
    ),
    source="Taylor's theorem; Nocedal & Wright, Numerical Optimization, 2006, Section 10.3",
    notebook="08_lq_loss_drop",
    threshold=Threshold(
        "within", (1.8, 2.2), "slope of log |predicted - actual| against log step length"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
