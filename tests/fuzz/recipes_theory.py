"""Valid arguments of every public call of `deltacontrol.theory`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltacontrol.theory as th
from deltacontrol.theory import bounds
from deltacontrol.theory.control import solved_problems as known
from deltacontrol.theory.depth import perturbation, turnpike
from deltacontrol.theory.dimension import estimate, gaussian_width, hadamard, projections
from deltacontrol.theory.dimension.cone_threshold import cross_entropy_threshold
from deltacontrol.theory.linear import krylov, operator, sketching
from deltacontrol.theory.linear.conjugate_gradients import conjugate_gradients
from deltacontrol.theory.rank import expressive_rank, low_rank
from deltacontrol.theory.solvers import registry

Recipe = tuple[str, Callable[..., Any], Callable[[Path], dict[str, Any]]]
F64 = torch.float64
L, N, M, BATCH = 3, 3, 2, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Fixed random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def positive(size: int, seed: int = 0) -> Tensor:
    """A fixed positive definite matrix."""
    root = normal(size, size, seed=seed)
    return root @ root.mT + torch.eye(size, dtype=F64)


def _terms() -> dict[str, Any]:
    return {
        "A": [0.5 * normal(N, N, seed=t) for t in range(L)],
        "B": [normal(N, M, seed=9 + t) for t in range(L)],
        "Q": [positive(N, seed=20 + t) for t in range(L)],
        "R": [positive(M, seed=30 + t) for t in range(L)],
        "Qf": positive(N, seed=40),
        "N": [0.1 * normal(N, M, seed=50 + t) for t in range(L)],
        "c": [normal(N, seed=60 + t) for t in range(L)],
        "q": [normal(N, seed=70 + t) for t in range(L)],
        "r": [normal(M, seed=80 + t) for t in range(L)],
        "qf": normal(N, seed=90),
    }


def _some(*names: str) -> Callable[[Path], dict[str, Any]]:
    return lambda _: {name: _terms()[name] for name in names}


def _u() -> tuple[Tensor, ...]:
    return tuple(normal(M, seed=t) for t in range(L))


def _network() -> th.ControlProblem:
    return known.residual_classifier()


def _evaluated(dynamics: Any, cost: Any, x0: Any, box: Any = None) -> Any:
    problem = th.ControlProblem(dynamics, cost, x0, box)
    return problem.residual(problem.initial_controls())


def _rolled(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make dynamics, and pass through them."""

    def call(**given: Any) -> Any:
        made = make(**given)
        x = torch.ones(N, dtype=F64)
        for t in range(made.horizon):
            x = made.step(t, x, torch.zeros(made.control_sizes[t], dtype=F64))
        return x

    return call


