"""What may go with any peft format: fully trained modules (modules_to_save) and biases (bias)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.format import Attached, Format, Plan, Slot
from deltacontrol.deltas.interop.targets import as_sites, saved_modules
from deltacontrol.deltas.methods.bitfit import BitFit
from deltacontrol.deltas.methods.head import HeadTuning
from deltacontrol.deltas.methods.layer_norm import LayerNormTuning
from deltacontrol.deltas.methods.selected_modules import SelectedModules
from deltacontrol.theory.errors import InputError

EXTRAS: tuple[type[Delta], ...] = (BitFit, HeadTuning, SelectedModules, LayerNormTuning)


def extend(
    plan: Plan,
    form: Format,
    config: Mapping[str, Any],
    host: Host,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Add modules_to_save and bias of a configuration to the plan of its format.

    Args:
        plan: of the format.
        form: the format.
        config: the configuration.
        host: the model.
        tensors: of the file, where there is one: a table of embeddings that had tokens added.
    """
    saved = saved_modules(config, host)
    inside = tuple(path + "." for path in saved)
    if saved:
        whole = set(saved) == set(host.sites.head_paths())
        plan.deltas.append(HeadTuning() if whole else SelectedModules(sites=as_sites(saved, host)))
        names = host.parameter_names(saved)
        plan.slots += parameter_slots({name: form.root + name for name in names}, host)
    if config.get("bias", "none") != "none":
        names = _biases(config["bias"], plan.paths, inside, host)
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        plan.deltas.append(BitFit(sites=as_sites(paths, host)))
        keys = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            under = f"{path}.base_layer" if path in plan.paths else path
            keys[name] = f"{form.root}{under}.{leaf}"
        plan.slots += parameter_slots(keys, host)
    _grown_tables(plan, form, host, tensors or {})
    _constants(plan, form, saved, host)


def parameter_slots(keys: Mapping[str, str], host: Host) -> list[Slot]:
    """The slots of base parameters, by name; tied ones are one control, under their first name."""
    firsts: dict[int, str] = {}
    slots = []
    for name, key in keys.items():
        parameter = host.parameter(name)
        first = firsts.setdefault(id(parameter), name)
        slots.append(Slot(key, tuple(parameter.shape), (first,)))
    return slots


def _biases(word: str, paths: Sequence[str], saved: tuple[str, ...], host: Host) -> list[str]:
    """Names of the biases that ``bias`` means; those of the saved modules are theirs."""
    names = host.parameter_names(host.sites.modules)
    biases = [n for n in names if n.rpartition(".")[2] == "bias" and not n.startswith(saved)]
    if word != "all":
        biases = [n for n in biases if n.rpartition(".")[0] in paths]
    if not biases:
        raise InputError(
            f"bias is {word!r}, but {type(host.model).__name__} has no bias there; load the model "
            "that the adapter was made for."
        )
    return biases


def _tables(host: Host) -> dict[str, Tensor]:
    """The weights of the table of embeddings and of the output embeddings, by the module's path."""
    found = {}
    for module in (host.model.get_input_embeddings(), host.model.get_output_embeddings()):
        path = next((p for p, m in host.sites.modules.items() if m is module), None)
        if path is not None and isinstance(module, nn.Embedding | nn.Linear):
            found[path] = host.original(f"{path}.weight").detach().cpu()
    return found


