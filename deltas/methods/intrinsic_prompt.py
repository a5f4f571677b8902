"""Intrinsic prompt tuning: a prompt from a small subspace, which other tasks' prompts span."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.prompt import lay_prompt
from deltacontrol.theory.dimension.projections import DenseProjection
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class IntrinsicPrompt(Delta):
    """[Dec(z); E(x)] with z ∈ R^k trained and the decoder fixed (Qin et al.).

    The decoder is linear, Dec(z) = M + Σ_i z_i V_i with n×d matrices M and V_i. From prompts of
    other tasks, M is their mean and V_i their i-th principal component, as long as their standard
    deviation along it: the best linear decoder of those prompts, where Qin et al. train a
    non-linear one. Without prompts, M holds embeddings of random tokens and the V_i are
    orthonormal, uniform over all subspaces: the random subspace that a learnt one must beat.
    z starts at zero. A checkpoint holds the decoder of prompts itself, and that of none as a seed.

    Attributes:
        length: n, number of prompt positions.
        dimension: k.
        prompts: safetensors files with prompts (n, d) of other tasks, such as the controls of runs
            with ``prompt``; every tensor of that shape counts, and one of shape (T, n, d) is T of
            them. They are read whenever the delta is attached. Empty means the random subspace.
        projection_seed: seed of the random subspace; None takes it from the seed of ``attach``.
        strip: take the rows off again, as in prompt tuning.
    """

    length: int = 16
    dimension: int = 5
    prompts: tuple[str, ...] = ()
    projection_seed: int | None = None
    strip: bool = True

    name = "intrinsic-prompt"
    acts_on = "input"
    searched_rates = (1e-2, 3e-2, 1e-1, 3e-1)
    category = "reparametrisation"
    law = "x_0 = [Dec(z); E(x)]"
    reference = "Qin et al., arXiv 2110.07867, Section 3"
    bibtex = r"""
        @misc{qin2021exploring,
          author = {Qin, Yujia and Wang, Xiaozhi and Su, Yusheng and others},
          title = {Exploring Universal Intrinsic Task Subspace via Prompt Tuning},
          eprint = {2110.07867},
          archiveprefix = {arXiv},
          year = {2021},
        }
    """
    num_parameters_formula = "k"
    unmergeable = "a prompt is no weight of the base model"
    identity_at_start = False

    @property
    def num_positions(self) -> int:
        """The prompt's length."""
        return self.length

    def __post_init__(self) -> None:
        """Check the sizes."""
        self._positive("length", "dimension")

    def build(self, host: Host) -> None:
        """Insert the decoded prompt before the backbone and take it off behind the blocks."""
        size = self.length * host.width
        if self.dimension > size:
            raise InputError(
                f"intrinsic-prompt: dimension {self.dimension} is above the {size} numbers of a "
                f"prompt of {self.length} rows of width {host.width}."
            )
        decoder = self._learnt(host) if self.prompts else self._random(host)
        start = torch.zeros(self.dimension)
        lay_prompt(host, start, decoder, length=self.length, strip=self.strip)

    def num_parameters(self, host: Host) -> int:
        """K."""
        return self.dimension

    def _random(self, host: Host) -> LinearDecoder:
        seed = host.draw_seed() if self.projection_seed is None else self.projection_seed
        weight = host.embedding_weight
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(weight.shape[0], (self.length,), generator=generator)
        with torch.no_grad():
            mean = host.model.get_input_embeddings()(tokens.to(weight.device)).clone()
        frame = DenseProjection(mean.numel(), self.dimension, seed, torch.float64).dense()
        return LinearDecoder(mean, frame.T.reshape(self.dimension, *mean.shape), seed)

    def _learnt(self, host: Host) -> LinearDecoder:
        """Principal components: M + Σ z_i V_i with V_i = s_i v_i/√(T-1)."""
        prompts = torch.stack(self._read(host.width)).double()
        if len(prompts) <= self.dimension:
            raise InputError(
                f"intrinsic-prompt: {len(prompts)} prompts of shape ({self.length}, {host.width}) "
                f"span no subspace of dimension {self.dimension} around their mean; give at least "
                f"{self.dimension + 1}, or lower dimension."
            )
        mean = prompts.mean(0)
        _, values, right = torch.linalg.svd((prompts - mean).flatten(1), full_matrices=False)
        lengths = values[: self.dimension] / (len(prompts) - 1) ** 0.5
        frame = lengths[:, None] * right[: self.dimension]
        return LinearDecoder(mean, frame.reshape(self.dimension, *mean.shape))

    def _read(self, width: int) -> list[Tensor]:
        """The prompts in the files.

        Raises:
            InputError: a file cannot be read or holds no prompt of the right shape.
        """
        shape, found = (self.length, width), []
        for path in self.prompts:
            try:
                tensors = load_file(Path(path))
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"intrinsic-prompt: cannot read prompts from {path}: {error}."
                ) from error
            before = len(found)
            for tensor in tensors.values():
                if tuple(tensor.shape) == shape:
                    found.append(tensor)
                elif tensor.dim() == 3 and tuple(tensor.shape[1:]) == shape:
                    found.extend(tensor)
            if len(found) == before:
                shapes = sorted({tuple(tensor.shape) for tensor in tensors.values()})
                raise InputError(
                    f"intrinsic-prompt: {path} has no prompt of shape {shape}; it has tensors of "
                    f"the shapes {shapes[:5]}. Choose length to match, and prompts of this model."
                )
        return found


class LinearDecoder(nn.Module):
    """z ↦ M + Σ z_i V_i; shapes: z (k,), mean M (n, d), frame V (k, n, d).

    With a seed, mean and frame follow from it and are not saved.
    """

    mean: Tensor
    frame: Tensor

    def __init__(self, mean: Tensor, frame: Tensor, seed: int | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=seed is None)
        self.register_buffer("frame", frame, persistent=seed is None)
        if seed is not None:
            self.register_buffer("seed", torch.tensor(seed))

    def forward(self, z: Tensor) -> Tensor:
        """The rows (n, d)."""
        return self.mean + torch.einsum("k,knd->nd", z, self.frame)
