"""ADALORA: paths in SVD form, whose dropped ranks the file leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.adapter import whole
from deltacontrol.deltas.interop.factors import features
from deltacontrol.deltas.interop.fields import Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot, shared
from deltacontrol.deltas.interop.formats.lora import LORA_FIELDS
from deltacontrol.deltas.interop.targets import as_sites, short_names, targets
from deltacontrol.deltas.methods.adalora import AdaLoRA
from deltacontrol.theory.errors import InputError

# peft divides by the number of ranks plus this.
_EPSILON = 1e-5
# A schedule is fractions of the steps here, and steps there: of so many.
_STEPS = 1000


class AdaloraFormat(Format):
    """ΔW = α/(init_r + 1e-5)·B (A ∘ E); rank_pattern says which of init_r are kept."""

    peft_type = "ADALORA"
    fields = {
        **LORA_FIELDS,
        "use_dora": Field(False, only=(False,), why="peft has no DoRA in SVD form"),
        "use_rslora": Field(False, only=(False,), why="peft does not read it here"),
        "lora_alpha": Field(8, "a positive number"),
        "rank_pattern": Field(None, "an object of lists of true and false"),
        "alpha_pattern": Field({}, only=({}, None), why="peft does not read it here"),
        "target_r": Field(8, "a positive integer"),
        "init_r": Field(12, "a positive integer"),
        "tinit": Field(0, "an integer"),
        "tfinal": Field(0, "an integer"),
        "deltaT": Field(1, "a positive integer"),
        "beta1": Field(0.85, "a number"),
        "beta2": Field(0.85, "a number"),
        "orth_reg_weight": Field(0.5, "a number"),
        "total_step": Field(None, "a positive integer"),
    }
    writes = (AdaLoRA,)
    bias_word = "lora_only"

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One AdaLoRA; the dropped ranks are masked."""
        paths = targets(config, host)
        rank, steps = config["init_r"], config["total_step"] or 1
        delta = AdaLoRA(
            rank=rank,
            target_rank=config["target_r"],
            alpha=float(config["lora_alpha"]),
            sites=as_sites(paths, host),
            dropout=config["lora_dropout"],
            warmup=config["tinit"] / steps,
            final=config["tfinal"] / steps,
            interval=config["deltaT"],
            sensitivity_decay=config["beta1"],
            uncertainty_decay=config["beta2"],
            orthogonality=config["orth_reg_weight"],
        )
        masks = _masks(config["rank_pattern"] or {}, paths, rank)
        slots = [s for path, mask in masks.items() for s in self._slots(path, mask, host)]
        values = {f"{path}.mask": mask for path, mask in masks.items()}
        return Plan([delta], slots, paths, values=values)

    def _slots(self, path: str, mask: Tensor, host: Host) -> list[Slot]:
        """The kept rows of A and E, and columns of B."""
        wide, narrow = features(path, host)
        rank, kept = len(mask), int(mask.sum())
        ratio = rank / (rank + _EPSILON)  # of peft's scale to α/r
        key = f"{self.root}{path}.lora_"

        def spread(value: Tensor) -> Tensor:
            """Rows at the places that the mask keeps, zero at the others."""
            full = value.new_zeros(rank, *value.shape[1:])
            full[mask] = value
            return full

        return [
            Slot(
                f"{key}A", (kept, wide), (f"{path}.Q",),
                lambda a: (spread(a),), lambda c: c[0][mask],
            ),
            Slot(
                f"{key}B", (narrow, kept), (f"{path}.P",),
                lambda b: (spread(b.T).T,), lambda c: c[0][:, mask],
            ),
            Slot(
                f"{key}E", (kept, 1), (f"{path}.Lambda",),
                lambda e: (spread(e[:, 0].double() * ratio),),
                lambda c: (c[0][mask].double() / ratio).to(c[0].dtype)[:, None],
            ),
        ]  # fmt: skip

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """Paths at one module side by side; the narrower modules are filled up with dropped ranks.

        peft has one init_r for all modules, and divides by it whatever a module keeps.
        """
        first = attached[0].delta
        scale = first.alpha / first.rank
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        for item in attached:
            ratio = item.delta.alpha / item.delta.rank / scale
            for site in host.find(item.delta.sites, item.delta.layers):
                q, p, values, mask = (
                    item.controls[f"{site.key}.{leaf}"] for leaf in ("Q", "P", "Lambda", "mask")
                )
                parts.setdefault(site.path, []).append((q, site.spread(p.T), values * ratio, mask))
        rank = max(sum(len(mask) for *_, mask in pieces) for pieces in parts.values())
        controls: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for path, pieces in parts.items():
            q, p, values, mask = (
                pad_rows(torch.cat(tensors), rank) for tensors in zip(*pieces, strict=True)
            )
            masks[path] = mask
            controls |= {f"{path}.Q": q, f"{path}.P": p.T, f"{path}.Lambda": values}
        dropped = not all(bool(mask.all()) for mask in masks.values())
        config = {
            "target_modules": short_names(list(parts), host.sites.modules),
            "init_r": rank,
            "target_r": min(shared(attached, "target_rank"), rank),
            "lora_alpha": whole(first.alpha if rank == first.rank else scale * rank),
            "lora_dropout": shared(attached, "dropout"),
            "rank_pattern": {f"{p}.lora_E": m.tolist() for p, m in masks.items()}
            if dropped
            else None,
            "total_step": _STEPS,
            "tinit": round(shared(attached, "warmup") * _STEPS),
            "tfinal": round(shared(attached, "final") * _STEPS),
            "deltaT": shared(attached, "interval"),
            "beta1": shared(attached, "sensitivity_decay"),
            "beta2": shared(attached, "uncertainty_decay"),
            "orth_reg_weight": shared(attached, "orthogonality"),
        }
        return Description(config, controls, list(parts))


def pad_rows(value: Tensor, rows: int) -> Tensor:
    """The tensor with zero (false) rows behind it."""
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])


def _masks(pattern: Mapping[str, Any], paths: Sequence[str], rank: int) -> dict[str, Tensor]:
    """Which of the initial ranks each module keeps.

    Raises:
        InputError: a name or a list does not fit; all are listed.
    """
    named = {f"{path}.lora_E": path for path in paths}
    problems = [f"{name} is no targeted module" for name in pattern.keys() - named.keys()]
    for name, kept in pattern.items():
        if len(kept) != rank or not all(isinstance(item, bool) for item in kept):
            problems.append(f"{name} holds {len(kept)} entries, expected {rank} of true or false")
    if problems:
        raise InputError(f"rank_pattern does not fit: {'; '.join(sorted(problems))}.")
    return {
        path: torch.tensor(pattern.get(name, [True] * rank), dtype=torch.bool)
        for name, path in named.items()
    }


FORMATS = (AdaloraFormat(),)
