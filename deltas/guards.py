"""What a base model refuses while deltas act in it: what would lose a part of them in silence.

A trainer that is given the base instead of the `DeltaModel` sees only those controls that stand in
for base parameters: it would train and save them, and leave the others at their start. A copy of
the base would act with the controls of the original.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from deltacontrol.deltas.editing.edits import Edits
from deltacontrol.theory.errors import InputError, raised_in

COPIED = (
    "a model with deltas cannot be copied: detach(), copy the base, attach to the copy and "
    "load(state())."
)


def guard(edits: Edits) -> None:
    """Let the base model answer by an InputError to what would leave controls out.

    ``train()`` is refused, and with it every loop and trainer that is given the base; ``eval()``
    takes the controls along. ``save_pretrained``, ``push_to_hub``, ``copy.deepcopy`` are refused.
    """
    model = edits.model
    name = type(model).__name__

    def train(mode: bool = True) -> PreTrainedModel:
        if mode:
            raise InputError(
                f"this {name} carries deltas, whose controls lie beside it: training it alone "
                "would leave most of them out. Train the DeltaModel that attach() returned "
                "(tuned.train(), Trainer(model=tuned, ...)), or detach() first."
            )
        edits.controls.train(mode)
        return type(model).train(model, mode)

    saved = (
        f"this {name} carries deltas, and its own files would leave their controls out. Save the "
        "DeltaModel that attach() returned (tuned.save(folder), or for the hub deltas.save(tuned, "
        "folder, push_to=...)); or merge() or detach() first, and save the plain model."
    )
    edits.override("train", train)
    edits.override("save_pretrained", _refuse(saved))
    edits.override("push_to_hub", _refuse(saved))
    edits.override("__deepcopy__", _refuse(COPIED))


@contextmanager
def first_pass(edits: Edits, again: Callable[[], Any]) -> Iterator[None]:
    """Watch the first pass of a model with deltas, which shows whether they can act on it at all.

    A module that is not called in one pass may be in another (an expert, a block that is dropped at
    random), so that this is only said.

    Args:
        edits: what the deltas do.
        again: runs the pass once more.

    Raises:
        InputError: the pass fails in the code of torch, transformers or this package, and that of
            the base alone does not.
    """
    called: set[nn.Module] = set()
    watched = {module for modules in edits.acted_on.values() for module in modules}
    handles = [
        module.register_forward_pre_hook(lambda m, _: called.add(m), prepend=True)
        for module in watched
    ]
    name = type(edits.model).__name__
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if tracing or not raised_in(error, ("deltacontrol", "torch", "transformers")):
            raise
        try:
            with torch.no_grad(), edits.suspended():
                again()
        except Exception:
            raise error from None  # the fault is not the deltas'
        why = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{', '.join(edits.acted_on)} cannot act on this {name}: the base takes this batch, "
            f"and with them torch says {why!r}. Choose other sites or layers, or another delta; "
            "where dtypes differ, give the controls that of the base."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for namespace, modules in edits.acted_on.items():
        if called.isdisjoint(modules):
            paths = [p for p, m in edits.model.named_modules() if m in modules]
            warnings.warn(
                f"{namespace} changed nothing in its first pass: the forward of {name} called none "
                f"of the modules on which it acts, such as {paths[0] if paths else name}",
                stacklevel=4,
            )


def refuse_offloaded(model: PreTrainedModel) -> None:
    """Refuse weights on ``meta``: a control that is laid on them has no values to start from.

    Accelerate leaves them there where it keeps the weights on the disk or in another memory.

    Raises:
        InputError: names the first such weights.
    """
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    empty += [name for name, b in model.named_buffers() if b.is_meta]
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise InputError(
            f"{len(empty)} weights of this {type(model).__name__} are on meta, without values "
            f"({', '.join(empty[:3])}{more}): they are offloaded. Load the model whole, without "
            "device_map or with room for all of it (device_map={'': 'cpu'}), or a smaller one."
        )


def require_memory(name: str, parameters: int, model: PreTrainedModel) -> None:
    """Refuse controls that no memory of this machine holds, before anything is made.

    Raises:
        InputError: gives the number of parameters and the memory.
    """
    weight = next(model.parameters(), None)
    size = 4 if weight is None else weight.element_size()
    total = psutil.virtual_memory().total
    if weight is not None and weight.is_cuda:
        total = torch.cuda.get_device_properties(weight.device).total_memory
    if parameters * size > total:
        raise InputError(
            f"{name} would have {parameters:,d} parameters, {parameters * size / 2**30:,.0f} GiB, "
            f"and the memory has {total / 2**30:,.0f} GiB; choose smaller sizes."
        )


@contextmanager
def allocating(name: str) -> Iterator[None]:
    """Say of a delta whose constants and controls no memory holds that they are too large.

    Raises:
        InputError: they are.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out_of_memory and not re.search("allocate memory|not enough memory", str(error)):
            raise
        why = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name}: its controls or constants are larger than the memory ({why}); choose "
            "smaller sizes."
        ) from error


def _refuse(message: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise InputError(message)

    return refuse
