"""Time and memory of projections, in copies of the vector that they make.

    python -m deltacontrol.experiments.benchmarks.projections
    python -m deltacontrol.experiments.benchmarks.projections --threads 1 --parts products

    products   lift and adjoint of each kind at D = 22.7 million, beside a copy of that vector
    reference  Fastfood against the plain loop of butterflies, the same map
    step       a training step in the subspace against full fine-tuning

Contestants take turns; see `contest`. A ratio is the median over the turns. Memory at work is the
peak of a process of its own: the projection, then one lift, its result not counted.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import FullFineTuning, StructuredSubspace, Subspace, attach
from deltacontrol.experiments.benchmarks.contest import alternate, quartiles, training_step
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.devices import PeakMemory
from deltacontrol.theory.dimension.projections import (
    RANDOM_PROJECTIONS,
    FastfoodProjection,
    Projection,
    ProjectionName,
)

Part = Literal["products", "reference", "step"]


@dataclass(frozen=True)
class Benchmark:
    """Measure, print and return the numbers.

    Attributes:
        parts: what to measure.
        full_dim: D.
        dims: d.
        kinds: of the projections.
        most: a kind is left out at a d where one product draws or multiplies more numbers.
        model: of the training step.
        step_dim: d of the training step.
        batch_size: examples of a batch.
        length: tokens of every example.
        turns: timed runs of each contestant.
        warmup: untimed runs of each.
        threads: of torch, each number in turn.
        out: also write the result to this JSON file.
    """

    parts: tuple[Part, ...] = ("products", "reference", "step")
    full_dim: int = 22_700_000
    dims: tuple[int, ...] = (10, 1_000, 100_000)
    kinds: tuple[ProjectionName, ...] = ("fastfood", "sparse-sign", "srht", "kronecker")
    most: int = 30_000_000_000
    model: str = "minilm-l6"
    step_dim: int = 1_000
    batch_size: int = 16
    length: int = 64
    turns: int = 5
    warmup: int = 1
    threads: tuple[int, ...] = (1, 2)
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """All parts in turn, for each number of threads."""
        measures: dict[str, Callable[[], Any]] = {
            "products": self.products,
            "reference": self.reference,
            "step": self.step,
        }
        result: dict[str, Any] = {
            "full_dim": self.full_dim,
            "turns": self.turns,
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }
        for threads in self.threads:
            torch.set_num_threads(threads)
            print(f"{threads} threads, D = {self.full_dim}, float32, medians of {self.turns} turns")
            result[f"threads_{threads}"] = {part: measures[part]() for part in self.parts}
        if self.out is not None:
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def products(self) -> dict[str, Any]:
        """Lift and adjoint in copies, bytes held and bytes at work in vectors of ``D``."""
        found: dict[str, Any] = {}
        for dim in self.dims:
            for kind in self.kinds:
                if kind in ("dense", "gaussian", "kronecker") and self._work(kind, dim) > self.most:
                    print(f"  {kind:11} d = {dim:6}  left out: {self._work(kind, dim):.1e} numbers")
                    continue
                projection = RANDOM_PROJECTIONS[kind](self.full_dim, dim)
                numbers = self._time(projection, reference=False)
                vector = 4 * self.full_dim
                numbers["held"] = projection.num_bytes / vector
                numbers["at_work"] = self._alone(kind, dim) / vector
                found[f"{kind} {dim}"] = numbers
                print(
                    f"  {kind:11} d = {dim:6}  {_copies(numbers, 'lift')}, "
                    f"{_copies(numbers, 'adjoint')}, copy {1e3 * numbers['copy']['median']:.1f} ms;"
                    f" memory in vectors: held {numbers['held']:.2f}, at work "
                    f"{numbers['at_work']:.2f}"
                )
        return found

    def reference(self) -> dict[str, Any]:
        """How much faster Fastfood is than the butterfly loop; their values agree."""
        dim = self.step_dim
        projection = FastfoodProjection(self.full_dim, dim)
        numbers = self._time(projection, reference=True)
        z = torch.randn(dim, generator=torch.Generator().manual_seed(1))
        fast, slow = projection @ z, projection.product_reference(z)
        numbers["difference"] = float((fast - slow).abs().max() / slow.abs().max())
        speed = numbers["speed_up"]
        print(
            f"  butterfly   d = {dim:6}  {_copies(numbers, 'reference')}, fastfood "
            f"{_copies(numbers, 'lift')}: {speed['median']:.1f} ({speed['q25']:.1f}-"
            f"{speed['q75']:.1f}) times faster; relative difference {numbers['difference']:.1e}"
        )
        return numbers

    def step(self) -> dict[str, Any]:
        """Forward, backward and AdamW: the subspace over full fine-tuning."""
        batch = self._batch()
        deltas = {
            "full": FullFineTuning(),
            "did": Subspace(dimension=self.step_dim),
            "said": StructuredSubspace(dimension=self.step_dim),
        }
        steps = {}
        for name, delta in deltas.items():
            controlled = attach(self._base(), delta)
            steps[name] = training_step(controlled, batch, "fp32", "cpu")
        seconds = alternate(steps, self.turns, self.warmup)
        found: dict[str, Any] = {f"{n}_seconds": quartiles(v) for n, v in seconds.items()}
        for name in ("did", "said"):
            ratio = quartiles([a / b for a, b in zip(seconds[name], seconds["full"], strict=True)])
            found[f"{name}_ratio"] = ratio
            print(
                f"  step {name:6} d = {self.step_dim:6}  {ratio['median']:.2f} "
                f"({ratio['q25']:.2f}-{ratio['q75']:.2f}) of full fine-tuning's "
                f"{found['full_seconds']['median']:.3f} s, batch {self.batch_size} x {self.length}"
            )
        return found

    def bytes_at_work(self, kind: ProjectionName, dim: int) -> int:
        """Peak of this process through drawing the projection and lifting once, less the result."""
        torch.set_num_threads(1)
        _ = RANDOM_PROJECTIONS[kind](10 * 64, 10) @ torch.zeros(10)  # what a first call loads
        memory = PeakMemory("cpu")
        projection = RANDOM_PROJECTIONS[kind](self.full_dim, dim)
        result = projection @ torch.ones(dim)
        return memory.peak() - memory.baseline - result.nbytes

    def _alone(self, kind: ProjectionName, dim: int) -> int:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(self.bytes_at_work, kind, dim).result()

    def _work(self, kind: str, dim: int) -> float:
        return self.full_dim * dim ** (0.5 if kind == "kronecker" else 1.0)

    def _time(self, projection: Projection, *, reference: bool) -> dict[str, Any]:
        """Seconds and copies of each contestant; turns are compared one with one."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(projection.sub_dim, generator=generator)
        v = torch.randn(self.full_dim, generator=generator)
        into = torch.empty_like(v)
        contestants: dict[str, Callable[[], object]] = {
            "copy": lambda: into.copy_(v),
            "lift": lambda: projection @ z,
        }
        if reference:
            assert isinstance(projection, FastfoodProjection)
            contestants["reference"] = lambda: projection.product_reference(z)
        else:
            contestants["adjoint"] = lambda: projection.T @ v
        seconds = alternate(
            {n: _silent(f) for n, f in contestants.items()}, self.turns, self.warmup
        )
        found: dict[str, Any] = {"copy": quartiles(seconds["copy"])}
        # A single copy is short: its median steadies the ratios of all turns.
        for name in contestants.keys() - {"copy"}:
            found[f"{name}_seconds"] = quartiles(seconds[name])
            found[name] = quartiles([t / found["copy"]["median"] for t in seconds[name]])
        if reference:
            pairs = zip(seconds["reference"], seconds["lift"], strict=True)
            found["speed_up"] = quartiles([slow / fast for slow, fast in pairs])
        return found

    def _base(self) -> PreTrainedModel:
        return Setting(self.model, model_kind="classification", num_labels=2).base

    def _batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape, vocabulary = (self.batch_size, self.length), self._base().config.vocab_size
        ids = torch.randint(5, vocabulary, shape, generator=generator)
        labels = torch.randint(2, shape[:1], generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _silent(function: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        function()

    return call


def _copies(numbers: dict[str, Any], name: str) -> str:
    spread = numbers[name]
    return f"{name} {spread['median']:.1f} ({spread['q25']:.1f}-{spread['q75']:.1f}) copies"


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
