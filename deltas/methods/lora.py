"""LoRA: a low-rank path beside a frozen linear map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay, low_rank_sites, widths
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.tables import check_table
from deltacontrol.theory.errors import InputError

_NARROW = ("svd", "olora")  # starts that a narrow map has not enough vectors for


@dataclass(frozen=True)
class LoRA(Delta):
    """W + s·B A: linear in the state, bilinear in the control (Hu et al., Eq. 3).

    A ∈ R^{r×in} starts random and B ∈ R^{out×r} at zero, so training starts at the base model. With
    ``init="svd"`` both start at the principal part of the weight, W ≈ s·B₀ A₀ (Meng et al.,
    Eq. 2–4), and the path is s·(B A - B₀ A₀): the same function as their W - s·B₀ A₀ + s·B A, with
    the base weight left as it is and the start exact. ``init="olora"`` starts in the same way at
    B₀ A₀ = Q_r R_r, the first r columns and rows of W = Q R (Büyükakyüz, Eq. 3).

    With ``init="orthogonal"`` A = Q₁' N₁ and B = N₂ Q₂' for the two halves Q₁, Q₂ of the columns of
    a random rotation (r, r) and Gaussian N₁, N₂, divided by ten each: neither is zero, but Q₂' Q₁
    is, so B A starts at zero. As rounding would leave a trace, B₀ A₀ is subtracted here as well.

    An embedding E is the linear map of one-hot tokens: E(i) + s·B A e_i. There A starts at zero and
    B Gaussian, so that the tokens of a batch move at once, and no input is dropped.

    Attributes:
        rank: r.
        alpha: α.
        sites: linear maps and embeddings that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
        scaling: s is α/r ("standard") or α/√r ("rslora", Kalajdzievski, Theorem 3.2), which keeps
            the size of the learned change from shrinking as the rank grows.
        step_ratio: λ, the learning rate of B over that of A (LoRA+, Hayou et al.).
        init: A is uniform in ±1/√in ("kaiming"), Gaussian with deviation 1/r ("gaussian"), or both
            are principal singular vectors of W ("svd"), the first of its QR factors ("olora"), or
            random and orthogonal to each other ("orthogonal", with an even rank).
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    step_ratio: float = 1.0
    init: Literal["kaiming", "gaussian", "svd", "olora", "orthogonal"] = "kaiming"

    name = "lora"
    look = ("LoRA", "#0072B2", "o", 2)
    default_rate = 1e-3
    category = "reparametrisation"
    law = "x (W + s A B)"
    reference = (
        "Hu et al., ICLR 2022, Eq. 3; Kalajdzievski, arXiv 2312.03732, Theorem 3.2 (rsLoRA); "
        "Hayou, Ghosh, Yu, ICML 2024 (LoRA+); Meng, Wang, Zhang, NeurIPS 2024, Eq. 2-4 (PiSSA); "
        "Büyükakyüz, arXiv 2406.01775, Eq. 3 (OLoRA)"
    )
    bibtex = r"""
        @inproceedings{hu2022lora,
          author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan
            and Li, Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu},
          title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
          booktitle = {International Conference on Learning Representations},
          year = {2022},
        }
        @misc{kalajdzievski2023rslora,
          author = {Kalajdzievski, Damjan},
          title = {A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}},
          eprint = {2312.03732},
          archiveprefix = {arXiv},
          year = {2023},
        }
        @inproceedings{hayou2024loraplus,
          author = {Hayou, Soufiane and Ghosh, Nikhil and Yu, Bin},
          title = {{LoRA+}: Efficient Low Rank Adaptation of Large Models},
          booktitle = {International Conference on Machine Learning},
          year = {2024},
        }
        @inproceedings{meng2024pissa,
          author = {Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan},
          title = {{PiSSA}: Principal Singular Values and Singular Vectors Adaptation of Large
            Language Models},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2024},
        }
        @misc{buyukakyuz2024olora,
          author = {B{\"u}y{\"u}kaky{\"u}z, Kerim},
          title = {{OLoRA}: Orthonormal Low-Rank Adaptation of Large Language Models},
          eprint = {2406.01775},
          archiveprefix = {arXiv},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of r (d_in + d_out)"

    def __post_init__(self) -> None:
        """Check rank, dropout and ratio."""
        self._positive("rank")
        self._one_of("scaling", "init")
        check_dropout(self.name, self.dropout)
        if not self.step_ratio > 0:
            raise InputError(f"lora: step_ratio is {self.step_ratio}; expected a positive number.")
        if self.init == "orthogonal" and self.rank % 2:
            raise InputError(f"lora: rank is {self.rank}; init=orthogonal needs an even one.")
        if self.init == "svd" and not self.alpha > 0:
            raise InputError(f"lora: alpha is {self.alpha}; init=svd needs a positive one.")

    @property
    def scale(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        fixed = self.init in (*_NARROW, "orthogonal")
        for site in self._checked_sites(host):
            if isinstance(site.module, nn.Embedding):
                path: nn.Module = self._lay_embedding(host, site, site.module)
            else:
                down, up = self._start(host, site)
                path = LowRankPath(down, up, self.scale, site, self.dropout, fixed=fixed)
                lay(host, site, path)
            if self.step_ratio != 1:
                host.scale_rate(path, "B", self.step_ratio)

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out)."""
        return sum(self.rank * sum(widths(site)) for site in self._checked_sites(host))

    def _checked_sites(self, host: Host) -> list[Site]:
        found = low_rank_sites(host, self.sites, self.layers, embeddings=True)
        for site in found:
            if isinstance(site.module, nn.Embedding):
                self._check_embedding(host, site)
            elif self.init in _NARROW:
                self._check_rank(site)
        return found

    def _check_rank(self, site: Site) -> None:
        bound = min(widths(site))
        if self.rank > bound:
            raise InputError(
                f"lora: rank {self.rank} is above the width {bound} of {site.path}, which has no "
                f"more vectors for init={self.init}; choose a rank from 1 to {bound}."
            )

    def _check_embedding(self, host: Host, site: Site) -> None:
        if self.init in (*_NARROW, "orthogonal"):
            raise InputError(
                f"lora: {site.path} is an embedding, which init={self.init} does not start; choose "
                "init=kaiming, or linear maps alone."
            )
        check_table(self.name, host, site)

    def _lay_embedding(self, host: Host, site: Site, module: nn.Embedding) -> EmbeddingPath:
        down = torch.zeros(self.rank, module.num_embeddings)
        up = host.normal(module.embedding_dim, self.rank, std=1.0)
        path = EmbeddingPath(down, up, self.scale, module)
        host.add(site.path, path, like=host.weight(site))
        host.on_output(module, path)
        host.on_merge(f"{site.path}.weight", path.merged)
        return path

    def _start(self, host: Host, site: Site) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        if self.init == "svd":
            return _principal(site, host.weight(site), self.rank, self.scale)
        if self.init == "olora":
            return _first_factors(site, host.weight(site), self.rank)
        if self.init == "orthogonal":
            return _apart(host, site, self.rank)
        if self.init == "gaussian":
            down = host.normal(self.rank, site.in_features, std=1 / self.rank)
        else:
            down = host.kaiming(self.rank, site.in_features)
        return down, torch.zeros(site.out_features, self.rank)


