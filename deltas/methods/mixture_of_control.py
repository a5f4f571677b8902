"""Mixture of control: several low-rank controls, weighed by the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.spans import Around, Span, act_across, find_spans
from deltacontrol.deltas.methods.parts.adapters import check_inner


@dataclass(frozen=True)
class MixtureOfControl(Delta):
    """f(h) + s Σ_k g_k(h) h A_k B_k with g(h) = softmax(h G), token by token.

    State-based control (Zhang et al. 2025) with the soft router of Zadouri et al.: the
    gain of the feedback depends on the state. The A_k start uniform as LoRA's A does, the B_k at
    zero, and G at zero, so that all controls weigh the same.

    Attributes:
        num_controls: K.
        rank: r of every control.
        scale: s.
        around: what f is, a block or its attention or MLP.
        layers: blocks to act in; None means all.
    """

    num_controls: int = 4
    rank: int = 4
    scale: float = 1.0
    around: Around = "block"
    layers: tuple[int, ...] | None = None

    name = "mixture-of-control"
    category = "addition"
    law = "f(h) + s sum_k softmax(h G)_k h A_k B_k"
    reference = (
        "Zhang et al., ICML 2025 (parallel control); Zadouri et al., ICLR 2024 (soft router)"
    )
    bibtex = r"""
        @inproceedings{zhang2025statebased,
          author = {Zhang, Chi and Ren, Lianhai and Cheng, Jingpu and Li, Qianxiao},
          title = {From Weight-Based to State-Based Fine-Tuning: Further Memory Reduction on
            {LoRA} with Parallel Control},
          booktitle = {International Conference on Machine Learning},
          year = {2025},
        }
        @inproceedings{zadouri2024pushing,
          author = {Zadouri, Ted and {\"U}st{\"u}n, Ahmet and Ahmadian, Arash and others},
          title = {Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient
            {MoE} for Instruction Tuning},
          booktitle = {International Conference on Learning Representations},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over blocks of K (r (d_in + d_out) + d_in)"
    unmergeable = "its gain depends on the state"

    def __post_init__(self) -> None:
        """Check the sizes."""
        self._positive("num_controls", "rank")

    def build(self, host: Host) -> None:
        """Add the controls around every span."""
        for span in self._spans(host):
            down = host.kaiming(self.num_controls * self.rank, span.width_in)
            down = down.unflatten(0, (self.num_controls, self.rank))
            control = GatedControls(down, span.width_out, self.scale)
            host.add(span.path, control, like=span.like)
            act_across(host, span, control)

    def num_parameters(self, host: Host) -> int:
        """Σ K (r (d_in + d_out) + d_in)."""
        spans, r = self._spans(host), self.rank
        return sum(self.num_controls * (r * (s.width_in + s.width_out) + s.width_in) for s in spans)

    def _spans(self, host: Host) -> list[Span]:
        spans = find_spans(host, self.around, self.layers)
        for span in spans:
            check_inner(self.name, "rank", self.rank, span.width_out, span.path)
        return spans


class GatedControls(nn.Module):
    """(h, y) ↦ y + s Σ_k softmax(h G)_k h A_k B_k.

    Shapes, as linear maps: A (K, r, d_in), B (K, d_out, r), G (K, d_in).
    """

    def __init__(self, down: Tensor, width_out: int, scale: float) -> None:
        super().__init__()
        count, rank, width_in = down.shape
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros(count, width_out, rank))
        self.G = nn.Parameter(torch.zeros(count, width_in))
        self.scale = scale

    def forward(self, state: Tensor, output: Tensor) -> Tensor:
        """The controlled output."""
        gains = linear(state, self.G).softmax(-1)
        inner = linear(state, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])
        weighed = (gains.unsqueeze(-1) * inner).flatten(-2)
        up = self.B.transpose(0, 1).flatten(1)  # (d_out, K r)
        return output + self.scale * linear(weighed, up)
