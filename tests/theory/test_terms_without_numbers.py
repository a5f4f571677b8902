"""NaN and infinite numbers are refused by the name of the term, the step and the problem."""

from __future__ import annotations

import math

import pytest
import torch

from deltacontrol.deltas import LoRA, parse
from deltacontrol.experiments.measures.solving import Solve
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory import (
    BinaryCrossEntropyCost,
    CrossEntropyCost,
    SquaredErrorCost,
    riccati,
)
from deltacontrol.theory.errors import InputError

F64 = torch.float64
L, N, M = 3, 2, 1  # steps, entries of the state and of the control
MATRICES, VECTORS = ("A", "B", "Q", "R", "N", "Qf"), ("c", "q", "r", "qf")


def terms(*batch: int) -> dict:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(*batch, *shape, generator=draw, dtype=F64) for _ in range(L)]

    def unit(size: int) -> list[torch.Tensor]:
        return [torch.eye(size, dtype=F64).expand(*batch, size, size).clone() for _ in range(L)]

    return {"A": normal(N, N), "B": normal(N, M), "Q": unit(N), "R": unit(M), "Qf": unit(N)[0],
            "N": [0.1 * x for x in normal(N, M)], "c": normal(N), "q": normal(N), "r": normal(M),
            "qf": normal(N)[0]}  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*MATRICES, *VECTORS])
def test_a_term_that_is_not_finite_is_named(name, bad):
    given = terms()
    term = given[name] if name in ("Qf", "qf") else given[name][1]
    term.view(-1)[-1] = bad
    place = name if name in ("Qf", "qf") else rf"{name}\[1\]"
    with pytest.raises(InputError, match=rf"^{place} has the entry {bad} at .*finite numbers"):
        riccati(**given)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", [*MATRICES, *VECTORS])
def test_the_bad_member_of_a_batch_is_named(name, stacked):
    given = terms(4)
    term = given[name] if name in ("Qf", "qf") else given[name][0]
    term[2] = math.nan
    if stacked:
        given = {n: torch.stack(x) if isinstance(x, list) else x for n, x in given.items()}
    place = name if name in ("Qf", "qf") else rf"{name}\[0\]"
    with pytest.raises(InputError, match=f"^{place} of problem 2 has the entry nan at"):
        riccati(**given)


def test_a_vector_of_one_problem_for_many_is_named_with_its_number():
    given = terms() | {"q": terms(5)["q"]}
    given["q"][2][3, 0] = math.inf
    with pytest.raises(InputError, match=r"^q\[2\] of problem 3 has the entry inf at \(0,\)"):
        riccati(**given)


@pytest.mark.parametrize("decay", [math.nan, math.inf, -1.0, -1e-300])
def test_a_weight_decay_that_is_none_is_refused(decay):
    labels, real = torch.tensor([0, 1]), torch.tensor([0.0, 1.0])
    for cost in (
        lambda: CrossEntropyCost(labels, decay),
        lambda: BinaryCrossEntropyCost(real, decay),
        lambda: SquaredErrorCost(real, decay),
        lambda: FineTuning(weight_decay=decay),
        lambda: Solve(weight_decay=decay),
    ):
        with pytest.raises(InputError, match=f"weight_decay is {decay}; expected a"):
            cost()


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_a_field_of_a_delta_that_is_not_finite_is_refused(text):
    for field in ("alpha", "dropout"):
        with pytest.raises(InputError, match=f"lora: {field} is -?(nan|inf); expected a finite"):
            parse(f"lora:{field}={text}")
        with pytest.raises(InputError, match=f"lora: {field} is -?(nan|inf); expected a finite"):
            LoRA(**{field: float(text)})
