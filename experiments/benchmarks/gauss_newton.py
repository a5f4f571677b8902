"""One Gauss-Newton step on a 12-layer GPT-2 with LoRA: products, memory and time.

    python -m deltacontrol.experiments.benchmarks.gauss_newton

The model has the sizes of GPT-2 and random weights, since only its cost is measured. The state
entering a block has ``tokens * 768`` entries; no Jacobian of it is formed. The step solves the
damped system ``(G + kappa ||g|| I) d = -g`` by conjugate gradients. Memory is the peak above the
loaded model, of the Gauss-Newton step and of one AdamW training step of the same LoRA, each in a
process of its own (resident set).
"""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.training.devices import PeakMemory


@dataclass(frozen=True)
class Benchmark:
    """Measure a Gauss-Newton step beside a training step.

    Attributes:
        tokens: length of the one text; the state has 768 entries for each.
        layers: blocks of the model.
        width: hidden size.
        rank: LoRA's rank, at query and value.
        weight_decay: the running cost of the controls.
        damping: kappa.
        rtol: relative residual at which conjugate gradients stop.
        max_products: products at most.
        keep: keep the graphs of all layers between products.
        threads: threads of torch.
        out: also write the result to this JSON file.
    """

    tokens: int = 128
    layers: int = 12
    width: int = 768
    rank: int = 8
    weight_decay: float = 1e-2
    damping: float = 0.1
    rtol: float = 0.01
    max_products: int = 200
    keep: bool = True
    threads: int = 1
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """Measure, print and return the numbers."""
        with ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            step = pool.submit(self.gauss_newton_step).result()
            training = pool.submit(self.training_step).result()
        result = {
            "state_entries": self.tokens * self.width,
            "layers": self.layers,
            "rank": self.rank,
            "tokens": self.tokens,
            "weight_decay": self.weight_decay,
            "damping": self.damping,
            "rtol": self.rtol,
            "keep": self.keep,
            "threads": self.threads,
            "gauss_newton": step,
            "training": training,
            "peak_bytes_ratio": step["peak_bytes"] / training["peak_bytes"],
            "seconds_ratio": step["seconds"] / training["seconds"],
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }
        _print(result)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def gauss_newton_step(self) -> dict[str, Any]:
        """One step from the controls of the model: gradient, solve, and J behind it."""
        from deltacontrol.deltas.dynamics.transformer import control_problem
        from deltacontrol.theory.linear.curvature import GaussNewtonCurvature
        from deltacontrol.theory.linear.operator import flatten, unflatten
        from deltacontrol.theory.solvers.gauss_newton import damped_step

        torch.set_num_threads(self.threads)
        controlled, batch = self._model()
        problem = control_problem(controlled, batch, weight_decay=self.weight_decay)
        u = problem.dynamics.controls()  # type: ignore[attr-defined]
        memory, began = PeakMemory("cpu"), time.perf_counter()
        now = problem.evaluate(u)
        curvature = GaussNewtonCurvature(problem, u, now, keep=self.keep)
        damping = self.damping * float(curvature.gradient.norm())
        found = damped_step(curvature, damping, rtol=self.rtol, max_products=self.max_products)
        seconds, peak = time.perf_counter() - began, memory.peak() - memory.baseline
        ahead = tuple(a + d for a, d in zip(u, unflatten(found.step, u), strict=True))
        with torch.no_grad():
            after = float(problem.objective(ahead))
        return {
            "products": found.products,
            "relative_residual": found.residual,
            "end": str(found.end),
            "num_controls": len(flatten(u)),
            "objective": float(now.objective),
            "objective_after": after,
            "predicted_decrease": found.decrease,
            "peak_bytes": peak,
            "seconds": seconds,
            "memory_method": memory.method,
        }

    def training_step(self) -> dict[str, Any]:
        """Three steps of AdamW on the same controls and text; the fastest, and the peak of all."""
        torch.set_num_threads(self.threads)
        controlled, batch = self._model()
        trained = list(controlled.controls.parameters())
        optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
        memory, seconds = PeakMemory("cpu"), []
        for _ in range(3):
            began = time.perf_counter()
            controlled(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
        return {
            "peak_bytes": memory.peak() - memory.baseline,
            "seconds": min(seconds),
            "memory_method": memory.method,
        }

    def _model(self) -> tuple[Any, dict[str, torch.Tensor]]:
        from transformers import GPT2Config, GPT2LMHeadModel

        from deltacontrol.deltas import LoRA, attach

        torch.manual_seed(0)
        config = GPT2Config(n_layer=self.layers, n_embd=self.width, n_positions=self.tokens)
        model = GPT2LMHeadModel(config)
        controlled = attach(model, LoRA(rank=self.rank), seed=0).eval()
        with torch.no_grad():
            for parameter in controlled.controls.parameters():  # away from LoRA's zero factors
                parameter.add_(0.01 * torch.randn_like(parameter))
        tokens = torch.randint(config.vocab_size, (1, self.tokens))
        return controlled, {"input_ids": tokens, "labels": tokens}


def _print(result: dict[str, Any]) -> None:
    step, training = result["gauss_newton"], result["training"]
    print(
        f"GPT-2, {result['layers']} layers, state of {result['state_entries']:,} entries, "
        f"{step['num_controls']:,} LoRA controls, {result['threads']} thread(s)\n"
        f"  one Gauss-Newton step: {step['products']} products (each one JVP and one VJP) to "
        f"relative residual {step['relative_residual']:.2g}, {step['seconds']:.1f} s, peak "
        f"{step['peak_bytes'] / 2**20:.0f} MiB\n"
        f"  one training step: {training['seconds']:.2f} s, peak "
        f"{training['peak_bytes'] / 2**20:.0f} MiB; memory ratio {result['peak_bytes_ratio']:.2f}, "
        f"time ratio {result['seconds_ratio']:.1f}\n"
        f"  J {step['objective']:.5f} -> {step['objective_after']:.5f}, decrease predicted "
        f"{step['predicted_decrease']:.3g}"
    )


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
