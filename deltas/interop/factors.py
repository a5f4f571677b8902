"""Low-rank factors at one module: their slots in a file, and several paths as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import widths
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.format import Attached, Slot
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Piece:
    """The change s·B A of one path.

    Attributes:
        down: A (rank, in).
        up: B (out, rank), out all features of the module.
        scale: s.
        own_alpha: α as configured, for a path that stays alone.
        rooted: s is α/√rank, not α/rank.
    """

    down: Tensor
    up: Tensor
    scale: float
    own_alpha: float | None
    rooted: bool

    def alpha(self, rooted: bool) -> float:
        """The α that gives s, when it is divided by √rank (``rooted``) or the rank."""
        if self.own_alpha is not None and rooted == self.rooted:
            return self.own_alpha
        rank = len(self.down)
        return self.scale * (math.sqrt(rank) if rooted else rank)


def side_by_side(pieces: Sequence[Piece]) -> Piece:
    """One path whose change is the sum of these: Σ s_i·B_i A_i = s·[B_i·s_i/s] [A_i]."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    down = torch.cat([piece.down for piece in pieces])
    up = torch.cat(
        [p.up if p.scale == first.scale else p.up * (p.scale / first.scale) for p in pieces], dim=1
    )
    return Piece(down, up, first.scale, None, rooted=False)


def features(path: str, host: Host) -> tuple[int, int]:
    """Width of the input and of the output of the map at a path."""
    return widths(Site(path, host.sites.modules[path]))


def factor_slots(root: str, path: str, rank: int, host: Host) -> list[Slot]:
    """The slots of A (rank, in) and B (out, rank)."""
    wide, narrow = features(path, host)
    if isinstance(host.sites.modules[path], nn.Embedding):
        names = ("lora_embedding_A", "lora_embedding_B")
    else:
        names = ("lora_A.weight", "lora_B.weight")
    return [
        Slot(f"{root}{path}.{names[0]}", (rank, wide), (f"{path}.A",)),
        Slot(f"{root}{path}.{names[1]}", (narrow, rank), (f"{path}.B",)),
    ]


def whole_sites(attached: Sequence[Attached], host: Host) -> dict[str, Attached]:
    """The delta that acts at each module, for methods that peft has at whole modules alone.

    Raises:
        InputError: a delta acts at a slice, or two act at one module.
    """
    found: dict[str, Attached] = {}
    for item in attached:
        for site in host.find(item.delta.sites, item.delta.layers):
            name = item.delta.name
            if site.part is not None:
                raise InputError(
                    f"{name} acts at a slice of {site.path}, and peft's at whole modules alone; "
                    f"train with sites={site.path.rpartition('.')[2]}, or use lora."
                )
            if site.path in found:
                raise InputError(f"two {name} act at {site.path}; peft holds one there.")
            found[site.path] = item
    return found
