"""Head tuning: only the task head on top of the frozen backbone is trained."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class HeadTuning(Delta):
    """The head's parameters are the control of the last step, Φ's own weights; u₀ = θ₀.

    The head is what transformers puts beside the backbone: ``classifier`` of BERT, ``score`` of
    GPT-2. A language-model head that is tied to the embedding is refused.
    """

    name = "head"
    look = ("head only", "#8C8C8C", "X", 9)
    acts_on = "head"
    default_rate = 5e-3
    searched_rates = (1e-2, 3e-2, 1e-1, 3e-1)
    category = "specification"
    law = "θ_head = u"
    reference = "Peters, Ruder, Smith, RepL4NLP 2019, Section 3 (feature extraction)"
    bibtex = r"""
        @inproceedings{peters2019tune,
          author = {Peters, Matthew E. and Ruder, Sebastian and Smith, Noah A.},
          title = {To Tune or Not to Tune? Adapting Pretrained Representations to Diverse
            Tasks},
          booktitle = {Workshop on Representation Learning for NLP ({RepL4NLP})},
          year = {2019},
        }
    """
    num_parameters_formula = "D_head"
    trains_head = True

    def build(self, host: Host) -> None:
        """Replace the head's parameters by trainable copies."""
        host.replace(self._names(host))

    def num_parameters(self, host: Host) -> int:
        """Number of the head's parameters."""
        return sum(p.numel() for p in host.distinct(self._names(host)).values())

    def _names(self, host: Host) -> list[str]:
        paths = host.sites.head_paths()
        if not paths:
            raise InputError(
                f"{type(host.model).__name__} has no head beside its backbone; load it as "
                "AutoModelForSequenceClassification, or drop the head delta."
            )
        return host.parameter_names(paths)
