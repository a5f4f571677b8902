"""Full fine-tuning: the reference that every delta is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host


@dataclass(frozen=True)
class FullFineTuning(Delta):
    """Every parameter is a control, θ = u, u₀ = θ₀.

    The copy that is trained costs the memory of one more model; the base stays untouched.
    """

    name = "full"
    look = ("full fine-tuning", "#000000", "s", 1)
    acts_on = "all parameters"
    default_rate = 1e-4
    category = "specification"
    law = "θ = u"
    reference = "Devlin et al., NAACL 2019, Section 3.2"
    bibtex = r"""
        @inproceedings{devlin2019bert,
          author = {Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova,
            Kristina},
          title = {{BERT}: Pre-training of Deep Bidirectional Transformers for Language
            Understanding},
          booktitle = {Conference of the North American Chapter of the Association for
            Computational Linguistics},
          year = {2019},
        }
    """
    num_parameters_formula = "D"
    trains_head = True
    unstackable = "embeddings are trained, and are no linear map or normalisation"

    def build(self, host: Host) -> None:
        """Replace every parameter by a trainable copy."""
        host.replace(self._names(host))

    def num_parameters(self, host: Host) -> int:
        """D, tied parameters once."""
        return sum(p.numel() for p in host.distinct(self._names(host)).values())

    def _names(self, host: Host) -> list[str]:
        return [n for n, _ in host.model.named_parameters(remove_duplicate=False)]
