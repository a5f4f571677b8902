"""Claim 25: the largest stable step of a delta is 2/λ_max of its Gauss-Newton matrix at the start.

Squared error on the logits, targets ±1, whose Gauss-Newton matrix is the whole Hessian of the
linearised model. The head is fitted beforehand, by ridge regression on other training rows, and
fixed: λ_max of delta and head together would be the head's, whatever the delta.

Beside the start, the path: with the largest stable step, step · λ_max after training lies near 2,
whatever it was at the start. The controls change how far the targets are from the outputs at the
start: the quadratic model is right where they are near, and nothing is left of it far away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.control.problem import ControlProblem, Controls
    from deltacontrol.theory.linear.operator import SymmetricOperator

MODEL, TASK = "minilm-l3", "movie"
DELTAS = ("lora", "houlsby", "bitfit")
SEEDS = tuple(range(10, 15))  # of the rows, of the head's rows, and of the delta
EXAMPLES, TOKENS = 4, 8
HEAD_ROWS, HEAD_RIDGE = 256, 1e-2
STEPS = 20  # of gradient descent: at 1.1 times 2/λ_max a quadratic mode grows by 1.2^20 = 38
BRACKET, RESOLUTION, WIDEST = 2.0, 0.25, 8.0  # of log2(step / prediction)
NEAR, FAR = 0.01, 30.0  # distance of the targets from the outputs at the start, over their own
CAUTION = 8.0  # the step of the path's control is that much shorter than the largest stable one


@cache
def _fitted_head(seed: int) -> Tensor:
    """Weight and bias, flat, of the ridge regression of ±1 targets on the head's frozen input."""
    import torch

    from deltacontrol.experiments.heads import head_inputs

    setting = _setting(num_examples=EXAMPLES + HEAD_ROWS, seed=seed)
    batch = setting.batch()
    features = head_inputs(setting.base, [batch])[EXAMPLES:]
    targets = _targets(batch["labels"])[EXAMPLES:]
    center = features.mean(0)
    z = features - center
    gram = z.mT @ z / len(z) + HEAD_RIDGE * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(gram, z.mT @ (targets - targets.mean(0)) / len(z)).mT
    return torch.cat([weight.reshape(-1), targets.mean(0) - weight @ center])


def _setting(*deltas: str, num_examples: int, seed: int) -> Setting:
    from deltacontrol.experiments.setting import Setting

    return Setting(
        MODEL, TASK, deltas=deltas, train_rows=num_examples, order="shuffled", max_length=TOKENS,
        dtype="float64", seed=seed,
    )  # fmt: skip


def _targets(labels: Tensor) -> Tensor:
    import torch
    from torch.nn.functional import one_hot

    return 2.0 * one_hot(labels, 2).to(torch.float64) - 1.0


@cache
def _problem(name: str, seed: int) -> tuple[ControlProblem, Controls, Tensor]:
    """The problem in squared error, the delta's initial controls, and a mask without the head."""
    import torch

    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.problem import ControlProblem

    setting = _setting(name, num_examples=EXAMPLES, seed=seed)
    controlled, dynamics = setting.controlled, cast(Any, setting.control_problem().dynamics)
    targets = _targets(setting.batch()["labels"])
    problem = ControlProblem(dynamics, SquaredErrorCost(targets), dynamics.x0)
    controls, head = list(dynamics.controls()), _fitted_head(seed)
    names = dynamics.control_names(len(controls) - 1)
    (path,) = controlled.host.sites.head_paths()
    sizes = [controlled.trainable()[n].numel() for n in names]
    in_head = [controlled.host.state_path[n].startswith(path) for n in names]
    free = torch.cat(
        [torch.full((s,), float(not h)) for s, h in zip(sizes, in_head, strict=True)]
    ).to(torch.float64)
    if int((free == 0).sum()) != len(head):
        raise AssertionError(f"the head has {len(head)} entries, the last step {names} {sizes}")
    controls[-1] = controls[-1].masked_scatter(free == 0, head)
    others = [torch.ones_like(u) for u in controls[:-1]]
    return problem, tuple(controls), torch.cat([*others, free])


