"""LoReFT: the state behind a block is edited inside a low-rank subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.spans import find_spans
from deltacontrol.deltas.methods.parts.adapters import check_inner
from deltacontrol.deltas.methods.parts.on_weight import at_least_single


@dataclass(frozen=True)
class LoReFT(Delta):
    """h ↦ h + R'(W h + b - R h), the rows of R orthonormal (Wu et al., Eq. 2).

    The part of the state in the subspace of R becomes W h + b; the rest stays. R is the orthonormal
    factor of a trained V, V' = R' T with T triangular. W starts at R and b at zero, so training
    starts at the base model. Every token is edited; the paper edits the first and last few of a
    prompt.

    Attributes:
        rank: r, the dimension of the subspace.
        layers: blocks whose output is edited; None means all.
    """

    rank: int = 4
    layers: tuple[int, ...] | None = None

    name = "loreft"
    acts_on = "outputs of blocks"
    default_rate = 1e-3
    category = "addition"
    law = "h + transpose(R) (W h + b - R h), R transpose(R) = 1"
    reference = "Wu et al., NeurIPS 2024, Eq. 2"
    bibtex = r"""
        @inproceedings{wu2024reft,
          author = {Wu, Zhengxuan and Arora, Aryaman and Wang, Zheng and Geiger, Atticus and
            Jurafsky, Dan and Manning, Christopher D. and Potts, Christopher},
          title = {{ReFT}: Representation Finetuning for Language Models},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over blocks of 2 r d + r"
    unmergeable = "it acts on states, between the maps of two blocks"

    def __post_init__(self) -> None:
        """Check the rank."""
        self._positive("rank")

    def build(self, host: Host) -> None:
        """Edit the output of every block."""
        spans = find_spans(host, "block", self.layers)
        for span in spans:
            check_inner(self.name, "rank", self.rank, span.width_out, span.path)
        for span in spans:
            edit = SubspaceEdit(host.normal(self.rank, span.width_out, std=1.0))
            host.add(span.path, edit, like=span.like)
            edit.start()
            host.on_output(span.exit.module, edit)

    def num_parameters(self, host: Host) -> int:
        """Σ 2 r d + r."""
        spans = find_spans(host, "block", self.layers)
        return sum(self.rank * (2 * span.width_out + 1) for span in spans)


class SubspaceEdit(nn.Module):
    """h ↦ h + R'((W - R) h + b); V and W (rank, d), b (rank,)."""

    def __init__(self, directions: Tensor) -> None:
        super().__init__()
        self.V = nn.Parameter(directions)
        self.W = nn.Parameter(torch.zeros_like(directions))
        self.b = nn.Parameter(torch.zeros(len(directions)))

    def start(self) -> None:
        """Put W at R, in the dtype of the controls, where both are computed alike."""
        with torch.no_grad():
            self.W.copy_(self.basis())

    def basis(self) -> Tensor:
        """R (rank, d), of orthonormal rows."""
        return torch.linalg.qr(at_least_single(self.V).T).Q.T.to(self.V.dtype)

    def forward(self, _inputs: tuple, state: Tensor) -> Tensor:
        """The edited state."""
        basis = self.basis()
        return state + linear(linear(state, self.W - basis, self.b), basis.T)
