"""Arguments that are not what their annotation says are refused by name, where a user calls."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from deltacontrol.theory import (
    AffineFeedback,
    ControlProblem,
    CrossEntropyCost,
    InputError,
    LinearDynamics,
    LowRankDynamics,
    NewtonCG,
    ProjectionCorrection,
    SquaredErrorCost,
    closed_loop,
    riccati,
    solve,
)
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.solved_problems import scalar
from deltacontrol.theory.depth.continuous import ContinuousDepth
from deltacontrol.theory.dimension.gaussian_width import published_threshold
from deltacontrol.theory.dimension.projections import FastfoodProjection
from deltacontrol.theory.feedback.affine_subspace import AffineSubspace
from deltacontrol.theory.parsing import checked
from deltacontrol.theory.rank import low_rank


@typed
def called(
    n: int = 1,
    x: float = 1.0,
    v: Tensor | None = None,
    names: Sequence[str] = (),
    sizes: tuple[int, int] = (1, 2),
    mode: Literal["up", "down"] = "up",
    function: Callable[[], int] | None = None,
    seed: int = 0,
    switch: bool = False,
) -> Any:
    return n, x


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"n": "3"}, "called: n is '3'; expected a whole number"),
        ({"n": 1.5}, "n is 1.5; expected a whole number"),
        ({"n": True}, "n is True"),
        ({"n": math.nan}, "n is nan"),
        ({"n": 2**70}, "at most 63 binary digits"),
        ({"x": "1"}, "x is '1'; expected a number"),
        ({"x": math.nan}, "x is nan"),
        ({"x": 10**400}, "very many digits; expected a number: it is larger than a float"),
        ({"v": [1.0]}, r"v is \[1.0\]; expected a tensor or None"),
        ({"v": torch.zeros(2, device="meta")}, "lies on meta"),
        ({"v": torch.eye(2).to_sparse()}, "sparse; give its .to_dense"),
        ({"v": torch.zeros(2, dtype=torch.complex64)}, "complex"),
        ({"names": "ab"}, "expected a list or tuple of texts"),
        ({"names": (name for name in "ab")}, "expected a list or tuple of texts"),
        ({"names": ["a", 1]}, "item 1 is 1, not a text"),
        ({"sizes": (1,)}, "has 1 items, not 2"),
        ({"sizes": (1, ())}, r"item 1 is \(\), not a whole number"),
        ({"mode": []}, "expected 'up' or 'down'"),
        ({"function": 3}, "expected a function or None"),
        ({"seed": -1}, "from 0 to"),
        ({"switch": 1}, "expected True or False"),
    ],
)
def test_what_is_of_another_type_is_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        called(**given)


def test_what_is_right_arrives() -> None:
    n, x = called(np.int64(3), torch.tensor(0.5))
    assert (type(n), n, type(x), x) == (int, 3, float, 0.5)
    assert called(4.0, math.inf) == (4, math.inf)
    called(1, 2, torch.ones(2), ["a"], (1, 2), "down", lambda: 1, 5, True)
    with pytest.raises(TypeError, match="surprise"):  # as Python says it
        called(surprise=1)


def linear(width: int = 2) -> LinearDynamics:
    eye = torch.eye(width, dtype=torch.float64)
    return LinearDynamics([eye, eye], [eye, eye])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: low_rank.singular_values("x"), "matrix is 'x'; expected a tensor"),
        (
            lambda: published_threshold(torch.ones(2), torch.tensor([1.0, math.nan]), 0.1),
            "finite and not zero",
        ),
        (lambda: published_threshold(torch.ones(2), torch.ones(2), 0.0), "target is 0"),
        (lambda: NewtonCG(radius="2"), "radius is '2'"),
        (lambda: solve(scalar(), "newton-cg"), "solver is 'newton-cg'"),
        (lambda: solve(scalar(), NewtonCG(), [0.0] * 5), "u0 is"),
        (lambda: scalar().evaluate(math.nan), "expected a tuple of tensors, one a step"),  # type: ignore[arg-type]
        (lambda: riccati(*[[torch.eye(1)]] * 4, Qf=True), "Qf is bool"),  # type: ignore[arg-type]
        (lambda: LowRankDynamics([torch.eye(2), torch.eye(2).double()], 1), "dtypes weights float"),
        (lambda: LowRankDynamics([torch.eye(2)], 2**40), "rank is"),
        (lambda: CrossEntropyCost(torch.ones(2)), "expected class numbers"),
        (lambda: SquaredErrorCost(torch.ones(2, dtype=torch.bool)), "expected numbers"),
        (lambda: FastfoodProjection(2**50, 4), "full_dim is"),
        (lambda: checked("lora", "alpha", 10**400, float), "expected a finite number"),
        (
            lambda: ControlProblem(linear(), "cost", torch.ones(2)),
            "cost is 'cost'; expected a Cost",
        ),  # type: ignore[arg-type]
        (
            lambda: closed_loop(linear(), ProjectionCorrection([None]), torch.ones(2).double()),
            "law is for 1 steps and the system has 2",
        ),
    ],
)
def test_public_calls_refuse_by_name(call: Callable[[], Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        call()


def test_a_stiff_layer_ends_after_its_steps() -> None:
    """x' = -1e6 x needs 3e5 explicit steps a layer; it is refused after the steps allowed."""
    one = torch.ones(1, 1, dtype=torch.float64)
    stiff = LinearDynamics([one * (1 - 1e6)], [one])
    depth = ContinuousDepth(stiff, rtol=1e-6, atol=1e-9, max_steps=50)
    with pytest.raises(InputError, match="layer 0 takes over max_steps = 50 steps.*stiff"):
        depth.rollout(one[0], (one[0],))
    mild = ContinuousDepth(LinearDynamics([one * 0.5], [one]), max_steps=500)
    (_, end) = mild.rollout(one[0], (0 * one[0],))
    assert abs(float(end) - math.exp(-0.5)) < 1e-9  # x' = -x/2


