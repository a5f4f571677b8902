"""Claim 25: the largest stable step of a delta is 2/λ_max of its Gauss-Newton matrix at the start.

Squared error on the logits, targets ±1, whose Gauss-Newton matrix is the whole Hessian of the
linearised model. The head is fitted beforehand, by ridge regression on other training rows, and
fixed: λ_max of delta and head together would be the head's, whatever the delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from deltacontrol.theory.claims import Claim, Evidence, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.control.problem import ControlProblem, Controls
    from deltacontrol.theory.linear.operator import SymmetricOperator

MODEL, TASK = "minilm-l6", "movie"
RUNS = (("lora", 0), ("lora", 1), ("houlsby", 0), ("houlsby", 1), ("bitfit", 0))
EXAMPLES, TOKENS = 6, 12
HEAD_ROWS, HEAD_RIDGE = 256, 1e-2
STEPS = 40  # of gradient descent: at 1.1 times 2/λ_max a quadratic mode grows by 1.2^40 = 1500
BRACKET, RESOLUTION, WIDEST = 2.0, 0.25, 8.0  # of log2(step / prediction)


@cache
def _fitted_head() -> Tensor:
    """Weight and bias, flat, of the ridge regression of ±1 targets on the head's frozen input."""
    import torch

    from deltacontrol.experiments.heads import head_inputs

    setting = _setting(num_examples=EXAMPLES + HEAD_ROWS)
    batch = setting.batch()
    features = head_inputs(setting.base, [batch])[EXAMPLES:]
    targets = _targets(batch["labels"])[EXAMPLES:]
    center = features.mean(0)
    z = features - center
    gram = z.mT @ z / len(z) + HEAD_RIDGE * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(gram, z.mT @ (targets - targets.mean(0)) / len(z)).mT
    return torch.cat([weight.reshape(-1), targets.mean(0) - weight @ center])


def _setting(*deltas: str, num_examples: int, seed: int = 0) -> Setting:
    from deltacontrol.experiments.setting import Setting

    return Setting(
        MODEL, TASK, deltas=deltas, train_rows=num_examples, max_length=TOKENS,
        dtype="float64", seed=seed,
    )  # fmt: skip


def _targets(labels: Tensor) -> Tensor:
    import torch
    from torch.nn.functional import one_hot

    return 2.0 * one_hot(labels).to(torch.float64) - 1.0


@cache
def _start(name: str, seed: int) -> tuple[ControlProblem, Controls, Tensor]:
    """The problem in squared error, the delta's initial controls, and a mask without the head."""
    import torch

    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.problem import ControlProblem

    setting = _setting(name, num_examples=EXAMPLES, seed=seed)
    controlled, dynamics = setting.controlled, cast(Any, setting.control_problem().dynamics)
    cost = SquaredErrorCost(_targets(setting.batch()["labels"]))
    problem = ControlProblem(dynamics, cost, dynamics.x0)
    controls, head = list(dynamics.controls()), _fitted_head()
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


def _largest_eigenvalue(operator: SymmetricOperator) -> float:
    import numpy as np
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    options: dict[str, Any] = {"tol": 1e-6, "v0": start, "return_eigenvectors": False}
    return float(eigsh(operator.to_scipy(), k=1, which="LA", **options)[0])


def _lambda_max(
    problem: ControlProblem, u: Controls, mask: Tensor, *, exact: bool = False
) -> float:
    """λ_max of the Gauss-Newton matrix, or of the Hessian, in the controls of the mask."""
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature, HessianCurvature
    from deltacontrol.theory.linear.operator import Congruence, Diagonal

    curvature = (HessianCurvature if exact else GaussNewtonCurvature)(problem, u)
    return _largest_eigenvalue(Congruence(Diagonal(mask), curvature))


def _mean_eigenvalue(name: str, seed: int) -> float:
    """The mean of the eigenvalues of G that are not zero: of the (outputs x outputs) ZZ'/n."""
    import torch

    from deltacontrol.theory.linear.linearisation import Linearisation

    problem, u, mask = _start(name, seed)
    lin = Linearisation.of(problem, u, keep=True)
    outputs = lin.states[-1]
    rows = []
    for i in range(outputs.numel()):
        q = torch.zeros_like(outputs).reshape(-1)
        q[i] = 1.0
        rows.append(mask * (q @ lin))
    jacobian = torch.stack(rows)
    return float((jacobian @ jacobian.mT).trace() / len(outputs) / outputs.numel())