@cache
def _start(name: str, seed: int, distance: float) -> tuple[ControlProblem, Controls, Tensor]:
    """The same, with the targets' distance from the outputs at the start stretched."""
    import torch

    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.problem import ControlProblem

    problem, controls, mask = _problem(name, seed)
    with torch.no_grad():
        outputs = problem.rollout(controls)[-1]
    targets = cast(SquaredErrorCost, problem.cost).target
    moved = SquaredErrorCost(outputs + distance * (targets - outputs))
    return ControlProblem(problem.dynamics, moved, problem.x0), controls, mask


def _largest_eigenvalue(operator: SymmetricOperator) -> float:
    import numpy as np
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    options: dict[str, Any] = {"tol": 1e-4, "v0": start, "return_eigenvectors": False}
    return float(eigsh(operator.to_scipy(), k=1, which="LA", **options)[0])


def _lambda_max(problem: ControlProblem, u: Controls, mask: Tensor) -> float:
    """λ_max of the Gauss-Newton matrix in the controls of the mask."""
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature
    from deltacontrol.theory.linear.operator import Congruence, Diagonal

    return _largest_eigenvalue(Congruence(Diagonal(mask), GaussNewtonCurvature(problem, u)))


def _predict() -> dict[str, Any]:
    """λ_max by Lanczos, through products with the Gauss-Newton matrix; the step 2/λ_max."""
    return {
        f"{name}/{seed}": {"lambda_max": top, "step": 2 / top}
        for name in DELTAS
        for seed in SEEDS
        for top in [_lambda_max(*_start(name, seed, 1.0))]
    }


def _descended(name: str, seed: int, step: float, distance: float) -> Controls | None:
    """The controls after a fixed number of full-batch steps.

    None if the loss exceeds its initial value at one of them, or is not finite.
    """
    from deltacontrol.theory.linear.operator import flatten, unflatten

    problem, u, mask = _start(name, seed, distance)
    now = problem.evaluate(u)
    initial = float(now.objective)
    z = flatten(u)
    for _ in range(STEPS):
        z = z - step * mask * flatten(now.gradient)
        now = problem.evaluate(unflatten(z, u))
        value = float(now.objective)
        if not math.isfinite(value) or value > initial:
            return None
    return unflatten(z, u)


@cache
def _threshold(name: str, seed: int, prediction: float, distance: float) -> dict[str, Any]:
    """log2(largest stable step / prediction) by bisection, and the longest stable run."""
    trials: list[tuple[float, bool]] = []
    longest: list[tuple[float, Controls]] = []

    def unstable(exponent: float) -> bool:
        found = _descended(name, seed, prediction * 2.0**exponent, distance)
        trials.append((exponent, found is None))
        if found is not None and (not longest or exponent > longest[0][0]):
            longest[:] = [(exponent, found)]
        return found is None

    first, at, inside = unstable(0.0), 0.0, False
    further = -BRACKET if first else BRACKET
    while not inside and abs(at) < WIDEST:
        at += further
        inside = unstable(at) != first
    low, high = sorted((at, at - further)) if inside else (at, at)
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return {
        "log2_ratio": (low + high) / 2,
        "inside": inside,
        "trials": trials,
        "longest": longest[0] if longest else None,
    }


def _at_the_start(
    prediction: Mapping[str, Any], name: str, note: str, distance: float = 1.0
) -> Evidence:
    """Mean |log2(measured / predicted step)| over seeds."""
    found = {
        seed: _threshold(name, seed, prediction[f"{name}/{seed}"]["step"], distance)
        for seed in SEEDS
    }
    return Evidence.mean(
        [abs(one["log2_ratio"]) for one in found.values()],
        "seed",
        details={
            f"seed {seed}": {
                "lambda_max": prediction[f"{name}/{seed}"]["lambda_max"],
                "ratio": 2.0 ** one["log2_ratio"],
                "inside of what was searched": one["inside"],
                "trials_log2_step_over_prediction": [list(trial) for trial in one["trials"]],
            }
            for seed, one in found.items()
        },
        note=note,
    )


