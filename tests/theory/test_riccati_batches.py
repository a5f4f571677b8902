"""Many linear-quadratic problems at once, and steps in parallel."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numba
import pytest
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import (
    LQFactor,
    UnboundedError,
    compiled,
    factorise,
    factorise_by_scan,
    riccati,
)
from tests.theory.lq_problems import (
    ONE,
    QUADRATIC,
    batch_terms,
    quadratic,
)
from tests.theory.problems import normal, varying

F64 = torch.float64


@pytest.mark.parametrize(("lead", "m"), [((3,), 2), ((2, 3), 1), ((210,), 4)])
@pytest.mark.one_in(3)
def test_a_batch_equals_its_problems_one_by_one(lead: tuple[int, ...], m: int) -> None:
    terms, x0 = batch_terms(*lead, m=m), normal(*lead, 4, seed=38)
    batch = riccati(**terms)
    trajectory = batch.simulate(x0)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in lead)).reshape(
        -1, len(lead)
    ):
        at = tuple(index.tolist())
        one = {k: v[at] if k in ("Qf", "qf") else v[:, *at] for k, v in terms.items()}
        single = riccati(**one)
        pairs = [(batch.gains, single.gains), (batch.feedforward, single.feedforward)]
        pairs += [(batch.hessians, single.hessians), (batch.slopes, single.slopes)]
        pairs += list(zip(trajectory, single.simulate(x0[at]), strict=True))
        for many, alone in pairs:
            for a, b in zip(many, alone, strict=True):
                torch.testing.assert_close(a[at], b, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(batch.constants[:, *at], single.constants)
        torch.testing.assert_close(batch.cost_to_go(2, x0)[at], single.cost_to_go(2, x0[at]))


def test_batch_axes_broadcast() -> None:
    """One system for many linear terms, many systems for one cost, many states for one law."""
    terms, many = batch_terms(), batch_terms(3)
    x0 = normal(3, 4, seed=40)
    whole = riccati(**(terms | {"q": many["q"]}))
    systems = riccati(**(terms | {"A": many["A"]}))
    for i in range(3):
        alone = riccati(**(terms | {"q": many["q"][:, i]})).simulate(x0[i])
        for a, b in zip(whole.simulate(x0).controls, alone.controls, strict=True):
            torch.testing.assert_close(a[i], b)
        alone = riccati(**(terms | {"A": many["A"][:, i]})).simulate(x0[0])
        for a, b in zip(systems.simulate(x0[0]).controls, alone.controls, strict=True):
            torch.testing.assert_close(a[i], b)
    law = riccati(**terms)
    for a, b in zip(law.simulate(x0).states, law.simulate(x0[1]).states, strict=True):
        torch.testing.assert_close(a[1], b)
    crossed = systems.simulate(normal(5, 1, 4, seed=41))
    assert crossed.states[0].shape == (5, 3, 4) and crossed.controls[0].shape == (5, 3, 2)
    alone = riccati(**(terms | {"A": many["A"][:, 2]})).simulate(normal(5, 1, 4, seed=41)[4, 0])
    torch.testing.assert_close(crossed.states[-1][4, 2], alone.states[-1])


def test_an_unbounded_problem_in_a_batch_is_named() -> None:
    R = torch.ones(3, 2, 4, 1, 1, dtype=F64)
    R[2, 1, 3] = -9.0
    ones = torch.ones(3, 1, 1, dtype=F64)
    with pytest.raises(UnboundedError, match=r"at step 2 of problem \(1, 3\)"):
        riccati(ones, ones, ones, R, ONE)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("horizon", [1, 2, 3, 6, 7, 8, 200])
def test_the_parallel_scan_equals_the_recursion(
    horizon: int, lead: tuple[int, ...], cross: bool
) -> None:
    terms = batch_terms(*lead, horizon=horizon)
    quadratic = {name: terms[name] for name in (QUADRATIC if cross else QUADRATIC[:-1])}
    by_scan, expected = factorise_by_scan(**quadratic), factorise(**quadratic)
    for name in ("gains", "hessians"):
        for a, b in zip(getattr(by_scan, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    rest = {k: v for k, v in terms.items() if k not in QUADRATIC}
    x0 = normal(*lead, 4, seed=38)
    for a, b in zip(
        by_scan.policy(**rest).simulate(x0).controls,
        expected.policy(**rest).simulate(x0).controls,
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_scan_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="equal sizes"):
        factorise_by_scan(*quadratic(varying(None)))
    terms = {name: batch_terms()[name] for name in QUADRATIC}
    with pytest.raises(InputError, match="positive definite"):
        factorise_by_scan(**(terms | {"R": 0 * terms["R"], "N": None}))
    stiff = {"Q": 0 * terms["Q"], "R": 1e-9 * terms["R"], "Qf": 1e12 * terms["Qf"], "N": None}
    with pytest.raises(InputError, match="too inexact"):
        factorise_by_scan(**(terms | stiff))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("singular", [False, True])
def test_a_gpu_computes_the_same(singular: bool) -> None:
    terms, x0 = batch_terms(7), normal(7, 4, seed=38)
    if singular:  # in the general form
        terms |= {
            "R": 0 * terms["R"],
            "B": 0 * terms["B"],
            "N": 0 * terms["N"],
            "r": 0 * terms["r"],
        }
    found = riccati(**{name: part.cuda() for name, part in terms.items()}).simulate(x0.cuda())
    expected = riccati(**terms).simulate(x0)
    for many, alone in zip(found, expected, strict=True):
        for a, b in zip(many, alone, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


# ---- kernels of numba

LEAD = compiled.LANES + 3  # the last lanes are filled up


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first steps of what the kernels were asked for; any number of steps is enough."""
    calls, sweep = [], compiled.sweep
    monkeypatch.setattr(compiled, "MANY", 1)

    def counted(*arguments):
        quick = sweep(*arguments)
        calls.append(quick.first)
        return quick

    monkeypatch.setattr(compiled, "sweep", counted)
    return calls


