"""The README.md beside saved deltas: a model card, whose head the hub reads.

The head is YAML between two lines of dashes, as `huggingface_hub.ModelCardData` writes it; the rest
is Markdown. What comes from a user, such as names of models, tasks and classes, is escaped; of a
path the last part is named. What is not known is left out.

A card ends with a digest of its own text, so that one which somebody has edited is told from one
that a later save may replace.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from deltacontrol.deltas import hub
from deltacontrol.deltas.summary import Attachment
from deltacontrol.theory.markdown import code, escape, fenced, rows_table

FILE = "README.md"
_SEAL = re.compile(r"<!-- written by deltacontrol, ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        title: of the page; plain text.
        intro: the first paragraph, Markdown.
        sections: Markdown by heading, in order; empty ones are left out.
        head: arguments of `huggingface_hub.ModelCardData`.
    """

    title: str
    intro: str
    sections: Mapping[str, str]
    head: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The file's content."""
        from huggingface_hub import ModelCardData

        parts = [f"---\n{ModelCardData(**self.head).to_yaml()}\n---", f"# {words(self.title)}"]
        parts.append(self.intro)
        parts += [f"## {name}\n\n{text}" for name, text in self.sections.items() if text]
        body = "\n\n".join(parts) + "\n\n"
        body = body.encode("utf-8", "replace").decode()  # a path may hold what is no letter
        return f"{body}<!-- written by deltacontrol, {_digest(body)} -->\n"


def is_own(text: str) -> bool:
    """Whether a README.md is as `Card.text` gave it."""
    found = _SEAL.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def described(
    attachments: Sequence[Attachment], model: PreTrainedModel, num_base: int, place: str
) -> Card:
    """What is known of deltas without a record of how they were trained.

    Args:
        attachments: what each delta put on the model.
        model: the base.
        num_base: its parameters.
        place: where the deltas are loaded from: the name of a folder, or an id of the hub.
    """
    name, kind = hub.public_name(model.name_or_path), type(model).__name__
    names = list(dict.fromkeys(attachment.delta.name for attachment in attachments))
    count = sum(attachment.num_parameters for attachment in attachments)
    comment = "the model that the deltas were saved with" + (f", {name}" if name else "")
    lines = [
        "import deltacontrol as dc",
        "",
        f"# base: {' '.join(comment.split())}, as {kind}",
        f"tuned = dc.load(base, {quoted(place)})",
    ]
    return Card(
        title=f"{' + '.join(names)} for {name or kind}",
        intro=intro(model, name, count, num_base),
        sections={
            "Method": methods(attachments),
            "How to load": fenced("\n".join(lines), "python"),
        },
        head=head(names, name if hub.is_id(model.name_or_path or "") else None),
    )


def intro(model: PreTrainedModel, base: str, num_trainable: int, num_base: int) -> str:
    """The first sentence of a card."""
    of = f", {words(base)}" if base else ""
    return (
        f"Deltas on a frozen {code(type(model).__name__)}{of}: {num_trainable:,d} trainable "
        f"parameters beside its {num_base:,d}, saved by deltacontrol."
    )


def head(
    names: Sequence[str], base: str | None, *, library: str = "deltacontrol"
) -> dict[str, Any]:
    """What the head says of any saved deltas.

    Args:
        names: of the methods.
        base: id of the base model on the hub; None where it has none.
        library: what loads them.
    """
    found: dict[str, Any] = {"library_name": library, "tags": ["deltacontrol", *names]}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "adapter"}
    return found


def methods(attachments: Sequence[Attachment]) -> str:
    """Law, source and settings of each method."""
    parts = []
    for one in attachments:
        delta = one.delta
        known = type(delta).__module__.startswith("deltacontrol.")
        settings = {k: v for k, v in delta.to_dict().items() if k != "name" and v is not None}
        rows = {
            "control law": code(delta.law),
            "kind": words(delta.category),
            "acts at": _modules(one.num_sites),
            "parameters": f"{one.num_parameters:,d} = {code(delta.num_parameters_formula)}",
            "settings": ", ".join(code(f"{k} = {json.dumps(v)}") for k, v in settings.items()),
            "source": words(delta.reference),
        }
        cells = [(name, text) for name, text in rows.items() if text]
        own = "" if known else "\n\nA method of the author's own; load its file first."
        parts.append(f"### {words(delta.name)}\n\n{rows_table((' ', ' '), cells)}{own}")
    return "\n\n".join(parts)


def _modules(count: int) -> str:
    if count == 0:
        return ""
    return "1 module" if count == 1 else f"{count:,d} modules"


def words(text: object) -> str:
    """Plain words on one line, as Markdown shows them."""
    return escape(" ".join(str(text).split()))


def quoted(text: str) -> str:
    """A text as Python writes it, between double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
