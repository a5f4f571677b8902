"""Training in a random subspace of all parameters (direct intrinsic dimension)."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.parts.coordinates import Coordinates, SubspaceDelta


@dataclass(frozen=True)
class Subspace(SubspaceDelta):
    """θ = θ₀ + P z with a fixed random P ∈ R^{D×d} and z ∈ R^d trained (Li et al., Eq. 2).

    All parameters move, the head included, so D is the model's size; or, with ``of``, all
    parameters of another delta. P z is computed in every forward pass.

    Attributes:
        dimension: d.
        projection: the kind of P; see
        `deltacontrol.deltas.methods.parts.coordinates.SubspaceDelta`.
        projection_seed: seed of P; None takes it from the seed of ``attach``.
        of: the delta whose parameters θ is; empty means all parameters of the model.
    """

    name = "subspace"
    look = ("subspace", "#7A5C3E", ">", 8)
    acts_on = "all parameters"
    default_rate = 1e-2
    law = "theta = theta_0 + P z"
    reference = "Li et al., ICLR 2018, Eq. 2; Aghajanyan et al., ACL 2021, Eq. 1 (DID)"
    bibtex = r"""
        @inproceedings{li2018measuring,
          author = {Li, Chunyuan and Farkhoor, Heerad and Liu, Rosanne and Yosinski, Jason},
          title = {Measuring the Intrinsic Dimension of Objective Landscapes},
          booktitle = {International Conference on Learning Representations},
          year = {2018},
        }
        @inproceedings{aghajanyan2021intrinsic,
          author = {Aghajanyan, Armen and Gupta, Sonal and Zettlemoyer, Luke},
          title = {Intrinsic Dimensionality Explains the Effectiveness of Language Model
            Fine-Tuning},
          booktitle = {Annual Meeting of the Association for Computational Linguistics},
          year = {2021},
        }
    """
    num_parameters_formula = "d"

    def build(self, host: Host) -> None:
        """Let every parameter be a function of z."""
        seed = self._seed(host)
        self._lay(
            host,
            "z",
            lambda start, _: Coordinates(self.name, start, self.dimension, self.projection, seed),
        )
