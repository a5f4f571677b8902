"""BitFit: only the bias vectors are trained."""

from __future__ import annotations

from dataclasses import dataclass

from deltas.base import Delta
from deltas.host import Host
from theory.errors import InputError


@dataclass(frozen=True)
class BitFit(Delta):
    """State-independent control: h + b with b trained, b₀ the pre-trained bias.

    All biases of the backbone: linear maps and normalisations (Ben Zaken et al., Eq. 1–6). The
    head's bias belongs to the head.

    Attributes:
        sites: modules whose biases are trained; None means the whole backbone.
    """

    sites: tuple[str, ...] | None = None

    name = "bitfit"
    category = "specification"
    law = "h + b"
    reference = "Ben Zaken, Goldberg, Ravfogel, ACL 2022, Eq. 1-6"
    num_parameters_formula = "sum of the widths of all biases"

    def build(self, host: Host) -> None:
        """Replace the biases by trainable copies."""
        host.replace(self._names(host))

    def num_parameters(self, host: Host) -> int:
        """Number of bias entries."""
        return sum(p.numel() for p in host.distinct(self._names(host)).values())

    def _names(self, host: Host) -> list[str]:
        if self.sites is None:
            head = tuple(path + "." for path in host.sites.head_paths())
            names = [n for n in host.parameter_names(host.sites.modules) if not n.startswith(head)]
        else:
            sites = host.find(self.sites)
            for site in sites:
                if site.part is not None:
                    raise InputError(
                        f"bitfit: {host.sites.model_type} keeps several maps in {site.path}, and "
                        f"their biases in one vector; take the whole, sites={site.path!r}."
                    )
            names = host.parameter_names(site.path for site in sites)
        biases = [name for name in names if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise InputError(
                f"{host.sites.model_type} has no bias at {self.sites or 'any module'}, so BitFit "
                "has nothing to train; choose another delta, such as lora or houlsby."
            )
        return biases
