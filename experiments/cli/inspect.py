"""``deltacontrol inspect``: what a delta attaches where."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltacontrol.experiments import tasks
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas.model import DeltaModel


@dataclass(frozen=True)
class Inspect:
    """Print a model's tree with the controls that deltas put on it, and the parameter counts.

    For example

        deltacontrol inspect --model minilm-l6 --delta lora:rank=16 bitfit

    Attributes:
        model: A packaged model's name, a local folder, or an id on the hub.
        delta: The deltas, such as lora:rank=16; none prints the bare model.
        kind: Which head the model gets: classification, regression or causal-lm.
        num_labels: Classes of the head, of a classification; 2 by default.
        depth: How deep into the tree to go.
    """

    model: str = "minilm-l6"
    delta: tuple[str, ...] = ("lora",)
    kind: tasks.Kind | None = None
    num_labels: int | None = None
    depth: int = 99

    def run(self) -> None:
        """Load, attach, print.

        Raises:
            InputError: The model cannot be loaded, a delta does not fit it, or an option is of
                another kind of model.
        """
        if self.num_labels is not None and self.kind not in (None, "classification"):
            raise InputError(
                f"--num-labels goes with --kind classification, not {self.kind}; leave it out"
            )
        if self.depth < 1:
            raise InputError(f"depth is {self.depth}; expected at least 1")
        setting = Setting(
            self.model,
            deltas=self.delta,
            add_head=False,
            model_kind=self.kind or "classification",
            num_labels=2 if self.num_labels is None else self.num_labels,
        )
        if not self.delta:
            base = setting.base
            print(f"{type(base).__name__}: {sum(p.numel() for p in base.parameters()):,d}")
            return
        print("\n".join(tree(setting.controlled, self.depth)))


def tree(controlled: DeltaModel, depth: int = 99) -> list[str]:
    """Lines: every module with its frozen parameters and the controls that act at it."""
    host = controlled.host
    controls: dict[str, dict[str, list[str]]] = {}
    for name, parameter in controlled.trainable().items():
        namespace, _, rest = name.partition(".")
        path = host.state_path[name]
        shape = "×".join(map(str, parameter.shape))
        leaf = rest.removeprefix(f"{path}.")
        controls.setdefault(path, {}).setdefault(namespace, []).append(f"{leaf} {shape}")
    trained = {id(p) for p in controlled.trainable().values()}
    lines = [f"{type(controlled.model).__name__}"]
    for path, module in host.sites.modules.items():
        if not path or path.count(".") >= depth:
            continue
        frozen = sum(p.numel() for p in module.parameters() if id(p) not in trained)
        acting = controls.get(path, {})
        if not frozen and not acting and not any(p.startswith(path + ".") for p in controls):
            continue
        indent = "  " * (path.count(".") + 1)
        text = f"{indent}{path.rpartition('.')[2]} ({type(module).__name__})"
        lines.append(f"{text:60} {frozen:>12,d}")
        lines += [f"{indent}  + {space}: {', '.join(parts)}" for space, parts in acting.items()]
        if path.count(".") == depth - 1:
            inside = [space for p in controls if p.startswith(path + ".") for space in controls[p]]
            lines += [f"{indent}  + {s}: {n} sites inside" for s, n in Counter(inside).items()]
    for path in controls.keys() - host.sites.modules.keys():
        lines += [f"  + {space}: {', '.join(p)}" for space, p in controls[path].items()]
    lines.append("")
    for attachment in controlled.attachments:
        delta = attachment.delta
        lines.append(
            f"{attachment.namespace}: {delta.law} ({delta.category}) at {attachment.num_sites} "
            f"sites, {attachment.num_parameters:,d} parameters = {delta.num_parameters_formula}"
        )
    share = controlled.num_trainable / controlled.num_total
    lines.append(
        f"trainable {controlled.num_trainable:,d} of {controlled.num_total:,d} ({share:.4%})"
    )
    return lines


COMMAND = Inspect
