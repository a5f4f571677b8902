"""Calibration of corrections: the principal axes of a Transformer's hidden states.

    calibration = calibrate(model, batches)                 # correct examples, without padding
    law = ProjectionCorrection(calibration.subspaces(rank=256), 0.5)

The axes of every site are the eigenvectors of the covariance of its tokens; nothing but moments is
kept while the batches pass. A calibration is saved as one safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltacontrol.deltas.feedback.laws import Model, StateTaps, attended, in_evaluation_mode, run
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.affine_subspace import AffineSubspace, Moments


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean and principal axes of the hidden states at every site, over tokens of correct examples.

    Attributes:
        site: the sites, as a user names them.
        paths: the same, one by one.
        counts: the number of tokens behind each.
        means: (n,) each.
        eigenvalues: of the covariance, ascending, (n,) each.
        eigenvectors: (n, n) each, in columns.
    """

    site: str
    paths: tuple[str, ...]
    counts: tuple[int, ...]
    means: tuple[Tensor, ...]
    eigenvalues: tuple[Tensor, ...]
    eigenvectors: tuple[Tensor, ...]

    def subspaces(
        self, rank: int | None = None, *, energy: float | None = None, dtype: Any = torch.float32
    ) -> list[AffineSubspace]:
        """The principal subspaces, one a site.

        Args:
            rank: their dimension; or
            energy: the share of the variance that each has to hold, 0 to 1.
            dtype: of the tensors; that of the model avoids a conversion in every pass.

        Raises:
            InputError: not exactly one of the two is given, or it is out of range.
        """
        if (rank is None) == (energy is None):
            raise InputError("give either a rank or an energy, such as energy=0.99.")
        if energy is not None and not 0 <= energy <= 1:
            raise InputError(f"energy is {energy}; expected a share of the variance, 0 to 1.")
        found = []
        for mean, values, vectors in zip(
            self.means, self.eigenvalues, self.eigenvectors, strict=True
        ):
            wanted = rank
            if wanted is None:
                left = 1 - values.flip(0).cumsum(0) / values.sum()
                wanted = int((left > 1 - (energy or 0.0)).sum()) + 1 if energy else 0
                wanted = min(wanted, len(values))
            subspace = AffineSubspace.principal(mean, vectors, wanted)
            found.append(AffineSubspace(subspace.mean.to(dtype), subspace.basis.to(dtype)))
        return found

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        tensors = {}
        for name in ("means", "eigenvalues", "eigenvectors"):
            parts = getattr(self, name)
            tensors |= {f"{name}.{i}": part.contiguous() for i, part in enumerate(parts)}
        about = {"site": self.site, "paths": list(self.paths), "counts": list(self.counts)}
        save_file(tensors, Path(path), metadata={"calibration": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, or something else.
        """
        try:
            with safe_open(Path(path), framework="pt") as file:
                about = json.loads(file.metadata()["calibration"])
                steps = range(len(about["paths"]))
                parts = {
                    name: tuple(file.get_tensor(f"{name}.{i}") for i in steps)
                    for name in ("means", "eigenvalues", "eigenvectors")
                }
            return cls(about["site"], tuple(about["paths"]), tuple(about["counts"]), **parts)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no saved calibration ({error}).") from error


def calibrate(
    model: Model, batches: Iterable[Mapping[str, Any]], site: str = "state"
) -> Calibration:
    """Collect the states of correctly classified examples, without padding, and their axes.

    Args:
        model: the model, in evaluation mode; laws that are attached act.
        batches: the model's arguments. Where they have class ``labels`` (batch,), only the examples
            that the model gets right are taken; without labels, or with labels of tokens, all.
        site: where.

    Raises:
        InputError: the model is in training mode, the site matches nothing, or fewer than two
            tokens were collected.
    """
    in_evaluation_mode(model)
    taps = StateTaps(model, site)
    moments: list[Moments | None] = [None] * len(taps.paths)
    states: dict[int, Tensor] = {}

    def keep(t: int, x: Tensor) -> Tensor:
        states[t] = x
        return x

    taps.put(keep)
    try:
        for batch in batches:
            states.clear()
            with torch.no_grad():
                output = run(model, batch)
            labels = batch.get("labels")
            right = None
            if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
                right = output.logits.argmax(-1) == labels
            for t, x in states.items():
                mask = attended(batch, x)
                mask = mask if right is None else mask & right.unsqueeze(1)
                found = moments[t] or Moments(x.shape[-1])
                found.update(x, mask)
                moments[t] = found
    finally:
        taps.remove()
    complete = [m for m in moments if m is not None]
    if len(complete) < len(moments):
        raise InputError(
            f"{len(moments) - len(complete)} of the sites {', '.join(taps.paths)} were not reached "
            "in any batch."
        )
    axes = [m.eigh() for m in complete]
    return Calibration(
        site,
        taps.paths,
        tuple(m.count for m in complete),
        tuple(m.mean for m in complete),
        tuple(values for values, _ in axes),
        tuple(vectors for _, vectors in axes),
    )
