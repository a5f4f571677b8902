"""What to cite: this software, the article that it builds on, and the papers of the methods used.

Each delta carries the BibTeX of its own papers (`deltacontrol.deltas.base.Delta.bibtex`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments.runs.record import Record
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.deltas import Delta

TITLE = "deltacontrol: delta tuning of Transformers as discrete optimal control"
SOFTWARE = """
    @misc{deltacontrol,
      author = {{deltacontrol authors}},
      title = {%s},
      howpublished = {Software, version %s},
    }
"""
ARTICLE = """
    @article{ding2023parameter,
      author = {Ding, Ning and Qin, Yujia and Yang, Guang and Wei, Fuchao and Yang, Zonghan and
        Su, Yusheng and Hu, Shengding and Chen, Yulin and Chan, Chi-Min and Chen, Weize and Yi, Jing
        and Zhao, Weilin and Wang, Xiaozhi and Liu, Zhiyuan and Zheng, Hai-Tao and Chen, Jianfei and
        Liu, Yang and Tang, Jie and Li, Juanzi and Sun, Maosong},
      title = {Parameter-efficient fine-tuning of large-scale pre-trained language models},
      journal = {Nature Machine Intelligence},
      volume = {5},
      number = {3},
      pages = {220--235},
      year = {2023},
      doi = {10.1038/s42256-023-00626-4},
    }
"""
_SUBSPACES = {"said": "said", "did": "subspace"}
# An entry begins at the start of a line; what stands inside of it is indented.
_ENTRY = re.compile(r"^@\w+\{([^,\s]+),.*?^\}", re.MULTILINE | re.DOTALL)


def cite(record_or_deltas: Record | str | Delta | Iterable[Any] | None = None) -> str:
    """BibTeX of the software, of the article, and of the papers of the deltas.

    Args:
        record_or_deltas: A run's record; or one delta or several, each an object, a text such as
            "lora:rank=16", or a dictionary with its name; None for the first two entries alone.

    Returns:
        Valid BibTeX, each entry once. A delta that carries no entry is named in a comment with its
        reference.

    Raises:
        InputError: A delta has an unknown name.

    Example:
        >>> from deltacontrol.experiments.runs.citing import cite
        >>> print(cite("prompt").splitlines()[-2])
          year = {2021},
    """
    entries = {"deltacontrol": cleandoc(SOFTWARE % (TITLE, version()))}
    entries |= _entries(ARTICLE)
    comments = []
    for method in _methods(record_or_deltas):
        found = _entries(method.bibtex)
        entries |= found
        if not found:
            comments.append(f"% {method.name}: {method.reference}")
    return "\n\n".join([*entries.values(), *dict.fromkeys(comments)])


def version() -> str:
    """The version of the installed software, or that it is unknown in a bare copy of the files."""
    try:
        return metadata.version("deltacontrol")
    except metadata.PackageNotFoundError:
        return "unknown"


def _entries(bibtex: str) -> dict[str, str]:
    return {match[1]: match[0] for match in _ENTRY.finditer(cleandoc(bibtex))}


def _deltas_of(record: Record) -> list[Any]:
    """The deltas that a record names, if any: it may be of anything.

    Of an adapter of peft the result names them. A search of a dimension names its subspace by its
    method, beside the delta whose parameters that is of.
    """
    config = record.config
    named = record.result.get("deltas") or config.get("deltas") or config.get("delta") or []
    subspace = _SUBSPACES.get(str(config.get("method")))
    return [*filter(None, [subspace]), *(named if isinstance(named, list | tuple) else [named])]


def _methods(given: Any, *, within: bool = False) -> list[type[Delta]]:
    """The classes of the deltas, and of the deltas that a delta holds; ``within`` a list."""
    if given is None and not within:
        return []
    from deltacontrol.deltas import Delta, parse
    from deltacontrol.deltas.registry import available  # imports torch

    if isinstance(given, Record):
        return _methods(_deltas_of(given))
    if isinstance(given, str):
        given = parse(given)
    if isinstance(given, Delta):
        given = given.to_dict()
    if not isinstance(given, Mapping):
        if not isinstance(given, Iterable) or isinstance(given, bytes):
            raise InputError(
                f"cannot cite {given!r}; expected a record, a delta such as LoRA() or its text, or "
                "a list of them"
            )
        return [method for one in given for method in _methods(one, within=True)]
    name = str(given.get("name"))
    if name not in available():
        raise unknown("delta", name, available())
    inner = str(given.get("of") or "").partition(":")[0]  # a subspace of a delta's parameters
    return [available()[name], *_methods({"name": inner} if inner else None)]