def _path(
    prediction: Mapping[str, Any],
    name: str,
    note: str,
    distance: float = 1.0,
    caution: float = 1.0,
) -> Evidence:
    """Mean over seeds of step · λ_max after training with the largest stable step."""
    products, details, complete = [], {}, True
    for seed in SEEDS:
        predicted = prediction[f"{name}/{seed}"]["step"]
        longest = _threshold(name, seed, predicted, distance)["longest"]
        if longest is None:  # not even the shortest step that was tried
            complete = False
            products.append(math.nan)
            continue
        step, u = predicted * 2.0 ** longest[0] / caution, longest[1]
        if caution != 1.0:
            shorter = _descended(name, seed, step, distance)
            u = u if shorter is None else shorter
        problem, _, mask = _start(name, seed, distance)
        top = _lambda_max(problem, u, mask)
        products.append(step * top)
        details[f"seed {seed}"] = {
            "step": step,
            "lambda_max": prediction[f"{name}/{seed}"]["lambda_max"],
            "lambda_max_after": top,
            "loss_before": float(problem.objective(_start(name, seed, distance)[1])),
            "loss_after": float(problem.objective(u)),
        }
    return Evidence.mean(
        products,
        "seed",
        details=details,
        assumptions={"a stable step was found for every seed": complete},
        note=note,
    )


def _parts(names: Sequence[str]) -> tuple[Part, ...]:
    """For each delta its largest stable step, and then the end of the path with it."""
    where = f"MiniLM-L3 in float64, {EXAMPLES} snippets of movie, {STEPS} full-batch steps"
    start = [
        Part(
            name=letter,
            title=f"2/λ_max at the start, {name}",
            threshold=Threshold("<=", 1.0, f"{name}, mean |log2(measured step / predicted step)|"),
            measure=lambda prediction, name=name: _at_the_start(prediction, name, where),
            negative_control=lambda prediction, name=name: _at_the_start(
                prediction, name, f"targets {FAR:g} times as far: the outputs are not linear", FAR
            ),
            passing_control=lambda prediction, name=name: _at_the_start(
                prediction, name, f"targets at {NEAR:g} of their distance: nearly linear", NEAR
            ),
            on="real fine-tuning",
        )
        for letter, name in zip("abc", names, strict=False)
    ]
    path = [
        Part(
            name=letter,
            title=f"the edge of stability, {name}",
            threshold=Threshold(
                "within", (1.5, 4.0), f"{name}, mean largest stable step · λ_max after training"
            ),
            measure=lambda prediction, name=name: _path(prediction, name, where),
            negative_control=lambda prediction, name=name: _path(
                prediction, name, f"a step {CAUTION:g} times shorter", caution=CAUTION
            ),
            passing_control=lambda prediction, name=name: _path(
                prediction, name, f"the largest step, targets at {NEAR:g} of their distance", NEAR
            ),
            on="real fine-tuning",
        )
        for letter, name in zip("def", names, strict=False)
    ]
    return (*start, *path)


# Fewer cases, for `claims run --preset quick`.
QUICK = {"SEEDS": (10, 11, 12)}

CLAIM = Claim(
    id=25,
    name="stable-step",
    title="A delta's largest stable step is 2/λ_max",
    statement=(
        "full-batch gradient descent on a delta alone, squared error, keeps the loss below its "
        "initial value up to the step 2/λ_max of the delta's Gauss-Newton matrix at the start "
        "(a to c), and after training with the largest stable step, step · λ_max is at the edge of "
        "stability (d to f)"
    ),
    source=(
        "this project, from the quadratic model; LeCun, Simard, Pearlmutter, NeurIPS 1992; the "
        "edge of stability: Cohen, Kaur, Li, Kolter & Talwalkar, ICLR 2021"
    ),
    notebook="25_stable_step",
    revised=(
        "the worst of three deltas was judged, with a control that equalled the measurement and a "
        "shift; the deltas, and the path beside the start, are now parts over fresh seeds, on "
        "a smaller model. A critical sharpness from few forward passes is not measured"
    ),
    predict=_predict,
    parts=_parts(DELTAS),
)
