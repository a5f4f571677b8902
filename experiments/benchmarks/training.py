"""A training step of LoRA on a language model: tokens a second, share of the peak, memory.

    python -m deltacontrol.experiments.benchmarks.training
    python -m deltacontrol.experiments.benchmarks.training --shape 1b --batch-size 8 --length 1024

Ours and `peft` train LoRA of one rank at the same maps of one model with random weights, each as it
is and compiled by ``torch.compile``, in turn in one process: forward, backward and AdamW on one
batch. The share of the peak (model FLOPs utilisation, Chowdhery et al., JMLR 24, 2023, App. B) is

    MFU = FLOPs of the step / (seconds of the step x peak FLOPs a second of the device).

The FLOPs are counted by torch in one uncompiled step of ours without recomputation: the frozen
forward pass, the gradient with respect to the states, and the products of LoRA; frozen weights get
no gradient, so a token costs about 4 FLOPs a weight and not 6. The peak is measured here, as the
best rate of a square matrix product in the same number format, unless ``--peak-tflops`` gives the
maker's number. What torch computes with on the CPU has no such peak in a data sheet.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deltacontrol.deltas import LoRA, attach
from deltacontrol.experiments.benchmarks.contest import (
    alternate,
    peak_allocated,
    quartiles,
    training_step,
)
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.training.devices import choose_device, choose_precision
from deltacontrol.theory.errors import InputError

# Llama-like: width, blocks, heads, heads of keys and values, inner width, tokens of the vocabulary.
SHAPES = {
    "1b": (2048, 16, 32, 8, 8192, 32000),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "small": (256, 4, 8, 4, 704, 2048),
    "tiny": (32, 2, 4, 2, 64, 128),
}
CONTESTANTS = ("ours", "peft", "ours compiled", "peft compiled")


@dataclass(frozen=True)
class Benchmark:
    """Measure, print and return the numbers.

    Attributes:
        shape: of the model; 1b has 1.1 billion weights and wants a GPU.
        rank: of LoRA at the query and value maps.
        batch_size: examples of a step.
        length: tokens of an example.
        compiled: also the compiled contestants.
        turns: timed steps of each contestant.
        warmup: untimed steps of each, the compiler's among them.
        threads: threads of torch; on the CPU only.
        precision: auto, fp32 or bf16.
        device: auto, cpu or cuda.
        peak_tflops: the device's peak in 10¹² FLOPs a second; measured by default.
        out: also write the result to this JSON file.
    """

    shape: Literal["1b", "135m", "small", "tiny"] = "small"
    rank: int = 8
    batch_size: int = 8
    length: int = 128
    compiled: bool = True
    turns: int = 20
    warmup: int = 3
    threads: int = 2
    precision: str = "auto"
    device: str = "auto"
    peak_tflops: float | None = None
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """All contestants in turn."""
        torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        precision = choose_precision(self.precision, device)
        batch = self._batch(device)
        names = CONTESTANTS if self.compiled else CONTESTANTS[:2]
        steps = {
            n: training_step(self._contestant(n, device), batch, precision, device) for n in names
        }
        with FlopCounterMode(display=False) as counter:
            steps["ours"]()
        flops = counter.get_total_flops()
        peak = self.peak_tflops * 1e12 if self.peak_tflops else measured_peak(precision, device)
        print(
            f"{self.shape} ({precision} on {device}), {self.batch_size} x {self.length} tokens, "
            f"{flops / 1e9:.3g} GFLOP a step, peak {peak / 1e12:.3g} TFLOP/s "
            f"({'given' if self.peak_tflops else 'measured'})"
        )
        seconds = alternate(steps, self.turns, self.warmup)
        tokens = self.batch_size * self.length
        found: dict[str, Any] = {}
        for name in names:
            spread = quartiles(seconds[name])
            ratio = quartiles([a / b for a, b in zip(seconds[name], seconds["peft"], strict=True)])
            # The profiler, which counts on the CPU, would see another graph than the compiled one.
            counted = device == "cuda" or "compiled" not in name
            found[name] = {
                "seconds": spread,
                "time_ratio": ratio,
                "tokens_per_second": tokens / spread["median"],
                "mfu": flops / spread["median"] / peak,
                "peak_bytes": peak_allocated(steps[name], device) if counted else None,
            }
            memory = found[name]["peak_bytes"]
            print(
                f"  {name:14} {tokens / spread['median']:10,.0f} tokens/s  MFU "
                f"{found[name]['mfu']:.2f}  {ratio['median']:.3f} of peft "
                f"({ratio['q25']:.3f}-{ratio['q75']:.3f})"
                + (f"  peak {memory / 2**20:,.0f} MiB" if memory is not None else "")
            )
        result = {
            "shape": self.shape,
            "rank": self.rank,
            "batch": [self.batch_size, self.length],
            "precision": precision,
            "device": device,
            "threads": self.threads,
            "turns": self.turns,
            "flops_per_step": flops,
            "peak_flops": peak,
            "peak_is": "given" if self.peak_tflops else "measured",
            "contestants": found,
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _batch(self, device: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        size = (self.batch_size, self.length)
        tokens = torch.randint(SHAPES[self.shape][-1], size, generator=generator).to(device)
        # Each example is full: no mask, so that the fast kernels of attention serve.
        return {"input_ids": tokens, "labels": tokens}

    def _contestant(self, name: str, device: str) -> nn.Module:
        base = self._base().to(device)
        model: nn.Module
        if name.startswith("ours"):
            delta = LoRA(rank=self.rank, alpha=2.0 * self.rank)
            model = attach(base, delta)
        else:
            model = self._by_peft(base)
        model.eval()
        return torch.compile(model) if "compiled" in name else model  # type: ignore[return-value]

    def _base(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        width, blocks, heads, shared, inner, vocabulary = SHAPES[self.shape]
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                num_hidden_layers=blocks,
                num_attention_heads=heads,
                num_key_value_heads=shared,
                intermediate_size=inner,
                vocab_size=vocabulary,
                use_cache=False,
            )
        )

    def _by_peft(self, base: Any) -> nn.Module:
        """LoRA of peft at the same maps.

        Raises:
            InputError: peft is not installed.
        """
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError as error:
            raise InputError("this benchmark compares with peft: pip install peft") from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=["q_proj", "v_proj"],
            task_type=TaskType.CAUSAL_LM,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft's calls
            return get_peft_model(base, config)


def measured_peak(precision: str, device: str, *, turns: int = 5) -> float:
    """FLOPs a second of the quickest of some square matrix products."""
    size = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)

    def timed(product: Callable[[], Tensor]) -> float:
        began = time.perf_counter()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed(lambda: left @ right)
    return 2 * size**3 / min(timed(lambda: left @ right) for _ in range(turns))


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
