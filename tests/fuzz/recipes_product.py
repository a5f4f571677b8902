"""Valid arguments of every call of `deltacontrol` itself, of deltas, tasks, models and records."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import deltacontrol as dc
from deltacontrol.deltas import from_dict, parse, registry
from deltacontrol.deltas.feedback.laws import attach_feedback
from deltacontrol.deltas.interop import export_peft, import_peft
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.tasks.reading import read_rows
from deltacontrol.theory.solvers import NewtonCG
from tests.fuzz.recipes_theory import Recipe

_BATCH = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
          "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
          "labels": torch.tensor([0, 1])}  # fmt: skip


@cache
def _read(place: str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(place).eval()


def model(path: Path) -> PreTrainedModel:
    """The labelled BERT in a folder, without deltas whatever the case before did with it."""
    import copy

    return copy.deepcopy(_read(str(path / "labelled")))


def _trained(tuned: Any) -> Any:
    if tuned.needs_data:
        tuned.prepare(lambda: iter([tuned(**_BATCH).loss]))
    tuned(**_BATCH).loss.backward()
    return tuned.summary()


def _several(deltas: Any) -> Any:
    return deltas if isinstance(deltas, list | tuple) else (deltas,)


def _attach(model: Any, deltas: Any, seed: Any) -> Any:
    return _trained(dc.attach(model, *_several(deltas), seed=seed))


def _delta(name: str) -> Callable[..., Any]:
    def call(model: Any, **fields: Any) -> Any:
        return _trained(dc.attach(model, registry.available()[name](**fields)))

    return call


def _fields(name: str) -> Callable[[Path], dict[str, Any]]:
    kind = registry.available()[name]

    def given(path: Path) -> dict[str, Any]:
        example = kind.example()
        own = {f: getattr(example, f) for f in registry.fields(name)}
        return {"model": model(path), **own}

    return given


def _problem(path: Path) -> Any:
    tuned = dc.attach(model(path).double(), dc.BitFit())
    return dc.control_problem(tuned, _BATCH)


def _controlled(deltas: Any, batch: Any, weight_decay: Any, path: Any) -> Any:
    tuned = dc.attach(model(path).double(), *_several(deltas))
    problem = dc.control_problem(tuned, batch, weight_decay=weight_decay)
    return problem.residual(problem.initial_controls())


def _saved(path: Path, deltas: Any, folder: Any) -> Any:
    tuned = dc.attach(model(path), *_several(deltas))
    dc.save(tuned, folder)
    return dc.load(model(path), folder)


def _state(path: Path, name: Any, value: Any) -> Any:
    tuned = dc.attach(model(path), dc.LoRA(rank=2))
    state = tuned.state()
    state[next(iter(state)) if name == "first" else str(name)] = value
    return tuned.load(state)


def _only(path: Path, namespaces: Any) -> Any:
    tuned = dc.attach(model(path), dc.LoRA(rank=2), dc.BitFit())
    tuned.train_only(namespaces)
    return tuned.summary()


def _exported(path: Path, deltas: Any, folder: Any, base_model: Any) -> Any:
    return export_peft(dc.attach(model(path), *_several(deltas)), folder, base_model=base_model)


def _first(place: Path) -> str:
    return min(p.name for p in (place / "runs").iterdir() if p.name[0] != ".")


def _record(runs: Any, run_id: Any) -> Any:
    store = RunStore(runs)
    record = store.get(run_id)
    return record.result, record.curve()


def _loaded_model(**given: Any) -> Any:
    return dc.load_model(**given)[0].config


def _finetune(**given: Any) -> Any:
    return dc.finetune(**given).result


def recipes() -> Iterator[Recipe]:
    """Name, call, and arguments that are valid; paths are those of the case's folder."""
    yield "attach", _attach, lambda p: {"model": model(p), "deltas": [dc.LoRA(rank=2), dc.BitFit()],
                                        "seed": 0}  # fmt: skip
    for name in registry.available():
        if not registry.available()[name].__module__.startswith("deltacontrol."):
            continue
        yield registry.available()[name].__name__, _delta(name), _fields(name)
    yield "deltas.parse", parse, lambda _: {"text": "lora:rank=2"}
    yield (
        "deltas.from_dict",
        from_dict,
        lambda _: {"config": {"name": "lora", "rank": 2, "sites": ["attention.query"]}},
    )
    yield "control_problem", _controlled, lambda p: {"deltas": [dc.BitFit()], "batch": dict(_BATCH),
                                                     "weight_decay": 0.1, "path": p}  # fmt: skip
    yield "solve(model)", dc.solve, lambda p: {"problem": _problem(p), "solver": NewtonCG(max_products=3),  # noqa: E501
                                               "max_steps": 1, "tol": 1e-3}  # fmt: skip
    yield "save", _saved, lambda p: {"path": p, "deltas": [dc.LoRA(rank=2)], "folder": p / "kept"}
    yield "load", dc.load, lambda p: {"model": model(p), "folder": p / "damaged" / "saved"}
    yield (
        "DeltaModel.load",
        _state,
        lambda p: {"path": p, "name": "first", "value": torch.ones(2, 32)},
    )
    yield "DeltaModel.train_only", _only, lambda p: {"path": p, "namespaces": ["lora"]}
    yield "load_model", _loaded_model, lambda p: {
        "name": str(p / "tiny"), "kind": "classification", "num_labels": 2, "pretrained": True,
        "seed": 0, "dtype": "float32"}  # fmt: skip
    yield "load_model(folder)", _loaded_model, lambda p: {
        "name": str(p / "damaged" / "labelled"), "kind": "classification", "num_labels": 3}  # fmt: skip  # noqa: E501
    yield "load_task", dc.load_task, lambda p: {
        "name": str(p / "task.csv"), "text_column": "text", "label_column": "label",
        "kind": "classification"}  # fmt: skip
    for suffix in ("csv", "tsv", "jsonl", "parquet", "txt", "csv.gz"):
        kind = "causal-lm" if suffix == "txt" else None
        yield f"load_task({suffix})", dc.load_task, lambda p, s=suffix, k=kind: {
            "name": str(p / "damaged" / f"task.{s}"), "kind": k}  # fmt: skip
        yield (
            f"read_rows({suffix})",
            read_rows,
            lambda p, s=suffix: {"path": p / "damaged" / f"task.{s}"},
        )
    yield "finetune", _finetune, lambda p: {
        "model": str(p / "tiny"), "task": str(p / "task.csv"), "deltas": ["lora:rank=2"],
        "runs": p / "runs", "progress": False, "steps": 1, "max_length": 8, "batch_size": 4,
        "learning_rate": 0.01, "optimiser": "adamw", "eval_limit": 8, "seed": 0, "warmup": 0.1,
        "schedule": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0, "grad_accumulation": 1}  # fmt: skip  # noqa: E501
    yield "estimate_dimension", dc.estimate_dimension, lambda p: {
        "model": str(p / "tiny"), "task": str(p / "task.csv"), "runs": p / "runs", "progress": False,  # noqa: E501
        "steps": 1, "max_length": 8, "target": 0.2, "budget": 2, "eval_limit": 4, "seeds": 2,
        "largest": 100, "smallest": 10, "start": 20, "share": 0.9, "confidence": 0.9}  # fmt: skip
    yield "runs", dc.runs, lambda p: {"root": p / "runs", "committed": False}
    yield "record", _record, lambda p: {"runs": p / "damaged" / "runs", "run_id": _first(p.parent)}
    yield "claims", dc.claims, lambda p: {"number": 2, "runs": p / "runs"}
    yield "cite", dc.cite, lambda _: {"record_or_deltas": ["lora", dc.BitFit()]}
    yield "figure", dc.figure, lambda p: {"name": "taxonomy", "preset": "paper", "runs": p / "runs"}
    yield "load_plugin", dc.load_plugin, lambda p: {"path": p / "mine.py"}
    yield (
        "import_peft",
        import_peft,
        lambda p: {"model": model(p), "path": p / "damaged" / "adapter"},
    )
    yield "export_peft", _exported, lambda p: {"path": p, "deltas": [dc.LoRA(rank=2)],
                                               "folder": p / "exported", "base_model": "x"}  # fmt: skip  # noqa: E501
    yield (
        "attach_feedback",
        attach_feedback,
        lambda p: {"model": model(p), "law": _law(), "site": "state"},
    )


def _law() -> Any:
    from deltacontrol.theory import AffineSubspace, ProjectionCorrection

    subspace = AffineSubspace(torch.zeros(32), torch.eye(32)[:, :2])
    return ProjectionCorrection([subspace] * 3, 0.5)


def spoil(chance: random.Random, place: Path, here: Path, given: dict[str, Any]) -> str:
    """Put a damaged copy where an argument names a path in ``damaged``; says what was done."""
    from tests.fuzz import world

    for value in given.values():
        if isinstance(value, str | Path) and "damaged/" in str(value):
            target = Path(value)
            source = place / target.name
            target.parent.mkdir(exist_ok=True)
            if not source.exists():
                source = place / "task.csv"  # a checkpoint that is something else
            return f"{target.name} " + world.damaged(chance, source, target)
    return ""
