"""A folder with the deltas of one model: what they are, their controls, and their base.

``deltas.json`` holds the configurations of the deltas, the seed, the identity of the base, a digest
of the controls and the versions of the packages; ``controls.safetensors`` holds the controls;
``README.md`` is a model card (`deltacontrol.deltas.card`), which nothing reads. Nothing is pickled,
and no path of the machine that wrote it is named.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import card, hub
from deltacontrol.theory.errors import InputError

DESCRIPTION, CONTROLS = "deltas.json", "controls.safetensors"
FILES = (DESCRIPTION, CONTROLS, card.FILE)
FORMAT = "deltacontrol deltas 1"
_KEYS = ("format", "deltas", "seed", "base", "controls", "versions")
_BASE_KEYS = ("class", "name", "dtype", "config", "weights")
_KINDS = {"deltas": list, "seed": int, "base": dict, "controls": str, "versions": dict}
_BASE_KINDS = {"class": str, "name": str, "dtype": str, "config": dict, "weights": str}
_WORDS = {list: "a list", int: "an integer", dict: "an object", str: "a text"}
_EXPECTED = "the JSON object that save() writes"
_AGAIN = "Copy the whole folder again, or save it again."
_SAMPLED = 1024
# Entries of a configuration that say where it came from or what a pass returns, not which map the
# model is; trainers and forward passes set some of them.
_NO_IDENTITY = {
    "_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """What such a folder holds.

    Attributes:
        deltas: the configurations, as `Delta.to_dict` writes them, in order.
        seed: that the deltas were attached with.
        base: the identity of the base model, as `identity` gives it.
        controls: the controls by name.
    """

    deltas: list[dict[str, Any]]
    seed: int
    base: dict[str, Any]
    controls: dict[str, Tensor]


def architecture(model: PreTrainedModel) -> dict[str, Any]:
    """What a base model is, without its weights.

    Returns:
        Plain JSON values: class, name (a name of the hub, or the last part of a path), dtype and
        configuration, whose numbers without an end are the texts "inf", "-inf" and "nan".
    """
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {
        "class": type(model).__name__,
        "name": hub.public_name(model.name_or_path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _identifying(config),
    }


def identity(model: PreTrainedModel, left_out: Container[str] = ()) -> dict[str, Any]:
    """What tells one base model from another: its `architecture` and a digest of its weights.

    The digest is a SHA-256 over every parameter and saved buffer, in the order of their names:
    name, shape, dtype, up to 1024 entries at even distances, and the sum of all entries' bits, read
    as integers, modulo 2^64. So a change of any single entry changes it, and a model of billions of
    parameters is read once and not copied.

    Args:
        model: a base model without deltas acting in it.
        left_out: names of parameters that do not count, because controls stand for them.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
            digest.update(_sample(value))
    return {**architecture(model), "weights": digest.hexdigest()}


def _sample(value: Tensor) -> bytes:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    bits = value.detach().reshape(-1).contiguous().view(kinds.get(value.itemsize, torch.int64))
    count = min(len(bits), _SAMPLED)
    places = torch.arange(count, device=bits.device) * (len(bits) - 1) // max(count - 1, 1)
    total = bits.sum(dtype=torch.int64)
    return bits[places].cpu().numpy().tobytes() + total.cpu().numpy().tobytes()


def _identifying(config: Any) -> Any:
    if isinstance(config, dict):
        kept = {k: v for k, v in config.items() if k not in _NO_IDENTITY}
        return {key: _identifying(value) for key, value in kept.items()}
    return _finite(config)


def _finite(value: Any) -> Any:
    """A value with texts for infinity and NaN: JSON has no such numbers, and NaN is not itself."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def check_same_base(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Refuse deltas that were saved with another base.

    Args:
        saved: identity of the base that the deltas were saved with.
        own: identity of the base that they are to be laid on, or its architecture alone.
        folder: that they were saved in, for the message.

    Raises:
        InputError: a part differs; the message names both sides.
    """
    differences = []
    for key in ("class", "dtype"):
        if saved[key] != own[key]:
            differences.append(f"{key} is {saved[key]} there and {own[key]} here")
    theirs, ours = saved["config"], own["config"]
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            there, here = (repr(c[key]) if key in c else "absent" for c in (theirs, ours))
            differences.append(f"{key} of the configuration is {there} there and {here} here")
    if not differences and "weights" in own and saved["weights"] != own["weights"]:
        differences.append(
            f"the weights have the digest {saved['weights'][:12]} there and "
            f"{own['weights'][:12]} here"
        )
    if differences:
        raise InputError(
            f"the deltas in {folder} belong to another base, {saved['name'] or 'without a name'}, "
            f"than this one, {own['name'] or 'without a name'}: {'; '.join(differences)}. Load the "
            "base that they were saved with."
        )


