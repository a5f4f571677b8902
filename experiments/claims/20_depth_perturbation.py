"""Claim 20: what a delta does to the last state is bounded by Lipschitz constants in depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.control.problem import Controls
    from deltacontrol.theory.control.systems import Segment

MODEL, TASK = "minilm-l6", "movie"
DELTAS = ("lora", "houlsby", "bitfit", "prefix")
EXAMPLES, TOKENS = 6, 12  # the first rows of the task are longer than that: no padding
TRAINING_STEPS, LEARNING_RATE = 30, 1e-3
POINTS, ITERATIONS = 5, 20
WORST_CASE_SIZE = 1e-3
RANDOM_DIRECTIONS = 8
FACTORS = (2, 4, 8)


def _problem(*deltas: str) -> Any:
    from deltacontrol.experiments.setting import Setting

    return Setting(
        MODEL, TASK, deltas=deltas, train_rows=EXAMPLES, max_length=TOKENS, dtype="float64"
    ).control_problem()


def _base() -> tuple[Segment, list[Tensor]]:
    """The blocks of the model without a delta, and the states x_0..x_6 between them."""
    import torch

    from deltacontrol.theory.control.systems import Segment

    problem = _problem()
    with torch.no_grad():
        states = problem.rollout(problem.dynamics.controls())
    return Segment(problem.dynamics, 1, problem.dynamics.horizon - 1), states[1:-1]


def _trained(name: str) -> tuple[list[Tensor], float, float]:
    """The states of the model with a delta after full-batch Adam; the loss before and after."""
    import torch

    problem = _problem(name)
    leaves = [u.requires_grad_() for u in problem.dynamics.controls()]
    optimiser = torch.optim.Adam(leaves, lr=LEARNING_RATE)
    losses = []
    for _ in range(TRAINING_STEPS):
        now = problem.evaluate(tuple(leaves))
        losses.append(float(now.objective))
        for leaf, g in zip(leaves, now.gradient, strict=True):
            leaf.grad = g
        optimiser.step()
    trained: Controls = tuple(u.detach() for u in leaves)
    final = problem.evaluate(trained)
    return final.states[1:-1], losses[0], float(final.objective)


def _perturbed(base: Segment, x: list[Tensor]) -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    """Other sequences of states.

    Those of the deltas; after the change of x_0 that the linearised blocks amplify most, and after
    the change of x_5 that the last block does, for which alone the bound is nearly attained; and
    those of finer steps in depth.
    """
    import torch

    from deltacontrol.theory.control.systems import Segment
    from deltacontrol.theory.depth.continuous import ContinuousDepth
    from deltacontrol.theory.depth.perturbation import example_norms, spectral_norm
    from deltacontrol.theory.linear.linearisation import Linearisation

    found: dict[str, tuple[list[Tensor], dict[str, Any]]] = {}
    for name in DELTAS:
        states, before, after = _trained(name)
        found[name] = states, {"loss_before": before, "loss_after": after}
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
        found[name] = states, {"amplification": top.value}
    coarser = x[-1]
    for factor in FACTORS:
        refined = ContinuousDepth(base).refine(factor)
        fine = [x[0]]
        with torch.no_grad():
            for k, u in enumerate(refined.lift(none)):
                fine.append(refined.step(k, fine[-1], u))
        change = example_norms(fine[-1] - coarser) / example_norms(x[-1])
        found[f"{factor} steps a block"] = fine[::factor], {"change_by_halving": change}
        coarser = fine[-1]
    return found


def _sampled_constants(base: Segment, x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
    """Spectral norms at points of the segments from x_t to y_t, (points, batch) for each block."""
    from deltacontrol.theory.depth.perturbation import segment_norms

    return [
        segment_norms(
            base,
            t,
            x[t],
            y[t],
            x[t].new_zeros(base.control_sizes[t]),
            num_points=POINTS,
            num_iterations=ITERATIONS,
        ).value
        for t in range(base.horizon)
    ]


def _mean_gains(base: Segment, x: list[Tensor]) -> list[Tensor]:
    """Root mean square of |A_t v| over random unit v, of which |A_t|_2 is the supremum."""
    import torch

    from deltacontrol.theory.depth.perturbation import example_norms
    from deltacontrol.theory.linear.linearisation import Linearisation

    none = tuple(x[0].new_zeros(m) for m in base.control_sizes)
    lin = Linearisation(base, x, none, keep=True)
    generator = torch.Generator().manual_seed(0)
    gains = []
    for t in range(base.horizon):
        squares = []
        for _ in range(RANDOM_DIRECTIONS):
            v = torch.randn(x[t].shape, generator=generator, dtype=x[t].dtype)
            gain = example_norms(lin.tangent_step(t, v, none[t])) / example_norms(v)
            squares.append(gain.square())
        gains.append(torch.stack(squares).mean(0).sqrt())
    return gains


def _evidence(*, broken: bool) -> Evidence:
    import torch

    from deltacontrol.theory.depth.perturbation import example_norms, growth_bound

    base, x = _base()
    details: dict[str, Any] = {}
    worst, trained = 0.0, True
    gains = _mean_gains(base, x) if broken else None
    for name, (y, more) in _perturbed(base, x).items():
        if gains is None:
            sampled = _sampled_constants(base, x, y)
            constants = [values.amax(0) for values in sampled]
            more["largest_over_smallest_on_a_segment"] = max(
                float((values.amax(0) / values.amin(0)).max()) for values in sampled
            )
        else:
            constants = gains
        with torch.no_grad():
            defects = [
                example_norms(y[t + 1] - base.step(t, y[t], x[t].new_zeros(m)))
                for t, m in enumerate(base.control_sizes)
            ]
        bound = growth_bound(constants, defects, example_norms(y[0] - x[0]))
        actual = torch.stack([example_norms(b - a) for a, b in zip(x, y, strict=True)])
        ratio = actual[-1] / bound[-1]
        details[name] = {
            "ratio": ratio,
            "relative_change_of_the_last_state": actual[-1] / example_norms(x[-1]),
            "mean_defect": [float(d.mean()) for d in defects],
            "mean_constant": [float(c.mean()) for c in constants],
            "median_slack_by_depth": [
                float(s) if s.isfinite() else None  # None where nothing has changed yet
                for s in (bound / actual)[1:].median(1).values
            ],
            **more,
        }
        worst = max(worst, float(ratio.max()))
        trained = trained and more.get("loss_after", 0.0) < more.get("loss_before", 1.0)
    note = "MiniLM-L6 in float64, 6 snippets of movie, largest ratio over examples and changes"
    return Evidence(
        value=worst,
        details=details,
        assumption_met=trained,
        note=note if not broken else note + "; constants are mean gains over random directions",
    )


def _predict() -> dict[str, Any]:
    """The ratio may not exceed 1; and how much a block can amplify at the model's own states."""
    base, x = _base()
    norms = [values[0] for values in _sampled_constants(base, x, x)]
    return {
        "largest_ratio": 1.0,
        "spectral_norm_of_each_block": [float(n.mean()) for n in norms],
    }


CLAIM = Claim(
    id=20,
    name="depth-perturbation",
    title="A delta's effect is bounded in depth (Grönwall)",
    statement=(
        "‖y_L - x_L‖ ≤ (Π_t Lip_t) ‖y_0 - x_0‖ + Σ_t (Π_{s>t} Lip_s) ‖y_{t+1} - f_t(y_t)‖ for "
        "every example, Lip_t the largest spectral norm of ∂f_t/∂x sampled from x_t to y_t"
    ),
    source="Hairer, Nørsett & Wanner 1993, Section I.10, in discrete form",
    notebook="20_depth_perturbation",
    threshold=Threshold("<=", 1.0, "largest ratio of the change of the last state to its bound"),
    predict=_predict,
    measure=lambda prediction: _evidence(broken=False),
    negative_control=lambda prediction: _evidence(broken=True),
)
