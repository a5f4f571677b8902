"""Controls in parallel to a sub-layer or a block: parallel adapters and state-based tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.spans import Around, Span, act_across, find_spans
from deltacontrol.deltas.methods.parts.adapters import check_activation, check_inner
from deltacontrol.theory.errors import InputError

_SUBLAYERS: tuple[Around, ...] = ("attention", "mlp")


class _Parallel(Delta):
    """y + s φ(h W_d) W_u with h the state at the entry of a span and y the one at its exit."""

    def _check(self, field: str, activation: str) -> None:
        self._positive(field)
        check_activation(self.name, activation)

    def _lay(self, host: Host, spans: list[Span], inner: int, scale: float, phi: str) -> None:
        for span in spans:
            down = host.kaiming(inner, span.width_in)
            control = ParallelControl(down, span.width_out, scale, phi)
            host.add(span.path, control, like=span.like)
            act_across(host, span, control)

    def _count(self, spans: list[Span], inner: int) -> int:
        return sum(inner * (span.width_in + span.width_out) for span in spans)

    def _fitting(self, spans: list[Span], field: str, inner: int) -> list[Span]:
        for span in spans:
            check_inner(self.name, field, inner, span.width_out, span.path)
        return spans


@dataclass(frozen=True)
class ParallelAdapter(_Parallel):
    """sublayer(h) + s φ(h W_d) W_u (He et al., Table 1: parallel adapter, and its scaled form).

    W_d starts uniform as LoRA's A does, W_u at zero. It has no biases, as in the formula.

    Attributes:
        bottleneck: m, the inner width.
        scale: s; He et al. found 4 to do well.
        activation: φ, by its name in transformers.
        sites: sub-layers to act beside, of "attention" and "mlp".
        layers: blocks to act in; None means all.
    """

    bottleneck: int = 32
    scale: float = 4.0
    activation: str = "relu"
    sites: tuple[str, ...] = ("mlp",)
    layers: tuple[int, ...] | None = None

    name = "parallel-adapter"
    category = "addition"
    law = "sublayer(h) + s phi(h W_d) W_u"
    reference = "He et al., ICLR 2022, Table 1 (parallel adapter, scaled PA)"
    bibtex = r"""
        @inproceedings{he2022unified,
          author = {He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor
            and Neubig, Graham},
          title = {Towards a Unified View of Parameter-Efficient Transfer Learning},
          booktitle = {International Conference on Learning Representations},
          year = {2022},
        }
    """
    num_parameters_formula = "sum over sub-layers of m (d_in + d_out)"
    unmergeable = "its bottleneck is not linear in the state"

    def __post_init__(self) -> None:
        """Check the bottleneck, the activation and the sub-layers."""
        self._check("bottleneck", self.activation)
        if not self.sites or set(self.sites) - {*_SUBLAYERS}:
            raise InputError(
                f"parallel-adapter: sites is {self.sites}; expected attention, mlp or both "
                "(state-based acts around whole blocks)."
            )

    def build(self, host: Host) -> None:
        """Add an adapter beside every sub-layer."""
        self._lay(host, self._spans(host), self.bottleneck, self.scale, self.activation)

    def num_parameters(self, host: Host) -> int:
        """Σ m (d_in + d_out)."""
        return self._count(self._spans(host), self.bottleneck)

    def _spans(self, host: Host) -> list[Span]:
        spans: list[Span] = []
        for kind in _SUBLAYERS:
            spans += find_spans(host, kind, self.layers) if kind in self.sites else []
        return self._fitting(spans, "bottleneck", self.bottleneck)


@dataclass(frozen=True)
class StateBasedTuning(_Parallel):
    """f(h) + s φ(h W_d) W_u with f a whole block, or its attention or MLP (Zhang et al. 2025).

    The paper's parallel control: the state is perturbed, not a weight. A frozen f then needs none
    of its own weights' inputs in the backward pass, which saves the memory that LoRA spends on
    them. Linear (φ the identity) as in the paper; another φ makes it an adapter.

    W_d starts uniform as LoRA's A does, W_u at zero.

    Attributes:
        rank: r, the inner width.
        scale: s.
        activation: φ, by its name in transformers; "linear" is the identity.
        around: what f is.
        layers: blocks to act in; None means all.
    """

    rank: int = 8
    scale: float = 1.0
    activation: str = "linear"
    around: Around = "block"
    layers: tuple[int, ...] | None = None

    name = "state-based"
    category = "addition"
    law = "f(h) + s phi(h W_d) W_u, f a block"
    reference = "Zhang, Ren, Cheng, Li, ICML 2025 (parallel control)"
    bibtex = r"""
        @inproceedings{zhang2025statebased,
          author = {Zhang, Chi and Ren, Lianhai and Cheng, Jingpu and Li, Qianxiao},
          title = {From Weight-Based to State-Based Fine-Tuning: Further Memory Reduction on
            {LoRA} with Parallel Control},
          booktitle = {International Conference on Machine Learning},
          year = {2025},
        }
    """
    num_parameters_formula = "sum over blocks of r (d_in + d_out)"
    unmergeable = "it acts beside a block, which is no linear map"

    def __post_init__(self) -> None:
        """Check the rank and the activation."""
        self._check("rank", self.activation)

    def build(self, host: Host) -> None:
        """Add a control around every span."""
        self._lay(host, self._spans(host), self.rank, self.scale, self.activation)

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out)."""
        return self._count(self._spans(host), self.rank)

    def _spans(self, host: Host) -> list[Span]:
        return self._fitting(find_spans(host, self.around, self.layers), "rank", self.rank)


class ParallelControl(nn.Module):
    """(h, y) ↦ y + s φ(h W_d) W_u; shapes: down (m, d_in), up (d_out, m)."""

    def __init__(self, down: Tensor, width_out: int, scale: float, activation: str) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(width_out, len(down)))
        self.scale = scale
        self.activation = ACT2FN[activation]

    def forward(self, state: Tensor, output: Tensor) -> Tensor:
        """The controlled output."""
        return output + self.scale * linear(self.activation(linear(state, self.down)), self.up)
