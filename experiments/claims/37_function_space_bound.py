"""Claim 37: an objective that is close everywhere has a minimiser that is nearly as good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.linear.linearisation import Linearisation

MODEL, TASK = "minilm-l3", "movie"
EXAMPLES, TOKENS = 4, 8
DELTAS = ("lora:rank=2", "houlsby:bottleneck=8", "prefix:length=4", "prompt:length=4", "bitfit")
SEEDS = range(5)
WEIGHT_DECAY = 1.0  # of the mean loss: it keeps the minimisers where the linear model is close
STEPS = 25
ROUNDING = 1e-9


@dataclass(frozen=True)
class _Pair:
    """An objective F and another one F̂ on the points that both minimisations visit.

    Attributes:
        epsilon: the largest |F - F̂| on these points.
        lost: F at the minimiser of F̂, less the least F.
        gained: F at the start, less the least F.
        residual: the larger of both gradients at the end over that at the start.
    """

    epsilon: float
    lost: float
    gained: float
    residual: float


@dataclass(frozen=True, eq=False)
class _Objectives:
    """F of a fine-tuning, and F̂ of the network linearised in its controls at the start."""

    problem: ControlProblem
    linear: Linearisation
    start: Tensor

    @classmethod
    def of(cls, delta: str, seed: int, rows: int | None = None) -> _Objectives:
        """Of a delta and rows that are drawn by the seed, or by ``rows``."""
        from deltacontrol.experiments.setting import Setting
        from deltacontrol.theory.linear.linearisation import Linearisation
        from deltacontrol.theory.linear.operator import flatten

        setting = Setting(
            MODEL, TASK, deltas=[delta], train_rows=EXAMPLES, max_length=TOKENS, dtype="float64",
            order="shuffled", order_seed=seed if rows is None else rows, seed=seed,
        )  # fmt: skip
        problem: Any = setting.control_problem()
        u = problem.dynamics.controls()
        return cls(problem, Linearisation.of(problem, u, keep=True), flatten(u))

    def real(self, z: Tensor) -> tuple[float, Tensor]:
        """F(start + z) and its gradient, with the weight decay on z."""
        from deltacontrol.theory.linear.operator import flatten, unflatten

        found = self.problem.evaluate(unflatten(self.start + z, self.linear.controls))
        decay = 0.5 * WEIGHT_DECAY * float(z @ z)
        return float(found.objective) + decay, flatten(found.gradient) + WEIGHT_DECAY * z

    def close(self, z: Tensor) -> tuple[float, Tensor]:
        """F̂ and its gradient."""
        import torch

        last = self.linear.states[-1]
        logits = (last + (self.linear @ z).reshape(last.shape)).requires_grad_()
        cost = self.problem.cost.terminal(logits)
        gradient = self.linear.T @ torch.autograd.grad(cost, logits)[0].reshape(-1)
        decay = 0.5 * WEIGHT_DECAY * float(z @ z)
        return float(cost.detach()) + decay, gradient + WEIGHT_DECAY * z


def _minimised(objective: Any, size: int) -> tuple[list[Tensor], list[float], float]:
    """The points that L-BFGS visits from zero, the end last, their values, the gradient's fall."""
    import numpy as np
    import torch
    from scipy.optimize import minimize

    points: list[Tensor] = []
    values: list[float] = []
    norms: list[float] = []

    def value(z: Any) -> tuple[float, Any]:
        points.append(torch.from_numpy(z.copy()))
        found, gradient = objective(points[-1])
        values.append(found)
        norms.append(float(gradient.norm()))
        return found, gradient.numpy()

    options = {"maxiter": STEPS, "ftol": 0.0, "gtol": 0.0}
    found = minimize(value, np.zeros(size), jac=True, method="L-BFGS-B", options=options)
    value(found.x)
    return points, values, norms[-1] / norms[0]


@cache
def _pairs(other: int = 0) -> dict[str, _Pair]:
    """By delta and seed; F̂ is minimised on the rows of so many seeds further."""
    return {f"{delta}/{seed}": _pair(delta, seed, other) for delta in DELTAS for seed in SEEDS}


def _pair(delta: str, seed: int, other: int) -> _Pair:
    own = _Objectives.of(delta, seed)
    away = _Objectives.of(delta, seed, seed + other) if other else own
    size = len(own.start)
    real, of_real, fell = _minimised(own.real, size)
    close, of_close, fell_close = _minimised(away.close, size)
    values = [*of_real, *(own.real(z)[0] for z in close)]
    near = [own.close(z)[0] for z in real]
    near += of_close if away is own else [own.close(z)[0] for z in close]
    least = min(values)
    return _Pair(
        epsilon=max(abs(f - g) for f, g in zip(values, near, strict=True)),
        lost=values[-1] - least,
        gained=values[0] - least,
        residual=max(fell, fell_close),
    )


