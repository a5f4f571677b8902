"""TRAINABLE_TOKENS: rows of the table of embeddings; the file holds the new rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.fields import COMMON, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot
from deltacontrol.deltas.interop.targets import matches
from deltacontrol.deltas.methods.trainable_tokens import TrainableTokens
from deltacontrol.theory.errors import InputError

_TENSOR = "trainable_tokens_delta"


class TokensFormat(Format):
    """The rows E_i + u_i (k, d). What is tied to the table has them once more."""

    peft_type = "TRAINABLE_TOKENS"
    fields = {
        **{name: field for name, field in COMMON.items() if name != "modules_to_save"},
        "target_modules": TARGETS["target_modules"],
        "token_indices": Field([], "a list of integers"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (TrainableTokens,)

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One delta on the table that the model looks tokens up in."""
        path = table_path(host)
        rule = config["target_modules"]
        targeted = [p for p in host.sites.modules if p and rule and matches(rule, p)]
        if rule and targeted != [path]:
            raise InputError(
                f"target_modules {rule!r} mean {', '.join(targeted) or 'no module'}; the tokens of "
                f"{type(host.model).__name__} are looked up in {path} alone."
            )
        delta = TrainableTokens(tuple(config["token_indices"]))
        delta.table(host)  # refuses tokens that the table has not
        plan = Plan([delta], [rows_slot(f"{self.root}{path}.{_TENSOR}", delta, host)], [path])
        for other in host.tied(f"{path}.weight"):
            plan.copies[f"{self.root}{other.rpartition('.')[0]}.{_TENSOR}"] = plan.slots[0].key
        return plan

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """The rows and their indices."""
        if len(attached) > 1:
            raise InputError("peft holds one list of trainable tokens; export them one at a time.")
        delta, path = attached[0].delta, table_path(host)
        config = {"target_modules": [path], "token_indices": list(delta.tokens)}
        return Description(config, dict(attached[0].controls), [path])


def table_path(host: Host) -> str:
    """The path of the table of embeddings; InputError where the model has none."""
    path = host.sites.embedding_path
    if path is None or not isinstance(host.sites.modules[path], nn.Embedding):
        host.embedding_weight  # noqa: B018 - it says what the model reads instead
    assert path is not None
    return path


def rows_slot(key: str, delta: TrainableTokens, host: Host) -> Slot:
    """The new rows, E_i + u_i, as one tensor."""
    table = host.original(f"{table_path(host)}.weight").detach().cpu()
    rows = table[list(delta.tokens)]

    def split(found: Tensor) -> Sequence[Tensor]:
        return (found.to(rows.dtype) - rows,)

    def join(controls: Sequence[Tensor]) -> Tensor:
        return rows + controls[0]

    return Slot(key, tuple(rows.shape), ("rows.u",), split, join)


FORMATS = (TokensFormat(),)
