"""Claim 4: what a step changes in J is bounded by the Hamiltonians and a sum of squares.

That a C exists is a theorem where derivatives are Lipschitz. What is measured is whether the C that
some bases need serves others, a base being one draw of LoRA, head and controls with all steps from
there. The largest C that is needed has no honest interval: drawn again with replacement, a maximum
is never above the one that was seen. So the share of new bases is judged that need more than twice
the largest C of the fit. Its interval is binomial over bases, because steps from one base depend on
each other. Sixteen bases without a violation allow a share of up to 24 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 3, 12
# Seeds of the controls, LoRA and head of MiniLM, from which steps are made; of the held-out ones,
# the first are also those of the negative controls.
FIT, HELD_OUT, BROKEN = range(13), range(13, 29), range(13, 21)
KINDS = ("all layers", "one layer", "gradient")
# C is the largest that the first half needs, times this: a second half of as many steps exceeds the
# largest of the first half every other time.
SAFETY = 2.0
SHARE = 0.25
# Of each part: relative sizes of the steps, those of the control's steps, and the relative distance
# of the controls whose costates the control takes. What these get wrong is of first order and the
# squares are of second, so that it shows in small steps or in costates that are far away.
CHECKS = {
    "a": ((1e-3, 1e-2, 1e-1, 1.0), (1e-3, 1e-2, 1e-1, 1.0), 0.01),
    "b": ((1e-4, 1e-2, 1.0), (1e-4,), 1.0),
}


@dataclass(frozen=True)
class _Step:
    """A step from ``u`` to ``v``: its base, its kind, its size, and the terms of the bound."""

    base: int
    kind: str
    size: float
    objective: float
    hamiltonian: float
    squares: float

    @property
    def needed(self) -> float:
        """The smallest C with which the bound holds for this step."""
        return (self.objective - self.hamiltonian) / self.squares


def _moved(u: Any, gradient: Any, kind: str, size: float, seed: int) -> Any:
    """Controls at a relative distance ``size`` from ``u``."""
    from deltacontrol.experiments.measures.identities import perturbed

    if kind == "gradient":
        sign = 1 if seed % 2 else -1
        norms = [sum(float(a.square().sum()) for a in parts) ** 0.5 for parts in (u, gradient)]
        return tuple(a + sign * size * norms[0] / norms[1] * g for a, g in
                     zip(u, gradient, strict=True))  # fmt: skip
    noisy = perturbed(u, size, seed)
    if kind == "all layers":
        return noisy
    controlled = [t for t, a in enumerate(u) if a.numel()]
    chosen = controlled[seed % len(controlled)]
    return tuple(noisy[t] if t == chosen else a for t, a in enumerate(u))


def _all_sizes() -> list[float]:
    return sorted({size for sizes, _, _ in CHECKS.values() for size in sizes})


@cache
def _steps(base: int, sizes: tuple[float, ...] = (), wrong: float = 0.0) -> tuple[_Step, ...]:
    """The steps from one base, of these sizes or of all.

    Args:
        base: the seed.
        sizes: relative sizes; empty for those of both checks, which share their steps.
        wrong: how far away the controls are whose costates are taken; zero for the right ones.
    """
    import dataclasses

    import torch

    from deltacontrol.experiments.measures.identities import perturbed
    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.solvers.emsa import step_change

    setting = Setting(
        MODEL, TASK, deltas=["lora:rank=4"], train_rows=EXAMPLES, max_length=TOKENS,
        dtype="float64", seed=base,
    )  # fmt: skip
    problem: Any = setting.control_problem(weight_decay=1e-3)
    u = perturbed(problem.dynamics.controls(), 0.3, seed=base)
    now = problem.evaluate(u)
    if wrong:
        elsewhere = problem.evaluate(perturbed(u, wrong, seed=100 + base))
        now = dataclasses.replace(now, costates=elsewhere.costates)
    found = []
    for number, (size, kind) in enumerate((s, k) for s in _all_sizes() for k in KINDS):
        if sizes and size not in sizes:
            continue
        v = _moved(u, now.gradient, kind, size, seed=101 * base + number)
        with torch.no_grad():
            difference = float(problem.objective(v) - now.objective)
        changes = [
            step_change(problem, t, now.states[t], now.costates[t + 1], a, b)
            for t, (a, b) in enumerate(zip(u, v, strict=True))
            if not torch.equal(a, b)
        ]
        hamiltonian = sum(float(change.hamiltonian) for change in changes)
        squares = sum(float(change.squares) for change in changes)
        found.append(_Step(base, kind, size, difference, hamiltonian, squares))
    return tuple(found)


def _of(bases: range, sizes: tuple[float, ...]) -> list[_Step]:
    """The steps of these sizes, with the right costates."""
    return [step for base in bases for step in _steps(base) if step.size in sizes]


def _largest(steps: Sequence[_Step]) -> float:
    """The smallest C with which the bound holds for all of these steps."""
    return max(step.needed for step in steps)


def _by(name: str, steps: Sequence[_Step]) -> dict[str, float]:
    values = sorted({getattr(step, name) for step in steps})
    return {
        f"largest C needed by {name} {value}": _largest(
            [step for step in steps if getattr(step, name) == value]
        )
        for value in values
    }


def _violated(part: str, steps: Sequence[_Step], **more: Any) -> Evidence:
    """The share of bases of which some step needs more than SAFETY times the fitted C."""
    fitted = _largest(_of(FIT, CHECKS[part][0]))
    allowed = SAFETY * fitted
    bases = {step.base for step in steps}
    violating = {step.base for step in steps if not step.needed <= allowed}
    details = {
        "fitted C": fitted,
        "largest C needed, relative to what is allowed": _largest(steps) / allowed,
        "steps": len(steps),
        "violations": sum(not step.needed <= allowed for step in steps),
        **more.pop("details", {}),
    }
    return Evidence.share(len(violating), len(bases), "base", details=details, **more)


def _measure(part: str) -> Evidence:
    """Fit C on the steps from one half of the bases, count the other bases that need more."""
    sizes = CHECKS[part][0]
    fit, held_out = _of(FIT, sizes), _of(HELD_OUT, sizes)
    return _violated(
        part,
        held_out,
        details={
            "violations with C = 0": sum(step.needed > 0 for step in held_out),
            **_by("size", fit + held_out),
            **_by("kind", fit + held_out),
        },
        assumptions={"the fitted C is positive": _largest(fit) > 0},
        note="MiniLM-L6 with LoRA in float64 on movie; from other controls than C was fitted on",
    )


def _elsewhere(part: str, bases: range, wrong: float) -> Evidence:
    """The control's steps with costates of controls that are so far away."""
    sizes = CHECKS[part][1]
    steps = [
        step for base in bases for step in (_steps(base, sizes, wrong) if wrong else _steps(base))
    ]
    note = f"costates of controls at a distance of {wrong:g}; steps of "
    return _violated(
        part,
        [step for step in steps if step.size in sizes],
        note=note + ", ".join(f"{size:g}" for size in sizes),
    )


