"""What was attached to a model, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from deltacontrol.deltas.base import Delta

SHARE = "share of the base (%)"


@dataclass(frozen=True)
class Attachment:
    """What one delta put on the model.

    Attributes:
        delta: the configuration.
        namespace: the first part of the names of its controls.
        num_parameters: counted; equals the method's formula.
        num_sites: how many modules it acts at.
    """

    delta: Delta
    namespace: str
    num_parameters: int
    num_sites: int


def summary(attachments: Iterable[Attachment], num_base: int) -> pd.DataFrame:
    """One row for every delta and one for all of them together.

    Args:
        attachments: of the model.
        num_base: parameters of the base model.

    Returns:
        Columns delta (its namespace), category, sites, parameters, and the parameters' share of the
        base in percent.
    """
    rows = [
        {
            "delta": attachment.namespace,
            "category": attachment.delta.category,
            "sites": attachment.num_sites,
            "parameters": attachment.num_parameters,
        }
        for attachment in attachments
    ]
    table = pd.DataFrame(rows, columns=["delta", "category", "sites", "parameters"])
    total = {"delta": "total", "category": "", **table[["sites", "parameters"]].sum().to_dict()}
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    return table.assign(**{SHARE: 100 * table["parameters"] / num_base})


def as_text(table: pd.DataFrame) -> str:
    """The table for a terminal."""
    return table.to_string(index=False, float_format="{:.3g}".format)


def as_html(table: pd.DataFrame) -> str:
    """The table for a notebook."""
    return table.to_html(index=False, float_format="{:.3g}".format, border=0)
