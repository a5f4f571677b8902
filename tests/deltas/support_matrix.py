"""The support matrix of the README, from the data of the conformance suite.

    python -m tests.deltas.support_matrix

rewrites it. Every cell is tested: a tick by `test_conformance`, a refusal by `test_support`, which
also finds a matrix that is out of date.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from deltacontrol.deltas import registry
from deltacontrol.deltas.base import Category
from tests.deltas.zoo import FAMILIES, METHODS, REFUSED

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- support:begin -->\n", "<!-- support:end -->"

TITLES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "modernbert": "ModernBERT",
    "mpnet": "MPNet",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "gpt_neox": "GPT-NeoX",
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gemma3": "Gemma3",
    "t5": "T5 encoder",
    "t5-seq2seq": "T5",
    "bart": "BART",
    "vit": "ViT",
    "dinov2": "DINOv2",
    "whisper": "Whisper encoder",
}


def render() -> str:
    """Methods by category in rows, architectures in columns, reasons of refusals below."""
    kinds = registry.available()
    reasons: dict[str, str] = {}
    head = ["method", *TITLES.values()]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " :-: |" * len(TITLES)]
    for category in get_args(Category):
        for method in sorted(m for m in METHODS if kinds[m].category == category):
            cells = [f"`{method}`"]
            for family in TITLES:
                reason = REFUSED.get((family, method))
                if reason is None:
                    cells.append("✓")
                else:
                    cells.append(reasons.setdefault(reason, f"({chr(ord('a') + len(reasons))})"))
            lines.append("| " + " | ".join(cells) + " |")
    notes = "; ".join(f"{letter} {reason}" for reason, letter in reasons.items())
    count = f"{len(METHODS)} methods on {len(FAMILIES)} architectures"
    return "\n".join(lines) + f"\n\n{count}. Refused with the reason: {notes}.\n"


def update(readme: Path = README) -> None:
    """Put the matrix between the README's markers."""
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + render() + END + after, encoding="utf-8")


if __name__ == "__main__":
    update()
