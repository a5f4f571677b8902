"""The files of a peft adapter: configuration, weights in safetensors, maybe a README.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltacontrol.deltas import card, hub
from deltacontrol.theory.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, card.FILE)


@dataclass(frozen=True)
class Adapter:
    """What the files hold.

    Attributes:
        config: the configuration, as written.
        tensors: the weights by key.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read(path: str | Path) -> Adapter:
    """Read an adapter's folder, or one on the hub by its id, ``owner/name``.

    Raises:
        InputError: a file is missing, is damaged, or is a pickle; or as
            `deltacontrol.deltas.hub.folder`.
    """
    folder = hub.folder(path, FILES).expanduser()
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not config.is_file():
        inside = (
            sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        )
        hint = (
            f"its sub-folders {', '.join(inside)} do: give one of them"
            if inside
            else "give the folder that peft's save_pretrained wrote"
        )
        raise InputError(f"{folder} holds no {CONFIG}; {hint}.")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{config} is not readable as JSON: {error}; save the adapter again."
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{config} holds a {type(values).__name__}; expected an object of fields.")
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = (
            "adapter_model.bin is a pickle, which can run code and is never read: load it with "
            "peft and call save_pretrained, which writes safetensors"
            if pickled
            else "copy it beside the configuration"
        )
        raise InputError(f"{folder} holds no {WEIGHTS}; {hint}.")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{weights} is damaged: {error}; copy or save the adapter again."
        ) from error
    broken = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise InputError(f"{weights} holds values that are not finite, in {', '.join(broken)}.")
    return Adapter(values, tensors)


def write(path: str | Path, adapter: Adapter, readme: str = "") -> None:
    """Write an adapter's folder, as peft lays it out, with a model card where one is given.

    Raises:
        InputError: the folder cannot be written, or holds an adapter already.
    """
    folder = Path(path).expanduser()
    try:
        wanted = FILES if readme else (CONFIG, WEIGHTS)
        present = [name for name in wanted if (folder / name).exists()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"the folder {folder} cannot be written ({error}); name another one."
        ) from error
    if present:
        raise InputError(
            f"{folder} holds {' and '.join(present)} already; choose another folder, or delete it."
        )
    text = json.dumps(dict(adapter.config), indent=2, sort_keys=True, allow_nan=False)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in adapter.tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(text, encoding="utf-8")
        if readme:
            (folder / card.FILE).write_text(readme, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the adapter to {folder}: {error}.") from error


def whole(value: float) -> int | float:
    """``value`` as an integer where it is one: peft writes lora_alpha as 16, not 16.0."""
    return int(value) if math.isfinite(value) and value == int(value) else value
