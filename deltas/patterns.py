"""Regular expressions that users give for paths of modules, matched in bounded time.

Some expressions, such as ``(a+)+b``, need a time that doubles with each letter where they fail. The
package `regex`, which takes what `re` takes, can be told to stop.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import regex

from deltacontrol.theory.errors import InputError

SECONDS = 2.0  # for one path; an expression that behaves takes microseconds


def match_whole(pattern: str, path: str) -> Any | None:
    """The match of a whole path, or None.

    Raises:
        InputError: the pattern is no regular expression, or takes too long.
    """
    try:
        return _compiled(pattern).fullmatch(path, timeout=SECONDS)
    except TimeoutError as error:
        raise InputError(
            f"the regular expression {pattern!r} takes over {SECONDS:g} s on {path!r}: "
            "a repetition within a repetition, such as (a+)+, can be tried in too many ways; "
            "write it plainer."
        ) from error


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}.") from error