def _cost(make: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Make a cost, and take it at a state of the right shape."""

    def call(**given: Any) -> Any:
        cost = make(**given)
        return cost.terminal(x), cost.running(0, x, torch.ones(M, dtype=F64))

    return call


def _projection(kind: type) -> Callable[..., Any]:
    def call(z: Any, **given: Any) -> Any:
        made = kind(**given)
        return made @ z, made.T @ (made @ z)

    return call


def _solved(problem: Any, solver: Any, u0: Any, **more: Any) -> Any:
    return th.solve(problem, solver, u0, **more)


def _solve(path: Path) -> dict[str, Any]:
    problem = known.scalar()
    return {"problem": problem, "solver": th.NewtonCG(), "u0": problem.zero_controls(dtype=F64),
            "max_steps": 3, "tol": 1e-6, "callback": print, "progress": False,
            "checkpoint": path / "solve.safetensors"}  # fmt: skip


def _resumed(checkpoint: Any) -> Any:
    return th.solve(known.scalar(), th.NewtonCG(), max_steps=2, checkpoint=checkpoint)


def _solver(kind: type) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        problem = known.residual_known()
        return th.solve(problem, kind(**given), max_steps=2)

    return call


def _subspaces() -> list[th.AffineSubspace]:
    return [th.AffineSubspace(normal(N), torch.linalg.qr(normal(N, 1)).Q) for _ in range(L)]


def _corrected(make: Callable[..., Any]) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        problem = _linear()
        added = _added(problem, problem.zero_controls())
        return th.closed_loop(added, make(**given), problem.x0)

    return call


def _added(problem: Any, controls: Any) -> Any:
    from deltacontrol.theory.feedback.correction import AdditiveControl

    return AdditiveControl(problem, controls)


def _linear() -> th.ControlProblem:
    terms = _terms()
    return th.ControlProblem(
        th.LinearDynamics(terms["A"], terms["B"], terms["c"]),
        th.QuadraticCost(**{k: v for k, v in terms.items() if k not in "ABc"}),
        normal(BATCH, N, seed=3),
    )


def _steer(_: Path) -> dict[str, Any]:
    problem = _linear()
    return {"dynamics": _added(problem, problem.zero_controls()), "x0": problem.x0,
            "output": lambda x: x[..., :1], "target": torch.tensor([2.0], dtype=F64),
            "weight": 2.0, "control_cost": 0.3, "damping": 0.0}  # fmt: skip


def _linearised(dynamics: Any, states: Any, controls: Any) -> Any:
    made = th.Linearisation(dynamics, states, controls)
    return made @ torch.ones(made.shape[1], dtype=F64)


def _linearisation(_: Path) -> dict[str, Any]:
    problem = _linear()
    return {"dynamics": problem.dynamics, "states": problem.rollout(_u()), "controls": _u()}


def _reached(linearisation: Any, stage: Any = None, access: Any = None, chunk: Any = None) -> Any:
    made = th.Reachability(linearisation, stage, access, chunk).gramian
    return made @ torch.ones(made.shape[1], dtype=F64)


def _curvature(kind: type) -> Callable[..., Any]:
    def call(problem: Any, u: Any) -> Any:
        made = kind(problem, u)
        return made @ torch.ones(made.shape[1], dtype=F64)

    return call


def _matrix(_: Path) -> dict[str, Any]:
    return {"W": operator.SymmetricMatrix(positive(6))}


def _depth(**given: Any) -> Any:
    rtol, weights = given["rtol"], given["weights"]
    made = th.ContinuousDepth(given["dynamics"], weights, given["controls"], rtol, given["atol"])
    return made.rollout(torch.ones(N, dtype=F64), _u())


def _tuned(weight: Any, **given: Any) -> Any:
    return th.ConvexTuning(**given).solve(weight)


def _estimate(_: Path) -> dict[str, Any]:
    return {"dimensions": [10.0, 10.0, 100.0, 100.0, 1000.0, 1000.0],
            "performance": [0.3, 0.35, 0.6, 0.62, 0.9, 0.88], "target": 0.8, "chance": 0.25,
            "confidence": 0.9, "num_draws": 50, "seed": 0}  # fmt: skip


def recipes() -> Iterator[Recipe]:
    """Name, call, and arguments that are valid."""
    yield "riccati", th.riccati, lambda _: _terms()
    yield "LinearDynamics", _rolled(th.LinearDynamics), _some("A", "B", "c")
    yield (
        "QuadraticCost",
        _cost(th.QuadraticCost, normal(N)),
        lambda _: {k: v for k, v in _terms().items() if k not in "ABc"},
    )
    yield "ResidualNetwork", _rolled(th.ResidualNetwork), lambda _: {
        "W1": [normal(N, N)] * L, "W2": [normal(N, N)] * L, "B": [normal(N, M)] * L}  # fmt: skip
    yield "LowRankDynamics", _rolled(th.LowRankDynamics), lambda _: {"weights": [normal(N, N)] * L,
                                                                     "rank": 1}  # fmt: skip
    yield "Segment", _rolled(th.Segment), lambda _: {"dynamics": _linear().dynamics, "start": 1,
                                                     "stop": 2}  # fmt: skip
    labels = torch.tensor([0, 2, 1, 1])
    yield "CrossEntropyCost", _cost(th.CrossEntropyCost, normal(BATCH, N)), lambda _: {
        "labels": labels, "weight_decay": 0.1}  # fmt: skip
    yield "BinaryCrossEntropyCost", _cost(th.BinaryCrossEntropyCost, normal(BATCH)), lambda _: {
        "labels": labels.clamp(max=1).double(), "weight_decay": 0.1}  # fmt: skip
    yield "SquaredErrorCost", _cost(th.SquaredErrorCost, normal(BATCH, N)), lambda _: {
        "target": normal(BATCH, N), "weight_decay": 0.1}  # fmt: skip
    yield "Box", _boxed, lambda _: {"low": -0.4, "high": 1.0}
    yield "ControlProblem", _evaluated, lambda _: {
        "dynamics": _linear().dynamics, "cost": _linear().cost, "x0": _linear().x0}  # fmt: skip
    yield "ControlProblem.evaluate", lambda u: _network().evaluate(u), lambda _: {
        "u": _network().zero_controls(dtype=F64)}  # fmt: skip
    yield "solve", _solved, _solve
    yield (
        "solve(checkpoint)",
        _resumed,
        lambda path: {"checkpoint": path / "damaged" / "x.safetensors"},
    )
    for kind, given in (
        (th.NewtonCG, {"radius": 1.0, "forcing": 0.1, "max_products": 9, "keep": True}),
        (th.GaussNewton, {"damping": 1.0, "forcing": 0.5, "max_products": 9, "keep": True}),
        (th.Shooting, {"memory": 5}),
        (th.MSA, {"minimiser": 0.1}),
        (th.ExtendedMSA, {"rho": 1.0, "minimiser": th.InnerLBFGS(2, 0.1), "adaptive": True}),
        (th.TorchOptimiser, {"optimiser": "Adam", "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}),
    ):
        yield kind.__name__, _solver(kind), lambda _, given=given: dict(given)
    yield "GradientStep", lambda **k: _solver(th.MSA)(minimiser=th.GradientStep(**k)), lambda _: {
        "step_size": 0.1}  # fmt: skip
    yield "InnerLBFGS", lambda **k: _solver(th.MSA)(minimiser=th.InnerLBFGS(**k)), lambda _: {
        "steps": 3, "reduction": 0.1}  # fmt: skip
    yield "ExactArgmin", th.ExactArgmin, lambda _: {"dense_limit": 10}
    yield "solvers.parse", registry.parse, lambda _: {"text": "newton-cg:radius=2"}
    yield "AffineSubspace", th.AffineSubspace, lambda _: {"mean": normal(N),
                                                          "basis": torch.eye(N, dtype=F64)[:, :1]}  # fmt: skip  # noqa: E501
    yield "AffineFeedback", _corrected(th.AffineFeedback), lambda _: {
        "gains": [normal(N, N)] * L, "controls": (normal(N),) * L, "states": [normal(N)] * L}  # fmt: skip  # noqa: E501
    yield "ProjectionCorrection", _corrected(th.ProjectionCorrection), lambda _: {
        "subspaces": _subspaces(), "gain": 0.5}  # fmt: skip
    yield "PIDCorrection", _corrected(th.PIDCorrection), lambda _: {
        "subspaces": _subspaces(), "proportional": 1.0, "integral": 0.1, "derivative": 0.1}  # fmt: skip  # noqa: E501
    yield "closed_loop", th.closed_loop, lambda _: {
        "dynamics": _linear().dynamics, "x0": _linear().x0, "disturbance": [normal(N)] * L,
        "law": th.AffineFeedback([normal(M, N)] * L, _u(), [normal(N)] * L)}  # fmt: skip
    yield "steer_output", th.steer_output, _steer
    yield "Linearisation", _linearised, _linearisation
    yield "Reachability", _reached, lambda path: {
        "linearisation": th.Linearisation(**_linearisation(path)), "stage": 1,
        "access": [1.0] * L, "chunk": 2}  # fmt: skip
    for curvature in (th.GaussNewtonCurvature, th.HessianCurvature):
        yield curvature.__name__, _curvature(curvature), lambda _: {
            "problem": _network(), "u": _network().zero_controls(dtype=F64)}  # fmt: skip
    yield "ContinuousDepth", _depth, lambda _: {"dynamics": _continuous(), "weights": "constant",
                                                "controls": "constant", "rtol": 1e-6, "atol": 1e-8}  # fmt: skip  # noqa: E501
    yield "solve_convex", th.solve_convex, lambda _: {
        "problem": known.scalar_box(), "per_example": False, "tolerance": 1e-8, "solver": "auto"}  # fmt: skip  # noqa: E501
    yield "ConvexTuning", _tuned, lambda _: {
        "features": normal(6, 3, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2]), "groups": [2, 2],
        "loss": "cross-entropy", "penalty": th.Ridge(), "tolerance": 1e-6, "weight": 0.1}  # fmt: skip  # noqa: E501
    yield "GroupLasso", lambda **k: _tuned(0.1, features=normal(6, 3, 4), groups=[2, 2],
                                           labels=torch.tensor([0, 1, 2, 0, 1, 2]),
                                           penalty=th.GroupLasso(**k)), lambda _: {"scales": (1.0, 2.0)}  # fmt: skip  # noqa: E501
    for name in projections.RANDOM_PROJECTIONS:
        kind = projections.RANDOM_PROJECTIONS[name]
        yield kind.__name__, _projection(kind), lambda _: {
            "full_dim": 32, "sub_dim": 4, "seed": 0, "dtype": F64, "z": normal(4)}  # fmt: skip
    yield "Threshold", th.Threshold, lambda _: {"op": "<=", "value": 1.0, "description": "error"}
    yield from _numbers()


def _continuous() -> Any:
    terms = _terms()
    return th.LinearDynamics([terms["A"][0]] * L, [terms["B"][0]] * L)


def _boxed(low: Any, high: Any) -> Any:
    problem = known.scalar()
    boxed = th.ControlProblem(problem.dynamics, problem.cost, problem.x0, th.Box(low, high))
    return th.solve(boxed, th.Shooting(), max_steps=2)


def _numbers() -> Iterator[Recipe]:
    """Functions of numbers and matrices."""
    values = positive(4).diagonal().sort(descending=True).values
    for function, given in (
        (bounds.binary_kl, {"q": 0.1, "p": 0.2}),
        (bounds.kl_inverse, {"q": 0.1, "divergence": 0.05}),
        (bounds.maurer_constant, {"n": 50}),
        (bounds.pac_bayes_bound, {"q": 0.1, "divergence": 3.0, "n": 100, "delta": 0.05}),
        (bounds.countable_class_bound, {"q": 0.1, "code": 9.0, "n": 100, "delta": 0.05}),
        (bounds.monte_carlo_bound, {"mean": 0.1, "draws": 20, "delta": 0.05}),
        (bounds.gaussian_kl, {"mean": normal(4), "posterior_deviation": 0.5, "prior_deviation": 1.0}),  # noqa: E501
        (bounds.quantise, {"vector": normal(20), "levels": 5}),
        (bounds.code_length, {"indices": torch.tensor([0, 1, 1, 2]), "levels": 3}),
        (low_rank.singular_values, {"matrix": normal(4, 3)}),
        (low_rank.stable_rank, {"values": values}),
        (low_rank.participation_ratio, {"values": values}),
        (low_rank.tail_energy, {"values": values}),
        (low_rank.numerical_rank, {"values": values, "shape": (4, 4), "eps": 1e-12}),
        (low_rank.principal_angles, {"first": normal(5, 2), "second": normal(5, 3, seed=1)}),
        (low_rank.subspace_overlap, {"first": normal(5, 2), "second": normal(5, 3, seed=1)}),
        (low_rank.truncated, {"matrix": normal(4, 3), "rank": 2}),
        (expressive_rank.rank_threshold, {"target": normal(3, 3), "frozen": [normal(3, 3, seed=i) for i in (1, 2)]}),  # noqa: E501
        (expressive_rank.adapted_product, {"target": normal(3, 3), "frozen": [normal(3, 3, seed=i) for i in (1, 2)], "rank": 2}),  # noqa: E501
        (hadamard.hadamard_transform, {"x": normal(8), "pad": False}),
        (hadamard.orthonormal_transform, {"x": normal(8)}),
        (perturbation.growth_bound, {"lipschitz": [torch.tensor([1.1], dtype=F64)] * 2, "defects": [torch.tensor([0.1], dtype=F64)] * 2, "initial": torch.tensor([0.0], dtype=F64)}),  # noqa: E501
        (perturbation.example_norms, {"x": normal(4, 3)}),
        (turnpike.two_sided_rate, {"values": torch.tensor([1.0, 0.3, 0.1, 0.09, 0.3, 1.0], dtype=F64)}),  # noqa: E501
        (estimate.estimate_dimension, _estimate(Path())),
        (gaussian_width.published_threshold, {"values": values, "displacement": normal(4), "target": 0.1}),  # noqa: E501
        (cross_entropy_threshold, {"kernel": positive(6), "logits": normal(3, 2), "labels": torch.tensor([0, 1, 0]), "target": 0.2, "draws": 3, "seed": 0}),  # noqa: E501
        (krylov.quadrature, {"W": operator.SymmetricMatrix(positive(6)), "start": normal(2, 6), "steps": 3}),  # noqa: E501
        (krylov.spectral_density, {"W": operator.SymmetricMatrix(positive(6)), "steps": 3, "probes": 2, "seed": 0}),  # noqa: E501
        (sketching.hutchpp, {"W": operator.SymmetricMatrix(positive(6)), "num_products": 6, "seed": 0}),  # noqa: E501
        (sketching.leading_spectrum, {"W": operator.SymmetricMatrix(positive(6)), "num_values": 2, "oversampling": 2, "iterations": 1, "probes": 2, "seed": 0}),  # noqa: E501
        (conjugate_gradients, {"H": operator.SymmetricMatrix(positive(6)), "gradient": normal(6), "rtol": 1e-6, "max_products": 9, "radius": 10.0}),  # noqa: E501
        (th.gap_bound, {"problem": _linear(), "controls": _u(), "radius": 0.5, "centre": None, "affine": False, "seed": 0}),  # noqa: E501
        (th.gap_bound, {"problem": _network(), "controls": _network().zero_controls(), "radius": 0.5, "affine": False, "starts": 1, "steps": 1, "seed": 0}),  # noqa: E501
        (th.quadratic_gap, {"gradient": normal(4), "hessian": positive(4), "radius": 0.5, "floor": None}),  # noqa: E501
        (operator.SymmetricMatrix, {"matrix": positive(4)}),
        (operator.Diagonal, {"diagonal": values}),
    ):  # fmt: skip
        module = function.__module__.removeprefix("deltacontrol.theory.")
        yield f"{module}.{function.__name__}", function, lambda _, given=given: dict(given)
