"""The pictures of the pages on concepts, drawn from real systems and committed records.

Each is drawn twice, for light and for dark pages; `NAME-light.svg` and `NAME-dark.svg`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

F64 = torch.float64
BLUE, ORANGE, GREEN, PINK = "#3f8fd2", "#e0701a", "#1aa37a", "#cc79a7"
THEMES = {"light": "#1f2328", "dark": "#ced6dd"}


def drawn() -> dict[str, bytes]:
    """Every picture as SVG, by file name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {}
    for theme, ink in THEMES.items():
        with plt.rc_context(_style(ink)):
            for name, draw in PICTURES.items():
                figure = draw()
                data = io.BytesIO()
                figure.savefig(data, format="svg", metadata={"Date": None}, transparent=True)
                plt.close(figure)
                found[f"{name}-{theme}.svg"] = data.getvalue()
    return found


def _style(ink: str) -> dict[str, Any]:
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inks, ink) | {
        "svg.hashsalt": "deltacontrol",
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }


def _figure(panels: int = 1, height: float = 2.8) -> tuple[Figure, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(1, panels, figsize=(7.2 if panels > 1 else 5.6, height))


def _steered() -> Any:
    """Six frozen layers, whose biases are the controls, with the controls that reach a target."""
    from deltacontrol.theory import (
        ControlProblem,
        NewtonCG,
        ResidualNetwork,
        SquaredErrorCost,
        solve,
    )

    network = ResidualNetwork.random(6, 2, 8, 8, seed=4)
    start = torch.tensor([[-1.0, 0.2], [-0.6, -0.5], [-0.9, 0.7]], dtype=F64)
    goal = torch.tensor([1.2, 0.9], dtype=F64).expand(3, 2).contiguous()
    problem = ControlProblem(network, SquaredErrorCost(goal, weight_decay=1e-2), start)
    found = solve(problem, NewtonCG(), problem.zero_controls(), max_steps=200, tol=1e-8)
    return problem, found.controls


def layers() -> Figure:
    """States through six layers, without and with a control."""
    problem, u = _steered()
    figure, (left, right) = _figure(2)
    zero = problem.zero_controls()
    runs = (("the frozen network", zero, BLUE), ("with the delta", u, ORANGE))
    for title, controls, colour in runs:
        states = torch.stack(problem.rollout(controls)).detach().numpy()
        for example in range(states.shape[1]):
            x = states[:, example]
            left.plot(*x.T, "o-", color=colour, markersize=3, lw=1,
                      label=title if example == 0 else None)  # fmt: skip
            left.plot(*x[0], "s", color="grey", markersize=5)
    left.plot(*problem.cost.target[0].numpy(), "*", color=GREEN, markersize=12, label="target")
    left.set(xlabel="first entry of the state", ylabel="second entry", title="a point is a layer")
    left.legend(fontsize=7)
    sizes = [float(control.norm()) for control in u]
    right.bar(range(len(sizes)), sizes, color=ORANGE)
    right.set(xlabel="layer t", ylabel=r"$\|u_t\|$", title="how much each layer is controlled")
    return figure


def costates() -> Figure:
    """What a costate foretells, against what a pushed state does to the loss."""
    problem, _ = _steered()
    u = problem.zero_controls()
    now = problem.evaluate(u)
    states, costs = now.states, [p.detach() for p in now.costates]
    figure, (left, right) = _figure(2)
    generator = torch.Generator().manual_seed(0)
    colours = (BLUE, ORANGE, GREEN)
    for t, colour in zip((1, 3, 6), colours, strict=True):
        told, seen = [], []
        for _ in range(25):
            push = 0.02 * torch.randn(states[t].shape, generator=generator, dtype=F64)
            x = states[t].detach() + push
            for s in range(t, problem.dynamics.horizon):
                x = problem.dynamics.step(s, x, u[s])
            told.append(float((costs[t] * push).sum()))
            seen.append(float(problem.cost.terminal(x) - now.objective))
        left.plot(told, seen, ".", color=colour, label=f"layer {t}")
    ends = left.get_xlim()
    left.plot(ends, ends, color="grey", lw=0.8, zorder=0)
    left.set(xlabel=r"$\langle p_t, \delta x_t\rangle$, foretold", ylabel="change of J, measured",
             title="states pushed at random")  # fmt: skip
    left.legend(fontsize=7)
    right.plot([float(p.norm()) for p in costs], "o-", color=BLUE)
    right.set(xlabel="layer t", ylabel=r"$\|p_t\|$", title="costates, from the last layer back")
    return figure


def riccati() -> Figure:
    """A cart: the Hessian of the cost to go and the gains, and two trajectories."""
    from deltacontrol.theory import riccati as solve_lq

    L = 20
    A = torch.tensor([[1.0, 0.3], [0.0, 1.0]], dtype=F64).expand(L, 2, 2)
    B = torch.tensor([[0.0], [0.3]], dtype=F64).expand(L, 2, 1)
    Q = 0.02 * torch.eye(2, dtype=F64).expand(L, 2, 2)
    R = 0.1 * torch.eye(1, dtype=F64).expand(L, 1, 1)
    policy = solve_lq(A, B, Q, R, torch.eye(2, dtype=F64))
    figure, (left, right) = _figure(2)
    hessians = torch.stack(list(policy.hessians))
    left.plot(hessians[:, 0, 0], "o-", ms=3, color=BLUE, label=r"$P_t$, place")
    left.plot(hessians[:, 1, 1], "o-", ms=3, color=GREEN, label=r"$P_t$, speed")
    gains = torch.stack(list(policy.gains))
    left.plot(gains[:, 0, 0], "s--", ms=3, color=ORANGE, label=r"$K_t$, place")
    left.set(xlabel="step t", title="computed backwards, from step 20")
    left.legend(fontsize=7)
    start = torch.tensor([1.0, 0.0], dtype=F64)
    generator = torch.Generator().manual_seed(2)
    kicks = 0.03 * torch.randn(L, 2, generator=generator, dtype=F64)
    planned, calm = [], start
    for t in range(L):
        planned.append(policy.control(t, calm))
        calm = A[t] @ calm + B[t] @ planned[t]
    for closed, colour, title in ((False, BLUE, "planned controls"), (True, ORANGE, "law u = K x")):
        x, places = start, [1.0]
        for t in range(L):
            u = policy.control(t, x) if closed else planned[t]
            x = A[t] @ x + B[t] @ u + kicks[t]
            places.append(float(x[0]))
        right.plot(places, color=colour, label=title)
    right.axhline(0, color="grey", lw=0.8)
    right.set(xlabel="step t", title="place of the cart, with the same disturbances")
    right.legend(fontsize=7)
    return figure


def gramian() -> Figure:
    """What a unit of energy reaches: the Gramian's ellipse and the ends of random controls."""
    from deltacontrol.theory import (
        ControlProblem,
        LinearDynamics,
        Linearisation,
        QuadraticCost,
        Reachability,
    )

    A = torch.tensor([[1.0, 0.4], [0.0, 0.9]], dtype=F64)
    B = torch.tensor([[0.0], [0.4]], dtype=F64)
    figure, axes = _figure(3, 2.6)
    angles = torch.linspace(0, 2 * torch.pi, 200, dtype=F64)
    circle = torch.stack([angles.cos(), angles.sin()])
    generator = torch.Generator().manual_seed(1)
    for L, ax in zip((1, 2, 6), axes, strict=True):
        system = LinearDynamics.constant(L, A, B)
        zeros, ones = torch.zeros(L, 2, 2, dtype=F64), torch.ones(L, 1, 1, dtype=F64)
        cost = QuadraticCost(zeros, ones, torch.eye(2, dtype=F64))
        problem = ControlProblem(system, cost, torch.zeros(2, dtype=F64))
        reach = Reachability(Linearisation.of(problem, problem.zero_controls()))
        W = reach.output_map().gramian()
        values, vectors = torch.linalg.eigh(W)
        edge = vectors @ ((2 * values.clamp(min=0)).sqrt()[:, None] * circle)  # energy 1/2 u'u = 1
        ax.plot(*edge.numpy(), color=ORANGE)
        draws = torch.randn(400, L, generator=generator, dtype=F64)
        draws *= 2**0.5 / draws.norm(dim=1, keepdim=True)
        ends = np.array([(reach @ draw).tolist() for draw in draws])
        ax.plot(*ends.T, ".", ms=2, color=BLUE)
        rank = int((values > 1e-12 * values[-1]).sum())
        ax.set(title=f"{L} step{'s' * (L > 1)}: rank {rank}", xlim=(-2.4, 2.4), ylim=(-1.7, 1.7))
        ax.set_xlabel("place")
    axes[0].set_ylabel("speed")
    return figure


def d90() -> Figure:
    """One committed search: accuracy over the dimension, target, and where the fit reaches it."""
    from docs.generators import figures

    rows = figures.loaded("d90")[1]
    mine = rows[(rows.model == "minilm-l3") & (rows.start == "pre-trained")
                & (rows.method == "said") & rows.d90.notna()]  # fmt: skip
    task = sorted(mine.task.unique())[0]
    mine = mine[mine.task == task]
    trained = mine[mine.dimension.notna()]
    first = mine.iloc[0]
    figure, ax = _figure()
    ax.semilogx(trained.dimension, trained.accuracy, "o", ms=4, color=BLUE,
                label="a training in d random directions")  # fmt: skip
    means = trained.groupby("dimension").accuracy.mean()
    ax.plot(means.index, means, color=BLUE, lw=1)
    full = mine[mine.dimension.isna()].accuracy.mean()
    ax.axhline(full, color=GREEN, lw=1, label="full fine-tuning")
    ax.axhline(first.target, color=ORANGE, lw=1, ls="--", label="target: 90 % of it")
    ax.axvspan(first.low, first.high, color=ORANGE, alpha=0.18, lw=0)
    ax.axvline(first.d90, color=ORANGE, lw=1)
    ax.set(xlabel="dimension d", ylabel="validation accuracy",
           title=f"MiniLM-L3 on {task}: d90 = {first.reading}")  # fmt: skip
    ax.legend(fontsize=7, loc="lower right")
    return figure


def claims() -> Figure:
    """Three committed verdicts: an interval, its control and the threshold."""
    from deltacontrol.experiments.claims import scoreboard

    figure, axes = _figure(3, 2.2)
    wanted: dict[str, Any] = {}
    for claim in scoreboard.available().values():
        outcome = scoreboard.stored(claim)
        for part in outcome.parts if outcome else ():
            plain = isinstance(part.threshold.value, int | float) and part.threshold.value
            if plain and part.evidence.interval and part.control.interval:
                wanted.setdefault(part.verdict.value, (claim, part))
    for ax, verdict in zip(axes, ("holds", "fails", "inconclusive"), strict=True):
        claim, part = wanted[verdict]
        for y, evidence, colour in ((1, part.evidence, BLUE), (0, part.control, PINK)):
            low, high = evidence.bounds()
            ax.plot([low, high], [y, y], color=colour, lw=2)
            ax.plot(evidence.value, y, "o", color=colour)
        ax.axvline(float(part.threshold.value), color=ORANGE, ls="--", lw=1)
        ax.set(yticks=[0, 1], yticklabels=["control", "measured"], ylim=(-0.6, 1.6))
        ax.set_title(f"{verdict}: {claim.id}{part.name}\nwanted {part.threshold.condition}")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "layers": layers,
    "costates": costates,
    "riccati": riccati,
    "gramian": gramian,
    "d90": d90,
    "claims": claims,
}
