"""(IA)³: trained gains on keys, values and the inner state of the MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class IA3(Delta):
    """Keys, values and the MLP's inner state times a gain (Liu et al., Section 3.3).

    softmax(Q (l_k ⊙ Kᵀ)/√d_k) (l_v ⊙ V) and (l_ff ⊙ γ(W_1 x)) W_2. The control is the distance of
    a gain from one, l = 1 + u, so that u = 0 is the base model and weight decay pulls towards it.

    Attributes:
        sites: linear maps whose output gets a gain.
        input_sites: linear maps whose input gets a gain.
        layers: blocks to act in; None means all.
    """

    sites: tuple[str, ...] = ("attention.key", "attention.value")
    input_sites: tuple[str, ...] = ("mlp.down",)
    layers: tuple[int, ...] | None = None

    name = "ia3"
    acts_on = "k, v, mlp inner"
    default_rate = 3e-3
    searched_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    category = "addition"
    law = "h * (1 + u)"
    reference = "Liu et al., NeurIPS 2022, Section 3.3"
    bibtex = r"""
        @inproceedings{liu2022fewshot,
          author = {Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang,
            Tenghao and Bansal, Mohit and Raffel, Colin},
          title = {Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
            In-Context Learning},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2022},
        }
    """
    num_parameters_formula = "sum of the widths of the scaled states"

    def __post_init__(self) -> None:
        """Check that there is something to scale."""
        if not (self.sites or self.input_sites):
            raise InputError("ia3: sites and input_sites are empty; name at least one linear map.")

    def build(self, host: Host) -> None:
        """Add a gain at every site."""
        outputs, inputs = self._checked_sites(host)
        for site in outputs:
            gain = Gain(site.out_features, site.spread)
            host.add(site.path, gain, like=host.weight(site), key=site.key)
            host.on_output(site.module, gain.scale_output)
            host.on_merge(f"{site.path}.weight", partial(_scaled, gain, site, of_output=True))
            if getattr(site.module, "bias", None) is not None:
                host.on_merge(f"{site.path}.bias", partial(_scaled, gain, site, of_output=True))
        for site in inputs:
            gain = Gain(site.in_features)
            host.add(site.path, gain, like=host.weight(site))
            host.on_call(site.module, gain.scale_input)
            value = partial(_scaled, gain, site, of_output=False)
            host.on_merge(f"{site.path}.weight", value, last=True)

    def num_parameters(self, host: Host) -> int:
        """Widths of the outputs of ``sites`` and of the inputs of ``input_sites``."""
        outputs, inputs = self._checked_sites(host)
        return sum(s.out_features for s in outputs) + sum(s.in_features for s in inputs)

    def _checked_sites(self, host: Host) -> tuple[list[Site], list[Site]]:
        outputs = host.find(self.sites, self.layers) if self.sites else []
        inputs = host.find(self.input_sites, self.layers) if self.input_sites else []
        for site in inputs:
            if site.part is not None:
                raise InputError(
                    f"ia3: {host.sites.model_type} computes several maps in {site.path} from one "
                    "input; scale their outputs instead (sites), or the input of mlp.down."
                )
        return outputs, inputs


def _scaled(gain: Gain, site: Site, tensor: Tensor, *, of_output: bool) -> Tensor:
    """A weight or bias with the gain taken in, in float64."""
    factor = gain.factor().detach().double()
    output_first = tensor.dim() == 1 or not isinstance(site.module, Conv1D)
    if tensor.dim() == 2 and of_output == output_first:
        factor = factor[:, None]
    return tensor * factor


class Gain(nn.Module):
    """h ↦ h ⊙ (1 + u) with u (width,).

    Args:
        width: of u.
        spread: puts u at its place among the features of a wider module; see `Site.spread`.
    """

    def __init__(self, width: int, spread: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(width))
        self.spread = spread

    def factor(self) -> Tensor:
        """1 + u, and 1 beside the site."""
        return 1 + (self.spread(self.u) if self.spread else self.u)

    def scale_output(self, _inputs: tuple, output: Tensor) -> Tensor:
        """The scaled output of a module."""
        return self._scale(output)

    def scale_input(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a module with its input scaled."""
        return (self._scale(args[0]), *args[1:]), kwargs

    def _scale(self, h: Tensor) -> Tensor:
        """The state times 1 + u; in a lower precision h + h ⊙ u in its format, rounded once."""
        if h.dtype == self.u.dtype:
            return h * self.factor()
        u = self.spread(self.u) if self.spread else self.u
        return torch.addcmul(h, h, u.to(h.dtype))
