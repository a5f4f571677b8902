"""Control with parameter-free attention over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.spans import Around, Span, act_across, find_spans
from deltacontrol.deltas.editing.visibility import Visibility
from deltacontrol.deltas.methods.parts.adapters import check_inner


@dataclass(frozen=True)
class AttentionControl(Delta):
    """f(h) + s (z + softmax(z zᵀ) z) with z = h W_d W_u (Zhang et al. 2024).

    The low-rank control z of each token is mixed with those of the tokens that the block's own
    attention lets it see: padding is left out, and causal models stay causal. No parameter is
    added to those of the low-rank control. W_d starts uniform as LoRA's A does, W_u at zero.

    Attributes:
        rank: r, the inner width.
        scale: s.
        around: what f is, the MLP as in the paper, the attention or a whole block.
        layers: blocks to act in; None means all.
    """

    rank: int = 8
    scale: float = 1.0
    around: Around = "mlp"
    layers: tuple[int, ...] | None = None

    name = "attention-control"
    category = "addition"
    law = "f(h) + s (z + softmax(z z^T) z), z = h W_d W_u"
    reference = "Zhang, Cheng, Xu, Li, ICML 2024 (parameter-free attention)"
    bibtex = r"""
        @inproceedings{zhang2024controls,
          author = {Zhang, Chi and Cheng, Jingpu and Xu, Yanyu and Li, Qianxiao},
          title = {Parameter-Efficient Fine-Tuning with Controls},
          booktitle = {International Conference on Machine Learning},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over blocks of r (d_in + d_out)"
    unmergeable = "its gain depends on the state"

    def __post_init__(self) -> None:
        """Check the rank."""
        self._positive("rank")

    def build(self, host: Host) -> None:
        """Add a control around every span."""
        blocks = {site.layer: site for site in host.find(("block",))}
        for span in self._spans(host):
            visibility = Visibility(host, blocks[span.exit.layer])
            down = host.kaiming(self.rank, span.width_in)
            key = f"{host.namespace}.{span.path}"
            control = MixedControl(down, span.width_out, self.scale, visibility, key)
            host.add(span.path, control, like=span.like)
            act_across(host, span, control)

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out)."""
        return sum(self.rank * (s.width_in + s.width_out) for s in self._spans(host))

    def _spans(self, host: Host) -> list[Span]:
        spans = find_spans(host, self.around, self.layers)
        for span in spans:
            check_inner(self.name, "rank", self.rank, span.width_out, span.path)
        return spans


class MixedControl(nn.Module):
    """(h, y) ↦ y + s (z + softmax(z zᵀ) z) with z = h W_d W_u.

    Computed in the r inner features: z zᵀ = a (W_u W_uᵀ) aᵀ with a = h W_d. Shapes, as linear
    maps: down (r, d_in), up (d_out, r).
    """

    def __init__(
        self, down: Tensor, width_out: int, scale: float, visibility: Visibility, key: str
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(width_out, len(down)))
        self.scale = scale
        self.visibility = visibility
        self.key = key

    def forward(self, state: Tensor, output: Tensor) -> Tensor:
        """The controlled output."""
        inner = self.visibility.rows(linear(state, self.down))
        others = self.visibility.keep(inner, self.key)
        scores = linear(inner, self.up.T @ self.up) @ others.mT
        seen = self.visibility.seen(scores.shape[-2], scores.shape[-1], scores.device)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        mixed = inner + scores.softmax(-1) @ others
        return output + self.scale * linear(mixed, self.up).view_as(output)
