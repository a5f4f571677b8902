"""The file from which an interrupted solve continues.

It is one safetensors file: the tensors ``control.t`` and ``memory.NAME``, and as metadata the
solver's ``repr`` and the history. It is written beside its place and then put there, so that the
file is always whole.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltacontrol.theory.control.problem import Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers.solution import HISTORY, Memory

__all__ = ["Checkpoint"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a solve needs to go on.

    Attributes:
        controls: the last finite iterate.
        memory: what the solver reported with it.
        history: by the names in `HISTORY`, one entry per iterate up to this one.
    """

    controls: Controls
    memory: Memory
    history: dict[str, list[float]]

    def write(self, path: Path, solver: str) -> None:
        """Replace the file.

        Args:
            path: the file, in a folder that exists.
            solver: the solver's ``repr``.

        Raises:
            OSError: the file could not be written, for instance on a full disk; what was there
                before is left alone.
        """
        tensors = {f"control.{t}": u.contiguous() for t, u in enumerate(self.controls)}
        tensors |= {f"memory.{name}": v.contiguous() for name, v in self.memory.items()}
        metadata = {"solver": solver, "history": json.dumps(self.history)}
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, temporary, metadata=metadata)
            temporary.replace(path)
        except SafetensorError as error:  # safetensors wraps what the system says
            raise OSError(str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path, solver: str, like: Controls) -> Checkpoint:
        """Read a file that the same solver wrote for controls of the same shapes.

        Args:
            path: the file.
            solver: the solver's ``repr``.
            like: controls whose shapes are expected, and whose dtypes and devices are taken.

        Raises:
            InputError: the file is no checkpoint, or one of another solver or of other controls.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written_by, history = metadata["solver"], json.loads(metadata["history"])
            history = {name: [float(value) for value in history[name]] for name in HISTORY}
            lengths = {len(values) for values in history.values()}
            if len(lengths) != 1 or lengths == {0}:
                raise ValueError("its history is empty or uneven")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no checkpoint of a solve ({error}); delete it to start anew"
            ) from error
        if written_by != solver:
            raise InputError(
                f"{path} is a checkpoint of {written_by}, not of {solver}; delete it to start "
                "anew, or name another file"
            )
        kept = [name for name in tensors if name.startswith("control.")]
        names = [f"control.{t}" for t in range(len(kept))]
        found = [tuple(tensors[name].shape) for name in names if name in tensors]
        if len(kept) != len(like) or found != [tuple(control.shape) for control in like]:
            raise InputError(
                f"{path} holds controls of shapes {found}; expected "
                f"{[tuple(control.shape) for control in like]}; delete it to start anew"
            )
        if not math.isfinite(history["objective"][-1] + history["residual"][-1]):
            for values in history.values():  # the file holds the finite iterate before it
                values.pop()
        memory = {
            name.removeprefix("memory."): value.to(like[0].device) if like else value
            for name, value in tensors.items()
            if name.startswith("memory.")
        }
        controls = tuple(
            tensors[name].to(control.device, control.dtype)
            for name, control in zip(names, like, strict=True)
        )
        return cls(controls, memory, history)
