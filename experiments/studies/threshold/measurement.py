"""Predicted and measured thresholds of random subspaces: where half of them reach a target loss.

Three kinds of measurement stand beside the prediction of
`deltacontrol.theory.dimension.gaussian_width`:

    quadratic    a quadratic loss with a chosen spectrum, solved exactly in drawn subspaces,
    linearised   the same for the Gauss-Newton model of a real model's loss,
    fine-tuned   the real model itself, trained in subspaces ``theta = theta_0 + P z`` of the same
                 controls on the same rows, by L-BFGS over ``z``.

The quadratic losses are predicted by Lanczos from products, the model from its tangent kernel; the
fine-tuned one also with its cross-entropy as it is, by
`deltacontrol.theory.dimension.cone_threshold`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.experiments.measures.initial_model import InitialModel
    from deltacontrol.theory.dimension.gaussian_width import EscapeThreshold, QuadraticLoss
    from deltacontrol.theory.dimension.random_subspaces import MeasuredThreshold

GRID = 41  # dimensions of a success curve
SPAN = 3.0  # widths on both sides of the threshold


@dataclass(frozen=True)
class QuadraticThreshold(Experiment):
    """A quadratic loss with eigenvalues ``i^-exponent`` and a Gaussian displacement.

    Attributes:
        exponent: of the eigenvalues.
        size: D.
        shares: of the largest fall, one target each.
        draws: subspaces that are solved.
        steps: of Lanczos.
        probes: of the spectral density.
        seed: of the displacement, the basis and the probes.
    """

    exponent: float = 1.0
    size: int = 400
    shares: Sequence[float] = (0.5, 0.8, 0.95)
    draws: int = 200
    steps: int = 60
    probes: int = 20
    seed: int = 0

    kind: ClassVar[str] = "quadratic-threshold"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not math.isfinite(self.exponent) or min(self.size, self.steps, self.probes) < 2:
            raise InputError(
                f"exponent is {self.exponent}, size {self.size}, steps {self.steps}, probes "
                f"{self.probes}; expected a finite number, and whole numbers >= 2"
            )
        _check_targets("shares", self.shares, 1.0)
        if self.draws < 10:
            raise InputError(f"draws is {self.draws}; a median with an interval needs 10 or more")

    @property
    def label(self) -> str:
        """The spectrum and the seed."""
        return f"threshold of eigenvalues i^-{self.exponent:g}, seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Predict by Lanczos, measure by exact solves.

        The result holds ``cases``, one a target; see `_case`. The curve holds the share of
        subspaces that reach each target, predicted and measured, over the dimension.
        """
        import pandas as pd
        import torch

        from deltacontrol.theory.dimension.gaussian_width import QuadraticLoss
        from deltacontrol.theory.dimension.random_subspaces import measured_threshold
        from deltacontrol.theory.linear.krylov import quadrature, spectral_density
        from deltacontrol.theory.linear.operator import SymmetricMatrix

        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        values = torch.arange(1, self.size + 1, dtype=torch.float64) ** -self.exponent
        displacement = normal(self.size)
        basis, _ = torch.linalg.qr(normal(self.size, self.size))
        hessian = SymmetricMatrix((basis * values) @ basis.mT)
        gradient = (basis @ (values * displacement))[None]
        exact = QuadraticLoss.exact(values, displacement)
        loss = QuadraticLoss.estimated(
            spectral_density(hessian, self.steps, probes=self.probes, seed=self.seed),
            quadrature(hessian, gradient, self.steps),
        )
        cases, curves = [], []
        for share in self.shares:
            fall = share * exact.largest_fall
            found = loss.threshold(fall)
            measured = measured_threshold(
                values, values * displacement, fall, self.size, range(self.draws)
            )
            cases.append(_case("quadratic", share, found, measured, _published(exact, fall)))
            curves.append(_success("quadratic", share, found, measured))
        return Outcome("completed", {"cases": cases}, pd.concat(curves, ignore_index=True))


