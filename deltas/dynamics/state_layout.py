"""A state made of several tensors, kept in one.

The state that enters a block is the hidden states alone in most models, and is then that tensor.
Where more reaches a later stage (the output of an encoder, a value that a control leaves, the
controls that act in several stages), all of it is the state, laid end to end in one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Part:
    """Shape and dtype of one part of a state."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> Part:
        """The part that ``value`` is."""
        return cls(value.shape, value.dtype)


@dataclass(frozen=True)
class StateLayout:
    """Named parts of a state, in order.

    One part is the state itself. Several are a vector (n,), n their entries together, of the widest
    of their dtypes; integers, such as tokens, are numbers of it.

    Attributes:
        parts: by name.

    Example:
        >>> layout = StateLayout.of({"hidden": torch.zeros(2, 3), "shared": torch.ones(4)})
        >>> x = layout.pack({"hidden": torch.zeros(2, 3), "shared": torch.ones(4)})
        >>> tuple(x.shape), layout.unpack(x)["shared"].tolist()
        ((10,), [1.0, 1.0, 1.0, 1.0])
    """

    parts: Mapping[str, Part]

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> StateLayout:
        """The layout of these parts."""
        return cls({name: Part.of(value) for name, value in values.items()})

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        dtypes = [part.dtype for part in self.parts.values()]
        result = dtypes[0]
        for dtype in dtypes[1:]:
            result = torch.promote_types(result, dtype)
        return result

    @property
    def shape(self) -> torch.Size:
        """Of the state."""
        shapes = [part.shape for part in self.parts.values()]
        if len(shapes) == 1:
            return shapes[0]
        return torch.Size([sum(shape.numel() for shape in shapes)])

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The state of these parts; others are left out."""
        if len(self.parts) == 1:
            return values[next(iter(self.parts))]
        return torch.cat([values[name].reshape(-1).to(self.dtype) for name in self.parts])

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of a state.

        Raises:
            InputError: the state has not the number of entries of the parts.
        """
        if len(self.parts) == 1:
            return {next(iter(self.parts)): x}
        sizes = [part.shape.numel() for part in self.parts.values()]
        if x.shape != self.shape:
            raise InputError(
                f"the state has shape {tuple(x.shape)}, expected {tuple(self.shape)}: "
                + ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.parts.items())
                + " end to end."
            )
        # Cloned, because the rounding of a matrix product depends on its alignment.
        return {
            name: piece.view(part.shape).clone().to(part.dtype)
            for (name, part), piece in zip(self.parts.items(), x.split(sizes), strict=True)
        }

    def holds(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the state gives these parts back exactly."""
        found = self.unpack(self.pack(values))
        return all(torch.equal(found[name], values[name]) for name in self.parts)
