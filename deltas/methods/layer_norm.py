"""LayerNorm tuning: only the gains and shifts of the normalisations are trained."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class LayerNormTuning(Delta):
    """n(h) ⊙ g + b with g and b trained, n the normalisation; u₀ = (g₀, b₀).

    All normalisations of the backbone, those of queries and keys included. An RMS normalisation
    has a gain and no shift.

    Attributes:
        layers: blocks to act in; None means all, and those outside of the blocks.
    """

    layers: tuple[int, ...] | None = None

    name = "layer-norm"
    acts_on = "normalisations"
    default_rate = 3e-3
    searched_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    category = "specification"
    law = "n(h) g + b"
    reference = "Zhao et al., ICLR 2024, Section 3; Qi et al., arXiv 2211.08682, Section 3"
    bibtex = r"""
        @inproceedings{zhao2024tuning,
          author = {Zhao, Bingchen and Tu, Haoqin and Wei, Chen and Mei, Jieru and Xie,
            Cihang},
          title = {Tuning {LayerNorm} in Attention: Towards Efficient Multi-Modal {LLM}
            Finetuning},
          booktitle = {International Conference on Learning Representations},
          year = {2024},
        }
        @misc{qi2022layernorm,
          author = {Qi, Wang and Ruan, Yu-Ping and Zuo, Yuan and Li, Taihao},
          title = {Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language
            Models},
          eprint = {2211.08682},
          archiveprefix = {arXiv},
          year = {2022},
        }
    """
    num_parameters_formula = "sum of the widths of all gains and shifts"

    def build(self, host: Host) -> None:
        """Replace gains and shifts by trainable copies."""
        host.replace(self._names(host))

    def num_parameters(self, host: Host) -> int:
        """Number of entries of the gains and shifts."""
        return sum(p.numel() for p in host.distinct(self._names(host)).values())

    def _names(self, host: Host) -> list[str]:
        names = host.backbone_names(("norm",), self.layers)
        if not names:
            raise InputError(
                f"{host.sites.model_type} has no normalisation with parameters, so layer-norm has "
                "nothing to train; choose another delta, such as bitfit or lora."
            )
        return names
