"""LoRA training of MiniLM: step time and memory against the real ``peft``.

    python -m experiments.benchmarks.lora_step

The two models take turns, one step each, on the same batch in one process with a fixed number of
threads, so that a slow minute of the machine slows both. Memory is measured twice: the bytes that
autograd keeps for the backward pass, which do not depend on the machine, and the peak of three
training steps above the loaded model, each model in a process of its own (resident set; on CUDA the
allocated memory).
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from transformers import PreTrainedModel

from experiments import data, models, provenance, tasks
from experiments.benchmarks.contest import alternate, quartiles, saved_bytes, training_step
from experiments.resources import PeakMemory, choose_device, choose_precision
from theory.errors import InputError


@dataclass(frozen=True)
class Benchmark:
    """Compare LoRA by hooks with LoRA by ``peft`` on the same batch.

    Attributes:
        model: model that both start from.
        batch_size: examples of a batch.
        length: tokens of every example.
        rank: LoRA's rank, at query and value.
        steps: timed steps of each.
        warmup: untimed steps of each.
        threads: threads of torch; on the CPU only.
        precision: auto, fp32 or bf16.
        device: auto, cpu or cuda.
        out: also write the result to this JSON file.
    """

    model: str = "minilm-l6"
    batch_size: int = 16
    length: int = 64
    rank: int = 8
    steps: int = 30
    warmup: int = 5
    threads: int = 2
    precision: str = "auto"
    device: str = "auto"
    out: Path | None = None

    def run(self) -> dict:
        """Measure, print and return the numbers."""
        torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        precision = choose_precision(self.precision, device)
        batch = {k: v.to(device) for k, v in self._batch().items()}
        contestants = {name: self._contestant(name, device) for name in ("deltacontrol", "peft")}
        steps = {n: training_step(m, batch, precision, device) for n, m in contestants.items()}
        saved = {
            n: sum(saved_bytes(m, batch, precision, device).values())
            for n, m in contestants.items()
        }
        seconds = alternate(steps, self.steps, self.warmup)
        del contestants, steps
        with ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            peaks = {n: pool.submit(self.peak_bytes, n).result() for n in seconds}
        result = self._result(seconds, peaks, saved, precision, device)
        _print(result)
        if self.out is not None:
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def peak_bytes(self, name: str) -> int:
        """Peak memory of three steps of one model, above what the loaded model takes."""
        torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        precision = choose_precision(self.precision, device)
        batch = {k: v.to(device) for k, v in self._batch().items()}
        step = training_step(self._contestant(name, device), batch, precision, device)
        memory = PeakMemory(device)
        for _ in range(3):
            step()
        return memory.peak() - memory.baseline

    def _contestant(self, name: str, device: str) -> nn.Module:
        return self._ours(device) if name == "deltacontrol" else self._peft(device)

    def _batch(self) -> dict[str, torch.Tensor]:
        task = tasks.load("movie")
        _, tokenizer = models.load(self.model, kind="classification", num_labels=2)
        encoded = data.encode(task, tokenizer, max_length=self.length)
        batch = encoded.training_batch(0, seed=0, batch_size=self.batch_size)
        width = self.length - batch["input_ids"].shape[1]
        # Full rows: every example has `length` tokens that count, whichever they are.
        ids = nn.functional.pad(batch["input_ids"], (0, width), value=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": batch["labels"],
        }

    def _base(self) -> PreTrainedModel:
        return models.load(self.model, kind="classification", num_labels=2)[0]

    def _ours(self, device: str) -> nn.Module:
        from deltas import HeadTuning, LoRA, attach

        lora = LoRA(rank=self.rank, alpha=2.0 * self.rank)
        return attach(self._base(), lora, HeadTuning()).to(device).eval()

    def _peft(self, device: str) -> nn.Module:
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError as error:
            raise InputError("this benchmark compares with peft: pip install peft") from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=["query", "value"],
            task_type=TaskType.SEQ_CLS,
        )
        return get_peft_model(self._base(), config).to(device).eval()

    def _result(
        self,
        seconds: dict[str, list[float]],
        peaks: dict[str, int],
        saved: dict[str, int],
        precision: str,
        device: str,
    ) -> dict:
        ratios = np.array(seconds["deltacontrol"]) / np.array(seconds["peft"])
        return {
            "model": self.model,
            "batch": [self.batch_size, self.length],
            "rank": self.rank,
            "steps": self.steps,
            "threads": self.threads,
            "precision": precision,
            "device": device,
            "seconds": {n: quartiles(s) for n, s in seconds.items()},
            "step_time_ratio": quartiles(ratios),
            "peak_bytes": peaks,
            "peak_bytes_ratio": peaks["deltacontrol"] / peaks["peft"],
            "saved_bytes": saved,
            "saved_bytes_ratio": saved["deltacontrol"] / saved["peft"],
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }


def _print(result: dict) -> None:
    print(
        f"{result['model']} batch {result['batch']} rank {result['rank']} {result['precision']} on "
        f"{result['device']}, {result['threads']} threads, {result['steps']} steps each"
    )
    for name, numbers in result["seconds"].items():
        peak, saved = result["peak_bytes"][name], result["saved_bytes"][name]
        print(
            f"  {name:13} {numbers['median']:.4f} s a step ({numbers['q25']:.4f}-"
            f"{numbers['q75']:.4f}), kept for backward {saved / 2**20:.1f} MiB, peak "
            f"{peak / 2**20:.1f} MiB above the model"
        )
    ratio = result["step_time_ratio"]
    print(
        f"  step time ratio deltacontrol/peft {ratio['median']:.3f} ({ratio['q25']:.3f}-"
        f"{ratio['q75']:.3f}), kept memory {result['saved_bytes_ratio']:.3f}, peak memory "
        f"{result['peak_bytes_ratio']:.3f}"
    )


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