def by_torch(terms: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> LQFactor:
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "serves", lambda terms: False)
        return factorise(**terms)


@pytest.mark.parametrize(
    ("n", "m", "cross"),
    [
        (4, 2, True),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in [(4, 2, False), (3, 3, True)]),
    ],
)
@pytest.mark.slow
def test_kernels_compute_what_torch_computes(
    n: int, m: int, cross: bool, kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = batch_terms(LEAD, n=n, m=m)
    terms = {name: terms[name] for name in (QUADRATIC if cross else QUADRATIC[:-1])}
    terms["Q"] = terms["Q"] + torch.ones(n, n, dtype=F64).triu(1)  # of which half counts
    terms["A"] = terms["A"][:, :1].expand(-1, LEAD, -1, -1)  # the same for all problems
    found, expected = factorise(**terms), by_torch(terms, monkeypatch)
    assert kernels == [0]
    a, b = found._quick, expected._quick
    assert a is not None and b is not None
    for name in ("lower", "gains", "roots", "bounds"):
        x, y = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lead", "failing"), [(LEAD, 7), (3 * LEAD, 7), (3 * LEAD, 0)])
@pytest.mark.slow
def test_kernels_stop_where_one_problem_fails(
    lead: int, failing: int, kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``P_2`` of one problem is indefinite; the rest of the steps goes on in the general form."""
    terms = {name: batch_terms(lead)[name].clone() for name in QUADRATIC[:-1]}
    terms["Q"][2, failing] -= 20 * torch.eye(4, dtype=F64)
    terms["A"][1, failing], terms["B"][1, failing] = 0, 0  # where it ends
    found, expected = factorise(**terms), by_torch(terms, monkeypatch)
    assert kernels == [3] and expected._quick is not None and expected._quick.first == 3
    for a, b in zip(found.gains, expected.gains, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", QUADRATIC)
@pytest.mark.slow
def test_kernels_see_what_is_not_finite(name: str, value: float, kernels: list[int]) -> None:
    terms = {name: part.clone() for name, part in batch_terms(LEAD).items()}
    terms[name].reshape(-1)[0] = value
    with pytest.raises(InputError, match="has the entry"):
        riccati(**terms)
    assert kernels or name == "Qf"


@pytest.mark.slow
def test_pivots_that_drown_are_seen_in_a_batch(kernels: list[int]) -> None:
    """``R = 0`` and a ``B`` of rank one leave rounding errors for pivots."""
    terms = {name: batch_terms(LEAD, horizon=1)[name].clone() for name in QUADRATIC[:-1]}
    terms["R"][0, 5] = 0
    terms["B"][0, 5, :, 1] = 3 * terms["B"][0, 5, :, 0]
    factor = factorise(**terms)
    assert kernels and list(factor.null) == [0] and factor._quick is not None
    assert factor._quick.first == 1


def test_kernels_serve_many_small_problems_only(kernels: list[int]) -> None:
    for lead, n, m in ((compiled.LANES - 1, 4, 2), (LEAD, compiled.LARGEST, 1), (LEAD, 4, 0)):
        riccati(**batch_terms(lead, n=n, m=m))
    riccati(**{name: part.float() for name, part in batch_terms(LEAD).items()})
    compiled.MANY = 6 * LEAD  # put back by the fixture
    riccati(**batch_terms(LEAD))
    assert not kernels


@pytest.fixture
def fresh() -> Iterator[None]:
    """No kernel is at hand, before and after."""
    compiled._kernel.cache_clear()
    yield
    compiled._kernel.cache_clear()


def test_without_numba_torch_computes(
    fresh: None, kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises ImportError
    riccati(**batch_terms(LEAD))
    assert not kernels


@pytest.mark.parametrize(
    "error", [OSError, *(pytest.param(e, marks=pytest.mark.slow) for e in (EOFError, RuntimeError))]
)
@pytest.mark.slow
def test_a_cache_that_cannot_be_used_is_done_without(
    error: type[Exception], fresh: None, kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = numba.njit

    def njit(*signature, cache=False, **options):
        if cache:
            raise error("the cache")
        return compile_(*signature, **options)

    monkeypatch.setattr(numba, "njit", njit)
    riccati(**batch_terms(LEAD))
    assert kernels == [0]


@pytest.mark.parametrize("reason", ["no code for this processor", ""])
def test_a_compiler_that_fails_is_told_and_done_without(
    reason: str, fresh: None, kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def njit(*_, **__):
        raise ValueError(reason)

    monkeypatch.setattr(numba, "njit", njit)
    with pytest.warns(UserWarning, match=f"torch computes it: {reason or 'ValueError'}"):
        riccati(**batch_terms(LEAD))
    assert not kernels
