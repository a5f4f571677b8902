"""How results print: a title and a few named values, as text and as a table of a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["html_table", "text_table"]


def text_table(title: str, rows: Mapping[str, str]) -> str:
    """The title, then one line for each value.

    Example:
        >>> print(text_table("Solution", {"status": "converged", "J": "0.25"}))
        Solution
          status  converged
          J       0.25
    """
    width = max((len(name) for name in rows), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows.items())])


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """The same as an HTML table, everything escaped."""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption><tbody>{body}</tbody></table>"
