"""LoRA: a low-rank path beside a frozen linear map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import check_dropout, lay, low_rank_sites, widths
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts import data_starts
from deltacontrol.deltas.methods.parts.data_starts import DataStart, Factors
from deltacontrol.deltas.methods.parts.low_rank_paths import EmbeddingPath, LowRankPath
from deltacontrol.deltas.methods.parts.tables import check_table
from deltacontrol.theory.errors import InputError

_CORDA = ("corda-ipm", "corda-kpm")
_BY_GRADIENT = ("lora-ga", "lora-one")
_FROM_DATA = ("eva", *_CORDA, *_BY_GRADIENT)
# Vectors of a map that a start takes for each rank: of both sides, or of its input alone (EVA).
_VECTORS = {"svd": 1, "olora": 1, "eva": 1, "lora-ga": 2, "lora-one": 1} | dict.fromkeys(_CORDA, 1)
_TAKEN_AWAY = ("svd", "olora", "orthogonal", *_CORDA, "lora-ga")  # B₀ A₀ is subtracted
_SCALED = ("svd", *_CORDA)  # s·B₀ A₀ is a part of W, whatever s > 0 is


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

    Five starts follow from data, which ``DeltaModel.prepare(losses)`` shows before training. With
    x the rows that go into the site, G = U S V' the gradient of the mean loss there, and γ a
    number, 16 for LoRA-GA and 128 for LoRA-One as in their authors' code:

        "eva"        A = the first r principal directions of the rows x, B = 0 (Paischer et al.)
        "corda-ipm"  W C = U S V', C = Σ x x'; s·B₀ A₀ = U_r S_r V_r' C⁻¹ of the r largest
                     components, the instruction-previewed mode (Yang et al.)
        "corda-kpm"  the same of the r smallest, the knowledge-preserved mode
        "lora-ga"    A₀ = c V_{1…r}', B₀ = c U_{r+1…2r}, c = out^(1/4)/√γ: under gradient descent
                     the first change of W is, to first order in the step η, -η s² c² G_{2r}, a
                     step along the best approximation of G of rank 2r (Wang et al.)
        "lora-one"   s·B₀ A₀ = -s/(γ S_1) G_r, a step along the best approximation of G of rank r,
                     both factors of equal size (Zhang, Liu, Chen)

    The starts of CorDA and LoRA-GA are subtracted as those of PiSSA are, and saved, because the
    base weight does not tell them. That of LoRA-One is itself the first step, and stays. Every site
    has the same rank: EVA's redistribution of ranks would make their number depend on the data.

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
            are principal singular vectors of W ("svd"), the first of its QR factors ("olora"),
            random and orthogonal to each other ("orthogonal", with an even rank), or follow from
            data as above.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    step_ratio: float = 1.0
    init: Literal[
        "kaiming",
        "gaussian",
        "svd",
        "olora",
        "orthogonal",
        "eva",
        "corda-ipm",
        "corda-kpm",
        "lora-ga",
        "lora-one",
    ] = "kaiming"

    name = "lora"
    look = ("LoRA", "#0072B2", "o", 2)
    default_rate = 1e-3
    category = "reparametrisation"
    law = "x (W + s A B)"
    reference = (
        "Hu et al., ICLR 2022, Eq. 3; Kalajdzievski, arXiv 2312.03732, Theorem 3.2 (rsLoRA); "
        "Hayou, Ghosh, Yu, ICML 2024 (LoRA+); Meng, Wang, Zhang, NeurIPS 2024, Eq. 2-4 (PiSSA); "
        "Büyükakyüz, arXiv 2406.01775, Eq. 3 (OLoRA); Paischer et al., arXiv 2410.07170 (EVA); "
        "Yang et al., NeurIPS 2024 (CorDA); Wang, Yu, Li, NeurIPS 2024 (LoRA-GA); "
        "Zhang, Liu, Chen, ICML 2025 (LoRA-One)"
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
        @misc{paischer2024eva,
          author = {Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas
            and Alkin, Benedikt and Deisenroth, Marc Peter and Hochreiter, Sepp},
          title = {One Initialization to Rule them All: Fine-tuning via Explained Variance
            Adaptation},
          eprint = {2410.07170},
          archiveprefix = {arXiv},
          year = {2024},
        }
        @inproceedings{yang2024corda,
          author = {Yang, Yibo and Li, Xiaojie and Zhou, Zhongzhu and Song, Shuaiwen Leon
            and Wu, Jianlong and Nie, Liqiang and Ghanem, Bernard},
          title = {{CorDA}: Context-Oriented Decomposition Adaptation of Large Language Models for
            Task-Aware Parameter-Efficient Fine-tuning},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2024},
        }
        @inproceedings{wang2024loraga,
          author = {Wang, Shaowen and Yu, Linxi and Li, Jian},
          title = {{LoRA-GA}: Low-Rank Adaptation with Gradient Approximation},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2024},
        }
        @inproceedings{zhang2025loraone,
          author = {Zhang, Yuanhe and Liu, Fanghui and Chen, Yudong},
          title = {{LoRA-One}: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language
            Models, Provably and Efficiently},
          booktitle = {International Conference on Machine Learning},
          year = {2025},
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
        if self.init in _SCALED and not self.alpha > 0:
            raise InputError(f"lora: alpha is {self.alpha}; init={self.init} needs a positive one.")
        if self.init == "lora-one":  # it starts one step away from the base
            object.__setattr__(self, "identity_at_start", False)

    @property
    def scale(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        fixed, sites = self.init in _TAKEN_AWAY, self._checked_sites(host)
        waiting = self._waiting(host) if self.init in _FROM_DATA else None
        for site in sites:
            if isinstance(site.module, nn.Embedding):
                path: nn.Module = self._lay_embedding(host, site, site.module)
            else:
                down, up = self._start(host, site)
                path = LowRankPath(
                    *(down, up, self.scale, site, self.dropout),
                    fixed=fixed,
                    waits=waiting is not None,
                )
                lay(host, site, path)
                if waiting is not None:
                    waiting.add(host, site, path)
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
            elif self.init in _VECTORS:
                self._check_rank(site)
        return found

    def _check_rank(self, site: Site) -> None:
        width = site.in_features if self.init == "eva" else min(widths(site))
        bound = width // _VECTORS[self.init]
        if self.rank > bound:
            above = "the width" if bound == width else "half the width"
            tried = f"a rank from 1 to {bound}" if bound else "other sites"
            raise InputError(
                f"lora: rank {self.rank} is above {above} {width} of {site.path}, which has no "
                f"more vectors for init={self.init}; choose {tried}."
            )

    def _check_embedding(self, host: Host, site: Site) -> None:
        if self.init not in ("kaiming", "gaussian"):
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

    def _waiting(self, host: Host) -> DataStart:
        """What puts the paths at their start when it has seen data."""

        def factors(site: Site, seen: Any) -> Factors:
            if self.init == "eva":
                return data_starts.eva(site, seen, self.rank)
            if self.init == "lora-ga":
                return data_starts.lora_ga(site, seen, self.rank)
            if self.init == "lora-one":
                return data_starts.lora_one(site, seen, self.rank)
            weight, mode = host.weight(site), self.init.removeprefix("corda-")
            return data_starts.corda(site, seen, weight, self.rank, self.scale, mode)

        return DataStart(self.name, host, by_gradient=self.init in _BY_GRADIENT, factors=factors)

    def _start(self, host: Host, site: Site) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        if self.init in _FROM_DATA:
            return (
                torch.zeros(self.rank, site.in_features),
                torch.zeros(site.out_features, self.rank),
            )
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
