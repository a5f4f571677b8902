"""FISH mask: the parameters with the largest Fisher information are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.requests import Losses, Requests
from deltacontrol.deltas.methods.parts.masks import (
    SparseChange,
    check_density,
    largest,
    maskable,
    num_kept,
)
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class FisherMask(Delta):
    """θ₀ + δ with δ zero except at the k = density·D places of the largest Fisher information.

    Before training, ``DeltaModel.prepare(losses)`` measures the diagonal of the empirical Fisher
    information

        F_i = 1/N Σ_n (∂ loss_n/∂θ_i)²,  loss_n = -log p(y_n | x_n) at θ₀

    (Sung et al., Section 3.1), one loss for each of the N examples. A loss that is a mean over
    several examples gives the square of their mean gradient instead, and a ranking of its own.
    Measuring takes 2 D numbers of memory, once; after it k values and k places are all there is.

    Attributes:
        density: k/D.
        sites: modules to choose from; None means the backbone.
        layers: blocks to choose from; None means all.
    """

    density: float = 0.005
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    name = "fisher-mask"
    acts_on = "all parameters"
    default_rate = 1e-3
    category = "specification"
    law = "theta_0 + delta, delta_i = 0 where the Fisher information is small"
    reference = "Sung, Nair, Raffel, NeurIPS 2021, Section 3.1"
    bibtex = r"""
        @inproceedings{sung2021training,
          author = {Sung, Yi-Lin and Nair, Varun and Raffel, Colin},
          title = {Training Neural Networks with Fixed Sparse Masks},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2021},
        }
    """
    num_parameters_formula = "k = density D"

    def __post_init__(self) -> None:
        """Check the density."""
        check_density(self.name, self.density)

    def build(self, host: Host) -> None:
        """Let the parameters be a function of k values, whose places the data will choose."""
        parameters = maskable(host, self.sites, self.layers)
        change = SparseChange(parameters, self.num_parameters(host))
        host.add("change", change, like=next(iter(parameters.values())))
        host.shared.append(f"{host.namespace}.change.values")
        choice = FisherChoice(change, host.requests)
        host.reparametrise(list(parameters), choice)
        host.on_data(choice.prepare)

    def num_parameters(self, host: Host) -> int:
        """K."""
        parameters = maskable(host, self.sites, self.layers)
        return num_kept(self.density, sum(p.numel() for p in parameters.values()))


class FisherChoice:
    """Gives the parameters of a pass: θ₀ with gradients while measuring, then the sparse change."""

    def __init__(self, change: SparseChange, requests: Requests) -> None:
        self.change = change
        self.requests = requests
        self.leaves: dict[str, Tensor] | None = None

    def __call__(self) -> dict[str, Tensor]:
        """All parameters by name.

        Raises:
            InputError: the places are not chosen yet.
        """
        if self.leaves is not None:
            return self.leaves
        if not self.change.chosen:
            if self.requests.preparing:  # another delta looks at the data first
                return dict(self.change.base[0])
            raise InputError(
                "fisher-mask has not seen data and does not know yet which parameters to train: "
                "call prepare(losses) on the DeltaModel, or load() controls saved after it."
            )
        return self.change()

    def prepare(self, losses: Losses) -> None:
        """Measure the Fisher information at θ₀ and choose the places.

        Raises:
            InputError: there is no loss, or one is not finite.
        """
        (base,) = self.change.base
        leaves = {name: p.detach().requires_grad_() for name, p in base.items()}
        information = [torch.zeros_like(p) for p in base.values()]
        count = 0
        self.leaves = leaves
        try:
            with torch.enable_grad():
                for loss in losses():
                    if not bool(loss.isfinite()):
                        raise InputError(
                            f"fisher-mask: loss {count + 1} of the data is {float(loss.detach())}; "
                            "the Fisher information needs finite losses."
                        )
                    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                    for total, gradient in zip(information, found, strict=True):
                        if gradient is not None:
                            total.addcmul_(gradient, gradient)
                    count += 1
        finally:
            self.leaves = None
        if not count:
            raise InputError("fisher-mask: prepare got no loss; give at least one batch.")
        scores = torch.cat([total.flatten() for total in information])
        self.change.choose(largest(scores, len(self.change.values)))
