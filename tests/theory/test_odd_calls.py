"""Values of a wrong shape, dtype or kind are named where a user gives them."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory import (
    AffineFeedback,
    ControlProblem,
    LinearDynamics,
    Linearisation,
    QuadraticCost,
    ResidualNetwork,
    TorchOptimiser,
    closed_loop,
    riccati,
    solve,
)
from deltacontrol.theory.bounds import gaussian_kl
from deltacontrol.theory.control import solved_problems as known
from deltacontrol.theory.convex.losses import CrossEntropy
from deltacontrol.theory.dimension.cone_threshold import cross_entropy_threshold
from deltacontrol.theory.dimension.projections import RANDOM_PROJECTIONS
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.conjugate_gradients import conjugate_gradients
from deltacontrol.theory.linear.operator import SymmetricMatrix
from deltacontrol.theory.rank.expressive_rank import adapted_product
from deltacontrol.theory.rank.low_rank import numerical_rank
from deltacontrol.theory.solvers import registry

F64 = torch.float64
N, M, L, BATCH = 3, 2, 2, 4


def linear() -> LinearDynamics:
    return LinearDynamics([torch.eye(N, dtype=F64)] * L, [torch.ones(N, M, dtype=F64)] * L)


def law(rows: int = M) -> AffineFeedback:
    controls = (torch.zeros(rows, dtype=F64),) * L
    return AffineFeedback(
        [torch.zeros(rows, N, dtype=F64)] * L, controls, [torch.zeros(N, dtype=F64)] * L
    )


def states(*batches: int) -> list[torch.Tensor]:
    return [torch.ones(b, N, dtype=F64) for b in batches]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("batches", [(4, 4, 5), (4, 5, 5), (5, 4, 4)])
def test_states_that_no_rollout_gives_are_refused(batches, keep):
    u = (torch.zeros(M, dtype=F64),) * L
    made = Linearisation(linear(), states(*batches), u, keep=keep)
    with pytest.raises(InputError, match="expected the states of a rollout of these dynamics"):
        made @ torch.ones(made.shape[1], dtype=F64)
    with pytest.raises(InputError, match="expected the states of a rollout of these dynamics"):
        made.T @ torch.ones(made.shape[0], dtype=F64)


@pytest.mark.parametrize("shape", [(M + 1,), (BATCH + 1, M), (1, BATCH, M), ()])
def test_controls_of_another_size_are_refused_when_they_are_given(shape):
    u = (torch.zeros(shape, dtype=F64),) * L
    with pytest.raises(InputError, match=r"the control of step 0 has shape .*; expected \(2,\)"):
        Linearisation(linear(), states(4, 4, 4), u)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("make", ["linear", "residual"])
def test_a_state_of_whole_numbers_is_refused_where_matrices_act_on_it(make, dtype):
    square = [torch.eye(N, dtype=F64)] * L
    dynamics = linear() if make == "linear" else ResidualNetwork(square, square, linear().B)
    with pytest.raises(InputError, match=f"has dtype {dtype}; expected floats"):
        closed_loop(dynamics, law(), torch.ones(N).to(dtype))
    cost = QuadraticCost.constant(
        L, Q=torch.eye(N, dtype=F64), R=torch.eye(M, dtype=F64), Qf=torch.eye(N, dtype=F64)
    )
    problem = ControlProblem(dynamics, cost, torch.ones(N).to(dtype))
    with pytest.raises(InputError, match=f"has dtype {dtype}; expected floats"):
        problem.rollout(problem.zero_controls(dtype=F64))


def test_a_law_for_controls_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"the control of step 0 has shape \(3,\)"):
        closed_loop(linear(), law(rows=3), torch.ones(N, dtype=F64))


@pytest.mark.parametrize("name", sorted(RANDOM_PROJECTIONS))
def test_projections_refuse_sparse_vectors_and_those_without_values(name):
    made = RANDOM_PROJECTIONS[name](32, 4, seed=0, dtype=F64)
    z, v = torch.ones(4, dtype=F64), torch.ones(32, dtype=F64)
    for odd in (lambda x: x.to_sparse(), lambda x: x.to("meta")):
        with pytest.raises(InputError, match="expected a dense one on cpu"):
            made @ odd(z)
        with pytest.raises(InputError, match="expected a dense one on cpu"):
            odd(v) @ made


@pytest.mark.parametrize(
    "options",
    [
        {"betas": 0.9},
        {"betas": (0.9,)},
        {"betas": (0.9, 0.99, 0.999)},
        {"betas": ("a", 0.99)},
        {"eps": "x"},
        {"schedule": lambda step: None},
        {"schedule": lambda step: "x"},
    ],
    ids=["betas", "one-beta", "three-betas", "text-beta", "eps", "no-rate", "text-rate"],
)
def test_options_that_fail_in_a_step_are_refused_before_the_first(options):
    solver = TorchOptimiser("Adam", lr=0.1, **options)
    with pytest.raises(
        InputError, match=r"cannot be made: .+; see the options of torch.optim.Adam"
    ):
        solve(known.scalar(), solver, max_steps=3)


def test_trying_the_options_changes_no_iterate():
    problem, rate = known.scalar(), 0.1
    u = problem.zero_controls(dtype=F64)
    found = solve(problem, TorchOptimiser("SGD", lr=rate), max_steps=3, tol=0.0)
    for _ in range(3):
        u = tuple(u_t - rate * g for u_t, g in zip(u, problem.gradient(u), strict=True))
    assert all(map(torch.equal, found.controls, u))


@pytest.mark.parametrize("shape", [(1, 6), (7,), (), (6, 1)])
def test_a_gradient_that_is_no_vector_of_the_operator_is_refused(shape):
    H = SymmetricMatrix(torch.eye(6, dtype=F64))
    with pytest.raises(InputError, match=r"the gradient has shape .*; expected \(6,\)"):
        conjugate_gradients(H, torch.ones(shape, dtype=F64), rtol=1e-6, max_products=9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_matrices_that_cannot_be_decomposed_are_named(bad):
    draw = torch.Generator().manual_seed(0)
    target, *frozen = torch.randn(3, 3, 3, generator=draw, dtype=F64)
    target = target * bad
    with pytest.raises(InputError, match="not finite"):
        adapted_product(target, frozen, rank=2)


def test_deviations_whose_squares_vanish_are_refused():
    for pair in ((5e-324, 1.0), (1.0, 5e-324), (1e-200, 1e-200)):
        with pytest.raises(InputError, match="scale all lengths alike"):
            gaussian_kl(torch.ones(2, dtype=F64), *pair)


@pytest.mark.parametrize("wrong", ["gains", "controls", "states"])
def test_a_law_of_several_dtypes_is_refused(wrong):
    terms = {
        "gains": [torch.zeros(M, N, dtype=F64)] * L,
        "controls": [torch.zeros(M, dtype=F64)] * L,
        "states": [torch.zeros(N, dtype=F64)] * L,
    }
    terms[wrong][1] = terms[wrong][1].float()
    with pytest.raises(InputError, match="expected one float dtype for all"):
        AffineFeedback(**terms)


@pytest.mark.parametrize("labels", [[0.0, 1.0], [False, True], [0, 2], [-1, 0]])
def test_labels_that_are_no_class_numbers_are_refused(labels):
    kernel, logits = torch.eye(4, dtype=F64), torch.zeros(2, 2, dtype=F64)
    with pytest.raises(InputError, match="expected whole numbers from 0 to 1"):
        cross_entropy_threshold(kernel, logits, torch.tensor(labels), 0.2, draws=2)


@pytest.mark.parametrize("where", ["A", "B", "Q", "R", "N"])
def test_a_list_within_the_terms_is_named(where):
    n, m = N, M
    terms = {
        "A": [torch.eye(n, dtype=F64)] * L,
        "B": [torch.ones(n, m, dtype=F64)] * L,
        "Q": [torch.eye(n, dtype=F64)] * L,
        "R": [torch.eye(m, dtype=F64)] * L,
        "N": [torch.zeros(n, m, dtype=F64)] * L,
    }
    terms[where] = [terms[where][0], list(terms[where])]
    with pytest.raises(InputError, match=f"{where} is list; expected"):
        riccati(**terms, Qf=torch.eye(n, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_law_around_states_that_are_no_numbers_meets_none(dtype):
    around = AffineFeedback(
        [torch.zeros(M, N, dtype=F64)] * L,
        (torch.zeros(M, dtype=F64),) * L,
        [torch.ones(N).to(dtype)] * L,
    )
    with pytest.raises(InputError, match="the states that it was found at"):
        closed_loop(linear(), around, torch.ones(N, dtype=F64))


@pytest.mark.parametrize("labels", [torch.tensor([True, False, True]), torch.ones(3)])
def test_class_numbers_are_whole(labels):
    with pytest.raises(InputError, match="class numbers, one per example"):
        CrossEntropy().targets(labels, (3, 2))


@pytest.mark.parametrize("shape", [(0, 3), (3, -1), (-1, -1)])
def test_a_matrix_has_sizes(shape):
    with pytest.raises(InputError, match="expected the two sizes of a matrix"):
        numerical_rank(torch.ones(2, dtype=F64), shape, 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_and_controls_have_one_dtype(dtype):
    problem = ControlProblem(
        linear(),
        QuadraticCost(
            [torch.eye(N, dtype=F64)] * L, [torch.eye(M, dtype=F64)] * L, torch.eye(N, dtype=F64)
        ),
        torch.ones(N, dtype=dtype),
    )
    with pytest.raises(InputError, match="give both one dtype"):
        problem.gradient((torch.zeros(M, dtype=F64),) * L)


@pytest.mark.parametrize("text", ["rprop:etas=-0.0,lr=0.01", "adam:betas=0.9"])
def test_options_of_too_few_numbers_are_named(text):
    with pytest.raises(InputError, match="the solver .* cannot be made|betas"):
        registry.parse(text)


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_terms_without_values_are_named_beside_others_that_do_not_fit(kind):
    wide, odd = torch.eye(N, dtype=F64), torch.eye(N, dtype=F64)
    odd = odd.to("meta") if kind == "meta" else odd.to_sparse()
    with pytest.raises(InputError, match="Qf is"):
        riccati([wide] * L, [torch.ones(N, M, dtype=F64)] * L, [wide] * L,
                [torch.eye(M, dtype=F64)] * L, odd, qf=torch.ones(1, N, dtype=F64))  # fmt: skip


@pytest.mark.parametrize("last", [(), [], [torch.eye(N, dtype=F64)]])
def test_the_cost_of_the_last_state_is_one_tensor(last):
    wide = torch.eye(N, dtype=F64)
    with pytest.raises(InputError, match="Qf is .*; expected one tensor"):
        riccati([wide] * L, [torch.ones(N, M, dtype=F64)] * L, [wide] * L,
                [torch.eye(M, dtype=F64)] * L, last)  # fmt: skip
