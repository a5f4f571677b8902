"""Rows of one batch under different LoRAs: rows a second, beside passes apart and beside `peft`.

    python -m deltacontrol.experiments.benchmarks.serving

A batch of real-sized rows names K adapters, as many rows of each, in mixed order. Contestants, in
turn in one process, forward passes without gradients: ours in one pass
(`deltacontrol.deltas.serve`), ours in K passes, one an adapter (the values of each are put in the
model's places, nothing is attached anew), and peft's ``adapter_names``, which runs the base once
and each adapter on its rows. Their outputs are held against one another.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, Server, attach_many
from deltacontrol.experiments.benchmarks.contest import alternate, quartiles
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.devices import choose_device
from deltacontrol.theory.errors import InputError

RANK, ALPHA = 8, 16.0
SITES = ("query", "value")  # peft's names of what LoRA's own sites are in a BERT


@dataclass(frozen=True)
class Benchmark:
    """Measure, print and return the numbers.

    Attributes:
        model: of the BERT kind.
        adapters: numbers K of adapters in a batch; each divides the rows.
        rows: of a batch.
        length: tokens of a row.
        turns: timed batches of each contestant.
        warmup: untimed ones.
        threads: threads of torch; on the CPU only.
        device: auto, cpu or cuda.
        out: also write the result to this JSON file.
    """

    model: str = "minilm-l6"
    adapters: tuple[int, ...] = (1, 4, 16)
    rows: int = 32
    length: int = 32
    turns: int = 20
    warmup: int = 3
    threads: int = 2
    device: str = "auto"
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """All numbers of adapters, all contestants.

        Raises:
            InputError: a number of adapters does not divide the rows.
        """
        for count in self.adapters:
            if count < 1 or self.rows % count:
                raise InputError(f"{count} adapters do not share {self.rows} rows; take a divisor")
        torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        print(f"{self.model}, {self.rows} x {self.length} tokens, LoRA of rank {RANK}, {device}")
        result = {
            "model": self.model,
            "batch": [self.rows, self.length],
            "rank": RANK,
            "device": device,
            "threads": self.threads,
            "turns": self.turns,
            "adapters": [self._contest(count, device) for count in self.adapters],
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _contest(self, count: int, device: str) -> dict[str, Any]:
        base = self._base().to(device)  # type: ignore[arg-type]
        stack = attach_many(base, LoRA(rank=RANK, alpha=ALPHA), seeds=range(count))
        draw = torch.Generator().manual_seed(count)
        with torch.no_grad():
            for value in stack.trainable().values():
                value.copy_(0.05 * torch.randn(value.shape, generator=draw))
        names = [f"a{k}" for k in range(count)]
        server = Server(stack, names)
        order = torch.randperm(self.rows, generator=draw)
        which = [names[int(place) % count] for place in order]
        size = (self.rows, self.length)
        tokens = torch.randint(base.config.vocab_size, size, generator=draw).to(device)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        steps: dict[str, Callable[[], Tensor]] = {
            "mixed": lambda: server(which, **batch)[0],
            "apart": lambda: self._apart(server, which, batch),
            "peft": self._peft(stack, names, which, batch, device),
        }
        with torch.no_grad():
            outputs = {name: step() for name, step in steps.items()}
            other = server([names[(names.index(name) + 1) % count] for name in which], **batch)[0]
            seconds = alternate(steps, self.turns, self.warmup)
        changed = float((other - outputs["mixed"]).norm() / outputs["mixed"].norm())
        found: dict[str, Any] = {"adapters": count, "adapters_differ": changed}
        for name in steps:
            error = (outputs[name] - outputs["mixed"]).norm() / outputs["mixed"].norm()
            ratio = [a / b for a, b in zip(seconds[name], seconds["mixed"], strict=True)]
            spread = quartiles(seconds[name])
            found[name] = {
                "seconds": spread,
                "rows_per_second": self.rows / spread["median"],
                "time_over_mixed": quartiles(ratio),
                "difference": float(error),
            }
            told = found[name]["time_over_mixed"]
            print(
                f"  K = {count:3} {name:6} {found[name]['rows_per_second']:8,.0f} rows/s, "
                f"{told['median']:.2f} ({told['q25']:.2f}-{told['q75']:.2f}) of the time of mixed, "
                f"outputs differ by {float(error):.0e}",
                flush=True,
            )
        return found

    def _base(self) -> PreTrainedModel:
        return Setting(self.model, model_kind="classification", num_labels=2).base.eval()

    def _apart(self, server: Server, which: list[str], batch: dict[str, Tensor]) -> Tensor:
        """One pass an adapter, and the rows in their places again."""
        parts = []
        places = []
        for name in server.names:
            rows = [i for i, own in enumerate(which) if own == name]
            copy = server.names.index(name)
            part = {key: value[rows] for key, value in batch.items()}
            parts.append(server.stack(copy, copy + 1, **part)[0])
            places += rows
        back = torch.tensor(places).argsort()
        return torch.cat(parts)[back]

    def _peft(
        self, stack: Any, names: list[str], which: list[str], batch: dict[str, Tensor], device: str
    ) -> Callable[[], Tensor]:
        """The same adapters on a model of peft's own.

        Raises:
            InputError: peft is not installed.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise InputError("this benchmark compares with peft: pip install peft") from error
        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(SITES))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft's calls
            model = get_peft_model(self._base(), config, adapter_name=names[0])
            for name in names[1:]:
                model.add_adapter(name, config)
        own = {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}
        values = stack.trainable()
        with torch.no_grad():
            for path, module in own.items():
                site = path.removeprefix("base_model.model.")
                for k, name in enumerate(names):
                    for factor, target in (("A", module.lora_A), ("B", module.lora_B)):
                        key = next(n for n in values if n.endswith(f"{site}.{factor}"))
                        target[name].weight.copy_(values[key][k])
        model.to(device).eval()
        return lambda: model(**batch, adapter_names=which)[0]


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
