"""The wrapper of L-BFGS-B: scipy's own iterates, and its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers.lbfgs import LBFGSEnd, differentiated, minimise_lbfgs

F64 = torch.float64


def rosenbrock(x: Tensor) -> Tensor:
    x = x.reshape(-1)
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


START = torch.tensor([[-1.2, 1.0], [0.3, 2.0]], dtype=F64)


def scipy_iterates(bounds: np.ndarray | None, options: dict) -> tuple[list[np.ndarray], object]:
    def value_and_gradient(z: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = differentiated(rosenbrock)(torch.from_numpy(z.copy()).view(2, 2))
        return value, gradient.numpy().reshape(-1)

    seen: list[np.ndarray] = []
    found = optimize.minimize(
        value_and_gradient,
        START.numpy().reshape(-1),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        callback=lambda x: seen.append(x.copy()),
        options=options,
    )
    return seen, found


@pytest.mark.parametrize("bounded", [False, True])
def test_the_iterates_are_scipys(bounded: bool) -> None:
    low, high = torch.full_like(START, -math.inf), torch.full_like(START, 0.1)
    bounds = np.stack([low.numpy().ravel(), high.numpy().ravel()], 1) if bounded else None
    start = START.clamp(max=0.1) if bounded else START
    options = {"maxcor": 5, "maxiter": 40, "maxfun": 60, "ftol": 0.0, "gtol": 1e-8}
    expected, found = scipy_iterates(bounds, options)
    seen: list[Tensor] = []
    result = minimise_lbfgs(
        differentiated(rosenbrock),
        start,
        memory=5,
        max_iterations=40,
        max_evaluations=60,
        gradient_tolerance=1e-8,
        bounds=(low, high) if bounded else None,
        callback=lambda x: bool(seen.append(x)),
    )
    assert len(seen) == len(expected) > 5
    for x, z in zip(seen, expected, strict=True):
        assert x.shape == (2, 2) and np.array_equal(x.numpy().reshape(-1), z)
    assert np.array_equal(result.x.numpy().reshape(-1), found.x)
    assert result.value == found.fun and result.evaluations == found.nfev
    assert result.message == found.message
    assert rosenbrock(result.best).item() == result.best_value <= result.value
    if bounded:
        assert bool((result.x <= 0.1).all()) and bool((result.x == 0.1).any())
    else:
        assert result.end is LBFGSEnd.TOLERANCE
        assert float(differentiated(rosenbrock)(result.x)[1].abs().max()) <= 1e-8


def test_every_end_has_its_name() -> None:
    function = differentiated(rosenbrock)
    ends = {
        LBFGSEnd.TOLERANCE: minimise_lbfgs(function, START, gradient_tolerance=1e-6),
        LBFGSEnd.LIMIT: minimise_lbfgs(function, START, max_iterations=3),
        LBFGSEnd.STOPPED: minimise_lbfgs(function, START, callback=lambda x: True),
        LBFGSEnd.LINE_SEARCH_FAILED: minimise_lbfgs(
            lambda x: (rosenbrock(x).item(), -function(x)[1]), START
        ),
    }
    for end, result in ends.items():
        assert result.end is end, result.message
    evaluations = minimise_lbfgs(function, START, max_evaluations=4)
    assert evaluations.end is LBFGSEnd.LIMIT and 4 < evaluations.evaluations < 10


def test_shape_and_dtype_are_those_of_the_start() -> None:
    asked: set[tuple] = set()

    def function(x: Tensor) -> tuple[float, Tensor]:
        asked.add((tuple(x.shape), x.dtype))
        return differentiated(rosenbrock)(x)

    result = minimise_lbfgs(function, START.float(), max_iterations=5)
    assert asked == {((2, 2), torch.float32)}
    assert result.x.shape == (2, 2) and result.x.dtype == torch.float32


def test_the_best_point_counts_line_searches_and_skips_nan() -> None:
    """A function that is not finite anywhere leaves the start."""
    result = minimise_lbfgs(lambda x: (math.nan, x), START, max_iterations=3)
    assert torch.equal(result.best, START) and result.best_value == math.inf
    values: list[float] = []

    def function(x: Tensor) -> tuple[float, Tensor]:
        value, gradient = differentiated(rosenbrock)(x)
        values.append(value)
        return value, gradient

    assert minimise_lbfgs(function, START, max_iterations=7).best_value == min(values)


def test_what_does_not_fit_is_refused() -> None:
    function = differentiated(rosenbrock)
    with pytest.raises(InputError, match="memory = 0"):
        minimise_lbfgs(function, START, memory=0)
    with pytest.raises(InputError, match=r"shapes \[\(4,\), \(4,\)\]; expected \(2, 2\)"):
        minimise_lbfgs(function, START, bounds=(torch.zeros(4), torch.ones(4)))
