"""HIRA, DELORA, MISS and GRALORA: changes of weight made of small matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.fields import COMMON, LAYERS, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Slot, shared
from deltacontrol.deltas.interop.modules import FLAG, NAMES, SIZE, ModuleFormat, biases
from deltacontrol.deltas.methods.delora import DeLoRA
from deltacontrol.deltas.methods.gralora import GraLoRA
from deltacontrol.deltas.methods.hira import HiRA
from deltacontrol.deltas.methods.miss import MiSS

_RANKS = Field({}, "an object of positive integers")
_DROP = Field(0.0, "a number")


class HiraFormat(ModuleFormat):
    """A (r, in) and B (out, r). peft 0.21 reads rank_pattern and gives every module the rank r."""

    peft_type = "HIRA"
    fields = {
        **NAMES,
        "r": Field(32, "a positive integer"),
        "rank_pattern": _RANKS,
        "hira_dropout": _DROP,
        "fan_in_fan_out": FLAG,
        "init_weights": Field(True),
    }
    writes = (HiRA,)
    kind = HiRA
    same = {"r": "rank", "hira_dropout": "dropout"}

    def slots(self, delta: HiRA, site: Site) -> list[Slot]:
        """A and B."""
        return [
            self.slot(site, "hira_A", "A", delta.rank, site.in_features),
            self.slot(site, "hira_B", "B", site.out_features, delta.rank),
        ]


class DeloraFormat(ModuleFormat):
    """A (r, in), B (out, r), λ (1,) and the norms of the base weight (in,)."""

    peft_type = "DELORA"
    fields = {
        **NAMES,
        "r": SIZE,
        "rank_pattern": _RANKS,
        "delora_lambda": Field(15, "a number"),
        "lambda_pattern": Field({}, "an object of numbers"),
        "module_dropout": _DROP,
        "bias": biases("delora_only"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (DeLoRA,)
    bias_word = "delora_only"
    kind = DeLoRA
    same = {"module_dropout": "dropout"}
    patterned = {
        "r": ("rank_pattern", "rank"),
        "delora_lambda": ("lambda_pattern", "strength"),
    }
    linear_only = True

    def slots(self, delta: DeLoRA, site: Site) -> list[Slot]:
        """All four."""
        return [
            self.slot(site, "delora_A", "A", delta.rank, site.in_features),
            self.slot(site, "delora_B", "B", site.out_features, delta.rank),
            self.slot(site, "delora_lambda", "strength", 1),
            self.slot(site, "delora_w_norm", "norms", site.in_features),
        ]


class MissFormat(ModuleFormat):
    """D; init_weights says which variant the adapter is."""

    peft_type = "MISS"
    fields = {
        **NAMES,
        "r": Field(64, "a positive integer"),
        "mini_r": Field(1, "a positive integer"),
        "miss_dropout": _DROP,
        "bias": biases("MiSS_only", "miss_only"),
        "init_weights": Field(True, only=(True, False, "mini", "bat"), why="peft has no other"),
    }
    writes = (MiSS,)
    bias_word = "MiSS_only"
    kind = MiSS
    linear_only = True

    def fields_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The variant and its sizes; Bone never drops."""
        variant = {"mini": "mini", "bat": "bone"}.get(config["init_weights"], "miss")
        return {
            "rank": config["r"],
            "variant": variant,
            "columns": config["mini_r"],
            "dropout": 0.0 if variant == "bone" else config["miss_dropout"],
        }

    def config_of(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """The same in peft's words."""
        variant = shared(attached, "variant")
        return {
            "r": shared(attached, "rank"),
            "mini_r": shared(attached, "columns"),
            "miss_dropout": shared(attached, "dropout"),
            "init_weights": {"mini": "mini", "bone": "bat"}.get(variant, True),
        }

    def slots(self, delta: MiSS, site: Site) -> list[Slot]:
        """D."""
        return [self.slot(site, "miss_block", "D", *delta.shape(site))]


class GraloraFormat(ModuleFormat):
    """A (k, in/k, r), B (k, r, out/k), and with a hybrid rank two factors of the whole."""

    peft_type = "GRALORA"
    fields = {
        **COMMON,
        "target_modules": TARGETS["target_modules"],
        **LAYERS,
        "r": Field(32, "a positive integer"),
        "hybrid_r": Field(0, "an integer"),
        "alpha": Field(64, "a number"),
        "gralora_dropout": _DROP,
        "gralora_k": Field(2, "a positive integer"),
        "fan_in_fan_out": FLAG,
        "bias": biases("gralora_only"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (GraLoRA,)
    bias_word = "gralora_only"
    kind = GraLoRA
    same = {
        "r": "rank",
        "hybrid_r": "hybrid_rank",
        "alpha": "alpha",
        "gralora_dropout": "dropout",
        "gralora_k": "num_blocks",
    }

    def slots(self, delta: GraLoRA, site: Site) -> list[Slot]:
        """Two factors, or four."""
        count, rank, whole = delta.num_blocks, delta.rank, delta.hybrid_rank
        wide, narrow = site.in_features, site.out_features
        slots = [
            self.slot(site, "gralora_A", "A", count, wide // count, rank),
            self.slot(site, "gralora_B", "B", count, rank, narrow // count),
        ]
        if whole:
            slots += [
                self.slot(site, "gralora_A_general.weight", "A_0", whole, wide),
                self.slot(site, "gralora_B_general.weight", "B_0", narrow, whole),
            ]
        return slots


FORMATS = (HiraFormat(), DeloraFormat(), MissFormat(), GraloraFormat())
