"""AdapterDrop: no adapters in the first blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.passes import Carried
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.adapters import Bottleneck, check_activation, output_sites
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class AdapterDrop(Delta):
    """h + [t ≥ n] φ(h W_d + b_d) W_u + b_u in block t, after the MLP (Rücklé et al., Section 3).

    Without gradients below block n the training is faster, and so is the inference. Two ways:
    ``random=False`` has no adapters below block n ("specialised"). ``random=True`` has adapters
    in all blocks; every training pass draws its own n from 0 … L-1, and evaluation leaves out the
    first ``num_dropped`` ("robust"), so that one training serves every n. Each pass computes an
    adapter that its n drops and then leaves it out: only evaluation saves the time.

    Attributes:
        num_dropped: n, how many of the first blocks go without.
        random: draw n anew in each training pass.
        bottleneck: m, the inner width.
        activation: φ, by its name in transformers.
        sites: linear maps whose output is adapted.
    """

    num_dropped: int = 1
    random: bool = False
    bottleneck: int = 32
    activation: str = "relu"
    sites: tuple[str, ...] = ("mlp.down",)

    name = "adapterdrop"
    category = "addition"
    law = "h + [t >= n] phi(h W_d) W_u"
    reference = "Rücklé et al., EMNLP 2021, Section 3"
    bibtex = r"""
        @inproceedings{ruckle2021adapterdrop,
          author = {R{\"u}ckl{\'e}, Andreas and Geigle, Gregor and Glockner, Max and Beck,
            Tilman and Pfeiffer, Jonas and Reimers, Nils and Gurevych, Iryna},
          title = {{AdapterDrop}: On the Efficiency of Adapters in Transformers},
          booktitle = {Conference on Empirical Methods in Natural Language Processing},
          year = {2021},
        }
    """
    num_parameters_formula = "sum over blocks with an adapter of 2 m d + d + m"
    unmergeable = "its bottleneck is not linear in the state"

    def __post_init__(self) -> None:
        """Check n, the bottleneck and the activation."""
        self._positive("bottleneck")
        if self.num_dropped < 0:
            raise InputError(f"adapterdrop: num_dropped is {self.num_dropped}; expected 0 or more.")
        check_activation(self.name, self.activation)

    def build(self, host: Host) -> None:
        """Add an adapter at every site that keeps one."""
        drawn = host.carry() if self.random else None
        adapters: list[Bottleneck] = []
        for site, depth in self._checked_sites(host):
            width = site.out_features
            down = host.normal(self.bottleneck, width, std=1 / math.sqrt(width))
            adapter = Bottleneck(down, self.activation)
            host.add(site.path, adapter, like=host.weight(site))
            adapters.append(adapter)
            if drawn is None:
                host.on_output(site.module, adapter)
            else:
                host.on_output(site.module, self._droppable(adapter, depth, drawn))
        if drawn is None:
            return
        depth = self._depth(host)

        def draw(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if adapters[0].training:
                drawn.value = torch.randint(depth, ())
            return args, kwargs

        host.on_call(host.model, draw)

    def _droppable(self, adapter: Bottleneck, depth: int, drawn: Carried):  # noqa: ANN202
        def law(inputs: tuple, state: Tensor) -> Tensor:
            if adapter.training and drawn.value is not None:
                kept = drawn.value.to(state.device) <= depth
                return torch.where(kept, adapter(inputs, state), state)
            return state if depth < self.num_dropped else adapter(inputs, state)

        return law

    def num_parameters(self, host: Host) -> int:
        """Σ 2 m d + d + m over the blocks that keep an adapter."""
        m = self.bottleneck
        widths = [site.out_features for site, _ in self._checked_sites(host)]
        return sum(2 * m * d + d + m for d in widths)

    def _depth(self, host: Host) -> int:
        """L, the number of blocks of the (shortest) stack."""
        paths = host.sites.block_paths
        stacks = {path.rpartition(".")[0] for path in paths}
        return min(sum(p.rpartition(".")[0] == stack for p in paths) for stack in stacks)

    def _checked_sites(self, host: Host) -> list[tuple[Site, int]]:
        """The sites that get an adapter, and the depth of their block in its stack."""
        depth = self._depth(host)
        if self.num_dropped >= depth:
            raise InputError(
                f"adapterdrop: num_dropped is {self.num_dropped}, but {host.sites.model_type} has "
                f"{depth} blocks and one must keep its adapter; choose 0 to {depth - 1}."
            )
        kept = []
        for site in output_sites(self.name, host, self.sites, None, self.bottleneck):
            if site.layer is None:
                raise InputError(
                    f"adapterdrop: {site.path} lies in no block, so it has no depth to be dropped "
                    "by; choose sites inside the blocks, such as mlp.down."
                )
            block = int(host.sites.block_paths[site.layer].rpartition(".")[2])
            if self.random or block >= self.num_dropped:
                kept.append((site, block))
        return kept
