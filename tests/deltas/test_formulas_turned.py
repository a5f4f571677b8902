"""Weights that are turned, gated, tiled or given by a spectrum, against dense formulas."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    BOFT,
    C3A,
    HRA,
    OFT,
    DeLoRA,
    FourierFT,
    GraLoRA,
    HiRA,
    LoRA,
    LoReFT,
    MiSS,
    RandLoRA,
    RoAd,
    TrainableTokens,
    VBLoRA,
    attach,
)
from deltacontrol.theory.errors import InputError
from tests.deltas.peft_models import peft
from tests.deltas.test_formulas_lowrank import SITES, Factors, assert_as_written
from tests.deltas.zoo import batch_of, d, m, move, out

Build = Callable[..., PreTrainedModel]
# GPT-2 has slices of fused matrices that are kept transposed: what can go wrong, does there.
SLOW = pytest.mark.slow
THREE = ["gpt2", pytest.param("bert", marks=SLOW), pytest.param("llama", marks=SLOW)]


def rotation(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹."""
    eye = torch.eye(len(skew), dtype=skew.dtype)
    return (eye - skew) @ torch.linalg.inv(eye + skew)


def upper(entries: Tensor, size: int) -> Tensor:
    """The skew matrix with these entries above its diagonal, by rows."""
    skew = torch.zeros(size, size, dtype=entries.dtype)
    for value, (i, j) in zip(entries, itertools.combinations(range(size), 2), strict=True):
        skew[i, j], skew[j, i] = value, -value
    return skew


