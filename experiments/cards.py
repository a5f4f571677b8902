"""The model card of a run: what its record says, and nothing else.

Scores stand in the head as the hub's ``model-index`` and in the text with their intervals: of a
share of rows Clopper and Pearson's (`deltacontrol.theory.evidence`). A number that the record does
not hold has no line. The rest of a card is that of `deltacontrol.deltas.card`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments import models, tasks
from deltacontrol.experiments.runs.citing import cite
from deltacontrol.experiments.tasks.files import is_file_name
from deltacontrol.theory.evidence import CONFIDENCE, Evidence
from deltacontrol.theory.markdown import code, fenced, rows_table

if TYPE_CHECKING:
    from deltacontrol.deltas.card import Card
    from deltacontrol.experiments.runs.record import Record
    from deltacontrol.experiments.setting import Setting

# Metrics of a result: the hub's name, and words.
METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "macro_f1": ("f1", "macro F1"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "mse": ("mse", "mean squared error"),
    "loss": ("loss", "mean cross-entropy, nats"),
    "perplexity": ("perplexity", "perplexity"),
}
# What the hub calls a model of a kind, and the task that it is evaluated on.
PIPELINES = {
    "classification": "text-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
}
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "backbone": "AutoModel",
}
_PATH = re.compile(r"(?:[/~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]).*", re.DOTALL)


def of_run(record: Record, setting: Setting, place: str, *, peft: bool = False) -> Card:
    """The card of a run's deltas.

    Args:
        record: of the run.
        setting: ``record.setting()``.
        place: where the deltas are loaded from: the name of a folder, or an id of the hub.
        peft: whether they are saved as an adapter of peft.
    """
    from deltacontrol.deltas import card

    tuned = setting.controlled
    names = list(dict.fromkeys(delta.name for delta in tuned.deltas))
    base, task = public_model(setting.model), _task_name(record)
    title = f"{' + '.join(names)} for {base}" + (f" on {task}" if task else "")
    sections = {
        "Scores": _scores(record),
        "Task": _task(record, setting),
        "Method": card.methods(tuned.attachments),
        "How to load": _loading(setting, place, peft=peft),
        "Settings": _settings(record),
        "Versions": _versions(record),
        "Citation": fenced(cite(record), "bibtex"),
    }
    head = card.head(names, base if _on_hub(setting.model) else None, library=_library(peft))
    head |= {"pipeline_tag": PIPELINES.get(setting.kind)} | _evaluated(record, setting, title)
    intro = card.intro(tuned.model, base, tuned.num_trainable, tuned.num_total)
    intro += f" The run ended as {code(record.status)}."
    intro += f" {card.words(record.message)}" if record.message else ""
    return card.Card(title, intro, sections, head)


def public_model(name: str) -> str:
    """A model's name without the path of this machine that it may be."""
    from deltacontrol.deltas import hub

    return hub.public_name(name)


def _library(peft: bool) -> str:
    return "peft" if peft else "deltacontrol"


def _on_hub(name: str) -> bool:
    return models.digest(name) is None


def _task_name(record: Record) -> str:
    """The task's name; of a file of the user's without its folder."""
    name = record.config.get("task") or ""
    return re.split(r"[/\\]", name)[-1] if is_file_name(name) else name


def _metrics(record: Record) -> dict[str, float]:
    """The scores that the record holds; one that was not finite is None there."""
    if "num_evaluated" not in record.result:
        return {}
    found = {name: record.result.get(name) for name in METRICS}
    return {name: float(value) for name, value in found.items() if value is not None}


def interval(record: Record, metric: str) -> tuple[float, float] | None:
    """The interval of a score over the rows; None where the record does not give one."""
    count, value = record.result.get("num_evaluated"), record.result.get(metric)
    if metric != "accuracy" or not count or value is None:
        return None
    right = round(value * count)
    return (
        Evidence.share(right, count, "row").bounds() if abs(right - value * count) < 1e-6 else None
    )


def _scores(record: Record) -> str:
    """Each score with its interval, and what the interval leaves out."""
    metrics = _metrics(record)
    if not metrics:
        return ""
    rows = []
    for name, value in metrics.items():
        ends = interval(record, name)
        rows.append(
            (
                METRICS[name][1],
                f"{value:.4g}",
                "" if ends is None else "[{:.4g}, {:.4g}]".format(*ends),
            )
        )
    count, split = record.result["num_evaluated"], record.config.get("evaluate_on") or ""
    text = f"On {count:,d} {split} rows, after one training.".replace("  ", " ")
    if any(ends for _, _, ends in rows):
        text += (
            " The interval is Clopper and Pearson's over the rows; it does not hold what another "
            "seed would change. The record keeps no rows from which other intervals would follow."
        )
    if (share := record.result.get("majority_share")) is not None:
        text += f" The most frequent class alone has a share of {share:.4g}."
    heading = ("metric", "value", f"{100 * CONFIDENCE:.0f} % interval")
    return f"{rows_table(heading, rows)}\n\n{text}"


