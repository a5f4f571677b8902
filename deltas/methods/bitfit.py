"""BitFit: only the bias vectors are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import whole_paths
from deltacontrol.theory.errors import InputError

_PARTS = {
    "attention": ("attention.query", "attention.key", "attention.value", "attention.output"),
    "mlp": ("mlp.up", "mlp.down"),
}


@dataclass(frozen=True)
class BitFit(Delta):
    """State-independent control: h + b with b trained, b₀ the pre-trained bias.

    All biases of the backbone: linear maps and normalisations (Ben Zaken et al., Eq. 1–6), also
    those that lie beside their weights under a name that ends in "_bias", as `in_proj_bias` of
    torch's own attention. The head's bias belongs to the head.

    Attributes:
        sites: modules whose biases are trained; None means those of ``part``.
        part: "all", or the linear maps of "attention" or "mlp" alone.
    """

    sites: tuple[str, ...] | None = None
    part: Literal["all", "attention", "mlp"] = "all"

    name = "bitfit"
    look = ("BitFit", "#E69F00", "D", 4)
    acts_on = "all biases"
    default_rate = 2e-3
    searched_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    category = "specification"
    law = "h + b"
    reference = "Ben Zaken, Goldberg, Ravfogel, ACL 2022, Eq. 1-6"
    bibtex = r"""
        @inproceedings{benzaken2022bitfit,
          author = {Ben Zaken, Elad and Goldberg, Yoav and Ravfogel, Shauli},
          title = {{BitFit}: Simple Parameter-efficient Fine-tuning for Transformer-based
            Masked Language-models},
          booktitle = {Annual Meeting of the Association for Computational Linguistics},
          year = {2022},
        }
    """
    num_parameters_formula = "sum of the widths of all biases"

    def __post_init__(self) -> None:
        """Check that one field chooses the biases."""
        self._one_of("part")
        if self.sites is not None and self.part != "all":
            raise InputError(
                f"bitfit: sites={self.sites} and part={self.part!r} both choose biases; give one."
            )

    def build(self, host: Host) -> None:
        """Replace the biases by trainable copies."""
        host.replace(self._names(host))

    def num_parameters(self, host: Host) -> int:
        """Number of bias entries."""
        return sum(p.numel() for p in host.distinct(self._names(host)).values())

    def _names(self, host: Host) -> list[str]:
        sites = _PARTS.get(self.part, self.sites)
        if sites is None:
            names = host.backbone_names()
        else:
            names = host.parameter_names(whole_paths(host.find(sites), self.name))
        leaves = {name: name.rpartition(".")[2] for name in names}
        biases = [name for name, leaf in leaves.items() if leaf == "bias" or leaf.endswith("_bias")]
        if not biases:
            raise InputError(
                f"{host.sites.model_type} has no bias at {sites or 'any module'}, so BitFit has "
                "nothing to train; choose another delta, such as lora or houlsby."
            )
        return biases
