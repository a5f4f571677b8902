"""The support matrix as the README shows it: read, and written.

The README is its home. What it says is tested cell by cell: a tick by `test_conformance`, a refusal
by `test_support`. `python -m tests.deltas.support_matrix` measures it anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from deltacontrol.deltas import registry
from deltacontrol.deltas.base import Category
from deltacontrol.theory.markdown import rewritten

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- support:begin -->\n", "<!-- support:end -->"
TICK = "✓"

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
    "camembert": "CamemBERT",
    "albert": "ALBERT",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "cohere": "Cohere",
    "olmo2": "OLMo2",
    "smollm3": "SmolLM3",
    "phi3": "Phi-3",
    "stablelm": "StableLM",
    "nemotron": "Nemotron",
    "phi": "Phi",
    "gptj": "GPT-J",
    "bloom": "BLOOM",
    "mpt": "MPT",
    "falcon": "Falcon",
    "falcon-alibi": "Falcon (ALiBi)",
    "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2-MoE",
    "deepseek-v3": "DeepSeek-V3",
    "mamba2": "Mamba2",
    "pegasus": "Pegasus",
    "mt5": "mT5",
}
_BREAK = "<br>"


def refused(readme: Path = README) -> dict[tuple[str, str], str]:
    """The reason of every refused cell (architecture, method); a cell without one has a tick."""
    lines = readme.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()
    notes = lines[-1].partition("with the reason: ")[2].removesuffix(".")
    reasons = dict(re.fullmatch(r"(\(.\)) (.+)", note).groups() for note in notes.split("; "))
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "|" in line]
    families = {title: family for family, title in TITLES.items()}
    columns = [[families[title] for title in cell.split(_BREAK)] for cell in rows[0][1:]]
    return {
        (family, row[0].strip("`")): reasons[cell]
        for row in rows[2:]
        for column, cell in zip(columns, row[1:], strict=True)
        for family in column
        if cell != TICK and row[0].strip("`") in registry.available()
    }


def render(refused: Mapping[tuple[str, str], str]) -> str:
    """Methods by category in rows, architectures in columns, reasons of refusals below.

    Architectures that take and refuse the same for the same reasons share a column.
    """
    kinds = registry.available()
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for family in TITLES:
        groups.setdefault(tuple(refused.get((family, name)) for name in kinds), []).append(family)
    letters: dict[str, str] = {}
    head = ["method", *(_BREAK.join(TITLES[f] for f in column) for column in groups.values())]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " :-: |" * len(groups)]
    for category in get_args(Category):
        for method in sorted(name for name, kind in kinds.items() if kind.category == category):
            cells = [f"`{method}`"]
            for column in groups.values():
                reason = refused.get((column[0], method))
                if reason is None:
                    cells.append(TICK)
                else:
                    cells.append(letters.setdefault(reason, f"({chr(ord('a') + len(letters))})"))
            lines.append("| " + " | ".join(cells) + " |")
    notes = "; ".join(f"{letter} {reason}" for reason, letter in letters.items())
    count = f"{len(kinds)} methods on {len(TITLES)} architectures"
    total, no = len(kinds) * len(TITLES), sum(name in kinds for _, name in refused)
    return (
        "\n".join(lines)
        + f"\n\n{count}: {total - no} of {total} work. Refused with the reason: {notes}.\n"
    )


def write(refused: Mapping[tuple[str, str], str], readme: Path = README) -> None:
    """Put the matrix between the README's markers."""
    assert rewritten(readme, BEGIN, END, lambda: render(refused))