def _task(record: Record, setting: Setting) -> str:
    """What the rows are, and which number stands for which class."""
    from deltacontrol.deltas.card import words

    if setting.task is None:
        return ""
    data = setting.data
    rows = {
        "name": code(_task_name(record)),
        "kind": words(data.kind),
        "source": words(data.source),
        "texts": f"at most {setting.max_length} tokens; longer ones are cut",
        "digest of the data": code(record.provenance["digests"]["data"] or ""),
    }
    template = setting.template
    if template is not None:
        rows["template"] = code(template.text)
    table = rows_table((" ", " "), rows.items())
    if not data.labels:
        return table
    if template is not None:
        found = [(words(name), code(template.words[name])) for name in data.labels]
        return f"{table}\n\n{rows_table(('class', 'its word'), found)}"
    order = setting.class_order
    numbers = range(len(data.labels)) if order is None else order.tolist()
    classes = rows_table(
        ("output", "class"),
        [(str(n), words(name)) for n, name in sorted(zip(numbers, data.labels, strict=True))],
    )
    return f"{table}\n\n{classes}"


def _loading(setting: Setting, place: str, *, peft: bool) -> str:
    """Python that gives the model back."""
    from deltacontrol.deltas.card import quoted

    base = quoted(public_model(setting.model))
    fits = [f"num_labels={setting.classes}"] if setting.classes is not None else []
    if setting.kind == "regression":
        fits = ["num_labels=1"]
    if peft and _on_hub(setting.model):
        auto = AUTO[setting.kind]
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f"model = {auto}.from_pretrained({', '.join([base, *fits])})",
        ]
    else:
        options = [f'kind="{setting.kind}"', *(fits if setting.kind == "classification" else [])]
        if not setting.pretrained:
            options += ["pretrained=False", f"seed={setting.seed}"]
        if setting.dtype != "float32":
            options.append(f"dtype={quoted(setting.dtype)}")
        lines = ["from peft import PeftModel", ""] if peft else []
        lines += [
            "import deltacontrol as dc",
            "",
            f"model, tokenizer = dc.load_model({', '.join([base, *options])})",
        ]
    take = "PeftModel.from_pretrained" if peft else "dc.load"
    lines.append(f"tuned = {take}(model, {quoted(place)})")
    text = fenced("\n".join(lines), "python")
    if Path(setting.model).is_dir():
        text += "\n\nThe base is a model in a folder of its author's; give the path of your copy."
    return text


def _settings(record: Record) -> str:
    """The configuration as it was asked for, without paths."""
    config: dict[str, Any] = _public(record.config)
    config |= {"model": public_model(record.config["model"])} if record.config.get("model") else {}
    config |= {"task": _task_name(record)} if record.config.get("task") else {}
    return (
        f"Run {code(record.id)}, a {record.kind}:\n\n"
        f"{fenced(json.dumps(config, indent=2, ensure_ascii=False), 'json')}"
    )


def _public(value: Any) -> Any:
    """JSON values, of each path the last part."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    if isinstance(value, str) and _PATH.fullmatch(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _versions(record: Record) -> str:
    project, packages = record.provenance.get("project") or {}, record.provenance.get("packages")
    rows = [(code(name), code(str(version))) for name, version in (packages or {}).items()]
    if commit := project.get("commit"):
        changed = ", with changes that were not committed" if project.get("modified") else ""
        rows.append(("commit of deltacontrol", f"{code(commit)}{changed}"))
    return rows_table(("package", "version"), rows) if rows else ""


def _evaluated(record: Record, setting: Setting, title: str) -> dict[str, Any]:
    """The scores as the head has them."""
    from huggingface_hub import EvalResult

    metrics, task = _metrics(record), _task_name(record)
    if not metrics or not task:
        return {}
    packaged = tasks.available().get(task)
    kind = setting.kind if setting.template is None else "classification"
    results = [
        EvalResult(
            task_type=PIPELINES.get(kind, "text-regression"),
            dataset_type=task,
            dataset_name=task if packaged is None else f"{task}: {packaged.description}",
            dataset_split=record.config.get("evaluate_on"),
            metric_type=METRICS[name][0],
            metric_name=METRICS[name][1],
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    hub_names = list(dict.fromkeys(METRICS[name][0] for name in metrics))
    return {"metrics": hub_names, "eval_results": results, "model_name": title}