@dataclass(frozen=True)
class ModelThreshold(Experiment):
    """A model's first rows of a task: the Gauss-Newton model, and fine-tuning in subspaces.

    Attributes:
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification task.
        deltas: whose parameters, all together, the subspaces are of.
        rows: the first so many training rows, in one batch.
        max_length: tokens of a text at most.
        targets: losses to reach, as shares of the loss at the start.
        draws: subspaces of the Gauss-Newton model.
        dimensions: of the subspaces in which the model itself is trained; none if empty.
        subspaces: trained at each dimension.
        steps: evaluations of loss and gradient in a training at most; one that is a tenth below
            all targets ends.
        projection: the kind of P.
        seed: of the weights that are drawn; the subspaces count from there.
    """

    model: str = "minilm-l3"
    task: str = "movie"
    deltas: Sequence[str] = ("selected-modules:sites=block+head",)
    rows: int = 128
    max_length: int = 32
    targets: Sequence[float] = (0.8, 0.6, 0.4)
    draws: int = 200
    dimensions: Sequence[int] = ()
    subspaces: int = 3
    steps: int = 50
    projection: str = "fastfood"
    seed: int = 0

    kind: ClassVar[str] = "model-threshold"

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_targets("targets", self.targets, 1.0)
        found = list(self.dimensions)
        if found != sorted(set(found)) or min(found, default=1) < 1:
            raise InputError(f"dimensions are {found}; expected increasing whole numbers >= 1")
        if self.draws < 10 or min(self.subspaces, self.steps) < 1:
            raise InputError(
                f"draws is {self.draws}, subspaces {self.subspaces}, steps {self.steps}; expected "
                "at least 10, 1 and 1"
            )

    @property
    def label(self) -> str:
        """Model, task, deltas and seed."""
        return f"threshold {self.model} {self.task} {'+'.join(self.deltas)} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Predict, solve, train.

        The result holds ``cases``, one for each target and kind (see `_case`; those that are
        fine-tuned have ``cone``, the dimension of `deltacontrol.theory.dimension.cone_threshold`),
        the loss at the start, D, the rank of the Gauss-Newton model, and ``displacement``: for each
        target the predicted root mean square of a parameter's change, beside that of the parameters
        themselves. The curve holds shares that reach each target, and the losses of all trainings
        beside the mean that the Gauss-Newton model predicts.

        Raises:
            InputError: as in `deltacontrol.experiments.measures.initial_model.InitialModel`.
        """
        import pandas as pd
        import torch

        from deltacontrol.experiments.measures.initial_model import InitialModel
        from deltacontrol.experiments.setting import Setting
        from deltacontrol.experiments.studies.threshold.subspace_training import train_in_subspaces
        from deltacontrol.theory.dimension.random_subspaces import measured_threshold

        initial = InitialModel(
            Setting(
                self.model,
                self.task,
                deltas=self.deltas,
                train_rows=self.rows,
                validation_rows=0,
                max_length=self.max_length,
                seed=self.seed,
            )
        )
        if initial.free:
            raise InputError(
                f"the head is not among the parameters of {'+'.join(self.deltas)}, and alone fits "
                f"{self.rows} rows; add 'head' to the deltas"
            )
        problem = initial.linearised()
        loss, start = problem.loss, initial.loss(torch.arange(self.rows))
        kept = loss.values > 1e-7 * loss.values.max()
        values, gradient = loss.values[kept], loss.gradient_weights[kept].sqrt()
        cases, curves, displacement = [], [], []
        for share in self.targets:
            fall = (1 - share) * start
            if fall >= loss.largest_fall:
                raise InputError(
                    f"{share:g} of the loss at the start is below what the Gauss-Newton model "
                    f"reaches, {1 - loss.largest_fall / start:.3g} of it; give a larger target"
                )
            found = loss.threshold(fall)
            measured = measured_threshold(values, gradient, fall, len(values), range(self.draws))
            cases.append(_case("linearised", share, found, measured, _published(loss, fall)))
            curves.append(_success("linearised", share, found, measured))
            displacement.append(_displacement(loss, found.kappa))
        if self.dimensions:
            frame = pd.DataFrame(
                train_in_subspaces(
                    initial,
                    self.dimensions,
                    projection=self.projection,
                    seeds=range(self.seed, self.seed + self.subspaces),
                    steps=self.steps,
                    enough=0.9 * min(self.targets) * start,
                )
            )
            falls = [_expected_fall(loss, d, len(values)) for d in frame["dimension"]]
            frame["expected"] = [start - fall for fall in falls]
            curves.append(frame.assign(kind="training"))
            for share in self.targets:
                found = loss.threshold((1 - share) * start)
                crossings = _crossings(frame, share * start)
                cone = _cone(initial, share * start)
                cases.append(_case("fine-tuned", share, found, crossings, None) | cone)
        result = {
            "cases": cases,
            "start": start,
            "least": start - loss.largest_fall,
            "num_parameters": initial.num_parameters,
            "rank": len(values),
            "displacement": displacement,
            "parameters": _root_mean_square(initial),
        }
        return Outcome("completed", result, pd.concat(curves, ignore_index=True))


def _check_targets(name: str, values: Sequence[float], below: float) -> None:
    if not values or not all(0 < value < below for value in values):
        raise InputError(f"{name} are {list(values)}; expected numbers between 0 and {below:g}")


def _case(
    kind: str,
    target: float,
    found: EscapeThreshold,
    measured: MeasuredThreshold,
    published: float | None,
) -> dict[str, Any]:
    """One comparison; low and high bound the measured median with 95 % (or are the extremes)."""
    low, high = measured.interval()
    return {
        "kind": kind,
        "target": target,
        "predicted": found.dimension,
        "standard_error": found.standard_error,
        "width": found.width,
        "published": published,
        "measured": measured.median,
        "low": low,
        "high": high,
        "draws": len(measured.dimensions),
        "measured_width": _deviation(measured.dimensions),
    }


def _deviation(values: Sequence[float]) -> float:
    import numpy as np

    finite = len(values) > 1 and math.isfinite(max(values))
    return float(np.std(values, ddof=1)) if finite else math.nan


def _published(loss: QuadraticLoss, fall: float) -> float:
    """The formula of Larsen et al., from the shortest way to the minimum."""
    from deltacontrol.theory.dimension.gaussian_width import published_threshold

    curved = loss.gradient_weights > 0
    values, weights = loss.gradient_values[curved], loss.gradient_weights[curved]
    target = loss.largest_fall - fall
    return published_threshold(values, weights.sqrt() / values, target)


def _success(kind: str, target: float, found: EscapeThreshold, measured: MeasuredThreshold) -> Any:
    """Shares that reach the target around the threshold, predicted and measured."""
    import numpy as np
    import pandas as pd

    low = max(1.0, found.dimension - SPAN * found.width)
    dimensions = np.unique(
        np.linspace(low, found.dimension + SPAN * found.width, GRID).round().astype(int)
    )
    return pd.DataFrame(
        {
            "kind": kind,
            "target": target,
            "dimension": dimensions,
            "predicted": [found.probability(d) for d in dimensions],
            "measured": [measured.share(d) for d in dimensions],
        }
    )


def _displacement(loss: QuadraticLoss, kappa: float) -> float:
    """Root mean square of a parameter's change, over parameters and subspaces, in the optimum.

    ``E ||delta||^2 = g'A^2 g (1 + kappa tr A^2 / tr HA^2)``, and of ``tr A^2`` the flat directions
    have ``D / kappa^2``, next to which all else vanishes.
    """
    shares = loss.values / (loss.values + kappa) ** 2
    own = float((loss.gradient_weights / (loss.gradient_values + kappa) ** 2).sum())
    return math.sqrt(own / kappa / float((loss.counts * shares).sum()))


def _root_mean_square(initial: InitialModel) -> float:
    trainable = initial.controlled.trainable().values()
    total = sum(float(p.detach().double().square().sum()) for p in trainable)
    return math.sqrt(total / initial.num_parameters)


def _cone(initial: InitialModel, target: float) -> dict[str, float]:
    """d* of the cross-entropy itself, of logits that are linear: no quadratic in its place."""
    import torch

    from deltacontrol.theory.dimension.cone_threshold import cross_entropy_threshold

    logits = initial.logits(torch.arange(initial.rows))
    left = torch.block_diag(*[initial.contrasts] * initial.rows)
    size = initial.rows * initial.contrasts.shape[1]
    kernel = left @ initial.kernel.total()[:size, :size] @ left.mT
    found = cross_entropy_threshold(kernel, logits, initial.labels, target)
    return {"cone": found.dimension, "cone_error": found.standard_error}


def _expected_fall(loss: QuadraticLoss, dimension: int, rank: int) -> float:
    """Of the Gauss-Newton model; from its rank on, all there is."""
    return loss.expected_fall(dimension) if dimension < rank else loss.largest_fall


def _crossings(frame: Any, target: float) -> MeasuredThreshold:
    """Where each subspace's losses cross the target, between dimensions by a straight line."""
    from deltacontrol.theory.dimension.random_subspaces import MeasuredThreshold

    found = []
    for _, rows in frame.groupby("seed"):
        rows = rows.sort_values("dimension")
        dimensions = rows["dimension"].tolist()
        losses = rows["loss"].tolist()
        index = next((i for i, value in enumerate(losses) if value <= target), None)
        if index is None or index == 0:
            found.append(math.inf if index is None else float(dimensions[0]))
            continue
        share = (losses[index - 1] - target) / (losses[index - 1] - losses[index])
        step = dimensions[index] - dimensions[index - 1]
        found.append(dimensions[index - 1] + share * step)
    return MeasuredThreshold(tuple(sorted(found)))
