"""Time and memory of deltas: against the real ``peft``, and what frozen work can be saved.

    python -m deltacontrol.experiments.benchmarks.deltas
    python -m deltacontrol.experiments.benchmarks.deltas --parts peft memory
    python -m deltacontrol.experiments.benchmarks.deltas --parts compiled --turns 40 --limit 120

    peft      LoRA, DoRA, VeRA, (IA)³, prefix and prompt: ratios to peft, same model and batch
    compiled  LoRA's step as it is and compiled, ours and peft's, in the same turns
    memory    state-based control of whole blocks against LoRA at all linear maps: what autograd
              keeps, beside an account by module
    caching   adapters in the last two blocks, with the states below kept and without
    together  K LoRA trainings in one pass against one after another

Contestants take turns; see `contest`. A contest ends after `limit` seconds of steps, so that all
parts take about five minutes on two cores. Compiling takes a minute or two where inductor's cache
is empty.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    Delta,
    HeadTuning,
    HoulsbyAdapter,
    LoRA,
    StateBasedTuning,
    attach,
    attach_many,
)
from deltacontrol.deltas.dynamics.frozen_states import FrozenStates
from deltacontrol.experiments.benchmarks.contest import (
    alternate,
    compiled_step,
    peak_allocated,
    quartiles,
    saved_bytes,
    training_step,
)
from deltacontrol.experiments.benchmarks.rivals import OURS, RANK, peft_config
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.devices import choose_device, choose_precision
from deltacontrol.experiments.training.settings import Settings
from deltacontrol.experiments.training.together.loop import Loop

Part = Literal["peft", "compiled", "memory", "caching", "together"]
EVERY_MAP = (
    "attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down",
)  # fmt: skip
# K, examples, tokens: many small batches, a middle one, and one that fills the machine alone.
TOGETHER = ((16, 4, 16), (8, 8, 32), (8, 16, 64))


@dataclass(frozen=True)
class Benchmark:
    """Measure, print and return the numbers.

    Attributes:
        parts: what to measure.
        methods: which deltas to hold against peft.
        model: a model of the BERT kind.
        decoder: a deeper causal model, for memory and caching; empty leaves it out.
        batch_size: examples of a batch.
        length: tokens of every example.
        turns: timed steps of each contestant.
        warmup: untimed steps of each.
        limit: seconds of timed steps of one contest, behind which it ends with fewer turns.
        threads: threads of torch; on the CPU only.
        precision: auto, fp32 or bf16.
        device: auto, cpu or cuda.
        out: also write the result to this JSON file.
    """

    parts: tuple[Part, ...] = ("peft", "compiled", "memory", "caching", "together")
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(OURS))
    model: str = "minilm-l6"
    decoder: str = "smollm2-135m"
    batch_size: int = 16
    length: int = 64
    turns: int = 20
    warmup: int = 3
    limit: float = 20.0
    threads: int = 2
    precision: str = "auto"
    device: str = "auto"
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """All parts in turn."""
        torch.set_num_threads(self.threads)
        measures: dict[str, Callable[[], Any]] = {
            "peft": self.against_peft,
            "compiled": self.compiled,
            "memory": self.memory,
            "caching": self.caching,
            "together": self.together,
        }
        precision, device = self._setting()
        print(f"{precision} on {device}, {self.threads} threads, medians of {self.turns} turns")
        result: dict[str, Any] = {
            "precision": precision,
            "device": device,
            "threads": self.threads,
            "turns": self.turns,
            "limit": self.limit,
            "batch": [self.batch_size, self.length],
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }
        for number, part in enumerate(self.parts, start=1):
            began = time.perf_counter()
            print(f"\npart {number} of {len(self.parts)}: {part}", flush=True)
            result[part] = measures[part]()
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    # -- against peft ----------------------------------------------------------------------------

    def against_peft(self) -> dict[str, Any]:
        """Ratios of time, memory kept for backward and peak memory, ours over theirs."""
        precision, device = self._setting()
        batch = self._batch(self.model, self.batch_size, self.length)
        print(f"\n{self.model}, batch {self.batch_size} x {self.length}: ratios to peft")
        found = {}
        for name in self.methods:
            contestants = {who: self._contestant(who, name) for who in ("ours", "peft")}
            steps = {w: training_step(m, batch, precision, device) for w, m in contestants.items()}
            kept = {
                w: sum(saved_bytes(m, batch, precision, device).values())
                for w, m in contestants.items()
            }
            sizes = {
                w: sum(p.numel() for p in m.parameters() if p.requires_grad)
                for w, m in contestants.items()
            }
            seconds = alternate(steps, self.turns, self.warmup, limit=self.limit)
            peaks = {who: peak_allocated(step, device) for who, step in steps.items()}
            ratio = quartiles([a / b for a, b in zip(*seconds.values(), strict=True)])
            found[name] = {
                "seconds": {who: quartiles(values) for who, values in seconds.items()},
                "time_ratio": ratio,
                "kept_bytes": kept,
                "peak_bytes": peaks,
                "num_trainable": sizes,
            }
            print(
                f"  {name:7} time {ratio['median']:.3f} ({ratio['q25']:.3f}-{ratio['q75']:.3f}), "
                f"kept {kept['ours'] / kept['peft']:.3f}, peak {peaks['ours'] / peaks['peft']:.3f}"
                f"; {sizes['ours']} controls, peft {sizes['peft']}",
                flush=True,
            )
        return found

    def _contestant(self, who: str, name: str) -> nn.Module:
        if who == "ours":
            return self._attached(self.model, OURS[name], HeadTuning())
        from peft import get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft's calls
            theirs = get_peft_model(self._base(self.model), peft_config(name))
        return theirs.to(self._setting()[1]).eval()

    def compiled(self) -> dict[str, Any]:
        """Time and peak memory of LoRA's step, ours and peft's, compiled and not, over peft's."""
        precision, device = self._setting()
        batch = self._batch(self.model, self.batch_size, self.length)
        print(f"{self.model}, LoRA, batch {self.batch_size} x {self.length}: ratios to peft")
        steps, spent = {}, {}
        for who in ("ours", "peft"):
            steps[who] = training_step(self._contestant(who, "lora"), batch, precision, device)
            other: Any = self._contestant(who, "lora")
            base = other.model if who == "ours" else other.get_base_model()
            plain = training_step(other, batch, precision, device)
            name = f"{who} compiled"
            steps[name], spent[name] = compiled_step(base, plain)
            print(f"  {name} in {spent[name]:.1f} s", flush=True)
        seconds = alternate(steps, self.turns, self.warmup, limit=self.limit)
        peaks = {who: peak_allocated(step, device) for who, step in steps.items()}
        found = {}
        for who, values in seconds.items():
            ratio = quartiles([a / b for a, b in zip(values, seconds["peft"], strict=True)])
            found[who] = {
                "seconds": quartiles(values),
                "time_ratio": ratio,
                "peak_bytes": peaks[who],
                "peak_ratio": peaks[who] / peaks["peft"],
                "compile_seconds": spent.get(who),
            }
            print(
                f"  {who:13} time {ratio['median']:.3f} ({ratio['q25']:.3f}-{ratio['q75']:.3f}), "
                f"peak {found[who]['peak_ratio']:.3f}",
                flush=True,
            )
        return found

    # -- memory ----------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """Bytes kept for backward by both, and their ratio, with an account by module.

        In fp32: the copies that autocast makes of weights would be counted as kept.
        """
        precision, device = "fp32", self._setting()[1]
        found = {}
        for model in self._models():
            batch = self._batch(model, self.batch_size, self.length)
            accounts = {}
            for name, delta in (
                ("state-based", StateBasedTuning(rank=RANK)),
                ("lora", LoRA(rank=RANK, sites=EVERY_MAP)),
            ):
                controlled = self._attached(model, delta)
                accounts[name] = saved_bytes(controlled, batch, precision, device)
                controlled.detach()
            totals = {name: sum(account.values()) for name, account in accounts.items()}
            ratio = totals["state-based"] / totals["lora"]
            found[model] = {"kept_bytes": accounts, "ratio": ratio}
            print(f"\n{model}, fp32: kept for backward, MiB, by the module that ran")
            print(f"  {'':52} {'state-based':>12} {'lora, all maps':>14}")
            paths = sorted({path for account in accounts.values() for path in account})
            rows = [(p, [accounts[n].get(p, 0) / 2**20 for n in accounts]) for p in paths]
            rows.append(("all", [total / 2**20 for total in totals.values()]))
            for path, (ours, lora) in rows:
                print(f"  {path[-52:]:52} {ours:12.2f} {lora:14.2f}")
            print(f"  ratio {ratio:.3f}")
        return found

    # -- caching ---------------------------------------------------------------------------------

    def caching(self) -> dict[str, Any]:
        """Seconds of a training step with the states of the frozen blocks and without them."""
        precision, device = self._setting()
        found = {}
        for model in self._models():
            batch = self._batch(model, self.batch_size, self.length)
            base = self._base(model)
            depth = getattr(base.config, "num_hidden_layers", 0)
            adapters = HoulsbyAdapter(bottleneck=16, layers=(depth - 2, depth - 1))
            controlled = attach(base, adapters).to(device).eval()
            plain = training_step(controlled, batch, precision, device)
            frozen = FrozenStates(controlled, batch)
            numbers = torch.arange(self.batch_size)

            def cached(plain=plain, frozen=frozen, batch=batch, numbers=numbers) -> None:
                with frozen.passing(numbers, batch["attention_mask"]):
                    plain()

            cached()  # the first epoch, in which the states become known
            seconds = alternate(
                {"cached": cached, "plain": plain}, self.turns, self.warmup, limit=self.limit
            )
            ratio = quartiles([p / c for c, p in zip(*seconds.values(), strict=True)])
            share = frozen.num_bytes / self.batch_size
            found[model] = {
                "seconds": {who: quartiles(values) for who, values in seconds.items()},
                "speedup": ratio,
                "num_blocks": depth,
                "num_frozen": frozen.num_frozen,
                "bytes_an_example": share,
            }
            print(
                f"\n{model}: adapters in the last 2 of {depth} blocks: {ratio['median']:.2f} times "
                f"({ratio['q25']:.2f}-{ratio['q75']:.2f}) as fast with the states of "
                f"{frozen.num_frozen} blocks kept, {share / 2**10:.0f} KiB an example"
            )
            controlled.detach()
        return found

    # -- many at once ----------------------------------------------------------------------------

    def together(self) -> list[dict[str, Any]]:
        """Throughput of K copies in one pass over that of one after another."""
        precision, device = self._setting()
        found = []
        print(f"\n{self.model}: K copies of LoRA and the head in one step")
        for count, rows, length in TOGETHER:
            batch = self._batch(self.model, rows, length)
            settings = [
                Settings(steps=10**6, learning_rate=1e-4, seed=seed, precision=precision,
                         device=device)
                for seed in range(count)
            ]  # fmt: skip
            lora = LoRA(rank=RANK, alpha=2.0 * RANK)
            base = self._base(self.model).to(device)  # type: ignore[arg-type]
            stack = attach_many(base, lora, HeadTuning(), seeds=range(count))
            loop = Loop(stack, [_Same(batch)] * count, settings, device)
            while not loop.groups.decided:
                loop.update(0, loop.groups.next())
            group = loop.groups.best
            # The same step K times: K models would take more cache than trainings one by one do.
            single = self._attached(self.model, lora, HeadTuning())
            step = training_step(single, batch, precision, device, as_trained=True)
            seconds = alternate(
                {
                    "one after another": lambda step=step, count=count: _again(step, count),
                    "together": lambda loop=loop, group=group: loop.update(0, group),
                },
                self.turns,
                self.warmup,
                limit=self.limit,
            )
            ratio = quartiles([a / t for a, t in zip(*seconds.values(), strict=True)])
            found.append(
                {
                    "copies": count,
                    "batch": [rows, length],
                    "group": group,
                    "seconds": {who: quartiles(values) for who, values in seconds.items()},
                    "throughput_ratio": ratio,
                }
            )
            print(
                f"  K = {count:2}, batch {rows} x {length}: {ratio['median']:.2f} times the "
                f"throughput ({ratio['q25']:.2f}-{ratio['q75']:.2f}), {group} in a pass"
            )
            stack.detach()
        return found

    # -- models and batches ----------------------------------------------------------------------

    def _setting(self) -> tuple[str, str]:
        device = choose_device(self.device)
        return choose_precision(self.precision, device), device

    def _models(self) -> list[str]:
        return [name for name in (self.model, self.decoder) if name]

    def _base(self, model: str) -> PreTrainedModel:
        return Setting(model, model_kind="classification", num_labels=2).base

    def _attached(self, model: str, *deltas: Delta, seed: int = 0) -> Any:
        return attach(self._base(model), *deltas, seed=seed).to(self._setting()[1]).eval()

    def _batch(self, model: str, rows: int, length: int) -> dict[str, Tensor]:
        """Full rows of random tokens: every example has ``length`` tokens that count."""
        vocabulary = self._base(model).config.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, vocabulary, (rows, length), generator=generator)
        labels = torch.randint(2, (rows,), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {key: value.to(self._setting()[1]) for key, value in batch.items()}


@dataclass(frozen=True)
class _Same:
    """The same batch at every step."""

    whole: dict[str, Tensor]

    def batch(self, step: int) -> dict[str, Tensor]:
        return self.whole


def _again(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