def _grown_tables(plan: Plan, form: Format, host: Host, tensors: Mapping[str, Tensor]) -> None:
    """Train the tables whose last rows, those of added tokens, are other ones in the file.

    peft saves a table whole where the vocabulary has grown, because the new rows are no part of the
    base model, and puts it in the place of the model's. A table that differs in its first half is
    not of this base and stays refused.

    Raises:
        InputError: the model has fewer or more tokens than the file.
    """
    taken = {slot.key for slot in plan.slots}
    keys: dict[str, str] = {}
    for path, table in _tables(host).items():
        for key in (f"{form.root}{path}.weight", f"{form.root}{path}.base_layer.weight"):
            if key in taken or key not in tensors:
                continue
            rows, wanted = tensors[key], len(tensors[key])
            if rows.shape[1:] == table.shape[1:] and wanted != len(table):
                raise InputError(
                    f"{key} has {wanted} tokens, and {type(host.model).__name__} has {len(table)}; "
                    f"call model.resize_token_embeddings({wanted}) before the import."
                )
            if rows.shape != table.shape:
                continue
            other = (rows.to(table.dtype) != table).any(dim=1).nonzero()
            if len(other) and int(other[0]) >= len(table) // 2:
                keys[f"{path}.weight"] = key
    if keys:
        paths = [name.rpartition(".")[0] for name in keys]
        plan.deltas.insert(0, SelectedModules(sites=as_sites(paths, host)))
        plan.slots += parameter_slots(keys, host)


def _constants(plan: Plan, form: Format, saved: Sequence[str], host: Host) -> None:
    """What peft saves beside the adapter.

    These are the embeddings where they are targeted, or where peft could not tell whether they had
    grown, and with bias="all" the biases of the saved modules once more, and as they were before.
    """
    taken = {slot.key for slot in plan.slots}
    for module in (host.model.get_input_embeddings(), host.model.get_output_embeddings()):
        path = next((p for p, m in host.sites.modules.items() if m is module), None)
        if path is None or module is None:
            continue
        for leaf, _ in module.named_parameters():
            value = host.original(f"{path}.{leaf}")
            keys = {f"{form.root}{path}.{leaf}", f"{form.root}{path}.base_layer.{leaf}"}
            plan.constants.update({key: value for key in keys - taken})
    for name in host.parameter_names(saved):
        owner = next(p for p in saved if name.startswith(p + "."))
        leaf = name[len(owner) + 1 :]
        for middle in ("modules_to_save", "modules_to_save.default"):
            plan.copies[f"{form.root}{owner}.{middle}.{leaf}"] = form.root + name
        plan.unused.add(f"{form.root}{owner}.original_module.{leaf}")


@dataclass(frozen=True)
class Chosen:
    """The extras on a model.

    Attributes:
        controls: values by the name of the base parameter.
        saved: modules_to_save.
        biases: names of trained biases outside of these.
    """

    controls: dict[str, Tensor]
    saved: list[str]
    biases: list[str]


def describe(attached: Sequence[Attached], host: Host) -> Chosen:
    """What the extras among the deltas train."""
    heads = host.sites.head_paths()
    controls: dict[str, Tensor] = {}
    saved: dict[str, None] = {}
    biases: list[str] = []
    for item in attached:
        controls.update(item.controls)
        if isinstance(item.delta, BitFit):
            biases += item.controls
            continue
        for name in item.controls:
            head = next((path for path in heads if name.startswith(path + ".")), None)
            saved[head or name.rpartition(".")[0]] = None
            # peft copies a module that it saves, so what is tied to it is saved as well.
            others = (other.rpartition(".")[0] for other in host.tied(name))
            saved |= {path: None for path in others if path in host.sites.modules}
    inside = tuple(path + "." for path in saved)
    return Chosen(controls, list(saved), [n for n in biases if not n.startswith(inside)])


def bias_word(form: Format, chosen: Chosen, paths: Sequence[str]) -> str:
    """The value of ``bias``: the narrowest that holds the trained biases.

    Raises:
        InputError: the format has no biases.
    """
    if not chosen.biases:
        return "none"
    if form.bias_word is None:
        raise InputError(
            f"peft's {form.peft_type} has no field for trained biases, so bitfit cannot go with "
            "it; drop bitfit, or export a lora with it."
        )
    at_targets = all(name.rpartition(".")[0] in paths for name in chosen.biases)
    return form.bias_word if at_targets else "all"
