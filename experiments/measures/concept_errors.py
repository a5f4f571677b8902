"""The error of a concept along the layers of a model, under laws with and without a sum of errors.

At each site t the states of the last token of two classes of text give a direction v_t, the unit
difference of their means, and a gap g_t, the length of that difference. For a text of the first
class the error is how far it is from the second one along v_t, in gaps:

    e_t = (m_t - x_t)' v_t / g_t,      m_t the mean of the second class,

and a law adds g_t (k_p e_t + k_i z_t) v_t to the state, z_t a sum of the errors up to t.

Source: PID steering, arXiv 2510.04309 (as cited in the claim's notebook).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacontrol.deltas.feedback.laws import StateTaps, attended, in_evaluation_mode, run
from deltacontrol.experiments.setting import Setting


@dataclass(frozen=True, eq=False)
class Concept:
    """Two classes of texts in the states of a model.

    Attributes:
        setting: the model and its rows.
        directions: v_t, (sites, width).
        means: m_t of the second class, (sites, width).
        gaps: g_t, (sites,).
    """

    setting: Setting
    directions: Tensor
    means: Tensor
    gaps: Tensor

    @classmethod
    def of(cls, setting: Setting, rows: slice) -> Concept:
        """From the rows of a batch with labels 0 and 1."""
        batch = chosen(setting.batch(), rows)
        states = last_states(setting, batch)
        labels = batch["labels"]
        first, second = (states[:, labels == k].mean(1) for k in (0, 1))
        gaps = (second - first).norm(dim=-1)
        return cls(setting, (second - first) / gaps[:, None], second, gaps)

    def error(self, t: int, x: Tensor) -> Tensor:
        """e_t of the states (batch, width)."""
        return (self.means[t] - x) @ self.directions[t] / self.gaps[t]

    def errors(
        self,
        batch: Mapping[str, Any],
        proportional: float,
        integral: float,
        *,
        sums: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> Tensor:
        """e_t of a batch along the sites as the states arrive there, (sites, batch).

        Args:
            batch: the model's arguments.
            proportional: k_p.
            integral: k_i.
            sums: what of the sums of all examples (batch,) each example is given; its own.
        """
        found: list[Tensor] = []
        total = torch.zeros(len(batch["labels"]))

        def law(t: int, x: Tensor) -> Tensor:
            nonlocal total
            rows, last = torch.arange(len(x)), _last(batch, x)
            error = self.error(t, x[rows, last])
            found.append(error)
            total = total + error
            strength = self.gaps[t] * (proportional * error + integral * sums(total))
            moved = x.clone()
            moved[rows, last] += strength[:, None] * self.directions[t]
            return moved

        _through(self.setting, batch, law)
        return torch.stack(found)


def chosen(batch: Mapping[str, Any], rows: slice | Tensor) -> dict[str, Any]:
    """Some rows of a batch."""
    return {name: value[rows] for name, value in batch.items()}


def last_states(setting: Setting, batch: Mapping[str, Any]) -> Tensor:
    """The state of every text's last token at each site, (sites, batch, width)."""
    found: list[Tensor] = []

    def keep(t: int, x: Tensor) -> Tensor:
        found.append(x[torch.arange(len(x)), _last(batch, x)])
        return x

    _through(setting, batch, keep)
    return torch.stack(found)


def _last(batch: Mapping[str, Any], x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return (attended(batch, x) * places).argmax(-1)


@torch.no_grad()
def _through(
    setting: Setting, batch: Mapping[str, Any], change: Callable[[int, Tensor], Tensor]
) -> None:
    in_evaluation_mode(setting.base)
    taps = StateTaps(setting.base)
    taps.put(change)
    try:
        run(setting.base, batch)
    finally:
        taps.remove()
