"""One float dtype for all terms of a system or a cost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltacontrol.theory.errors import InputError

__all__ = ["require_one_dtype"]


def require_one_dtype(**terms: Sequence[Tensor] | Tensor | None) -> None:
    """Refuse terms of several dtypes, or of whole numbers.

    Raises:
        InputError: naming the dtypes of each term.
    """
    found = {
        name: {item.dtype for item in (given[None] if isinstance(given, Tensor) else given)}
        for name, given in terms.items()
        if given is not None
    }
    kinds = set().union(*found.values())
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        shown = ", ".join(
            f"{name} {' and '.join(sorted(str(k).removeprefix('torch.') for k in kinds))}"
            for name, kinds in found.items()
        )
        raise InputError(f"the terms have dtypes {shown}; expected one float dtype for all")