def _negative_control(part: str) -> Evidence:
    """The costates of other controls: the Hamiltonians are wrong to first order."""
    return _elsewhere(part, BROKEN, CHECKS[part][2])


def _passing_control(part: str) -> Evidence:
    """The same at a distance of zero, from the bases on which C was fitted.

    It does not lean on the held-out bases, so that these may fail while the control is sound.
    """
    return _elsewhere(part, FIT, 0.0)


def _part(name: str, title: str) -> Part:
    return Part(
        name,
        title,
        Threshold(
            "<=", SHARE, "share of bases with a step that needs over twice the largest C of the fit"
        ),
        measure=lambda prediction: _measure(name),
        negative_control=lambda prediction: _negative_control(name),
        passing_control=lambda prediction: _passing_control(name),
        on="real model, untrained",
    )


CLAIM = Claim(
    id=4,
    name="hamiltonian-bound",
    title="The Hamiltonians bound the change of J",
    statement=(
        "J(v) - J(u) ≤ Σ_t ΔH_t + C Σ_t (|Δf_t|² + |Δ(∂_x f_t)ᵀ p_{t+1}|² + |Δ∇_x ℓ_t|²) with one "
        "C for all steps u → v of a region; Δ replaces u_t by v_t along the states and costates of "
        "u, and |·|² is the mean over the examples"
    ),
    source="Li & Hao, ICML 2018, Theorem 2; Li, Chen, Tai, E, JMLR 18(165), 2018, Lemma 2",
    notebook="04_hamiltonian_bound",
    revised=(
        "the control of the first check (costates 1 % away) passed with 0.597 of the allowed C, "
        "and was then given smaller steps and costates farther away; both checks are shown, a as "
        "it was first and b as it was changed, and the share of bases is judged by its interval"
    ),
    predict=dict,
    parts=(
        _part("a", "the check as it was first"),
        _part("b", "control of the smallest steps"),
    ),
)
