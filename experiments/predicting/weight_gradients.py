"""The gradient of the loss by the weights of a model's linear maps: where, and of what rank.

For the weight ``W`` at a site, ``G = dL/dW`` of the mean loss of some rows. A step ``-eta G`` is
what full fine-tuning does first; the least rank that keeps a share ``s`` of it is the least ``r``
with

    sum_{i <= r} sigma_i^2 >= s ||G||_F^2        (Eckart & Young, 1936),

and ``||G||_F^2`` over all sites says where the loss falls fastest. It is a number of the model and
its rows, before any delta.

Source: Zhang, Liu & Chen, *LoRA-One: One-step full gradient could suffice for fine-tuning large
language models, provably and efficiently*, ICML 2025 (its leading directions as a start).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas.editing.sites import Site, SiteMap
from deltacontrol.experiments.tasks.encoding import Batch, without_labels
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.rank.low_rank import singular_values, tail_energy

SITES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("mlp.up", "mlp.down"),
)
SHARE = 0.9  # of the squared norm that a useful rank keeps


@dataclass(frozen=True, eq=False)
class SiteGradient:
    """The gradient at one site of one layer.

    Attributes:
        layer: number of the block.
        site: semantic name.
        key: of the site, as in `deltacontrol.deltas.editing.sites.Site`.
        values: singular values of ``G``, largest first.
    """

    layer: int
    site: str
    key: str
    values: Tensor

    @property
    def energy(self) -> float:
        """``||G||_F^2``."""
        return float(tail_energy(self.values)[0])

    def rank(self, share: float = SHARE) -> int:
        """The least rank that keeps a share of the energy; 0 where there is none."""
        tails = tail_energy(self.values)
        return int((tails > (1 - share) * tails[0]).sum()) if tails[0] > 0 else 0

    def held(self, rank: int | None) -> float:
        """The energy that a rank keeps; all of it for None."""
        tails = tail_energy(self.values)
        left = 0.0 if rank is None else float(tails[min(rank, len(tails) - 1)])
        return float(tails[0]) - left


def weight_gradients(model: PreTrainedModel, batches: Iterable[Batch]) -> list[SiteGradient]:
    """At every linear map of the blocks that has a semantic name; layers first, then `SITES`.

    Args:
        model: a classifier in evaluation mode, without deltas.
        batches: rows with labels; the loss is the mean over all of them.

    Raises:
        InputError: no linear map of the model has such a name.
    """
    sites = _sites(SiteMap(model))
    if not sites:
        raise InputError(
            f"{type(model).__name__} has none of the maps {', '.join(SITES)} by which ranks and "
            "sites are told; `deltacontrol inspect` prints what it has"
        )
    weights = {site.path: site.module.get_parameter("weight") for _, site in sites}
    flags = [(weight, weight.requires_grad) for weight in weights.values()]
    sums = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            logits = model(**without_labels(batch)).logits
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
            found = torch.autograd.grad(
                loss, list(weights.values()), allow_unused=True, materialize_grads=True
            )
            for path, gradient in zip(weights, found, strict=True):
                sums[path] += gradient
            count += len(logits)
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
    found_at = []
    for name, site in sites:
        values = singular_values(site.rows(sums[site.path]) / count)
        found_at.append(SiteGradient(site.layer or 0, name, site.key, values))
    return found_at


def useful_rank(gradients: Sequence[SiteGradient], share: float = SHARE) -> int:
    """The least rank that, the same at all of these sites, keeps a share of their energy in all.

    Example:
        >>> one = SiteGradient(0, "mlp.up", "a", torch.tensor([4.0, 1.0, 0.1]).double())
        >>> other = SiteGradient(1, "mlp.up", "b", torch.tensor([0.1, 0.0, 0.0]).double())
        >>> useful_rank([one, other]), useful_rank([one, other], 0.99)
        (1, 2)
    """
    total = sum(one.energy for one in gradients)
    if not total > 0:
        return 0
    most = max(len(one.values) for one in gradients)
    low, high = 0, most  # held energy rises with the rank
    while low < high:
        middle = (low + high) // 2
        if sum(one.held(middle) for one in gradients) >= share * total:
            high = middle
        else:
            low = middle + 1
    return low


def _sites(sites: SiteMap) -> list[tuple[str, Site]]:
    found: list[tuple[str, Site]] = []
    for name in SITES:
        try:
            found += [(name, site) for site in sites.resolve((name,))]
        except InputError:  # the architecture has no map of this name
            continue
    return sorted(found, key=lambda pair: (pair[1].layer or 0, SITES.index(pair[0])))
