"""The command ``deltacontrol``: one subcommand a class, found by itself.

A subcommand is a dataclass with a method ``run``. Its fields are the options, and its docstrings
their help. Those of this package are the modules beside this one (each names its class
COMMAND); other packages add theirs through the entry-point group ``deltacontrol.commands``.

`deltacontrol --help` has a line a command; the help of a command is tyro's, wrapped.

Exit codes: 0 done, 1 a check did not hold, 2 wrong input (one message, no traceback), 130
interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, TextIO

from deltacontrol.experiments import cli
from deltacontrol.experiments.runs.citing import version
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError, unknown

GROUP = "deltacontrol.commands"
# Options of several values; given twice, the values of the first would be lost without a word.
SEVERAL = (
    *("--delta", "--deltas", "--where", "--only", "--sizes", "--predictors"),
    *("--verbaliser", "--track"),
)
SHELLS = ("bash", "zsh", "fish")
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
HEAD = "usage: deltacontrol [--load FILE] COMMAND [OPTIONS]\n\nDelta tuning as optimal control.\n"
OPTIONS = (
    ("COMMAND --help", "what a command does, with examples and options"),
    ("--load FILE", "take in a file of yours: a delta, a claim, ..."),
    ("--version", "the version"),
    (f"{COMPLETION[0]} SHELL", f"completion for {', '.join(SHELLS)}"),
)
_OWN_LINE = re.compile(r"``?deltacontrol [\w-]+``?: (.+)")


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
    if argv in ([], ["-h"], ["--help"]):
        print(overview(known))
        return 0 if argv else 2
    if words[0] in COMPLETION and (len(argv) < 2 or argv[1] not in SHELLS):
        return _fail(f"{words[0]} needs one of {', '.join(SHELLS)}, such as {COMPLETION[0]} bash")
    # Of one command its own help; of all, what completion needs.
    chosen = {argv[0]: known[argv[0]]} if argv[0] in known else known
    try:
        with _wrapped() if {"-h", "--help"} & set(argv) else nullcontext():
            command = tyro.extras.subcommand_cli_from_dict(
                chosen,
                prog="deltacontrol",
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


def overview(known: Mapping[str, type[Command]]) -> str:
    """The short help: a line a command."""
    width = max(40, shutil.get_terminal_size().columns)
    left = max(map(len, known), default=0)
    lines = [*HEAD.splitlines(), "", "commands:"]
    lines += [f"  {name:{left}}  {_summary(kind)}" for name, kind in known.items()]
    lines += ["", "options:"]
    left = max(len(words) for words, _ in OPTIONS)
    lines += [f"  {words:{left}}  {meaning}" for words, meaning in OPTIONS]
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)


def _summary(kind: type) -> str:
    """The first line of the command's module, else of its class."""
    module = (sys.modules[kind.__module__].__doc__ or "").strip().partition("\n")[0]
    own = _OWN_LINE.match(module)
    line = own[1] if own else (kind.__doc__ or "").strip().partition("\n")[0]
    return line.rstrip(".")


class _Held(io.StringIO):
    """Output that is held back, for a terminal of the same kind."""

    encoding = property(lambda self: self.out.encoding)  # type: ignore[assignment]

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self.out = out

    def isatty(self) -> bool:
        return self.out.isatty()


@contextmanager
def _wrapped() -> Iterator[None]:
    """Wrap what is printed at the width of the terminal; tyro does so for its boxes alone."""
    held = _Held(sys.stdout)
    try:
        with redirect_stdout(held):
            yield
    finally:
        text = re.sub(r"\n{3,}", "\n\n", held.getvalue())
        width = max(40, shutil.get_terminal_size().columns)
        sys.stdout.write("\n".join(part for line in text.split("\n") for part in wrap(line, width)))


def wrap(line: str, width: int) -> list[str]:
    """One line of help as lines of at most `width`; a command's continuation can be copied."""
    if len(line) <= width or line[:1] in "╭│╰+|\x1b":
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    if not line.lstrip().startswith("deltacontrol "):
        return textwrap.wrap(line, width, subsequent_indent=indent)
    parts = textwrap.wrap(
        line, width - 2, subsequent_indent=f"{indent}    ", break_on_hyphens=False
    )
    return [*(f"{part} \\" for part in parts[:-1]), parts[-1]]


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
