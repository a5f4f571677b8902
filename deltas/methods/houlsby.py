"""Houlsby adapters: a bottleneck after both sub-layers of every block."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.methods.parts.adapters import OutputAdapter


@dataclass(frozen=True)
class HoulsbyAdapter(OutputAdapter):
    """h + φ(h W_d + b_d) W_u + b_u after the attention's and the MLP's output projection.

    It acts before the block's own residual connection and normalisation (Houlsby et al., Fig. 2).
    W_u and the biases start at zero, so that the start is the identity exactly; W_d is Gaussian
    with variance 1/width.

    Attributes:
        bottleneck: m, the inner width.
        activation: φ, by its name in transformers.
        sites: linear maps whose output is adapted.
        layers: blocks to act in; None means all.
    """

    sites: tuple[str, ...] = ("attention.output", "mlp.down")

    name = "houlsby"
    look = ("adapter", "#D55E00", "^", 3)
    reference = "Houlsby et al., ICML 2019, Section 2.1"
    bibtex = r"""
        @inproceedings{houlsby2019parameter,
          author = {Houlsby, Neil and Giurgiu, Andrei and Jastrzebski, Stanislaw and Morrone,
            Bruna and de Laroussilhe, Quentin and Gesmundo, Andrea and Attariyan, Mona and
            Gelly, Sylvain},
          title = {Parameter-Efficient Transfer Learning for {NLP}},
          booktitle = {International Conference on Machine Learning},
          year = {2019},
        }
    """
    num_parameters_formula = "sum over sites of 2 m d + d + m"
