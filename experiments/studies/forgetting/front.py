"""The front of task loss against distance from the base model that one quadratic model foretells.

At the start u₀ of a control, with the gradient g and the Gauss-Newton matrix G of the task's loss
and the Fisher matrix F of held text, a step u changes

    task loss by  g'u + u'Gu/2,        KL(base, tuned) on held text by  u'Fu/2,

both up to third order, since u₀ is the base model. The front is that of

    u(μ) = argmin  g'u + u'Gu/2 + μ u'Fu/2,        μ > 0.

It is sought in a Krylov subspace of both matrices: an orthonormal basis Q of g, Gg, Fg, … , so that
every point is one that a control can reach in the model, and the front itself is not above it. No
training is looked at.

Source: Martens, *New insights and perspectives on the natural gradient method*, JMLR 21(146), 2020,
section 5 (the Fisher matrix as the curvature of KL).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.settings import check_count

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.linear.operator import SymmetricOperator

DAMPING = 1e-6  # of the small systems, over the largest eigenvalue of Q'GQ


@dataclass(frozen=True)
class ForetoldFront(Experiment):
    """Compute the front of a delta before it is trained.

    Attributes:
        delta: the delta, as a dictionary with its name.
        model: a causal language model.
        task: a language-model task.
        held: a task whose texts are the held ones.
        seed: of the control's start.
        max_length: tokens of a text at most.
        rows: training rows of the task, and as many held texts.
        size: of the subspace: products with G, and as many with F.
        points: of the front.
    """

    delta: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    model: str = "smollm2-135m"
    task: str = "movie-lines"
    held: str = "bbc"
    seed: int = 0
    max_length: int = 32
    rows: int = 16
    size: int = 8
    points: int = 25

    kind: ClassVar[str] = "forgetting-front"
    in_full: ClassVar[tuple[str, ...]] = ("delta",)
    steps: ClassVar[int] = 0  # it trains nothing

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("max_length", "rows", "size", "points"):
            check_count(self, name, least=1)
        check_count(self, "seed", least=0)

    @property
    def label(self) -> str:
        """Delta and seed."""
        return f"foretold front {self.delta['name']} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Compute it; the curve has a row a point: mu, gain of the task loss, and kl."""
        import pandas as pd

        from deltacontrol.deltas.dynamics.transformer import control_problem
        from deltacontrol.experiments import tasks
        from deltacontrol.theory.linear.curvature import GaussNewtonCurvature

        setting = Setting(
            self.model, self.task, deltas=(dict(self.delta),), train_rows=self.rows,
            validation_rows=0, test_rows=0, expects="causal-lm", max_length=self.max_length,
            seed=self.seed,
        )  # fmt: skip
        texts = tasks.load(self.held).test[["text"]].head(self.rows)
        model = setting.controlled.eval()
        curvatures = []
        for batch in (setting.batch(), setting.encode(texts).batch()):
            problem = control_problem(model, batch)
            start = problem.initial_controls()
            curvatures.append(GaussNewtonCurvature(problem, start, keep=False))
        G, F = curvatures
        found = front(G.gradient, G, F, size=self.size, points=self.points)
        result = {"task_loss": float(G.evaluation.objective), "num_controls": len(G.gradient)}
        return Outcome("completed", result, pd.DataFrame(found))


def front(
    g: Tensor, G: SymmetricOperator, F: SymmetricOperator, *, size: int, points: int
) -> list[dict[str, float]]:
    """Points of the front in a Krylov subspace of both operators, the largest gain first.

    Args:
        g: the gradient (n,).
        G: the task's Gauss-Newton matrix (n, n).
        F: the held text's Fisher matrix (n, n).
        size: dimension of the subspace at most.
        points: how many values of μ, from a thousandth to a million times the one at which both
            terms of the smallest system are of one size.
    """
    import torch

    Q, of_g, of_f = _basis(g, G, F, size)
    small_g, small_f = (0.5 * (m + m.T) for m in (Q.T @ of_g, Q.T @ of_f))
    slope = Q.T @ g.double()
    eye = torch.eye(len(slope), dtype=torch.float64)
    damping = DAMPING * float(torch.linalg.eigvalsh(small_g)[-1])
    scale = float(small_g.trace() / small_f.trace().clamp_min(1e-300))
    found = []
    for mu in torch.logspace(-3, 6, points, dtype=torch.float64).tolist():
        u = -torch.linalg.solve(small_g + mu * scale * small_f + damping * eye, slope)
        gain = -float(slope @ u + 0.5 * u @ small_g @ u)
        found.append({"mu": mu * scale, "gain": gain, "kl": 0.5 * float(u @ small_f @ u)})
    return found


def _basis(
    g: Tensor, G: SymmetricOperator, F: SymmetricOperator, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis (n, k), and its products with both operators (n, k)."""
    import torch

    columns: list[Tensor] = []
    products: dict[str, list[Tensor]] = {"G": [], "F": []}
    waiting = [g.double()]
    while waiting and len(columns) < size:
        new = _orthogonal(waiting.pop(0), columns)
        if new is None:
            continue
        columns.append(new)
        for name, operator in (("G", G), ("F", F)):
            image = (operator @ new.to(g.dtype)).double()
            products[name].append(image)
            waiting.append(image)
    return torch.stack(columns, 1), *(torch.stack(products[n], 1) for n in ("G", "F"))


def _orthogonal(vector: Tensor, columns: Sequence[Tensor]) -> Tensor | None:
    """The unit vector of what no column holds, by Gram and Schmidt twice; None if nothing is."""
    before = float(vector.norm())
    for _ in range(2):
        for column in columns:
            vector = vector - (column @ vector) * column
    size = float(vector.norm())
    return vector / size if size > 1e-8 * max(before, 1e-300) else None
