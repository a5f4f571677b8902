"""P-tuning: prompt rows that an encoder makes of trained ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.prompt import lay_prompt
from deltacontrol.theory.errors import unknown


@dataclass(frozen=True)
class PTuning(Delta):
    """[E(P); E(x)] with the rows P and their encoder E trained (Liu et al., Section 3).

    E ties the rows to each other (LSTM), or gives them one map (MLP). The rows enter and leave as
    in prompt tuning.

        lstm   MLP([→h_i; ←h_i]) with a bidirectional LSTM over the rows
        mlp    three linear maps with ReLU between

    Attributes:
        length: n, number of prompt positions.
        encoder: "mlp" or "lstm".
        hidden: k, width of the encoder (of each direction of the LSTM).
        num_layers: layers of the LSTM; the MLP always has its three maps.
        init_std: standard deviation of the initial rows.
        strip: take the rows off again, as in prompt tuning.
    """

    length: int = 16
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int = 128
    num_layers: int = 2
    init_std: float = 1.0
    strip: bool = True

    name = "p-tuning"
    acts_on = "input"
    default_rate = 3e-3
    searched_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    category = "addition"
    law = "x_0 = [Enc(P); E(x)]"
    reference = "Liu et al., arXiv 2103.10385 (AI Open 2024), Section 3"
    bibtex = r"""
        @article{liu2024gpt,
          author = {Liu, Xiao and Zheng, Yanan and Du, Zhengxiao and Ding, Ming and Qian,
            Yujie and Yang, Zhilin and Tang, Jie},
          title = {{GPT} Understands, Too},
          journal = {AI Open},
          eprint = {2103.10385},
          archiveprefix = {arXiv},
          year = {2024},
        }
    """
    num_parameters_formula = (
        "n d + (d+1) k + (k+1) k + (k+1) d (MLP); "
        "n d + sum over layers of 8 k (d_in + k + 1) + (2k+1) 2k + (2k+1) d (LSTM)"
    )
    unmergeable = "a prompt is no weight of the base model"
    identity_at_start = False

    @property
    def num_positions(self) -> int:
        """The prompt's length."""
        return self.length

    def __post_init__(self) -> None:
        """Check the sizes and the encoder."""
        self._positive("length", "hidden", "num_layers")
        if self.encoder not in ("mlp", "lstm"):
            raise unknown("encoder", self.encoder, ("lstm", "mlp"))

    def build(self, host: Host) -> None:
        """Insert the encoded prompt before the backbone and take it off behind the blocks."""
        width, k = host.width, self.hidden
        rows = host.normal(self.length, width, std=self.init_std)
        if self.encoder == "mlp":
            encoder: nn.Module = Encoder(host, [width, k, k, width])
        else:
            inputs = [width] + [2 * k] * (self.num_layers - 1)
            layers = [BidirectionalLSTM(host, size, k) for size in inputs]
            encoder = nn.Sequential(*layers, Encoder(host, [2 * k, 2 * k, width]))
        lay_prompt(host, rows, encoder, strip=self.strip)

    def num_parameters(self, host: Host) -> int:
        """Rows and encoder; see the formula."""
        d, k = host.width, self.hidden
        rows = self.length * d
        if self.encoder == "mlp":
            return rows + (d + 1) * k + (k + 1) * k + (k + 1) * d
        inputs = d + 2 * k * (self.num_layers - 1)
        lstm = 8 * k * (inputs + (k + 1) * self.num_layers)
        return rows + lstm + (2 * k + 1) * 2 * k + (2 * k + 1) * d


class Encoder(nn.Module):
    """Linear maps of the given widths with ReLU between; weights (out, in)."""

    def __init__(self, host: Host, widths: list[int]) -> None:
        super().__init__()
        maps = list(zip(widths[1:], widths[:-1], strict=True))
        self.weights = nn.ParameterList([nn.Parameter(host.kaiming(*shape)) for shape in maps])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(rows)) for rows, _ in maps])

    def forward(self, rows: Tensor) -> Tensor:
        """(n, first width) to (n, last width)."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = linear(rows, weight, bias)
            rows = rows if i == last else rows.relu()
        return rows


class BidirectionalLSTM(nn.Module):
    """One layer (n, in) ↦ (n, 2k): an LSTM forwards and one backwards over the rows, side by side.

    With the gates i, f, g, o of each direction one below the other:

        [i f g o] = W x_t + R h_{t-1} + b,  c_t = σ(f) c_{t-1} + σ(i) tanh(g),  h_t = σ(o) tanh(c_t)

    Written out, because the fused kernels of torch have no forward-mode derivative. Shapes:
    W (2, 4k, in), R (2, 4k, k), b (2, 4k).
    """

    def __init__(self, host: Host, size: int, hidden: int) -> None:
        super().__init__()
        std = 1 / math.sqrt(3 * hidden)
        self.W = nn.Parameter(host.normal(2, 4 * hidden, size, std=std))
        self.R = nn.Parameter(host.normal(2, 4 * hidden, hidden, std=std))
        self.b = nn.Parameter(torch.zeros(2, 4 * hidden))

    def forward(self, rows: Tensor) -> Tensor:
        """The states of both directions."""
        return torch.cat([self._run(rows, 0), self._run(rows.flip(0), 1).flip(0)], dim=-1)

    def _run(self, rows: Tensor, direction: int) -> Tensor:
        driven = linear(rows, self.W[direction], self.b[direction])
        recurrent = self.R[direction]
        state = cell = driven.new_zeros(recurrent.shape[-1])
        states: list[Tensor] = []
        for row in driven:
            i, f, g, o = (row + linear(state, recurrent)).chunk(4, dim=-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states)
