"""Claim 20: what a delta does to the last state is bounded by Lipschitz constants in depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.control.problem import Controls
    from deltacontrol.theory.control.systems import Segment

# The sizes are chosen by cost alone.
MODEL, TASK = "minilm-l6", "movie"
DELTAS = ("lora", "houlsby", "bitfit", "prefix")
SEEDS = range(5, 10)  # heads and starts that no earlier check has seen
EXAMPLES, TOKENS = 4, 8
TRAINING_STEPS, LEARNING_RATE = 30, 1e-3
POINTS, ITERATIONS = 3, 20
WORST_CASE_SIZE = 1e-3
RANDOM_DIRECTIONS = 8
FACTORS = (2, 4, 8)


@dataclass(frozen=True, eq=False)
class _Change:
    """A model's states, another sequence of states, and what bounds their distance.

    Attributes:
        name: where the other states are from.
        base: the blocks of the model without a delta.
        x: their states.
        y: the other states.
        trained: whether they are those of a trained delta.
        more: numbers for the record.
    """

    name: str
    base: Segment
    x: list[Tensor]
    y: list[Tensor]
    trained: bool = False
    more: dict[str, float] = field(default_factory=dict)

    def ratios(self, constants: list[Tensor], carried: float = 1.0) -> Tensor:
        """Actual change over its bound, (states, examples); NaN before anything has changed.

        Only the share ``carried`` of each constant counts.
        """
        import torch

        from deltacontrol.theory.depth.perturbation import example_norms, growth_bound

        defects = self.defects()
        initial = example_norms(self.y[0] - self.x[0])
        bound = growth_bound([carried * c for c in constants], defects, initial)
        actual = [example_norms(b - a) for a, b in zip(self.x, self.y, strict=True)]
        return torch.stack(actual) / bound

    def defects(self) -> list[Tensor]:
        """What is added behind each block, for each example."""
        import torch

        from deltacontrol.theory.depth.perturbation import example_norms

        with torch.no_grad():
            return [
                example_norms(self.y[t + 1] - self.base.step(t, self.y[t], self.x[t].new_zeros(m)))
                for t, m in enumerate(self.base.control_sizes)
            ]

    def first_change(self) -> int:
        """The first state that differs."""
        differs = [not bool((a == b).all()) for a, b in zip(self.x, self.y, strict=True)]
        return differs.index(True)

    def spectral_norms(self) -> list[Tensor]:
        """The largest of a few points of the segments from x_t to y_t, (batch,) a block."""
        from deltacontrol.theory.depth.perturbation import segment_norms

        found = []
        for t, m in enumerate(self.base.control_sizes):
            zero = self.x[t].new_zeros(m)
            sampled = segment_norms(
                self.base, t, self.x[t], self.y[t], zero,
                num_points=POINTS, num_iterations=ITERATIONS,
            )  # fmt: skip
            found.append(sampled.value.amax(0))
        return found

    def frobenius_norms(self) -> list[Tensor]:
        """Estimates of the Frobenius norms at x_t: root mean square gains times √n."""
        import torch

        from deltacontrol.theory.depth.perturbation import example_norms
        from deltacontrol.theory.linear.linearisation import Linearisation

        none = tuple(self.x[0].new_zeros(m) for m in self.base.control_sizes)
        lin = Linearisation(self.base, self.x, none, keep=True)
        generator = torch.Generator().manual_seed(0)
        norms = []
        for t in range(self.base.horizon):
            squares = []
            for _ in range(RANDOM_DIRECTIONS):
                v = torch.randn(self.x[t].shape, generator=generator, dtype=self.x[t].dtype)
                gain = example_norms(lin.tangent_step(t, v, none[t])) / example_norms(v)
                squares.append(gain.square())
            norms.append((torch.stack(squares).mean(0) * self.x[t][0].numel()).sqrt())
        return norms


def _problem(seed: int, *deltas: str) -> Any:
    from deltacontrol.experiments.setting import Setting

    return Setting(
        MODEL, TASK, deltas=deltas, train_rows=EXAMPLES, order="sampled", max_length=TOKENS,
        dtype="float64", seed=seed,
    ).control_problem()  # fmt: skip


def _base(seed: int) -> tuple[Segment, list[Tensor]]:
    """The blocks of the model without a delta, and the states between them."""
    import torch

    from deltacontrol.theory.control.systems import Segment

    problem = _problem(seed)
    with torch.no_grad():
        states = problem.rollout(problem.dynamics.controls())
    return Segment(problem.dynamics, 1, problem.dynamics.horizon - 1), states[1:-1]


def _trained(name: str, seed: int) -> tuple[list[Tensor], dict[str, float]]:
    """The states of the model with a delta after full-batch Adam; the loss before and after."""
    import torch

    problem = _problem(seed, name)
    leaves = [u.requires_grad_() for u in problem.dynamics.controls()]
    optimiser = torch.optim.Adam(leaves, lr=LEARNING_RATE)
    losses = []
    for _ in range(TRAINING_STEPS):
        now = problem.evaluate(tuple(leaves))
        losses.append(float(now.objective))
        for leaf, g in zip(leaves, now.gradient, strict=True):
            leaf.grad = g
        optimiser.step()
    final = problem.evaluate(tuple(u.detach() for u in leaves))
    return final.states[1:-1], {"loss before": losses[0], "loss after": float(final.objective)}


def _made(base: Segment, x: list[Tensor]) -> Iterator[_Change]:
    """Changes that no delta makes.

    The change of x_0 that the linearised blocks amplify most, and that of x_{L-1} that the last
    block does, for which alone the bound is nearly attained; and finer steps in depth.
    """
    import torch

    from deltacontrol.theory.control.systems import Segment
    from deltacontrol.theory.depth.continuous import ContinuousDepth
    from deltacontrol.theory.depth.perturbation import example_norms, spectral_norm
    from deltacontrol.theory.linear.linearisation import Linearisation

    none: Controls = tuple(x[0].new_zeros(m) for m in base.control_sizes)
    for first, name in ((0, "worst case"), (base.horizon - 1, "worst case, last block")):
        rest = Segment(base, first)
        lin = Linearisation(rest, x[first:], none[first:], keep=True)
        top = spectral_norm(lin.transition, x[first], num_iterations=ITERATIONS)
        size = WORST_CASE_SIZE * example_norms(x[first])
        states = [*x[:first], x[first] + size[:, None, None] * top.vector]
        with torch.no_grad():
            for t in range(first, base.horizon):
                states.append(base.step(t, states[-1], none[t]))
        yield _Change(name, base, x, states, more={"amplification": float(top.value.max())})
    coarser = x[-1]
    for factor in FACTORS:
        refined = ContinuousDepth(base).refine(factor)
        fine = [x[0]]
        with torch.no_grad():
            for k, u in enumerate(refined.lift(none)):
                fine.append(refined.step(k, fine[-1], u))
        halved = float((example_norms(fine[-1] - coarser) / example_norms(x[-1])).max())
        more = {"change by halving": halved}
        yield _Change(f"{factor} steps a block", base, x, fine[::factor], more=more)
        coarser = fine[-1]


def _changes() -> Iterator[_Change]:
    for seed in SEEDS:
        base, x = _base(seed)
        for name in DELTAS:
            y, more = _trained(name, seed)
            yield _Change(f"{name}, seed {seed}", base, x, y, True, more)
        if seed == SEEDS[0]:
            yield from _made(base, x)


@cache
def _found() -> dict[str, dict[str, Any]]:
    """For every change what the record and the parts need, one of them in memory at a time."""
    from deltacontrol.theory.depth.perturbation import example_norms

    found: dict[str, dict[str, Any]] = {}
    for change in _changes():
        constants, first = change.spectral_norms(), change.first_change()
        ratios, depth = change.ratios(constants), len(change.x) - 1
        effects = example_norms(change.y[-1] - change.x[-1]) / example_norms(change.x[-1])
        row: dict[str, Any] = {
            "trained": change.trained,
            # Where something has first changed the bound is that change: nothing is told there.
            "by state": {t: float(ratios[t].max()) for t in range(first + 1, depth + 1)},
            "relative change of the last state": float(effects.max()),
            "mean constants": [float(c.mean()) for c in constants],
            "mean defects": [float(d.mean()) for d in change.defects()],
            **change.more,
        }
        if change.trained:
            alone = change.ratios(constants, carried=0.0)
            row["by state, nothing carried"] = [float(r.max()) for r in alone[first + 1 :]]
            row["effect over bound"] = _typical(ratios[-1])
            crude = change.ratios(change.frobenius_norms())
            row["effect over crude bound"] = _typical(crude[-1])
            row["first effect over crude bound"] = _typical(crude[first])
        found[change.name] = row
    return found


def _typical(ratios: Tensor) -> float:
    """The geometric mean of the examples."""
    return float(ratios.log().mean().exp())


def _trainings() -> dict[str, dict[str, Any]]:
    return {name: row for name, row in _found().items() if row["trained"]}


def _met(delta: str = "") -> dict[str, bool]:
    rows = [row for name, row in _trainings().items() if name.startswith(delta)]
    return {"training lowers the loss": all(row["loss after"] < row["loss before"] for row in rows)}


def _holds(prediction: Mapping[str, Any]) -> Evidence:
    """The largest ratio over deltas, seeds, states and examples; constructed changes too."""
    cases = {
        f"{name}, state {t}": ratio / prediction["largest_ratio"]
        for name, row in _found().items()
        for t, ratio in row["by state"].items()
    }
    note = f"{MODEL} in float64, {EXAMPLES} snippets of {TASK}; a case is a change and a state"
    return Evidence.worst(cases, note=note, details={"changes": _found()}, assumptions=_met())


def _nothing_carried(prediction: Mapping[str, Any]) -> Evidence:
    """Lip_t = 0: what a delta did in one block is not carried on by those behind it."""
    cases = {name: max(row["by state, nothing carried"]) for name, row in _trainings().items()}
    note = "the defect of the last block alone; the delta and seed that violate it least"
    return Evidence.worst(cases, least=True, note=note)


def _all_carried(prediction: Mapping[str, Any]) -> Evidence:
    """The same deltas with all of the constants."""
    cases = {name: max(row["by state"].values()) for name, row in _trainings().items()}
    return Evidence.worst(cases, note="the same deltas with the whole constants")


def _worth(i: int, column: str, note: str, prediction: Mapping[str, Any]) -> Evidence:
    """How much of the bound one delta's effect on the last state is; a value a seed."""
    names = [f"{DELTAS[i]}, seed {seed}" for seed in SEEDS]
    values = {name: _found()[name][column] for name in names}
    return Evidence.mean(
        list(values.values()), "seed", details=values, note=note, assumptions=_met(DELTAS[i])
    )