def _principal(site: Site, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = √(S/s) V', B = U √(S/s) of the r largest singular values, so that s·B A ≈ W."""
    rows = site.rows(weight.detach()).double()
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _first_factors(site: Site, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = the first r rows of R, B = the first r columns of Q, W = Q R."""
    left, right = torch.linalg.qr(site.rows(weight.detach()).double())
    return right[:rank].clone(), left[:, :rank].clone()


def _apart(host: Host, site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """A and B, not zero, with B A = 0: they use different columns of one rotation."""
    rotation = torch.linalg.qr(host.normal(rank, rank, std=1.0).double()).Q
    half = rank // 2
    down = host.normal(half, site.in_features, std=0.1)
    up = host.normal(site.out_features, half, std=0.1)
    return rotation[:, ::2] @ down.double(), up.double() @ rotation[:, 1::2].T


class LowRankPath(WeightPath):
    """ΔW = s·B A, or s·(B A - B₀ A₀) where the start is ``fixed``; A (rank, in), B (out, rank).

    A₀ and B₀ are not saved: they follow from the base weight, and only their product matters, which
    the signs of singular vectors leave alone.
    """

    A_0: Tensor | None
    B_0: Tensor | None

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        scale: float,
        site: Site,
        dropout: float = 0.0,
        *,
        fixed: bool = False,
    ) -> None:
        super().__init__(site, dropout)
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(up)
        self.scale = scale
        self.register_buffer("A_0", down.clone() if fixed else None, persistent=False)
        self.register_buffer("B_0", up.clone() if fixed else None, persistent=False)

    def weight(self) -> Tensor:
        """s·B A, less its start where that is not zero."""
        change = self.B @ self.A
        if self.A_0 is not None and self.B_0 is not None:
            change = change - self.B_0 @ self.A_0
        return self.scale * change

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r features."""
        change = linear(linear(x, self.A) * self.scale, self.B)
        if self.A_0 is not None and self.B_0 is not None:
            change = change - linear(linear(x, self.A_0) * self.scale, self.B_0)
        return change


class EmbeddingPath(nn.Module):
    """E(i) ↦ E(i) + s·B A e_i; A (rank, vocabulary), B (width, rank).

    An embedding that scales its output (Gemma's) scales the path with it.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, module: nn.Embedding) -> None:
        super().__init__()
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(up)
        self.scale = scale
        self.__dict__["module"] = module  # the base's own: no submodule

    def forward(self, inputs: tuple, output: Tensor) -> Tensor:
        """The embedded tokens with the path's contribution added."""
        change = linear(embedding(inputs[0], self.A.T), self.B) * self.scale
        gain = getattr(self.__dict__["module"], "embed_scale", None)
        return output + (change if gain is None else change * gain)

    def merged(self, weight: Tensor) -> Tensor:
        """The table (vocabulary, width) with the change, in float64."""
        change = self.B.detach().double() @ self.A.detach().double()
        return weight + self.scale * change.T
