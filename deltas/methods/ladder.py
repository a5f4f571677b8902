"""Ladder side-tuning: a narrow network beside the frozen one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.passes import Carried
from deltacontrol.deltas.editing.spans import state_width
from deltacontrol.deltas.methods.parts.adapters import check_activation
from deltacontrol.theory.errors import InputError

_EXPANSION = 4  # inner width of a side block, in side widths


@dataclass(frozen=True)
class LadderSideTuning(Delta):
    """x_L + s_L U, with the side network s_t = g_t(μ_t x_t D_t + (1-μ_t) s_{t-1}), s_0 = x_0 D_0.

    x_t is the output of block t, μ_t = σ(α_t) a learned gate (Sung et al., Section 3.2), and
    g_t(s) = s + φ(s W_1) W_2 a residual MLP of side width d/k and inner width 4d/k. The side
    network's blocks do not mix tokens: the states that they read are mixed already, and so the
    ladder needs no mask and no cache. The controls act behind the last block alone, so no gradient
    goes through the backbone. U starts at zero and α_t at zero.

    Attributes:
        reduction: k.
        activation: φ, by its name in transformers.
    """

    reduction: int = 8
    activation: str = "gelu"

    name = "ladder"
    acts_on = "beside all blocks"
    category = "addition"
    law = "x_L + s_L U, s_t = g_t(mu_t x_t D_t + (1 - mu_t) s_{t-1})"
    reference = "Sung, Cho, Bansal, NeurIPS 2022, Section 3.2"
    bibtex = r"""
        @inproceedings{sung2022lst,
          author = {Sung, Yi-Lin and Cho, Jaemin and Bansal, Mohit},
          title = {{LST}: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
            Learning},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2022},
        }
    """
    num_parameters_formula = "(L + 2) d w + L (8 w^2 + 1), w = d / k"
    unmergeable = "a side network is no weight of the base model"

    def __post_init__(self) -> None:
        """Check the reduction and the activation."""
        self._positive("reduction")
        check_activation(self.name, self.activation)

    def build(self, host: Host) -> None:
        """Lay the ladder beside the blocks."""
        width, side = self._widths(host)
        blocks = host.find(("block",))
        like = host.like(blocks[0])
        carried = host.carry()
        entry = Entry(host.kaiming(side, width))
        end = End(torch.zeros(width, side))
        self._add(host, blocks[0].path, entry, like, "entry")

        def enter(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            carried.value = entry(args[0] if args else kwargs["hidden_states"])
            return args, kwargs

        host.on_call(blocks[0].module, enter)
        for block in blocks:
            rung = Rung(
                host.kaiming(side, width),
                host.kaiming(_EXPANSION * side, side),
                host.kaiming(side, _EXPANSION * side),
                self.activation,
                carried,
            )
            self._add(host, block.path, rung, like, block.path)
            host.on_output(block.module, rung)
        self._add(host, blocks[-1].path, end, like, "end")
        host.on_output(blocks[-1].module, lambda _, state: end(carried.value, state))

    def _add(self, host: Host, path: str, part: nn.Module, like: Tensor, key: str) -> None:
        host.add(path, part, like=like, key=key)
        host.shared += [f"{host.namespace}.{key}.{leaf}" for leaf, _ in part.named_parameters()]

    def num_parameters(self, host: Host) -> int:
        """(L + 2) d w + L (8 w² + 1)."""
        width, side = self._widths(host)
        depth = len(host.sites.blocks)
        return (depth + 2) * width * side + depth * (2 * _EXPANSION * side**2 + 1)

    def _widths(self, host: Host) -> tuple[int, int]:
        if host.sites.num_stacks > 1:
            raise InputError(
                f"ladder: {host.sites.model_type} has two stacks of blocks with other tokens in "
                "each, and a ladder stands beside one; give the encoder, for example "
                "T5EncoderModel."
            )
        width = state_width(host)
        if width % self.reduction:
            raise InputError(
                f"ladder: the width {width} of {host.sites.model_type} is no multiple of reduction "
                f"{self.reduction}; choose a divisor of it."
            )
        return width, width // self.reduction


class Entry(nn.Module):
    """x_0 ↦ s_0 = x_0 D_0; D_0 as a linear map (w, d)."""

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down)

    def forward(self, state: Tensor) -> Tensor:
        """The first side state."""
        return linear(state, self.down)


class Rung(nn.Module):
    """Reads a block's output x_t, moves the side state on, and leaves x_t as it is.

    Shapes, as linear maps: down (w, d), inner (4w, w), outer (w, 4w); gate a scalar.
    """

    def __init__(
        self, down: Tensor, inner: Tensor, outer: Tensor, activation: str, carried: Carried
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.inner = nn.Parameter(inner)
        self.outer = nn.Parameter(outer)
        self.gate = nn.Parameter(torch.zeros(()))
        self.activation = ACT2FN[activation]
        self.__dict__["carried"] = carried

    def forward(self, _inputs: tuple, state: Tensor) -> Tensor:
        """The same state."""
        carried: Carried = self.__dict__["carried"]
        gate = self.gate.sigmoid()
        side = gate * linear(state, self.down) + (1 - gate) * carried.value
        carried.value = side + linear(self.activation(linear(side, self.inner)), self.outer)
        return state


class End(nn.Module):
    """(s_L, x_L) ↦ x_L + s_L U; U as a linear map (d, w)."""

    def __init__(self, up: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(up)

    def forward(self, side: Tensor, state: Tensor) -> Tensor:
        """The last state with the side network's share."""
        return state + linear(side, self.up)
