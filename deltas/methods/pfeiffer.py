"""Pfeiffer adapters: one bottleneck a block, after the MLP."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.methods.parts.adapters import OutputAdapter


@dataclass(frozen=True)
class PfeifferAdapter(OutputAdapter):
    """h + φ(h W_d + b_d) W_u + b_u after the MLP's output projection alone.

    Half of Houlsby's adapters, which Pfeiffer et al. found to do as well. Their adapter reads the
    MLP's output behind one more use of the block's normalisation; here it reads that output itself,
    which also serves blocks that normalise before the MLP.

    Attributes:
        bottleneck: m, the inner width.
        activation: φ, by its name in transformers.
        sites: linear maps whose output is adapted.
        layers: blocks to act in; None means all.
    """

    activation: str = "relu"
    sites: tuple[str, ...] = ("mlp.down",)

    name = "pfeiffer"
    reference = "Pfeiffer et al., EACL 2021, Section 4; Pfeiffer et al., EMNLP 2020, Eq. 1"
    bibtex = r"""
        @inproceedings{pfeiffer2021adapterfusion,
          author = {Pfeiffer, Jonas and Kamath, Aishwarya and R{\"u}ckl{\'e}, Andreas and Cho,
            Kyunghyun and Gurevych, Iryna},
          title = {{AdapterFusion}: Non-Destructive Task Composition for Transfer Learning},
          booktitle = {Conference of the European Chapter of the Association for Computational
            Linguistics},
          year = {2021},
        }
        @inproceedings{pfeiffer2020madx,
          author = {Pfeiffer, Jonas and Vuli{\'c}, Ivan and Gurevych, Iryna and Ruder,
            Sebastian},
          title = {{MAD-X}: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer},
          booktitle = {Conference on Empirical Methods in Natural Language Processing},
          year = {2020},
        }
    """
    num_parameters_formula = "sum over blocks of 2 m d + d + m"
