"""LORA: low-rank paths beside linear maps and embeddings, DoRA's magnitudes among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.adapter import whole
from deltacontrol.deltas.interop.factors import Piece, factor_slots, features, side_by_side
from deltacontrol.deltas.interop.fields import COMMON, LAYERS, PATTERNS, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot, shared
from deltacontrol.deltas.interop.targets import (
    as_sites,
    by_pattern,
    grouped,
    short_names,
    targets,
    to_patterns,
)
from deltacontrol.deltas.methods.dora import DoRA
from deltacontrol.deltas.methods.lora import LoRA
from deltacontrol.deltas.methods.parts.data_starts import unseen
from deltacontrol.theory.errors import InputError

# Initialisations after which the base weights are as they were. The others subtract their start
# from the base, so that the saved A and B mean nothing on the base itself.
_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")

LORA_FIELDS = {
    **COMMON,
    **TARGETS,
    **LAYERS,
    "r": Field(8, "a positive integer"),
    "lora_alpha": Field(8, "a number"),
    "lora_dropout": Field(0.0, "a number"),
    "fan_in_fan_out": Field(False, "true or false"),  # follows from the module's class
    "bias": Field("none", only=("none", "all", "lora_only"), why="peft has no other"),
    "use_rslora": Field(False, "true or false"),
    "init_lora_weights": Field(
        True,
        only=_INITS,
        why="others change the base model; save the adapter with "
        "path_initial_model_for_weight_conversion",
    ),
    "megatron_config": Field(None, only=(None,), why="it needs the Megatron runtime"),
    "megatron_core": Field("megatron.core"),
    "trainable_token_indices": Field(None, only=(None,), why="it trains rows of the embedding"),
    "loftq_config": Field({}),
    "eva_config": Field(None),
    "corda_config": Field(None),
    "lora_ga_config": Field(None),
    "use_dora": Field(False, "true or false"),
    "velora_config": Field(None, only=(None,), why="it changes the gradient"),
    "alora_invocation_tokens": Field(None, only=(None,), why="it acts behind certain tokens only"),
    "use_qalora": Field(False, only=(False,), why="it pools the inputs"),
    "qalora_group_size": Field(16, "an integer"),
    "monteclora_config": Field(None, only=(None,), why="it draws the weights at random"),
    "layer_replication": Field(None, only=(None,), why="it copies blocks of the model"),
    "lora_bias": Field(False, only=(False,), why="it adds a bias to B"),
    "target_parameters": Field(None, only=(None, []), why="it changes parameters without a module"),
    "use_bdlora": Field(None, only=(None,), why="its factors are block-diagonal"),
    "arrow_config": Field(None, only=(None,), why="it routes between adapters"),
    "kasa_config": Field(None, only=(None,), why="it changes the base model"),
    "ensure_weight_tying": Field(False, only=(False,), why="it trains both ends of a tie"),
}


class LoraFormat(Format):
    """ΔW = s·B A with s = α/r, or α/√r with use_rslora; with use_dora also magnitudes m."""

    peft_type = "LORA"
    fields = {**LORA_FIELDS, **PATTERNS}
    writes = (LoRA, DoRA)
    bias_word = "lora_only"

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One LoRA or DoRA for each rank and α; A, B and m as they are."""
        paths = targets(config, host)
        ranks = by_pattern(config["rank_pattern"] or {}, paths, config["r"])
        alphas = by_pattern(config["alpha_pattern"] or {}, paths, config["lora_alpha"])
        groups = grouped({path: (ranks[path], float(alphas[path])) for path in paths})
        deltas = [
            _delta(config, rank, alpha, as_sites(members, host))
            for (rank, alpha), members in groups.items()
        ]
        slots: list[Slot] = []
        for path in paths:
            slots += factor_slots(self.root, path, ranks[path], host)
            if config["use_dora"]:
                key = f"{self.root}{path}.lora_magnitude_vector"
                slots.append(Slot(key, (features(path, host)[1],), (f"{path}.m",)))
        return Plan([*deltas], slots, paths)

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """Paths at one module are put side by side, which adds their changes."""
        is_dora = isinstance(attached[0].delta, DoRA)
        if not all(isinstance(item.delta, DoRA) == is_dora for item in attached):
            raise InputError(
                "peft's use_dora is for all modules; lora and dora cannot go together."
            )
        pieces: dict[str, list[Piece]] = {}
        for item in attached:
            for site in host.find(item.delta.sites, item.delta.layers):
                pieces.setdefault(site.path, []).extend(_pieces(item, site))
        joined = {path: side_by_side(parts) for path, parts in pieces.items()}
        ranks = {path: len(piece.down) for path, piece in joined.items()}
        rooted = all(piece.rooted for piece in joined.values())
        alphas = {path: whole(piece.alpha(rooted)) for path, piece in joined.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        magnitudes = _magnitudes(attached, host) if is_dora else {}
        controls = {f"{path}.m": m for path, m in magnitudes.items()}
        controls |= {f"{path}.A": piece.down for path, piece in joined.items()}
        controls |= {f"{path}.B": piece.up for path, piece in joined.items()}
        config = {
            "target_modules": short_names(list(joined), host.sites.modules),
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": shared(attached, "dropout"),
            "use_rslora": rooted,
            "use_dora": is_dora,
            "rank_pattern": to_patterns(ranks, rank),
            "alpha_pattern": to_patterns(alphas, alpha),
        }
        return Description(config, controls, list(joined))


def _delta(
    config: Mapping[str, Any], rank: int, alpha: float, sites: tuple[str, ...]
) -> LoRA | DoRA:
    rooted, drop = config["use_rslora"], config["lora_dropout"]
    if config["use_dora"]:
        alpha = alpha * math.sqrt(rank) if rooted else alpha
        return DoRA(rank=rank, alpha=alpha, sites=sites, dropout=drop)
    scaling = "rslora" if rooted else "standard"
    return LoRA(rank=rank, alpha=alpha, sites=sites, dropout=drop, scaling=scaling)


def _pieces(item: Attached, site: Site) -> list[Piece]:
    """The path at a site; one that starts at the principal part also takes its start away."""
    delta, key = item.delta, site.key
    path = item.tree.get_submodule(key)
    if getattr(path, "started", None) is not None and not bool(path.started):
        raise unseen(delta.name)
    scale = float(path.scale)  # type: ignore[arg-type]
    rooted = getattr(delta, "scaling", "standard") == "rslora"

    def piece(down: Tensor, up: Tensor) -> Piece:
        whole_up = up if site.part is None else site.spread(up.T).T
        return Piece(down, whole_up, scale, delta.alpha, rooted)

    pieces = [piece(item.controls[f"{key}.A"], item.controls[f"{key}.B"])]
    start = getattr(path, "A_0", None), getattr(path, "B_0", None)
    starts_at_zero = getattr(delta, "init", "") == "orthogonal"  # B₀ A₀ = 0
    if start[0] is not None and start[1] is not None and not starts_at_zero:
        pieces.append(piece(start[0].cpu(), -start[1].cpu()))
    return pieces


def _magnitudes(attached: Sequence[Attached], host: Host) -> dict[str, Tensor]:
    """Magnitudes of whole modules; beside a slice they are the norms of the base weight.

    Raises:
        InputError: two deltas have magnitudes for one output feature.
    """
    found: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}
    for item in attached:
        for site in host.find(item.delta.sites, item.delta.layers):
            own = item.controls[f"{site.key}.m"]
            inside = (
                torch.ones_like(own) if site.part is None else site.spread(torch.ones_like(own))
            )
            inside = inside.bool()
            if site.path not in found:
                weight = host.original(f"{site.path}.weight").detach().cpu()
                rows = weight.T if isinstance(site.module, Conv1D | nn.Embedding) else weight
                found[site.path] = torch.linalg.vector_norm(rows, dim=1)
                taken[site.path] = torch.zeros_like(inside)
            if bool((inside & taken[site.path]).any()):
                raise InputError(f"two dora act at {site.path}; peft holds one there.")
            taken[site.path] |= inside
            found[site.path][inside] = own
    return found


FORMATS = (LoraFormat(),)
