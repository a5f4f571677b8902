"""Merging: controls that become part of the base weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from deltacontrol.deltas.quantised import refuse_quantised
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Merge:
    """How a base parameter takes up a control.

    Attributes:
        namespace: of the delta.
        name: of the base parameter.
        value: its merged value, given its present one; both in float64.
        whole: the control acts wherever a tied parameter is used, not only under this name.
        last: the control acts on the input of the map, before everything beside the parameter.
    """

    namespace: str
    name: str
    value: Callable[[Tensor], Tensor]
    whole: bool
    last: bool = False


def check_merges(
    merges: Iterable[Merge], ties: Callable[[str], list[str]], original: Callable[[str], Tensor]
) -> None:
    """Refuse a control that acts at one name of a tied parameter only, or at a quantised one.

    Args:
        merges: of all deltas.
        ties: the other names of a base parameter.
        original: the base's own parameter of a name.

    Raises:
        InputError: there is one; merging would change the parameter where the control does not act,
            or round it to the codes of a quantised weight.
    """
    for merge in merges:
        taken = {merge.name: original(merge.name)}
        refuse_quantised(taken, f"{merge.namespace} cannot be merged into")
        if not merge.whole and (tied := ties(merge.name)):
            raise InputError(
                f"{merge.namespace} cannot be merged: it acts at {merge.name}, which is tied "
                f"to {', '.join(tied)} and would change there too. Untie the model "
                "(tie_word_embeddings=False), or choose other sites."
            )


def merged_values(merges: Iterable[Merge], original: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The base parameters in float64 with all controls in them, by name.

    What stands for a parameter comes before what acts beside it, whatever the order; what changes
    the input of a map acts on the sum of both.

    Args:
        merges: of all deltas.
        original: the base's own parameter of a name.
    """
    merged: dict[str, Tensor] = {}
    for merge in sorted(merges, key=lambda merge: (not merge.whole, merge.last)):
        before = merged.get(merge.name)
        if before is None:
            before = original(merge.name).detach().double()
        merged[merge.name] = merge.value(before)
    return merged
