"""Whether the hub can be asked for a model, told at once and not after a library's retries.

One connection is tried, to the hub's host or to the proxy that leads there, for at most a second
(`SECONDS_VARIABLE` sets another time, for a slow network). Without one, the copy of the model that
an earlier download has left in the hub's own cache serves.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from deltacontrol.theory.errors import InputError

SECONDS_VARIABLE = "DELTACONTROL_HUB_SECONDS"
_PORTS = {"https": 443, "http": 80}


def located(name: str) -> Path | str:
    """What `from_pretrained` takes for an id: the id itself, or without a connection its copy.

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
            "kept here. Check the connection and the id, or give a local folder or a packaged "
            "model (`deltacontrol models`)."
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
