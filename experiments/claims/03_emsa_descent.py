"""Claim 3: extended MSA decreases J whenever its penalty is above a constant.

What is judged is the share of held-out problems in which a step raises J. Its unit is the problem,
with a start of its own and one rho above rho*, because the steps from one start depend on each
other. That no step ever ascends cannot be shown by a sample: of 100 problems without an ascent the
interval of the share still ends at 4 to 5 %, and so the threshold is 5 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Ground, Part, Threshold

GRID = tuple(8.0**k for k in range(-5, 5))  # powers of eight
# Seeds of the problems that fit rho*, of those that test it, and of those without a penalty.
FIT = {"residual": range(6), "low-rank": range(6), "minilm": range(6)}
HELD_OUT = {"residual": range(6, 156), "low-rank": range(6, 156), "minilm": range(6, 106)}
BROKEN = {"residual": range(6, 46), "low-rank": range(6, 46), "minilm": range(6, 36)}
ITERATIONS = {"residual": 2, "low-rank": 2, "minilm": 1}
INNER_STEPS = {"residual": 8, "low-rank": 8, "minilm": 3}
SHARE = 0.05
TINY = 1e-4  # step size with which MSA is gradient descent and needs no penalty
ROUNDING = 1e-12
MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 3, 8
FIRST_BLOCK = 4  # of MiniLM: the last two of its six blocks and the readout are controlled


def _problem(family: str, seed: int) -> tuple[Any, Any]:
    """A problem of the family, and controls from which to start."""
    import torch

    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.control.systems import LowRankDynamics, ResidualNetwork

    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if family == "minilm":
        return _minilm(seed)
    if family == "residual":
        dynamics = ResidualNetwork.random(4, width=4, hidden=8, control_size=3, seed=seed)
        cost = SquaredErrorCost(2 * normal(6, 4), weight_decay=0.01)
        problem = ControlProblem(dynamics, cost, normal(6, 4))
    else:
        dynamics = LowRankDynamics([0.5 * normal(4, 4) for _ in range(3)], rank=2)
        cost = SquaredErrorCost(2 * normal(6, 4), weight_decay=0.01)
        problem = ControlProblem(dynamics, cost, normal(6, 4))
    return problem, tuple(0.5 * normal(m) for m in dynamics.control_sizes)


def _minilm(seed: int) -> tuple[Any, Any]:
    """LoRA in the last blocks of MiniLM, on three snippets of movie."""
    from deltacontrol.experiments.measures.identities import perturbed
    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.control.systems import Segment

    setting = Setting(
        MODEL, TASK, deltas=["lora:rank=2"], train_rows=EXAMPLES, max_length=TOKENS,
        dtype="float64", seed=seed,
    )  # fmt: skip
    problem: Any = setting.control_problem(weight_decay=1e-3)
    u = perturbed(problem.dynamics.controls(), 0.1, seed)
    first = FIRST_BLOCK + 1  # step 0 is the input
    x0 = problem.rollout(u)[first].detach()
    return ControlProblem(Segment(problem.dynamics, first), problem.cost, x0), u[first:]


def _ascents(family: str, problem: Any, start: Any, solver: Any) -> tuple[int, int]:
    """How often J rises by more than rounding, and in how many steps.

    An objective that is not finite is an ascent.
    """
    from itertools import pairwise

    from deltacontrol.theory.solvers.solving import solve

    solution = solve(problem, solver, start, max_steps=ITERATIONS[family], tol=0.0)
    history = solution.history["objective"].tolist()
    ascents = sum(
        not math.isfinite(after) or after - before > ROUNDING * abs(before)
        for before, after in pairwise(history)
    )
    return ascents, len(history) - 1


def _solver(family: str, rho: float) -> Any:
    """Extended MSA of a fixed penalty; without one, basic MSA with the same inner minimiser."""
    from deltacontrol.theory.solvers.emsa import ExtendedMSA
    from deltacontrol.theory.solvers.minimisers import InnerLBFGS
    from deltacontrol.theory.solvers.msa import MSA

    inner = InnerLBFGS(INNER_STEPS[family])
    return ExtendedMSA(rho, inner, adaptive=False) if rho else MSA(inner)


def _fit(family: str) -> float | None:
    """The smallest rho of the grid from which on no step ascends; None where the largest does."""
    problems = [_problem(family, seed) for seed in FIT[family]]
    fitted = None
    for rho in reversed(GRID):
        if any(_ascents(family, *pair, _solver(family, rho))[0] for pair in problems):
            break
        fitted = rho
    return fitted


@dataclass
class _Count:
    """Of some problems: how many had a step that raised J, and how many made a step at all."""

    rose: int = 0
    moved: int = 0
    still: int = 0

    def add(self, ascents: int, steps: int) -> None:
        self.rose += ascents > 0
        self.moved += steps > 0
        self.still += steps == 0

    def evidence(self, **more: Any) -> Evidence:
        if not self.moved:
            return Evidence(math.nan, **more)
        details = {"problems without a step": self.still, **more.pop("details", {})}
        return Evidence.share(self.rose, self.moved, "problem", details=details, **more)


@cache
def _counted(family: str) -> tuple[float | None, _Count, _Count, _Count]:
    """The fitted rho*, and held-out problems above it, without a penalty, and with tiny steps.

    The problems take the values of the grid above rho* in turn.
    """
    from deltacontrol.theory.solvers.msa import MSA

    fitted = _fit(family)
    above = [rho for rho in GRID if fitted is not None and rho > fitted]
    with_penalty, without, tiny = _Count(), _Count(), _Count()
    for number, seed in enumerate(HELD_OUT[family]):
        pair = _problem(family, seed)
        if above:
            rho = above[number % len(above)]
            with_penalty.add(*_ascents(family, *pair, _solver(family, rho)))
        if seed in BROKEN[family]:
            without.add(*_ascents(family, *pair, _solver(family, 0.0)))
        tiny.add(*_ascents(family, *pair, MSA(TINY)))
    return fitted, with_penalty, without, tiny


def _measure(family: str) -> Evidence:
    """Fit rho* on some problems of a family, count ascents above it on others."""
    fitted, found, _, _ = _counted(family)
    return found.evidence(
        details={"rho*": fitted, "steps of each problem": ITERATIONS[family]},
        # At the grid's end no step would be counted.
        assumptions={"rho* is found, below the end of the grid": found.moved + found.still > 0},
        note=f"{NAMES[family]}; rho fixed, powers of 8 above the one fitted on other seeds",
    )


def _negative_control(family: str) -> Evidence:
    """Without the penalty: basic MSA with the same inner minimiser."""
    return _counted(family)[2].evidence(note="rho = 0, on held-out problems")


def _passing_control(family: str) -> Evidence:
    """Without the penalty where none is needed: steps so short that MSA is gradient descent."""
    note = f"rho = 0, on held-out problems; one gradient step of size {TINY:g} as inner minimiser"
    return _counted(family)[3].evidence(note=note)


NAMES = {
    "residual": "tanh networks",
    "low-rank": "bilinear low-rank layers",
    "minilm": "LoRA in the last two blocks and the head of MiniLM-L6 on movie, in float64",
}


def _part(name: str, family: str, on: Ground) -> Part:
    return Part(
        name,
        NAMES[family].split(",")[0],
        Threshold("<=", SHARE, "share of held-out problems with a step above ρ* that raises J"),
        measure=lambda prediction: _measure(family),
        negative_control=lambda prediction: _negative_control(family),
        passing_control=lambda prediction: _passing_control(family),
        on=on,
    )


# Fewer cases, for `claims run --preset quick`.
QUICK = {
    "HELD_OUT": {"residual": range(6, 106), "low-rank": range(6, 106), "minilm": range(6, 36)},
    "BROKEN": {"residual": range(6, 26), "low-rank": range(6, 26), "minilm": range(6, 16)},
}

CLAIM = Claim(
    id=3,
    name="emsa-descent",
    title="Extended MSA descends above a penalty",
    statement=(
        "minimising H_t + ρ/2 |f_t - x_{t+1}|² + ρ/2 |∇_x H_t - p_t|² in u_t, all layers at once, "
        "decreases J for every ρ above a constant ρ*, fitted on other problems of the family"
    ),
    source="Li, Chen, Tai, E, JMLR 18(165), 2018, Section 3, Lemma 2 and Algorithm 2",
    notebook="03_emsa_descent",
    revised=(
        "no ascent in 20 steps on MiniLM allowed a share of up to 14 %; now 100 problems or more "
        "of each family are judged by the interval of their share, each family by itself"
    ),
    predict=dict,
    parts=(
        _part("a", "residual", "random network"),
        _part("b", "low-rank", "random network"),
        _part("c", "minilm", "real model, untrained"),
    ),
)
