"""Checkpoints of a training: everything that its next step depends on, in one file.

A training's randomness is a function of (seed, step), so its state is the step count, the controls
and the optimiser's moments. The numbers go into the tensors of a safetensors file, the step, the
curve and the bookkeeping into its header. The file is replaced by a rename: at every moment there
is one whole checkpoint or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deltacontrol.experiments.runs.store import unwritable, write_tensors
from deltacontrol.theory.errors import InputError

FILE = "checkpoint.safetensors"


@dataclass
class Progress:
    """Bookkeeping of a training, all of it JSON.

    Attributes:
        step: Updates done.
        rows: The curve, one dictionary per step.
        seconds: Time spent, by all attempts together.
        peak_memory: Largest peak of all attempts, bytes.
        best: Value of the monitored metric and the step where it was reached.
        stale: Evaluations since then.
    """

    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    best: dict[str, float] | None = None
    stale: int = 0


def save(
    folder: Path,
    progress: Progress,
    controls: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    best_controls: Mapping[str, Tensor] | None,
) -> None:
    """Write the checkpoint of `folder`; raises `InputError` where it cannot be written."""
    tensors = {f"control/{name}": value.detach() for name, value in controls.items()}
    for name, parameter in controls.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    for name, value in (best_controls or {}).items():
        tensors[f"best/{name}"] = value
    write(folder, progress, tensors)


def write(folder: Path, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
    """Write bookkeeping and tensors; raises `InputError` where they cannot be written."""
    temporary = folder / (FILE + ".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, dict(tensors), metadata={"progress": json.dumps(asdict(progress))})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, folder / FILE)
    except OSError as error:
        raise unwritable(folder, error) from error


def read(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Bookkeeping and tensors of a checkpoint; fresh and none where there is none.

    Raises:
        InputError: The checkpoint is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return Progress(), {}
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            return progress, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise unusable(folder, error) from error


def steps_done(folder: Path) -> int:
    """Updates that the checkpoint of a folder holds; 0 where there is none to be read."""
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            return int(json.loads(file.metadata()["progress"])["step"])
    except Exception:  # none yet, or just being replaced
        return 0


def unusable(folder: Path, error: Exception) -> InputError:
    """The error of a checkpoint that cannot be put in place."""
    return InputError(
        f"the checkpoint {folder / FILE} cannot be used: {error}; delete the folder {folder} to "
        "begin this run anew"
    )


def load(
    folder: Path,
    controls: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Put the checkpoint of `folder`, if there is one, into `controls` and `optimizer`.

    Returns:
        The bookkeeping and the best controls so far; a fresh `Progress` where there is none.

    Raises:
        InputError: The checkpoint is damaged or belongs to other controls.
    """
    progress, tensors = read(folder)
    if not tensors:
        return progress, None
    try:
        moments: dict[str, dict[str, Tensor]] = {}
        for place, value in tensors.items():
            key, _, name = place.partition("/")
            if key not in ("control", "best"):
                moments.setdefault(name, {})[key] = value
        for name, parameter in controls.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"control/{name}"])
            state = moments.get(name)  # absent while the control has had no gradient
            if state is not None:
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in state.items()
                }
    except Exception as error:
        raise unusable(folder, error) from error
    best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
    return progress, best or None
