"""The command ``deltacontrol``: one subcommand a class, found by itself.

A subcommand is a dataclass with a method ``run``. Its fields are the options, and its docstrings
their help. Those of this package are the modules beside this one (each names its class
COMMAND); other packages add theirs through the entry-point group ``deltacontrol.commands``.

Exit codes: 0 done, 1 a check did not hold, 2 wrong input (one message, no traceback), 130
interrupted.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from deltacontrol.experiments import cli
from deltacontrol.experiments.runs.citing import version
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError, unknown

GROUP = "deltacontrol.commands"
# Options of several values; given twice, the values of the first would be lost without a word.
SEVERAL = ("--delta", "--where", "--only", "--sizes")
DESCRIPTION = """Delta tuning as optimal control.

A frozen Transformer is a discrete dynamical system and a delta (LoRA, adapter, prefix, ...) is a
control on it. Start with

    deltacontrol finetune --task movie --delta lora
    deltacontrol inspect --delta lora:rank=16 bitfit
    deltacontrol figures

Your own delta, solver, claim, task, model, figure or command is a Python file:

    deltacontrol --load my_delta.py finetune --delta mine

and read the version with deltacontrol --version.
"""


class Command(Protocol):
    """A subcommand, its options filled in."""

    def run(self) -> int | None:
        """Do it; the exit code, None for 0."""
        ...


def available() -> dict[str, type[Command]]:
    """The subcommands by name, in alphabetical order."""
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(cli.__path__):
        if info.name != "main":
            module = importlib.import_module(f"{cli.__name__}.{info.name}")
            found[info.name.replace("_", "-")] = module.COMMAND
    for entry in entry_points(group=GROUP):
        found[entry.name] = entry.load()
    added = ((name.replace("_", "-"), value) for name, value in plugins.values("COMMAND"))
    return plugins.merged("command", found, added)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(_main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    import tyro

    if argv == ["--version"]:
        print(f"deltacontrol {version()}")
        return 0
    try:
        argv, files = _loads(argv)
        for file in (*plugins.configured(Path.cwd()), *files):
            plugins.load(file)
        known = available()
    except InputError as error:
        return _fail(error)
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        return _fail(unknown("command", argv[0], known))
    words = [argument.partition("=")[0] for argument in argv]
    if twice := next((word for word in SEVERAL if words.count(word) > 1), None):
        return _fail(
            f"{twice} is given twice, and the first would be lost; give it once, several values "
            "behind one another (--delta lora bitfit)"
        )
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            known,
            prog="deltacontrol",
            description=DESCRIPTION,
            args=argv,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        return command.run() or 0
    except InputError as error:
        return _fail(error)
    except KeyboardInterrupt as stop:
        saved = f"; {stop}" if stop.args else ""
        print(f"interrupted{saved}; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}")


def _loads(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without every ``--load FILE``, and the files."""
    rest, files = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--load":
            file = next(arguments, None)
            if file is None or file.startswith("-"):
                raise InputError("--load needs the path of a Python file, such as my_delta.py")
            files.append(file)
        elif argument.startswith("--load="):
            files.append(argument.removeprefix("--load="))
        else:
            rest.append(argument)
    return rest, files


def _fail(error: Exception | str) -> int:
    print(f"deltacontrol: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
