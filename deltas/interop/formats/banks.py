"""RANDLORA and VBLORA: changes of weight from matrices that all modules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.fields import COMMON, LAYERS, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Plan, Slot, shared
from deltacontrol.deltas.interop.modules import FLAG, NAMES, ModuleFormat, biases
from deltacontrol.deltas.methods.randlora import RandLoRA
from deltacontrol.deltas.methods.vblora import VBLoRA
from deltacontrol.theory.errors import InputError

_DROP = Field(0.0, "a number")


class SharingFormat(ModuleFormat):
    """One delta in an adapter: what its sites share fits the widths of them all."""

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """The one delta, its shared controls among the others."""
        if len(attached) > 1:
            raise InputError(
                f"peft holds one {self.kind.name} in an adapter; export them one at a time."
            )
        described = super().describe(attached, host)
        common = {k: v for k, v in attached[0].controls.items() if k.startswith("shared.")}
        described.controls |= common
        return described


class RandloraFormat(SharingFormat):
    """Λ (r, n) and Γ (n, min); A and B follow from projection_prng_key, and the file holds them."""

    peft_type = "RANDLORA"
    fields = {
        **COMMON,
        "target_modules": TARGETS["target_modules"],
        **LAYERS,
        "r": Field(32, "a positive integer"),
        "projection_prng_key": Field(0, "an integer"),
        "save_projection": Field(True, "true or false"),
        "sparse": FLAG,
        "very_sparse": FLAG,
        "randlora_dropout": _DROP,
        "fan_in_fan_out": FLAG,
        "randlora_alpha": Field(640, "a number"),
        "bias": biases("randlora_only"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (RandLoRA,)
    bias_word = "randlora_only"
    kind = RandLoRA
    same = {
        "r": "rank",
        "projection_prng_key": "seed",
        "randlora_dropout": "dropout",
        "randlora_alpha": "alpha",
    }

    def fields_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """very_sparse goes before sparse."""
        kind = "sparse" if config["sparse"] else "uniform"
        kind = "very-sparse" if config["very_sparse"] else kind
        return super().fields_of(config) | {"bases": kind}

    def config_of(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """The same in peft's words."""
        kind = shared(attached, "bases")
        words = {"sparse": kind == "sparse", "very_sparse": kind == "very-sparse"}
        return super().config_of(attached) | words

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """The shared matrices must be the ones that the key gives."""
        plan = super().plan(config, host)
        (delta,) = plan.deltas
        assert isinstance(delta, RandLoRA)
        sites = [Site(path, host.sites.modules[path]) for path in plan.paths]
        pair = delta.pair([(site.in_features, site.out_features) for site in sites])
        for name, matrix in (("randlora_A", pair.A), ("randlora_B", pair.B)):
            plan.constants[f"base_model.{name}"] = matrix
            plan.constants |= {f"{self.root}{path}.{name}": matrix for path in plan.paths}
        if config["save_projection"]:
            plan.required = {"base_model.randlora_A", "base_model.randlora_B"}
        return plan

    def slots(self, delta: RandLoRA, site: Site) -> list[Slot]:
        """Λ and Γ."""
        small = min(site.in_features, site.out_features)
        count = delta.num_pairs(small)
        return [
            self.slot(site, "randlora_lambda", "Lambda", delta.rank, count),
            self.slot(site, "randlora_gamma", "Gamma", count, small),
        ]


class VbloraFormat(SharingFormat):
    """The bank (h, b), and the logits of each module."""

    peft_type = "VBLORA"
    fields = {
        **NAMES,
        "r": Field(4, "a positive integer"),
        "num_vectors": Field(256, "a positive integer"),
        "vector_length": Field(256, "a positive integer"),
        "topk": Field(2, "a positive integer"),
        "save_only_topk_weights": Field(
            False, only=(False,), why="the file then lacks the logits, so it cannot be trained on"
        ),
        "vblora_dropout": _DROP,
        "fan_in_fan_out": FLAG,
        "bias": biases("vblora_only"),
        "init_vector_bank_bound": Field(0.02, "a number"),
        "init_logits_std": Field(0.1, "a number"),
    }
    writes = (VBLoRA,)
    bias_word = "vblora_only"
    kind = VBLoRA
    same = {
        "r": "rank",
        "num_vectors": "num_vectors",
        "vector_length": "vector_length",
        "topk": "top_k",
        "vblora_dropout": "dropout",
        "init_vector_bank_bound": "bound",
        "init_logits_std": "logit_std",
    }

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """The modules, and the bank."""
        plan = super().plan(config, host)
        shape = config["num_vectors"], config["vector_length"]
        plan.slots.append(Slot("base_model.vblora_vector_bank", shape, ("shared.vectors",)))
        return plan

    def slots(self, delta: VBLoRA, site: Site) -> list[Slot]:
        """The logits of A and B."""
        count, length, rank = delta.num_vectors, delta.vector_length, delta.rank
        wide, narrow = site.in_features // length, site.out_features // length
        return [
            self.slot(site, "vblora_logits_A", "A", rank, wide, count),
            self.slot(site, "vblora_logits_B", "B", narrow, rank, count),
        ]


FORMATS = (RandloraFormat(), VbloraFormat())
