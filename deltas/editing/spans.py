"""Controls in parallel: from the input of a sub-layer, or of a whole block, to its output.

A *span* is what lies between the state h that a control reads and the output that it adds to:

    attention   from the input of the query's map to the output of attention.output
    mlp         from the input of mlp.up to the output of mlp.down
    block       from the input of a block to its output, residual connections and norms included

The first two are found by their linear maps, because not every architecture has one module around
them (BERT's and OPT's MLP are two maps of the block). Where a block normalises before the
sub-layer, h is the normalised state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError, unknown

Around = Literal["attention", "mlp", "block"]
_ENDS = {"attention": ("attention.query", "attention.output"), "mlp": ("mlp.up", "mlp.down")}


@dataclass(frozen=True)
class Span:
    """A part of a block with one state going in and one coming out.

    Attributes:
        entry: the site whose input is h.
        exit: the site whose output the control adds to.
        width_in: width of h.
        width_out: width of the output.
        like: a parameter of the exit, for dtype and device.
    """

    entry: Site
    exit: Site
    width_in: int
    width_out: int
    like: Tensor

    @property
    def path(self) -> str:
        """Path of the module at whose output the control acts."""
        return self.exit.path


def find_spans(host: Host, around: Around, layers: Iterable[int] | None = None) -> list[Span]:
    """The spans of one kind, one a block.

    Raises:
        InputError: there is no such kind, a layer does not exist, or the architecture has no such
            span in every block.
    """
    if around not in get_args(Around):
        raise unknown("around", around, get_args(Around))
    if around == "block":
        width = state_width(host)
        blocks = host.find(("block",), layers)
        return [Span(b, b, width, width, host.like(b)) for b in blocks]
    entry, end = (by_layer(host, name, layers) for name in _ENDS[around])
    if entry.keys() != end.keys():
        raise InputError(
            f"{host.sites.model_type} has {_ENDS[around][0]} in the blocks {sorted(entry)} but "
            f"{_ENDS[around][1]} in {sorted(end)}; choose layers that have both, or around='block'."
        )
    return [
        Span(entry[t], end[t], entry[t].in_features, end[t].out_features, host.weight(end[t]))
        for t in entry
    ]


def state_width(host: Host) -> int:
    """Width of the states that go from block to block.

    Raises:
        InputError: the configuration does not say.
    """
    width = getattr(host.config, "hidden_size", None)
    if not isinstance(width, int):
        raise InputError(
            f"the configuration of {host.sites.model_type} has no single hidden_size, so the width "
            "of its blocks is unknown; choose a delta at linear maps, such as lora or houlsby."
        )
    return width


def by_layer(host: Host, name: str, layers: Iterable[int] | None = None) -> dict[int, Site]:
    """The first site of that name in every block."""
    found: dict[int, Site] = {}
    for site in host.find((name,), layers):
        if site.layer is not None:
            found.setdefault(site.layer, site)
    return found


def act_across(host: Host, span: Span, law: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Pass a span's output y through ``law(h, y)``, h the state at its entry."""
    if span.entry is span.exit:
        host.on_output(span.exit.module, lambda inputs, output: law(inputs[0], output))
        return
    carried = host.carry()

    def note(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        carried.value = args[0] if args else next(iter(kwargs.values()))
        return args, kwargs

    host.on_call(span.entry.module, note)
    host.on_output(span.exit.module, lambda _, output: law(carried.take(), output))
