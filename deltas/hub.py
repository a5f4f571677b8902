"""The hub, through `huggingface_hub`: whether it can be asked, taking from it, putting there.

Whether it answers is told at once and not after a library's retries: one connection is tried, to
the hub's host or to the proxy that leads there, for at most a second (`SECONDS_VARIABLE` sets
another time, for a slow network). Without one, the copy that an earlier download has left in the
hub's own cache serves. What is put there needs a connection and a token.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from deltacontrol.theory.errors import InputError, first_lines

SECONDS_VARIABLE = "DELTACONTROL_HUB_SECONDS"
_PORTS = {"https": 443, "http": 80}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODEL = "a local folder or a packaged model (`deltacontrol models`)"


def is_id(place: str | Path) -> bool:
    """Whether this is no folder or file here, and has the form ``owner/name`` of an id."""
    try:
        return _ID.fullmatch(str(place)) is not None and not Path(place).exists()
    except OSError:  # such as a name that is too long
        return False


def public_name(name: str | None) -> str:
    """A name of the hub as it is; of a path the last part, because the rest is private."""
    name = name or ""
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not Path(name).exists():
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def folder(place: str | Path, files: Sequence[str]) -> Path:
    """The folder at a place: the place itself, or a download of the files where it is an id.

    Raises:
        InputError: it is an id, and the hub has no such repository, cannot be reached while no
            earlier download of it is kept here, or does not answer as it should.
    """
    if not is_id(place):
        return Path(place)
    name = str(place)
    found = located(name, "a local folder: there is none of that name")
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    with _answering(f"{name} is no folder here, and could not be taken from the hub"):
        return Path(snapshot_download(name, allow_patterns=list(files)))


def located(name: str, instead: str = _MODEL) -> Path | str:
    """What `from_pretrained` takes for an id: the id itself, or without a connection its copy.

    Args:
        name: the id.
        instead: what may be given in its place, for the message.

    Raises:
        InputError: the hub cannot be reached, and there is no copy.
    """
    reason = unreachable()
    if reason is None:
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InputError(
            f"{name} could not be loaded from the hub: {reason}, and no earlier download of it is "
            f"kept here. Check the connection and the id, or give {instead}."
        ) from error


def require(name: str) -> None:
    """Refuse a place to put files that will not do, before any work is done for it.

    Raises:
        InputError: it is no id, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import get_token

    if not _ID.fullmatch(name):
        raise InputError(
            f"{name!r} is no id of the hub; expected owner/name, such as me/lora-movie"
        )
    reason = unreachable()
    if reason is not None:
        raise InputError(
            f"nothing can be put at {name} on the hub: {reason}. Check the connection, or save to "
            "a folder alone and push later."
        )
    if not get_token():
        raise InputError(
            f"nothing can be put at {name} on the hub without a token; log in (`hf auth login`), "
            "or set HF_TOKEN to one that may write."
        )


def push(source: Path, name: str, files: Sequence[str], *, private: bool | None = None) -> str:
    """Put files of a folder at ``owner/name``, which is made where it is not there yet.

    Files of the same names there are replaced; its history keeps them.

    Args:
        source: the folder; nothing in it but the files goes along.
        name: the id.
        files: their names.
        private: whether a new repository is private; None leaves that to the owner's settings.

    Returns:
        The address of the commit.

    Raises:
        InputError: as `require`, or the hub refuses.
    """
    from huggingface_hub import HfApi

    require(name)
    api = HfApi()
    with _answering(f"the files could not be put at {name} on the hub"):
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=source,
            allow_patterns=list(files),
            commit_message="Upload deltas with deltacontrol",
        )
    return done.commit_url


@contextmanager
def _answering(what: str) -> Iterator[None]:
    """Say in one line what the hub answers; libraries raise errors of every kind.

    Raises:
        InputError: with the first lines of the error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{what}: {first_lines(error, 3)}. Check the id and what the token allows."
        ) from error


def unreachable() -> str | None:
    """Why the hub cannot be asked, in a few words; None where it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host, port = _asked(constants.ENDPOINT)
    seconds = _seconds()
    answers: list[OSError | None] = []

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            answers.append(None)
        except OSError as error:
            answers.append(error)

    # A thread, since looking a name up has no time limit of its own.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers or isinstance(answers[0], TimeoutError):
        return (
            f"{host} does not answer within {seconds:g} s ({SECONDS_VARIABLE} gives it more time)"
        )
    error = answers[0]
    return None if error is None else f"{host} cannot be reached ({error.strerror or error})"


def _asked(endpoint: str) -> tuple[str, int]:
    """Host and port that a request to the endpoint goes to: its own, or those of a proxy."""
    address = urlsplit(endpoint)
    proxies, host = getproxies(), address.hostname or ""
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(host):
        address = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    return address.hostname or host, address.port or _PORTS.get(address.scheme, 443)


def _seconds() -> float:
    given = os.environ.get(SECONDS_VARIABLE, "1")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:
        raise InputError(f"{SECONDS_VARIABLE} is {given!r}; expected seconds above 0, such as 5")
    return seconds
