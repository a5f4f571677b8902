"""One linear-quadratic problem by the compiled kernel, against the recursion by LAPACK."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import LQPolicy, UnboundedError, factorise, fused, riccati
from tests.theory.lq_problems import QUADRATIC, batch_terms
from tests.theory.problems import normal

F64 = torch.float64


def problem(n: int, m: int, *, horizon: int = 6, cross: bool = True) -> dict[str, Tensor]:
    terms = batch_terms(horizon=horizon, n=n, m=m)
    for name in ("A", "B"):  # else states of many entries grow, and their rounding errors with them
        terms[name] = terms[name] / n**0.5
    return {name: terms[name].clone() for name in (QUADRATIC if cross else QUADRATIC[:-1])}


def plain(terms: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **affine: Tensor) -> LQPolicy:
    with monkeypatch.context() as patch:
        patch.setattr(fused, "kernels", lambda: None)
        policy = riccati(**terms, **affine)
        assert not isinstance(policy._found, fused.Solved)
    return policy


def assert_equal(found: LQPolicy, expected: LQPolicy, x0: Tensor) -> None:
    pairs = [(found.gains, expected.gains), (found.hessians, expected.hessians)]
    pairs += [(found.feedforward, expected.feedforward), (found.slopes, expected.slopes)]
    pairs += list(zip(found.simulate(x0), expected.simulate(x0), strict=True))
    for these, those in pairs:
        assert type(these) is type(those)
        scale = max(float(b.abs().max()) for b in those)
        for a, b in zip(these, those, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(found.constants, expected.constants, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gain(2), expected.gains[2], rtol=1e-12, atol=1e-12)
    assert found.singular == expected.singular


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 2), (4, 4), (8, 4), (5, 7), (9, 1), (37, 12)])
def test_the_kernel_computes_what_lapack_computes(
    n: int, m: int, cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = problem(n, m, cross=cross)
    terms["Q"] = terms["Q"] + torch.ones(n, n, dtype=F64).triu(1)  # of which half counts
    terms["R"] = terms["R"].mT  # not in the order of rows
    terms["A"] = terms["A"][:1].expand(6, -1, -1)
    found = riccati(**terms)
    assert isinstance(found._found, fused.Solved)
    assert_equal(found, plain(terms, monkeypatch), normal(n, seed=3))


def test_affine_terms_and_many_states_go_on_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terms, affine = problem(4, 2), {name: batch_terms()[name] for name in ("c", "q", "r", "qf")}
    affine = {
        name: part[:1].repeat(6, 1) if part.ndim > 1 else part for name, part in affine.items()
    }
    found, expected = riccati(**terms, **affine), plain(terms, monkeypatch, **affine)
    assert_equal(found, expected, normal(4, seed=3))
    several = normal(3, 4, seed=4)
    for a, b in zip(
        riccati(**terms).simulate(several).states,
        plain(terms, monkeypatch).simulate(several).states,
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    listed = riccati(**{k: v if k == "Qf" else list(v) for k, v in terms.items()})
    assert_equal(listed, plain(terms, monkeypatch), normal(4, seed=3))


def test_a_state_that_does_not_fit_is_refused() -> None:
    policy = riccati(**problem(4, 2))
    for wrong in (torch.zeros(3, dtype=F64), torch.zeros(4)):
        with pytest.raises(InputError, match="x0"):
            policy.simulate(wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", QUADRATIC)
def test_every_entry_that_is_not_finite_is_named(name: str, value: float) -> None:
    count = 2 * 3 if name == "N" else 3
    for entry in range(count):
        terms = problem(3, 2, horizon=2)
        terms[name].reshape(-1)[entry] = value
        assert fused.solve(**terms) is None
        with pytest.raises(InputError, match="has the entry"):
            riccati(**terms)


def test_what_the_kernel_cannot_solve_the_other_forms_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An indefinite ``P_2``, pivots that drown, and an unbounded problem."""
    halfway = problem(4, 2, cross=False)
    halfway["Q"][2] -= 20 * torch.eye(4, dtype=F64)
    halfway["A"][1], halfway["B"][1] = 0, 0
    drowned = problem(4, 2, horizon=3, cross=False)
    drowned["R"][2] = 0
    drowned["B"][2, :, 1] = 3 * drowned["B"][2, :, 0]
    for terms, first in ((halfway, 3), (drowned, 3)):
        assert fused.solve(**terms) is None
        factor, expected = factorise(**terms), plain(terms, monkeypatch)
        assert factor._quick is not None or expected._factor._quick is None
        if terms is halfway:
            assert factor._quick is not None and factor._quick.first == first
        assert_equal(riccati(**terms), expected, normal(4, seed=3))
    unbounded = problem(4, 2, cross=False)
    unbounded["R"][3] -= 1e3 * torch.eye(2, dtype=F64)
    with pytest.raises(UnboundedError, match="unbounded at step 3"):
        riccati(**unbounded)
    with pytest.raises(InputError, match="Q.0. has shape"):
        riccati(**(problem(4, 2) | {"Q": torch.ones(6, 3, 3, dtype=F64)}))


def test_the_kernel_serves_one_small_problem_in_float64() -> None:
    assert fused.solve(**problem(4, 2)) is not None
    assert fused.solve(**batch_terms_of(2)) is None
    assert fused.solve(**{k: v.float() for k, v in problem(4, 2).items()}) is None
    assert fused.solve(**problem(fused.LARGEST, 1, horizon=1)) is None
    assert fused.solve(**{k: v.requires_grad_() for k, v in problem(4, 2).items()}) is None
    empty = {k: v if k == "Qf" else v[:0] for k, v in problem(4, 2).items()}
    assert fused.solve(**empty) is None


def batch_terms_of(batch: int) -> dict[str, Tensor]:
    return {name: batch_terms(batch)[name] for name in QUADRATIC}


def test_a_problem_has_the_same_bits_whenever_it_is_solved() -> None:
    terms = problem(4, 2)
    first = riccati(**terms)
    for size in range(1, 20):
        riccati(**problem(size, 1))
    assert isinstance(first._found, fused.Solved)
    pairs = zip(first.gains, riccati(**terms).gains, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def fresh():
    fused.kernels.cache_clear()
    yield
    fused.kernels.cache_clear()


def test_without_numba_lapack_computes(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises ImportError
    assert not isinstance(riccati(**problem(4, 2))._found, fused.Solved)


def test_a_compiler_that_fails_is_told_and_done_without(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba

    def njit(*_, **__):
        raise ValueError("no code for this processor")

    monkeypatch.setattr(numba, "njit", njit)
    monkeypatch.delitem(sys.modules, "deltacontrol.theory.lq.kernels", raising=False)
    monkeypatch.delattr("deltacontrol.theory.lq.kernels", raising=False)
    with pytest.warns(UserWarning, match="LAPACK computes it: no code for this processor"):
        riccati(**problem(4, 2))