def _predict() -> dict[str, Any]:
    """The ratio may not exceed 1."""
    return {"largest_ratio": 1.0}


def _worth_part(i: int, letter: str, title: str) -> Part:
    return Part(
        letter,
        f"the bound is worth something, {title}",
        Threshold(">=", 0.01, "mean share of the bound that the last state's change is"),
        partial(_worth, i, "effect over bound", "geometric mean over examples, mean over seeds"),
        partial(_worth, i, "effect over crude bound", "Frobenius norms for spectral norms"),
        partial(
            _worth, i, "first effect over crude bound",
            "Frobenius norms, at the first state that changes: no constant enters there",
        ),
        "real fine-tuning",
    )  # fmt: skip


# Fewer cases, for `claims run --preset quick`.
QUICK = {"SEEDS": range(5, 7)}

CLAIM = Claim(
    id=20,
    name="depth-perturbation",
    title="A delta's effect is bounded in depth (Grönwall)",
    statement=(
        "‖y_L - x_L‖ ≤ (Π_t Lip_t) ‖y_0 - x_0‖ + Σ_t (Π_{s>t} Lip_s) ‖y_{t+1} - f_t(y_t)‖ for "
        "every example, Lip_t the largest spectral norm of ∂f_t/∂x sampled from x_t to y_t (a); "
        "and what a trained delta does is at least a hundredth of it (b to e)"
    ),
    source="Hairer, Nørsett & Wanner 1993, Section I.10, in discrete form",
    notebook="20_depth_perturbation",
    predict=_predict,
    revised=(
        "one constructed change, which nearly attains the bound, decided alone, and the control "
        "passed for every trained delta; each delta and state is now a case, and what the bound "
        "is worth for trained deltas has parts of its own"
    ),
    parts=(
        Part(
            "a",
            "the bound holds",
            Threshold("<=", 1.0, "largest ratio of the change of a state to its bound"),
            _holds,
            _nothing_carried,
            _all_carried,
            "real fine-tuning",
        ),
        _worth_part(0, "b", "LoRA"),
        _worth_part(1, "c", "Houlsby's adapter"),
        _worth_part(2, "d", "BitFit"),
        _worth_part(3, "e", "prefix"),
    ),
)