def test_what_only_the_function_can_know_is_refused_by_it() -> None:
    """Each ended with a traceback of a library, when odd values were drawn."""
    from deltacontrol.theory.dimension.cone_threshold import cross_entropy_threshold
    from deltacontrol.theory.feedback.affine_subspace import AffineSubspace

    with pytest.raises(InputError, match="expected one float dtype for both"):
        AffineSubspace(torch.zeros(3), torch.eye(3, 2, dtype=torch.int64))
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(InputError, match="kernel is zero"):
        cross_entropy_threshold(torch.zeros(6, 6), logits, labels, 0.5)


def test_an_optimiser_is_a_class_of_torch() -> None:
    from deltacontrol.theory.solvers import TorchOptimiser

    for wrong in ({}, 3, torch.nn.Linear):
        with pytest.raises(InputError, match="expected a class of torch.optim or its name"):
            TorchOptimiser(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ["deltacontrol.made", "torch.made", "mine"])
@pytest.mark.parametrize("second", [torch.ones(3), torch.ones(2, 2).double()])
def test_what_only_torch_finds_comes_with_the_shapes(module: str, second: Tensor) -> None:
    """Errors of a user's own functions stay what they are."""
    names: dict[str, Any] = {"Tensor": Tensor, "__name__": module}
    exec("def times(first: Tensor, second: Tensor): return first @ second", names)
    times, first = typed(names["times"]), torch.ones(2, 2)
    if module == "mine":
        with pytest.raises(RuntimeError):
            times(first, second)
        return
    shown = str(second.dtype).removeprefix("torch.")
    message = rf"times cannot compute .*first \(2, 2\) float32; second \(.*\) {shown}; check that"
    with pytest.raises(InputError, match=message) as caught:
        times(first, second=second)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("shape", [(), (0,), (2, 2), (1, 5)])
def test_disturbances_of_other_shapes_are_named(shape) -> None:
    n, m = 3, 2
    system = LinearDynamics([torch.eye(n).double()] * 2, [torch.ones(n, m).double()] * 2)
    law = AffineFeedback(
        [torch.zeros(m, n).double()] * 2,
        (torch.zeros(m).double(),) * 2,
        [torch.zeros(n).double()] * 2,
    )
    if shape == ():
        closed_loop(system, law, torch.ones(n).double(), [torch.zeros(()).double()] * 2)
        return
    with pytest.raises(InputError, match="disturbance of step 0 has shape"):
        closed_loop(system, law, torch.ones(n).double(), [torch.zeros(shape).double()] * 2)


def test_a_subspace_of_scalars_is_named() -> None:
    with pytest.raises(InputError, match=r"expected \(n,\) and \(n, k\)"):
        AffineSubspace(torch.tensor(1.0), torch.tensor(1.0))