@pytest.mark.parametrize("family", THREE)
class TestTurned:
    @pytest.mark.parametrize("share", [False, True])
    def test_oft(self, build: Build, family, share):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            blocks = [rotation(upper(row, 4)) for row in f["q"]]
            blocks = blocks * (w.shape[1] // 4) if share else blocks
            return w @ torch.block_diag(*blocks).T

        delta = OFT(block_size=4, share=share, sites=SITES)
        assert_as_written(build, family, delta, weight)

    def test_oft_by_a_series(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            blocks = []
            for row in f["q"]:
                q = upper(row, 4)
                terms = [torch.linalg.matrix_power(q, k) for k in range(6)]
                blocks.append(terms[0] + 2 * sum(terms[1:5]) + terms[5])
            return w @ torch.block_diag(*blocks).T

        assert_as_written(build, family, OFT(4, neumann_terms=6, sites=SITES), weight)

    @pytest.mark.parametrize("factors", [1, 3])
    def test_boft(self, build: Build, family, factors):
        """The permutations are those of peft's own layer."""

        def weight(w: Tensor, f: Factors, _) -> Tensor:
            layer, wide = peft.tuners.boft.layer.BOFTLayer, w.shape[1]
            total = torch.eye(wide, dtype=w.dtype)
            for i, blocks in enumerate(f["M"]):
                diagonal = torch.block_diag(*[rotation((b - b.T) / 2) for b in blocks])
                order = layer.block_butterfly_perm(None, wide, wide // 4 // 2**i, 2, factors - 1)
                permutation = torch.eye(wide, dtype=w.dtype)[order]
                total = permutation @ diagonal @ permutation.T @ total
            return torch.diag(f["s"]) @ w @ total.T

        delta = BOFT(block_size=4, num_factors=factors, sites=SITES)
        assert_as_written(build, family, delta, weight)

    @pytest.mark.parametrize("rank", [4, 5])
    def test_hra(self, build: Build, family, rank):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            for u in f["U"].T:
                w = w - 2 * torch.outer(w @ u, u) / (u @ u)
            return w

        assert_as_written(build, family, HRA(rank=rank, sites=SITES), weight)

    def test_hra_of_orthonormal_vectors(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            span = f["U"] @ torch.linalg.inv(f["U"].T @ f["U"]) @ f["U"].T
            return w - 2 * w @ span

        assert_as_written(build, family, HRA(rank=3, gram_schmidt=True, sites=SITES), weight)

    def test_hira(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            return w * (1 + f["B"] @ f["A"])

        assert_as_written(build, family, HiRA(rank=3, sites=SITES), weight, scale=0.5)


@pytest.mark.parametrize("family", THREE)
class TestChanges:
    def test_delora(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            change = torch.zeros_like(w)
            for a, b in zip(f["A"], f["B"].T, strict=True):
                change += f["strength"] / 3 * torch.outer(b / b.norm(), a / a.norm())
            return w + change * w.norm(dim=0)

        assert_as_written(build, family, DeLoRA(rank=3, strength=0.1, sites=SITES), weight)

    def test_fourierft(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            rows, columns = w.shape
            seeded = torch.Generator().manual_seed(5)
            change = torch.zeros_like(w)
            order = torch.randperm(rows * columns, generator=seeded).tolist()
            y, x = (torch.arange(n, dtype=w.dtype) for n in w.shape)
            for value, place in zip(f["c"], order, strict=False):
                k, p = divmod(place, columns)
                angle = 2 * math.pi * (k * y[:, None] / rows + p * x / columns)
                change += value * angle.cos() / (rows * columns)
            return w + 50 * change

        delta = FourierFT(num_frequencies=30, scaling=50.0, seed=5, sites=SITES)
        assert_as_written(build, family, delta, weight)

    def test_c3a(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            change = torch.zeros_like(w)
            for i, j in itertools.product(*map(range, w.shape)):
                change[i, j] = f["w"][i // 8, j // 8, (j - i) % 8]
            return w + change / w.shape[1]

        assert_as_written(build, family, C3A(block_size=8, sites=SITES), weight, scale=2.0)

    @pytest.mark.parametrize("rank", [4, 5])
    @pytest.mark.parametrize("variant", ["miss", "mini"])
    def test_miss(self, build: Build, family, variant, rank):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            change, columns = torch.zeros_like(w), f["D"].shape[1]
            for i, j in itertools.product(*map(range, w.shape)):
                change[i, j] = f["D"][j % rank, i % columns]
            return w + change

        delta = MiSS(rank=rank, variant=variant, columns=4, sites=SITES)
        assert_as_written(build, family, delta, weight)

    def test_bone(self, build: Build, family):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            moved = w.clone()
            for i, j in itertools.product(range(len(w) // 8), range(w.shape[1] // 8)):
                place = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8)
                moved[place] += w[place] @ f["D"][i] + f["D"][i]
            return moved

        assert_as_written(build, family, MiSS(rank=8, variant="bone", sites=SITES), weight)

    @pytest.mark.parametrize("whole", [0, 3])
    def test_gralora(self, build: Build, family, whole):
        def weight(w: Tensor, f: Factors, _) -> Tensor:
            change = f["B_0"] @ f["A_0"] if whole else torch.zeros_like(w)
            high, wide = len(w) // 2, w.shape[1] // 2
            for j, n in itertools.product(range(2), range(2)):
                down, up = f["A"][n][:, 2 * j : 2 * j + 2], f["B"][j][2 * n : 2 * n + 2]
                change[high * j : high * (j + 1), wide * n : wide * (n + 1)] += (down @ up).T
            return w + 5.0 / (4 + whole) * change

        delta = GraLoRA(rank=4, alpha=5.0, hybrid_rank=whole, sites=SITES)
        assert_as_written(build, family, delta, weight)

    def test_vblora(self, build: Build, family):
        def mixed(logits: Tensor, bank: Tensor) -> Tensor:
            order = logits.argsort(descending=True)[:3]
            weights = logits[order].exp() / logits[order].exp().sum()
            return sum(x * bank[i] for x, i in zip(weights, order, strict=True))  # type: ignore[return-value]

        def weight(w: Tensor, f: Factors, controlled) -> Tensor:
            bank = controlled.controls.get_parameter("vblora.shared.vectors").detach()
            down = torch.stack([torch.cat([mixed(x, bank) for x in row]) for row in f["A"]])
            columns = f["B"].unbind(1)
            up = torch.stack([torch.cat([mixed(x, bank) for x in rows]) for rows in columns], 1)
            return w + up @ down

        delta = VBLoRA(rank=2, num_vectors=9, vector_length=8, top_k=3, sites=SITES)
        assert_as_written(build, family, delta, weight)

    @pytest.mark.parametrize("bases", ["uniform", "sparse", "very-sparse"])
    def test_randlora(self, build: Build, family, bases):
        def weight(w: Tensor, f: Factors, controlled) -> Tensor:
            shared = controlled.controls.get_submodule("randlora.shared")
            down, up = shared.A.double(), shared.B.double()
            assert up.shape == (m, math.ceil(d / 5), 5)
            small, large, count = min(w.shape), max(w.shape), f["Lambda"].shape[1]
            assert count == math.ceil(small / 5)
            change = torch.zeros(large, small, dtype=w.dtype)
            for term in range(5 * count):
                (pair, column), (row, mine) = divmod(term, 5), divmod(term, count)
                scaled = f["Lambda"][row, mine] * down[row, 0, :small] * f["Gamma"][mine]
                change += torch.outer(up[:large, pair, column], scaled)
            return w + 7.0 / 5 * (change.T if w.shape[1] > w.shape[0] else change)

        delta = RandLoRA(rank=5, alpha=7.0, bases=bases, sites=SITES)
        assert_as_written(build, family, delta, weight)

    @pytest.mark.parametrize("init", ["olora", "orthogonal"])
    def test_lora_from_factors(self, build: Build, family, init):
        """OLoRA: W less the part that A and B start at; the orthogonal start takes nothing away."""

        def weight(w: Tensor, f: Factors, _) -> Tensor:
            left, right = torch.linalg.qr(w)
            start = left[:, :4] @ right[:4] if init == "olora" else torch.zeros_like(w)
            return w + 5.0 / 4 * (f["B"] @ f["A"] - start)

        delta = LoRA(rank=4, alpha=5.0, init=init, sites=SITES)
        assert_as_written(build, family, delta, weight)


@pytest.mark.parametrize(("variant", "share"), [("one", 2), ("two", 1), ("four", 1)])
def test_road(build: Build, variant: str, share: int):
    """Weight and bias of the site, turned by hand; a slice of a fused matrix as well."""
    for family in ("bert", "gpt2"):
        model = build(family)
        delta = RoAd(variant=variant, group_size=8, sites=("attention.query",))  # type: ignore[arg-type]
        controlled = move(attach(model, delta))
        (site, *_) = controlled.host.find(("attention.query",))
        path = controlled.controls.get_submodule(f"road.{site.key}")
        theta, alpha = path.theta.detach(), path.alpha.detach()  # type: ignore[union-attr]
        turned = torch.zeros(d, d, dtype=torch.float64)
        for i in range(d):
            group, place = divmod(i, 8)
            partner = i + 4 if place < 4 else i - 4
            one = two = 4 * group + place % 4 if share == 2 else i
            if variant == "four":
                one, two = 16 * group + place, 16 * group + 8 + place
            turned[i, i] = alpha[one] * theta[one].cos()
            turned[i, partner] = (1 if place >= 4 else -1) * alpha[two] * theta[two].sin()
        states: list[tuple[Tensor, Tensor]] = []
        hook = site.module.register_forward_hook(
            lambda _, x, y, seen=states: seen.append((x[0], y))
        )
        with torch.no_grad():
            out(controlled, batch_of(model))
        hook.remove()
        controlled.detach()
        x, found = states[0]
        with torch.no_grad():
            expected = site.take(site.module(x)) @ turned.T
        torch.testing.assert_close(site.take(found), expected, rtol=0, atol=1e-12)


def test_loreft(build: Build):
    """In the subspace of R the state becomes W h + b, across it nothing changes."""
    model = build("bert")
    controlled = move(attach(model, LoReFT(rank=3)))
    block = model.get_submodule("bert.encoder.layer.0")
    edit = controlled.controls.get_submodule("loreft.bert.encoder.layer.0")
    states: list[Tensor] = []
    hook = block.register_forward_hook(
        lambda _, x, y: states.append(y if isinstance(y, Tensor) else y[0])
    )
    with torch.no_grad():
        out(controlled, batch_of(model))
    edited = states.pop()
    w, b, v = (p.detach() for p in (edit.W, edit.b, edit.V))  # type: ignore[union-attr]
    with torch.no_grad(), controlled.disable():
        out(model, batch_of(model))
    hook.remove()
    controlled.detach()
    (state,) = states
    basis = torch.linalg.qr(v.T).Q.T
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=v.dtype))
    inside = basis.T @ basis
    torch.testing.assert_close(edited @ basis.T, state @ w.T + b, rtol=0, atol=1e-12)
    torch.testing.assert_close(edited - edited @ inside, state - state @ inside, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_trainable_tokens(build: Build, family):
    """The rows of the table, wherever it acts: in GPT-2 also as the head."""
    model = build(family, "causal-lm" if family == "gpt2" else "classification")
    tokens = tuple(range(5, 60))
    controlled = move(attach(model, TrainableTokens(tokens)))
    change = controlled.trainable()["trainable-tokens.rows.u"].detach().clone()
    found = out(controlled, batch_of(model)).detach()
    controlled.detach()
    table = model.get_input_embeddings().weight
    kept = table.detach().clone()
    with torch.no_grad():
        table[list(tokens)] += change
        expected = out(model, batch_of(model))
        table.copy_(kept)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("delta", "part"),
    [
        (OFT(block_size=5), "block_size=5 does not divide the width 32"),
        (BOFT(num_factors=5), "needs blocks of an even size"),
        (FourierFT(num_frequencies=2000), "above the 1024 entries"),
        (C3A(block_size=5), "does not divide both widths"),
        (MiSS(rank=5, variant="bone"), "rank 5 does not divide both widths"),
        (RoAd(group_size=6), "group_size=6 does not divide the width 32"),
        (VBLoRA(vector_length=5), "vector_length=5 does not divide both widths"),
        (GraLoRA(rank=6, num_blocks=3), "num_blocks=3 does not divide both widths"),
        (TrainableTokens((3, 100)), "from 0 to 99"),
        (TrainableTokens(), "at least one index"),
        (LoReFT(rank=33), "rank 33 is above the width 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build: Build, delta, part: str):
    with pytest.raises(InputError, match=part):
        attach(build("bert"), delta)


def test_an_odd_rank_has_no_orthogonal_start():
    with pytest.raises(InputError, match="init=orthogonal needs an even one"):
        LoRA(rank=3, init="orthogonal")