def _ratios(pairs: dict[str, _Pair]) -> dict[str, float]:
    return {name: p.lost / (2 * p.epsilon) for name, p in pairs.items()}


def _bound(other: int, *, least: bool = False) -> Evidence:
    pairs = _pairs(other)
    return Evidence.worst(
        _ratios(pairs),
        least=least,
        details={"epsilon": {name: p.epsilon for name, p in pairs.items()}},
        note=f"{MODEL} in float64, {EXAMPLES} snippets of {TASK} a seed; a case a delta and a seed",
    )


def _worth(delta: str) -> Iterator[float]:
    """2ε over what minimising F gains, a seed."""
    found = _pairs()
    return (
        2 * found[f"{delta}/{seed}"].epsilon / found[f"{delta}/{seed}"].gained for seed in SEEDS
    )


def _said(delta: str) -> Evidence:
    found = _pairs()
    residuals = [found[f"{delta}/{seed}"].residual for seed in SEEDS]
    return Evidence.mean(
        list(_worth(delta)),
        "seed",
        details={"gradient at the end over that at the start": max(residuals)},
        assumptions={"both minimisers are reached to 1e-4": max(residuals) <= 1e-4},
    )


@cache
def _far(decay: float) -> Evidence:
    """The same of BitFit with another weight decay: it holds the minimisers less near, or more."""
    import math

    values = []
    for seed in SEEDS:
        own = _Objectives.of(DELTAS[-1], seed)
        scaled = _Scaled(own, decay)
        real, of_real, _ = _minimised(scaled.real, len(own.start))
        close, of_close, _ = _minimised(scaled.close, len(own.start))
        f = [*of_real, *(scaled.real(z)[0] for z in close)]
        near = [*(scaled.close(z)[0] for z in real), *of_close]
        gap = max(abs(v - g) for v, g in zip(f, near, strict=True))
        values.append(2 * gap / (f[0] - min(f)))
    finite = [v if math.isfinite(v) else 1e6 for v in values]
    return Evidence.mean(finite, "seed", note=f"BitFit with the weight decay {decay:g}")


@dataclass(frozen=True, eq=False)
class _Scaled:
    """Both objectives with another weight decay."""

    own: _Objectives
    decay: float

    def real(self, z: Tensor) -> tuple[float, Tensor]:
        return self._with(self.own.real(z), z)

    def close(self, z: Tensor) -> tuple[float, Tensor]:
        return self._with(self.own.close(z), z)

    def _with(self, found: tuple[float, Tensor], z: Tensor) -> tuple[float, Tensor]:
        more = self.decay - WEIGHT_DECAY
        return found[0] + 0.5 * more * float(z @ z), found[1] + more * z


# Fewer cases, for `claims run --preset quick`.
QUICK = {"SEEDS": range(2)}

CLAIM = Claim(
    id=37,
    name="function-space-bound",
    title="A uniformly close objective has a nearly optimal minimiser",
    statement=(
        "if |F - F̂| ≤ ε on a set that holds minimisers of both, F at the minimiser of F̂ is at most "
        "2ε above the least F; with F a fine-tuning, F̂ that of the network linearised in its "
        "controls, and the set the points that both minimisations visit, the bound says something: "
        "2ε is less than what tuning gains"
    ),
    source="Ding et al., Nature Machine Intelligence 2023, optimisation perspective",
    notebook="37_function_space_bound",
    predict=dict,
    parts=(
        Part(
            name="a",
            title="The bound holds for every delta",
            threshold=Threshold("<=", 1.0 + ROUNDING, "loss of optimality over 2ε"),
            measure=lambda prediction: _bound(0),
            # F̂ is minimised on other rows: it is not the objective that is ε-close.
            negative_control=lambda prediction: _bound(1, least=True),
            passing_control=lambda prediction: _bound(0, least=True),
            on="real model, untrained",
        ),
        *(
            Part(
                name="bcdef"[place],
                title=f"The bound says something for {delta.partition(':')[0]}",
                threshold=Threshold("<", 1.0, "2ε over what tuning gains, mean over seeds"),
                measure=lambda prediction, delta=delta: _said(delta),
                # A weight decay too small to keep the minimisers where the linear model is close.
                negative_control=lambda prediction: _far(1e-4),
                passing_control=lambda prediction: _far(10.0),
                on="real model, untrained",
            )
            for place, delta in enumerate(DELTAS)
        ),
    ),
)