def _predict() -> dict[str, Any]:
    """λ_max by Lanczos, through products with the Gauss-Newton matrix; the step 2/λ_max."""
    found: dict[str, Any] = {}
    for name, seed in RUNS:
        problem, u, mask = _start(name, seed)
        top = _lambda_max(problem, u, mask)
        found[f"{name}/{seed}"] = {
            "lambda_max": top,
            "step": 2 / top,
            "lambda_max_of_the_hessian": _lambda_max(problem, u, mask, exact=True),
            "mean_nonzero_eigenvalue": _mean_eigenvalue(name, seed),
            "loss": float(problem.objective(u)),
        }
    return found


def _descended(name: str, seed: int, step: float) -> Controls | None:
    """The controls after a fixed number of full-batch steps.

    None if the loss exceeds its initial value at one of them, or is not finite.
    """
    from deltacontrol.theory.linear.operator import flatten, unflatten

    problem, u, mask = _start(name, seed)
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
def _threshold(name: str, seed: int, prediction: float) -> dict[str, Any]:
    """log2(largest stable step / prediction) by bisection, and what stands behind it.

    The largest eigenvalue after the largest stable run says where the curvature went; it is not
    judged.
    """
    trials: list[tuple[float, bool]] = []
    stable: Controls = _start(name, seed)[1]

    def trial(exponent: float) -> bool:
        nonlocal stable
        found = _descended(name, seed, prediction * 2.0**exponent)
        stable = stable if found is None else found
        trials.append((exponent, found is None))
        return found is None

    low, high = -BRACKET, BRACKET
    while low > -WIDEST and trial(low):
        low, high = low - BRACKET, low
    while low == -BRACKET and high < WIDEST and not trial(high):
        low, high = high, high + BRACKET
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (low, middle) if trial(middle) else (middle, high)
    problem, _, mask = _start(name, seed)
    return {
        "log2_ratio": (low + high) / 2,
        "trials": trials,
        "loss_after": float(problem.objective(stable)),
        "lambda_max_after": _lambda_max(problem, stable, mask),
    }


def _evidence(prediction: Mapping[str, Any], assumed: str) -> Evidence:
    details: dict[str, Any] = {}
    for name, seed in RUNS:
        predicted = prediction[f"{name}/{seed}"]
        found = _threshold(name, seed, predicted["step"])
        against_top = found["log2_ratio"]
        shift = math.log2(predicted[assumed] / predicted["lambda_max"])
        details[f"{name}/{seed}"] = {
            "log2_ratio": against_top + shift,
            "ratio": 2.0 ** (against_top + shift),
            "largest_stable_step": predicted["step"] * 2.0**against_top,
            "largest_stable_step_times_lambda_max_after_it": (
                predicted["step"] * 2.0**against_top * found["lambda_max_after"]
            ),
            "loss_after": found["loss_after"],
            "lambda_max_after": found["lambda_max_after"],
            "trials_log2_step_over_prediction": [list(t) for t in found["trials"]],
        }
    ratios = [found["log2_ratio"] for found in details.values()]
    return Evidence(
        value=max(abs(r) for r in ratios),
        details=details,
        spread=(min(map(abs, ratios)), max(map(abs, ratios))),
        note=f"MiniLM-L6 in float64, {EXAMPLES} snippets of movie, {STEPS} full-batch steps; "
        f"2/{assumed}; the worst of the deltas and seeds",
    )


CLAIM = Claim(
    id=25,
    name="stable-step",
    title="A delta's largest stable step is 2/λ_max",
    statement=(
        "full-batch gradient descent on a delta alone, squared error, keeps the loss below its "
        "initial value up to the step 2/λ_max of the delta's Gauss-Newton matrix at the start"
    ),
    source="this project, from the quadratic model; LeCun, Simard, Pearlmutter, NeurIPS 1992",
    notebook="25_stable_step",
    threshold=Threshold("<=", 1.0, "largest |log2(measured step / predicted step)|"),
    predict=_predict,
    measure=lambda prediction: _evidence(prediction, "lambda_max"),
    negative_control=lambda prediction: _evidence(prediction, "mean_nonzero_eigenvalue"),
)
