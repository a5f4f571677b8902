"""The Fastfood projection, and the one that shares its Gaussians between blocks."""

from __future__ import annotations

import math

import pytest
import torch

from deltacontrol.theory.dimension.hadamard import butterfly_reference
from deltacontrol.theory.dimension.projections import FastfoodProjection, Projection
from deltacontrol.theory.errors import InputError
from tests.theory.operators import normal
from tests.theory.projections import F64, SIZES, RandomNorms


class TestFastfood(RandomNorms):
    """Structured blocks, each with factors of its own."""

    SHARE: int | None = None

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return FastfoodProjection(D, d, seed, dtype, share=self.SHARE)

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_equals_the_product_of_its_factors(self, D: int, d: int) -> None:
        """The formula ``S H G Pi H B / sqrt(D n)`` written out block by block."""
        P = self.make(D, d)
        assert isinstance(P, FastfoodProjection)
        n = P.block_size
        H = butterfly_reference(torch.eye(n, dtype=F64))
        rows = []
        for group in range(P.num_groups):
            G, S = torch.diag(P._gaussians[group]), torch.diag(P._lengths[group])
            Pi = torch.eye(n, dtype=F64)[P._permutation[group].long() % n]
            first = group * P.share
            count = min(P.share, P.num_blocks - first)
            signs = P._signs[first * n : (first + count) * n].view(n, count)
            blocks = [S @ H @ G @ Pi @ H @ torch.diag(b.double()) for b in signs.mT]
            rows.append(torch.stack(blocks, 1).reshape(n * count, n))
        expected = torch.cat(rows)[:D, :d]
        torch.testing.assert_close(P.dense(), expected, rtol=1e-12, atol=1e-13)
        lifted = torch.stack([P.product_reference(row) for row in torch.eye(d, dtype=F64)], 1)
        torch.testing.assert_close(lifted, expected, rtol=1e-12, atol=1e-13)

    def test_rows_have_the_lengths_of_gaussian_rows(self) -> None:
        """With ``d = n`` the squared row norms times ``D`` are chi-squared with ``n`` degrees."""
        P = FastfoodProjection(4096, 16, 0, F64)
        squares = 4096 * P.dense().square().sum(1)
        assert float(squares.mean()) == pytest.approx(16, abs=4 * math.sqrt(32 / 4096))
        assert float(squares.var()) == pytest.approx(32, rel=0.15)

    def test_long_maps_are_worked_on_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same draw whole and in chunks gives the same map."""
        z, v = normal(6, seed=1), normal(150, seed=2)
        whole = self.make(150, 6)
        monkeypatch.setattr(
            "deltacontrol.theory.dimension.projections.fastfood._CHUNK", {"cpu": 32}
        )
        parts = self.make(150, 6)
        assert isinstance(whole, FastfoodProjection) and isinstance(parts, FastfoodProjection)
        assert len(list(whole._pieces())) < len(list(parts._pieces()))
        torch.testing.assert_close(whole @ z, parts @ z, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(whole.T @ v, parts.T @ v, rtol=1e-13, atol=1e-14)


class TestSharedFastfood(TestFastfood):
    """Groups of four blocks, the last one unfinished."""

    SHARE = 4

    def test_an_empty_group_is_refused(self) -> None:
        with pytest.raises(InputError, match="share is 0"):
            FastfoodProjection(10, 2, share=0)

    def test_memory_is_below_one_vector_and_sharing_grows_with_it(self) -> None:
        for D, d in ((2**20, 10), (2**20, 1000), (2**20, 10**4)):
            P = FastfoodProjection(D, d)
            assert P.num_bytes < 4 * D
        shares = [FastfoodProjection(D, 16).share for D in (2**12, 2**13, 2**15, 2**20)]
        assert shares == [1, 2, 8, 64]

    @pytest.mark.slow
    def test_sharing_keeps_the_mean_and_the_deviation_of_the_gram_matrix(self) -> None:
        """``P'P`` over 400 draws: mean the identity, its deviation that of unshared factors."""
        D, d, draws = 1024, 6, 400
        spreads = {}
        for share in (1, 32):
            grams = []
            for seed in range(draws):
                matrix = FastfoodProjection(D, d, seed, F64, share=share).dense()
                grams.append(matrix.mT @ matrix)
            found = torch.stack(grams)
            error = found.std(0) / math.sqrt(draws)
            # 21 different entries: 4.5 standard errors fail one time in seven thousand.
            assert bool(((found.mean(0) - torch.eye(d)).abs() <= 4.5 * error).all())
            off = found[:, *torch.triu_indices(d, d, 1)]
            spreads[share] = (float(off.std()), float(found.diagonal(dim1=1, dim2=2).std()))
        # Off the diagonal the signs of all blocks average: of g_l^2/||g||^2, a Dirichlet vector,
        # against signs that sum to zero comes 2/(n+2) a block, of the lengths about 2/n^2.
        n = 8
        assert spreads[32][0] == pytest.approx(spreads[1][0], rel=0.1)
        predicted = math.sqrt((2 / (n + 2) + 2 / n**2) * n / D)
        assert spreads[1][0] == pytest.approx(predicted, rel=0.1)
        # On it the lengths S decide: sqrt(6)/n a group, 128 groups of one block or 4 of 32 here.
        for share in (1, 32):
            predicted = math.sqrt(6) / 8 / math.sqrt(128 / share)
            assert spreads[share][1] == pytest.approx(predicted, rel=0.35)

    def test_given_the_gaussians_columns_have_one_length(self) -> None:
        """``||H G Pi H e_j||^2 = n ||G||^2``: sharing G and Pi moves no norm in the mean."""
        P = FastfoodProjection(64, 16, 2, F64, share=4)
        H, g = butterfly_reference(torch.eye(16, dtype=F64)), P._gaussians[0]
        product = H @ torch.diag(g) @ H[P._permutation[0].long() % 16]
        lengths = product.square().sum(0)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 16 * float(g @ g)))
