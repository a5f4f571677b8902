"""OFT and BOFT: block rotations of the input of linear maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.fields import Field
from deltacontrol.deltas.interop.format import Attached, Slot, shared
from deltacontrol.deltas.interop.modules import FLAG, NAMES, NO_DROPS, ModuleFormat, biases
from deltacontrol.deltas.methods.boft import BOFT
from deltacontrol.deltas.methods.oft import OFT

# peft refuses a series without a version: before 0.18 its terms were others.
WRITTEN_AS = "0.21.2"


class OftFormat(ModuleFormat):
    """R_i from the entries of Q_i above the diagonal, (n, b (b - 1) / 2).

    A width that the block size does not divide gets, in peft, the nearest size that does; such an
    adapter is refused by its shapes, because one size no longer says which blocks it has.
    """

    peft_type = "OFT"
    fields = {
        **NAMES,
        "r": Field(0, "an integer"),
        "oft_block_size": Field(32, "an integer"),
        "module_dropout": NO_DROPS,
        "fan_in_fan_out": FLAG,
        "bias": biases("oft_only"),
        "init_weights": Field(True, "true or false"),
        "coft": Field(False, only=(False,), why="it projects the rotations in every pass"),
        "eps": Field(6e-5, "a number"),
        "block_share": FLAG,
        "use_cayley_neumann": Field(True, "true or false"),
        "num_cayley_neumann_terms": Field(5, "a positive integer"),
    }
    writes = (OFT,)
    bias_word = "oft_only"
    kind = OFT
    linear_only = True

    def fields_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Either the size of the blocks or their number, and the series."""
        terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else 0
        return {
            "block_size": config["oft_block_size"] or OFT.block_size,
            "num_blocks": config["r"],
            "share": config["block_share"],
            "neumann_terms": terms,
        }

    def config_of(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """Peft takes a size or a number, the other one zero."""
        count, terms = shared(attached, "num_blocks"), shared(attached, "neumann_terms")
        return {
            "r": count,
            "oft_block_size": 0 if count else shared(attached, "block_size"),
            "block_share": shared(attached, "share"),
            "use_cayley_neumann": bool(terms),
            "num_cayley_neumann_terms": terms or 5,
            "peft_version": WRITTEN_AS,
        }

    def slots(self, delta: OFT, site: Site) -> list[Slot]:
        """Q."""
        size, count = delta.blocks(site)
        rows = 1 if delta.share else count
        return [self.slot(site, "oft_R.weight", "q", rows, size * (size - 1) // 2)]


class BoftFormat(ModuleFormat):
    """M (m, n, b, b) and s (out, 1)."""

    peft_type = "BOFT"
    fields = {
        **NAMES,
        "boft_block_size": Field(4, "an integer"),
        "boft_block_num": Field(0, "an integer"),
        "boft_n_butterfly_factor": Field(1, "a positive integer"),
        "boft_dropout": NO_DROPS,
        "fan_in_fan_out": FLAG,
        "bias": biases("boft_only"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (BOFT,)
    bias_word = "boft_only"
    kind = BOFT
    linear_only = True

    def fields_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Either the size of the blocks or their number, and the factors."""
        return {
            "block_size": config["boft_block_size"] or BOFT.block_size,
            "num_blocks": config["boft_block_num"],
            "num_factors": config["boft_n_butterfly_factor"],
        }

    def config_of(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """Peft takes a size or a number, the other one zero."""
        count = shared(attached, "num_blocks")
        return {
            "boft_block_num": count,
            "boft_block_size": 0 if count else shared(attached, "block_size"),
            "boft_n_butterfly_factor": shared(attached, "num_factors"),
        }

    def slots(self, delta: BOFT, site: Site) -> list[Slot]:
        """M and s."""
        size, count = delta.blocks(site)
        width = site.out_features
        return [
            self.slot(site, "boft_R", "M", delta.num_factors, count, size, size),
            Slot(
                f"{self.root}{site.path}.boft_s",
                (width, 1),
                (f"{site.path}.s",),
                split=lambda gain: (gain.flatten(),),
                join=_column,
            ),
        ]


def _column(controls: Sequence[Tensor]) -> Tensor:
    return controls[0][:, None]


FORMATS = (OftFormat(), BoftFormat())
