"""Claim 8: the curvature that a step's predicted loss drop leaves out is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 8, 16
SEEDS = tuple(range(8))
STEPS = tuple(2.0**-k for k in range(7, 11))  # short: the third order is below the second
ROUNDING = 1e-14  # of an objective, relative


def _predict() -> dict[str, Any]:
    """Half the neglected curvature, d'(∇²J - G)d / 2, a seed, without taking a step."""
    return {f"seed {seed}": _line(seed, "step")["coefficient"] for seed in SEEDS}


def _without_curvature(problem: Any, u: Any, seed: int) -> Any:
    """A Gaussian direction without the part that moves the outputs to first order: G d = 0."""
    import torch

    from deltacontrol.theory.linear.linearisation import Linearisation

    lin = Linearisation.of(problem, u, keep=True)
    outputs = lin.states[-1]
    unit = torch.eye(outputs.numel(), dtype=outputs.dtype)
    rows = torch.stack([q @ lin for q in unit])
    basis = torch.linalg.qr(rows.mT).Q
    drawn = torch.randn(
        rows.shape[1], generator=torch.Generator().manual_seed(seed), dtype=rows.dtype
    )
    for _ in range(2):  # once more for what rounding left
        drawn = drawn - basis @ (basis.mT @ drawn)
    return drawn / drawn.norm()


@cache
def _line(seed: int, kind: str) -> dict[str, Any]:
    """Along one direction: drops of J, slope, curvatures of G and of ∇²J.

    The kind "step" is the damped Gauss-Newton step with weight decay; "flat" is a direction in
    which G vanishes, without a decay.
    """
    import torch

    from deltacontrol.experiments.measures.identities import perturbed
    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature, HessianCurvature
    from deltacontrol.theory.linear.operator import unflatten
    from deltacontrol.theory.solvers.gauss_newton import damped_step

    setting = Setting(
        MODEL, TASK, deltas=["lora:rank=8"], train_rows=EXAMPLES, max_length=TOKENS,
        dtype="float64", seed=seed,
    )  # fmt: skip
    problem: Any = setting.control_problem(weight_decay=1e-2 if kind == "step" else 0.0)
    # Away from the start, where LoRA's second factor is zero.
    u = perturbed(problem.dynamics.controls(), 0.1, seed=seed)
    now = problem.evaluate(u)
    curvature = GaussNewtonCurvature(problem, u, now)
    if kind == "step":
        direction = damped_step(curvature, float(curvature.gradient.norm()), rtol=1e-6).step
    else:
        direction = _without_curvature(problem, u, seed)
    gauss_newton = float(direction @ (curvature @ direction))
    exact = float(direction @ (HessianCurvature(problem, u, now) @ direction))
    drops = []
    for s in STEPS:
        ahead = tuple(a + s * d for a, d in zip(u, unflatten(direction, u), strict=True))
        with torch.no_grad():
            drops.append(float(now.objective - problem.objective(ahead)))
    return {
        "objective": float(now.objective),
        "slope": float(curvature.gradient @ direction),
        "gauss_newton": gauss_newton,
        "coefficient": 0.5 * (exact - gauss_newton),
        "drops": drops,
    }


def _found(line: Mapping[str, Any], share: float) -> float:
    """(predicted - actual drop) / s², mean over the steps; the model has a share of G."""
    errors = [
        -s * line["slope"] - 0.5 * s**2 * share * line["gauss_newton"] - drop
        for s, drop in zip(STEPS, line["drops"], strict=True)
    ]
    return sum(e / s**2 for e, s in zip(errors, STEPS, strict=True)) / len(STEPS)


def _evidence(coefficients: Mapping[int, float], kind: str, share: float, note: str) -> Evidence:
    """Decades by which the coefficient that was found misses the predicted one, over seeds."""
    lines = {seed: _line(seed, kind) for seed in SEEDS}
    found = {seed: _found(line, share) for seed, line in lines.items()}
    ratios = {seed: found[seed] / coefficients[seed] for seed in SEEDS}
    told = min(
        abs(coefficients[seed]) * STEPS[-1] ** 2 / (ROUNDING * abs(line["objective"]))
        for seed, line in lines.items()
    )
    return Evidence.mean(
        [math.log10(max(abs(ratio - 1), 1e-16)) for ratio in ratios.values()],
        "seed",
        details={
            "found over predicted coefficient": {f"seed {s}": r for s, r in ratios.items()},
            "predicted coefficients": {f"seed {s}": c for s, c in coefficients.items()},
            "d'Gd": {f"seed {s}": line["gauss_newton"] for s, line in lines.items()},
            "least error over rounding at the shortest step": told,
        },
        assumptions={"the error of the shortest step is above 100 times rounding": told > 100},
        note=note,
    )


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """The damped Gauss-Newton step of the real model."""
    coefficients = {seed: prediction[f"seed {seed}"] for seed in SEEDS}
    note = (
        f"MiniLM-L6 with LoRA in float64, {EXAMPLES} snippets of movie; seeds of LoRA and of the "
        f"controls; steps {STEPS[-1]:.2g} to {STEPS[0]:.2g} of the Gauss-Newton direction"
    )
    return _evidence(coefficients, "step", 1.0, note)


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The model without its curvature, along the same directions."""
    coefficients = {seed: prediction[f"seed {seed}"] for seed in SEEDS}
    return _evidence(coefficients, "step", 0.0, "the same steps, G left out of the model")


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """The model without its curvature, where it has none: directions with G d = 0."""
    coefficients = {seed: _line(seed, "flat")["coefficient"] for seed in SEEDS}
    return _evidence(coefficients, "flat", 0.0, "G left out, along directions in which G d = 0")


CLAIM = Claim(
    id=8,
    name="lq-loss-drop",
    title="What the LQ model leaves out of a step's loss drop is known beforehand",
    statement=(
        "along a Gauss-Newton direction d of a real fine-tuning, [predicted drop -s g'd - s²/2 "
        "d'Gd] - [J(u) - J(u + s d)] = s²/2 d'(∇²J - G)d + O(s³), with ∇²J - G the curvature that "
        "the costates carry"
    ),
    source="Taylor's theorem; Nocedal & Wright, Numerical Optimization, 2006, Section 10.3",
    notebook="08_lq_loss_drop",
    revised=(
        "the slope of the error against the step, judged before, is 2 for every quadratic model, "
        "also one without curvature; judged is now the coefficient"
    ),
    # Ten percent. In decades and without the sign, for the coefficients have either sign.
    threshold=Threshold(
        "<=",
        -1.0,
        "mean log10 |error of the predicted drop over s²/2 d'(∇²J - G)d - 1|, short steps",
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    passing_control=_passing_control,
    on="real model, untrained",
)
