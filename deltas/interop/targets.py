"""Which modules a peft configuration means, by peft's own rules.

A list of target_modules matches a module's path or the end of it at a dot; a text is a regular
expression for the whole path. exclude_modules and modules_to_save take modules away,
layers_to_transform keeps those whose path holds one of its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import SEMANTIC
from deltacontrol.deltas.patterns import match_whole
from deltacontrol.theory.errors import InputError

# A classification adapter of peft trains the modules of these names, whatever its configuration.
CLASSIFIERS = ("classifier", "score")
# The class of a model says what peft calls its task.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}


def task_type(model: PreTrainedModel) -> str | None:
    """What peft calls the task of a model; None where it has no word for it."""
    return task_of(type(model).__name__)


def task_of(name: str) -> str | None:
    """What peft calls the task of the models of a class."""
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def matches(rule: str | Iterable[str], path: str) -> bool:
    """Whether a path is meant by a regular expression (text) or by one of several names."""
    if isinstance(rule, str):
        return is_match(rule, path)
    return any(path == name or path.endswith("." + name) for name in rule)


def is_match(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a whole path; InputError where it is none."""
    return match_whole(pattern, path) is not None


def saved_modules(config: Mapping[str, Any], host: Host) -> list[str]:
    """Paths of the modules that modules_to_save means: those whose path ends with a name.

    Raises:
        InputError: a name matches nothing, or one module lies in another.
    """
    if "modules_to_save" not in config:
        return []  # a type of adapter that trains nothing else
    names = list(dict.fromkeys(config["modules_to_save"] or ()))
    if config["task_type"] == "SEQ_CLS":
        names += [name for name in CLASSIFIERS if name not in names]
    paths = [p for p in host.sites.modules if p and p.endswith(tuple(names))] if names else []
    idle = [n for n in names if n not in CLASSIFIERS and not any(p.endswith(n) for p in paths)]
    nested = [p for p in paths if any(p.startswith(q + ".") for q in paths)]
    if idle or nested:
        problem = f"{idle} match no module" if idle else f"{nested} lie in others of them"
        raise InputError(
            f"modules_to_save is {config['modules_to_save']}, but {problem} of "
            f"{type(host.model).__name__}; load the model that the adapter was made for."
        )
    return paths


def targets(config: Mapping[str, Any], host: Host) -> list[str]:
    """Paths of the modules that get a controller, in the model's order.

    Raises:
        InputError: nothing is targeted, or a name, a layer or a regular expression matches nothing.
    """
    rule = config["target_modules"]
    if not rule:
        raise InputError(
            "target_modules is empty, so peft would take its own default for the architecture; "
            "name the modules in adapter_config.json."
        )
    if isinstance(rule, str) and rule.lower() == "all-linear":
        rule = _all_linear(host.model, config["task_type"])
    saved = saved_modules(config, host)
    excluded = config.get("exclude_modules") or ()
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if isinstance(rule, str) and layers:
        raise InputError(
            "layers_to_transform does not go with a regular expression as target_modules."
        )
    paths = [p for p in host.sites.modules if p and matches(rule, p)]
    idle = (
        []
        if isinstance(rule, str)
        else [n for n in rule if not any(matches([n], p) for p in paths)]
    )
    if idle or not paths:
        raise InputError(
            f"target_modules {idle or rule} match no module of {type(host.model).__name__}; load "
            "the model that the adapter was made for."
        )
    paths = [
        p
        for p in paths
        if not matches(excluded, p) and not any(p == s or p.startswith(s + ".") for s in saved)
    ]
    if layers:
        numbers = {p: _layer(config.get("layers_pattern"), p) for p in paths}
        absent = sorted(set(layers) - {n for n in numbers.values() if n is not None})
        if absent:
            raise InputError(f"layers_to_transform holds {absent}: no targeted module lies there.")
        paths = [p for p in paths if numbers[p] in layers]
    if not paths:
        raise InputError("exclude_modules and modules_to_save leave no module of target_modules.")
    return paths


def _layer(patterns: str | Sequence[str] | None, path: str) -> int | None:
    """The number of the layer that a path names, the first one."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        is_match(pattern, "")  # refuses what is no regular expression
        if found := match_whole(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\..*", path):
            return int(found["number"])
    return None


def _all_linear(model: PreTrainedModel, task_type: str | None) -> list[str]:
    """Every linear map but the head."""
    head = model.get_output_embeddings()
    if head is None and task_type == "SEQ_CLS":
        head = next((h for n in CLASSIFIERS if (h := getattr(model, n, None)) is not None), None)
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def by_pattern(
    patterns: Mapping[str, Any], paths: Sequence[str], default: Any, *, dotted: bool = False
) -> dict[str, Any]:
    """A path's value: that of the first pattern that matches its end, else the default.

    With ``dotted`` a dot of the path must stand before the end, as some types of peft want.

    Raises:
        InputError: a pattern matches no path.
    """
    values, used = dict.fromkeys(paths, default), set()
    for path in paths:
        for pattern, value in patterns.items():
            if is_match(rf".*\.{pattern}" if dotted else rf"(.*\.)?({pattern})", path):
                values[path] = value
                used.add(pattern)
                break
    if idle := sorted(patterns.keys() - used):
        raise InputError(f"the patterns {idle} match no targeted module; correct or remove them.")
    return values


def to_patterns(values: Mapping[str, Any], default: Any, *, dotted: bool = False) -> dict[str, Any]:
    """Patterns that give each path its value; those at the default are left out.

    Raises:
        InputError: ``dotted``, and the patterns cannot tell the paths apart.
    """
    if not dotted:
        return {rf"^{re.escape(path)}": v for path, v in values.items() if v != default}
    ends = {path: path.partition(".")[2] for path, v in values.items() if v != default}
    patterns = {re.escape(end): values[path] for path, end in ends.items()}
    if "" in patterns or by_pattern(patterns, [*values], default, dotted=True) != dict(values):
        raise InputError(
            f"peft's patterns cannot tell {', '.join(ends)} from the other modules; use one value "
            "for all of them."
        )
    return patterns


def grouped(values: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Paths by their value, in order."""
    groups: dict[Any, list[str]] = {}
    for path, value in values.items():
        groups.setdefault(value, []).append(path)
    return groups


def short_names(paths: Sequence[str], modules: Iterable[str]) -> list[str]:
    """For each path its shortest end that matches none but these; the path if there is none."""
    modules, wanted = list(modules), set(paths)
    names: dict[str, None] = {}
    for path in paths:
        if matches(names, path):
            continue
        parts = path.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        fits = (end for end in ends if all(p in wanted for p in modules if matches([end], p)))
        names[next(fits, path)] = None
    return sorted(names)


def as_sites(paths: Sequence[str], host: Host) -> tuple[str, ...]:
    """Sites of a delta that mean exactly these modules: short names where that is possible."""
    names = short_names(paths, host.sites.modules)
    if not set(names) & set(SEMANTIC) and _found(names, host) == set(paths):
        return tuple(names)
    exact = tuple(p if _found([p], host) == {p} else f"(?:{re.escape(p)})" for p in paths)
    assert _found(exact, host) == set(paths)
    return exact


def _found(names: Iterable[str], host: Host) -> set[str]:
    return {site.path for site in host.find(names) if site.part is None}
