"""The fast transform against the plain butterfly loop and the recursion that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.dimension.hadamard import (
    butterfly_reference,
    hadamard_transform,
    orthonormal_transform,
    transform_columns,
)
from deltacontrol.theory.errors import InputError

F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sylvester(n: int) -> Tensor:
    """``H_{2n} = [[H, H], [H, -H]]``, the definition."""
    matrix = torch.ones(1, 1, dtype=F64)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64), matrix)
    return matrix


@pytest.mark.parametrize("bits", range(14))
def test_equals_the_butterflies_and_is_its_own_inverse(bits: int) -> None:
    x = normal(3, 2**bits, seed=bits)
    found = hadamard_transform(x)
    torch.testing.assert_close(found, butterfly_reference(x), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(hadamard_transform(found), 2**bits * x, rtol=1e-12, atol=1e-9)
    single = hadamard_transform(x.float())
    assert single.dtype == torch.float32
    assert float((single - found).abs().max()) <= 1e-6 * 2 ** (bits / 2) * 10
    if bits <= 9:
        torch.testing.assert_close(found, x @ sylvester(2**bits), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "n", "columns"), [(1, 1, 3), (2, 8, 1), (1, 64, 1), (3, 128, 5), (1, 2048, 2)]
)
def test_columns(groups: int, n: int, columns: int) -> None:
    x = normal(groups, n, columns, seed=n)
    expected = butterfly_reference(x.mT).mT
    found, other = transform_columns(x.clone(), torch.empty_like(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    assert found.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 48, 100, 1000])
def test_any_length(n: int) -> None:
    x = normal(2, n, seed=n)
    padded = hadamard_transform(x, pad=True)
    size = padded.shape[-1]
    assert size & (size - 1) == 0 and size // 2 < n <= size
    full = torch.nn.functional.pad(x, (0, size - n))
    torch.testing.assert_close(padded, butterfly_reference(full), rtol=1e-12, atol=1e-12)
    turned = orthonormal_transform(x)
    assert turned.shape == x.shape
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(orthonormal_transform(turned), x, rtol=1e-12, atol=1e-13)


def test_derivatives_and_batches() -> None:
    x = normal(4, 3, 64, seed=1)
    jacobian = torch.func.jacrev(hadamard_transform)(x[0, 0])
    torch.testing.assert_close(jacobian, sylvester(64), rtol=0, atol=1e-14)
    mapped = torch.func.vmap(torch.func.vmap(hadamard_transform))(x)
    torch.testing.assert_close(mapped, hadamard_transform(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [0, 3, 48])
def test_other_lengths_are_refused(n: int) -> None:
    with pytest.raises(InputError, match=r"no power of two; pad it \(pad=True\)"):
        hadamard_transform(torch.zeros(2, n))
