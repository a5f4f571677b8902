"""Mix-and-match: short prefixes in the attention, parallel adapters beside the MLP."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.parallel import ParallelAdapter
from deltacontrol.deltas.methods.prefix import PrefixTuning


@dataclass(frozen=True)
class MixAndMatch(Delta):
    """Prefix tuning of the attention, and mlp(h) + s φ(h W_d) W_u (He et al., Section 4.6).

    Attributes:
        length: n, number of prefix positions a layer.
        bottleneck: m of the adapter.
        scale: s of the adapter.
        activation: φ, by its name in transformers.
        init_std: standard deviation of the initial keys and values.
        layers: blocks to act in; None means all.
    """

    length: int = 16
    bottleneck: int = 32
    scale: float = 4.0
    activation: str = "relu"
    init_std: float = 0.02
    layers: tuple[int, ...] | None = None

    name = "mam"
    acts_on = "keys, values; mlp"
    category = "combined"
    law = "prefix in the attention; mlp(h) + s phi(h W_d) W_u"
    reference = "He et al., ICLR 2022, Section 4.6 (MAM adapter)"
    bibtex = r"""
        @inproceedings{he2022unified,
          author = {He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor
            and Neubig, Graham},
          title = {Towards a Unified View of Parameter-Efficient Transfer Learning},
          booktitle = {International Conference on Learning Representations},
          year = {2022},
        }
    """
    num_parameters_formula = "sum over blocks of 2 n d_kv + 2 m d"
    unmergeable = "a prefix is no weight of the base model"
    identity_at_start = False

    def __post_init__(self) -> None:
        """Check both parts."""
        self._positive("length", "bottleneck")
        self._parts()

    def build(self, host: Host) -> None:
        """Lay both parts."""
        for part in self._parts():
            part.build(host)

    def num_parameters(self, host: Host) -> int:
        """Σ 2 n d_kv + 2 m d."""
        return sum(part.num_parameters(host) for part in self._parts())

    def _parts(self) -> tuple[Delta, Delta]:
        return (
            PrefixTuning(length=self.length, init_std=self.init_std, layers=self.layers),
            ParallelAdapter(self.bottleneck, self.scale, self.activation, layers=self.layers),
        )
