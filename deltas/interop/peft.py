"""Adapters of the peft library, read and written without it.

    controlled = import_peft("adapter/", model)    # the same outputs as peft's
    export_peft(controlled, "adapter/")            # PeftModel.from_pretrained(model, "adapter/")

The files are those of peft 0.21. Every field and every tensor must be known and fit the model; what
does not is listed and refused, because peft itself goes on with a warning.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.attaching import attach
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop import extras, formats
from deltacontrol.deltas.interop.adapter import Adapter, read, write
from deltacontrol.deltas.interop.fields import checked
from deltacontrol.deltas.interop.format import Attached, Format, Plan
from deltacontrol.deltas.interop.targets import task_type
from deltacontrol.deltas.methods.bitfit import BitFit
from deltacontrol.deltas.methods.layer_norm import LayerNormTuning
from deltacontrol.deltas.methods.selected_modules import SelectedModules
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown


@cache
def available() -> dict[str, Format]:
    """The formats by peft_type."""
    found: dict[str, Format] = {}
    for info in pkgutil.iter_modules(formats.__path__):
        module = importlib.import_module(f"{formats.__name__}.{info.name}")
        found.update({form.peft_type: form for form in module.FORMATS})
    return dict(sorted(found.items()))


@typed
def import_peft(path: str | Path, model: PreTrainedModel) -> DeltaModel:
    """Attach the adapter in a folder to a model.

    The deltas of the result say what the adapter is: a LORA with a rank pattern is one LoRA for
    each rank, modules_to_save a HeadTuning or SelectedModules, bias a BitFit. The controls are
    trainable; ``detach()`` restores the model.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors, or the id of one on the
            hub, ``owner/name``.
        model: the model that the adapter was made for, free of deltas.

    Raises:
        InputError: a file cannot be read; a field or a tensor is unknown, missing, of another shape
            or not reproducible (all of them are listed); the model has deltas already.
    """
    adapter = read(path)
    form = _format(adapter.config)
    config = checked(form.fields, adapter.config)
    host = Host(model)
    plan = form.plan(config, host)
    extras.extend(plan, form, config, host, adapter.tensors)
    values = _fitted(plan, adapter.tensors, model)
    controlled = attach(model, *plan.deltas)
    try:
        state = controlled.state()
        names = {key.partition(".")[2]: key for key in state}
        controlled.load(state | {names[name]: value for name, value in values.items()})
    except BaseException:
        controlled.detach()
        raise
    return controlled


@typed
def export_peft(
    controlled: DeltaModel,
    path: str | Path,
    *,
    base_model: str | None = None,
    card: str = "",
) -> None:
    """Write the deltas of a model as an adapter that peft loads, with the same outputs.

    Args:
        controlled: the model with its deltas.
        path: folder to write; it must not hold an adapter yet.
        base_model: name or folder of the base model, kept in the configuration; None takes the one
            that the model was loaded from.
        card: text of a README.md beside the adapter; none by default.

    Raises:
        InputError: peft has no format for a delta, or for these deltas together; nothing is written
            then.
    """
    write(path, to_adapter(controlled, base_model=base_model), card)


def to_adapter(controlled: DeltaModel, *, base_model: str | None = None) -> Adapter:
    """The files' contents for the deltas of a model; see `export_peft`."""
    host = controlled.host
    state = controlled.state()
    attached = [
        Attached(
            a.delta,
            {
                key.partition(".")[2]: value
                for key, value in state.items()
                if key.partition(".")[0] == a.namespace
            },
            controlled.controls.get_submodule(a.namespace),
        )
        for a in controlled.attachments
    ]
    mains = _mains(attached)
    form = _form_for(mains)
    rest = [item for item in attached if not any(item is main for main in mains)]
    chosen = extras.describe(rest, host)
    described = form.describe(mains, host)
    task = task_type(host.model)
    targeted = "target_modules" in form.fields
    saves = "modules_to_save" in form.fields
    if chosen.saved and not saves:
        raise InputError(
            f"peft's {form.peft_type} trains no module beside its own, and {chosen.saved} are "
            "trained here; drop that delta, or export it with a lora."
        )
    if (
        targeted
        and saves
        and task == "SEQ_CLS"
        and not set(host.sites.head_paths()) <= set(chosen.saved)
    ):
        task = None  # with this task peft trains the head, and the head is not trained here
    config = {name: field.default for name, field in form.fields.items()}
    config |= described.config
    config |= {
        "peft_type": form.peft_type,
        "task_type": task,
        "base_model_name_or_path": base_model or host.model.name_or_path or None,
        "inference_mode": True,
        # As peft does without a task: the class that the adapter goes with.
        "auto_mapping": None if task else _class_of(host.model),
    }
    if saves:
        config["modules_to_save"] = chosen.saved or None
    word = extras.bias_word(form, chosen, described.paths)
    if "bias" in form.fields:
        config["bias"] = word
    if "fan_in_fan_out" in form.fields:
        modules = [host.sites.modules[path] for path in described.paths]
        config["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in modules)
    plan = form.plan(checked(form.fields, config), host)
    if set(plan.paths) != set(described.paths):
        more = ", ".join(sorted(set(plan.paths) ^ set(described.paths)))
        raise InputError(
            f"peft would act at other modules than these deltas (they differ in {more}): it gives "
            "a module one adapter or trains it whole. Choose other sites, or drop one delta."
        )
    extras.extend(plan, form, config, host)
    return Adapter(config, _tensors(plan, described.controls | chosen.controls, host))


def _class_of(model: PreTrainedModel) -> dict[str, str]:
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _mains(attached: list[Attached]) -> list[Attached]:
    """The deltas that decide the format: whole modules only where nothing else does."""
    methods = [item for item in attached if not isinstance(item.delta, extras.EXTRAS)]
    norms = [item for item in attached if isinstance(item.delta, LayerNormTuning)]
    modules = [item for item in attached if isinstance(item.delta, SelectedModules)]
    biases = [item for item in attached if isinstance(item.delta, BitFit)]
    return methods or norms or modules or biases or attached


def _format(config: Mapping[str, Any]) -> Format:
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise InputError(
            f"adapter_config.json has peft_type {kind!r}; expected one of {', '.join(available())}."
        )
    if kind not in available():
        raise unknown("peft_type", kind, available())
    return available()[kind]


def _form_for(attached: Sequence[Attached]) -> Format:
    """The one format that holds all of these deltas."""
    forms = available().values()
    for form in forms:
        if all(isinstance(item.delta, form.writes) for item in attached):
            return form
    kinds = {type(item.delta) for item in attached}
    known = {kind for form in forms for kind in form.writes}
    lost = sorted(kind.name for kind in kinds - known)
    if lost:
        raise InputError(
            f"peft has no format for {', '.join(lost)}; it has one for "
            f"{', '.join(sorted(kind.name for kind in known))}, each with biases or whole modules."
        )
    raise InputError(
        f"peft holds one method in an adapter, not {' and '.join(sorted(k.name for k in kinds))} "
        "together; export them one at a time."
    )


def _fitted(plan: Plan, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The controls by name, from tensors that are exactly those of the plan.

    Raises:
        InputError: tensors are missing, unknown, of another shape, or contradict each other or the
            base model; all are listed.
    """
    expected = {slot.key for slot in plan.slots}
    missing = sorted((expected | plan.required) - tensors.keys())
    known = expected | plan.constants.keys() | plan.copies.keys() | plan.unused
    extra = sorted(tensors.keys() - known)
    problems = [f"missing {key}" for key in missing] + [f"unknown {key}" for key in extra]
    for key, value in plan.constants.items():
        if key in tensors and not _same(tensors[key], value):
            problems.append(f"{key} is not what this model has")
    for key, first in plan.copies.items():
        if key in tensors and first in tensors and not torch.equal(tensors[key], tensors[first]):
            problems.append(f"{key} differs from {first}")
    values = dict(plan.values)
    for slot in plan.slots:
        if slot.key not in tensors:
            continue
        tensor = tensors[slot.key]
        if tuple(tensor.shape) != slot.shape:
            shapes = f"{tuple(tensor.shape)}, expected {slot.shape}"
            problems.append(f"{slot.key} has shape {shapes}")
            continue
        for name, value in zip(slot.controls, slot.split(tensor), strict=True):
            if name in values and not torch.equal(values[name], value):
                problems.append(f"{slot.key} is tied to {name}, but has other values")
            values.setdefault(name, value)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise InputError(
            f"the adapter's tensors do not fit {type(model).__name__}:{listed}\nLoad "
            "the base model that it was trained on, and keep the configuration it was saved with."
        )
    return values


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal in the dtype of either: a file may be coarser or finer than the model."""
    if found.shape != expected.shape:
        return False
    found, expected = found.detach().cpu(), expected.detach().cpu()
    return torch.equal(found.to(expected.dtype), expected) or torch.equal(
        found, expected.to(found.dtype)
    )


def _tensors(plan: Plan, controls: Mapping[str, Tensor], host: Host) -> dict[str, Tensor]:
    """The file's tensors; a base parameter that no control stands for is written as it is."""
    tensors = {}
    for slot in plan.slots:
        parts = [
            controls[name] if name in controls else host.original(name) for name in slot.controls
        ]
        tensors[slot.key] = slot.join([part.detach().cpu() for part in parts])
        assert tuple(tensors[slot.key].shape) == slot.shape, slot.key
    tensors |= {key: plan.constants[key] for key in plan.required}
    left = sorted(controls.keys() - {name for slot in plan.slots for name in slot.controls})
    if left:
        raise InputError(
            f"peft cannot hold the controls {', '.join(left)} beside the others: it gives a module "
            "one adapter or trains it whole, not both. Drop one of the deltas."
        )
    return tensors