def write(folder: str | Path, saved: Saved, readme: str) -> None:
    """Write such a folder, whole or not at all; an earlier one of the kind is replaced.

    It is made beside the place and then renamed; where an earlier one stands there, it is moved
    away first, and moved back if anything ends the renaming, an interrupt too. Nothing is deleted
    before a whole folder stands at the place.

    Raises:
        InputError: there is something else at that place, or it cannot be written.
    """
    try:
        target = Path(folder).resolve()
        _check_free(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        had_one = target.exists()
        beside = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"the folder {folder} cannot be written ({getattr(error, 'strerror', '') or error}); "
            "name another one"
        ) from error
    new, old = beside / "new", beside / "old"
    try:
        _fill(new, saved, readme)
        if had_one:
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        if target.exists() or not had_one:
            shutil.rmtree(beside, ignore_errors=True)


def _fill(folder: Path, saved: Saved, readme: str) -> None:
    folder.mkdir()
    tensors = {name: value.contiguous() for name, value in saved.controls.items()}
    save_file(tensors, folder / CONTROLS, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "deltas": saved.deltas,
        "seed": saved.seed,
        "base": saved.base,
        "controls": _digest(folder / CONTROLS),
        "versions": _versions(),
    }
    text = json.dumps(description, indent=2, allow_nan=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    (folder / card.FILE).write_text(readme, encoding="utf-8")


def read(folder: str | Path) -> Saved:
    """Read such a folder.

    Raises:
        InputError: it is no such folder, a file is missing, damaged or does not belong to the
            other, or it was written in another format.
    """
    folder = Path(folder)
    for name in (DESCRIPTION, CONTROLS):
        try:
            there = (folder / name).is_file()
        except OSError as error:  # such as a name that is too long
            raise InputError(f"{folder} cannot be read: {error.strerror}") from error
        if not there:
            raise InputError(
                f"{folder} has no {name}; expected a folder that save() wrote, with {DESCRIPTION} "
                f"and {CONTROLS}."
            )
    description = _description(folder)
    if _digest(folder / CONTROLS) != description["controls"]:
        raise InputError(
            f"{folder / CONTROLS} has the SHA-256 {_digest(folder / CONTROLS)[:12]}, but "
            f"{DESCRIPTION} says {str(description['controls'])[:12]}: the two were not saved "
            "together, or the file was changed; copy the whole folder again."
        )
    try:
        controls = load_file(folder / CONTROLS)
    except SafetensorError as error:
        raise InputError(f"{folder / CONTROLS} is no safetensors file: {error}") from error
    return Saved(description["deltas"], description["seed"], description["base"], controls)


def _description(folder: Path) -> dict[str, Any]:
    """The checked content of ``deltas.json``."""
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error}); expected {_EXPECTED}. {_AGAIN}") from error
    if not isinstance(description, dict):
        raise InputError(
            f"{file} holds a {type(description).__name__}; expected {_EXPECTED}. {_AGAIN}"
        )
    if description.get("format") != FORMAT:
        raise InputError(
            f"{file} has the format {description.get('format')!r}, expected {FORMAT!r}: another "
            "program wrote it, or another version of this one."
        )
    _check_keys(file, "", description, _KEYS)
    _check_kinds(file, "", description, _KINDS)
    _check_keys(file, " of base", description["base"], _BASE_KEYS)
    _check_kinds(file, " of base", description["base"], _BASE_KINDS)
    for number, delta in enumerate(description["deltas"], 1):
        if not isinstance(delta, dict) or not isinstance(delta.get("name"), str):
            raise InputError(
                f"{file}: delta {number} is {_short(delta)}; expected an object with the name of "
                f"a delta and its fields. {_AGAIN}"
            )
    seed = description["seed"]
    if isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise InputError(
            f"{file}: seed is {_short(seed)}; expected an integer of 64 bits. {_AGAIN}"
        )
    return description


def _check_keys(file: Path, of: str, entries: dict[str, Any], expected: Iterable[str]) -> None:
    if set(entries) != set(expected):
        raise InputError(
            f"{file} has the entries{of} {', '.join(sorted(entries)) or 'none'} where "
            f"{', '.join(sorted(expected))} are expected. {_AGAIN}"
        )


def _check_kinds(file: Path, of: str, entries: dict[str, Any], kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(entries[key], kind):
            raise InputError(
                f"{file}: {key}{of} is {_short(entries[key])}; expected {_WORDS[kind]}. {_AGAIN}"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_free(target: Path) -> None:
    """Refuse to write over anything but an empty folder or one that `write` has made."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; give save() a folder.")
    names = {path.name for path in target.iterdir()}
    others = sorted(names - set(FILES))
    if others:
        raise InputError(
            f"{target} holds other files ({', '.join(others[:3])}), which save() would delete; "
            "give it a folder of its own."
        )
    if names:
        if DESCRIPTION not in names:
            raise InputError(f"{target} was not written by save(); give it a folder of its own.")
        _description(target)
    if card.FILE in names:
        text = (target / card.FILE).read_text(encoding="utf-8", errors="replace")
        if not card.is_own(text):
            raise InputError(
                f"{target / card.FILE} was changed since save() wrote it, or is not from it, "
                "and would be replaced; move it away, or give save() another folder."
            )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("deltacontrol", "torch", "transformers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
