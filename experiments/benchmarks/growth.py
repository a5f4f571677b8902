"""How costs grow: training steps, solvers and lists of runs, along one size at a time.

    python -m deltacontrol.experiments.benchmarks.growth

For each growth the cost ``c`` is measured at several sizes ``s``, and a line is fitted through the
logarithms of its medians by least squares,

    log c = log a + p log s,

over the upper half of the sizes, which `growing.upper_half` fixes before anything is measured. The
exponent ``p`` stands beside the one that theory gives, with the reason. Its interval of 95 % is a
bootstrap over turns: it tells what the machine's noise does, and not what terms of lower order do,
which bend the line; these show in the largest deviation of a median from it.

In a turn each size is measured once, in changing order, so that a slow minute of the machine slows
all; short work is repeated until it takes `least` seconds. Times are processor seconds of one
thread, which other processes lengthen less than they do the clock's. Memory is what autograd keeps
for the backward pass of a training step; it is counted, and is the same in every turn.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import threadpoolctl
import torch
import tyro

from deltacontrol.experiments.benchmarks.contest import alternate, quartiles
from deltacontrol.experiments.benchmarks.growing import GROWTHS, Growth, Work, upper_half
from deltacontrol.experiments.runs import provenance
from deltacontrol.theory.errors import InputError, unknown

RESAMPLES = 2000


@dataclass(frozen=True)
class Line:
    """``log c = log a + p log s``.

    Attributes:
        exponent: ``p``.
        coefficient: ``a``.
        misfit: the largest factor between a cost and the line, at least 1.
    """

    exponent: float
    coefficient: float
    misfit: float


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Line:
    """The line of least squares through the logarithms.

    Raises:
        InputError: there are fewer than two sizes, or a size or cost is not positive.
    """
    if len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise InputError(
            f"a line through costs {list(costs)} at sizes {list(sizes)} is not determined; give "
            "at least two sizes, and positive numbers"
        )
    weights, middle = _weights(sizes)
    logs = np.log(costs)
    exponent = float(weights @ logs)
    level = float(logs.mean()) - exponent * middle
    rest = np.abs(logs - level - exponent * np.log(sizes)).max()
    return Line(exponent, math.exp(level), math.exp(rest))


def interval(
    sizes: Sequence[float], costs: np.ndarray, seed: int = 0, share: float = 0.95
) -> tuple[float, float]:
    """Percentiles of the exponent over resamples of the turns, of their medians.

    Args:
        sizes: ``S`` of them.
        costs: ``(T, S)``, a row a turn.
        seed: of the resamples.
        share: of the resamples that the interval holds.
    """
    drawn = np.random.default_rng(seed).integers(len(costs), size=(RESAMPLES, len(costs)))
    found = np.log(np.median(costs[drawn], axis=1)) @ _weights(sizes)[0]
    low, high = np.quantile(found, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _weights(sizes: Sequence[float]) -> tuple[np.ndarray, float]:
    """The slope as a linear function of the logarithms of costs; the mean logarithm of sizes."""
    logs = np.log(sizes)
    centred = logs - logs.mean()
    return centred / (centred @ centred), float(logs.mean())


@dataclass(frozen=True)
class Benchmark:
    """Measure how costs grow.

    Attributes:
        only: names of the growths to measure; all when empty.
        quick: take three small sizes of each, whose exponents mean nothing.
        turns: how often each size is measured.
        warmup: runs of each work before.
        least: seconds that one measurement takes at least.
        threads: threads of torch and of BLAS.
        clock: processor seconds or the clock's.
        seed: of models, batches, problems and resamples.
        out: also write the result to this JSON file.
    """

    only: tuple[str, ...] = ()
    quick: bool = False
    turns: int = 11
    warmup: int = 1
    least: float = 0.005
    threads: int = 1
    clock: Literal["cpu", "wall"] = "cpu"
    seed: int = 0
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """Measure, print and return the numbers.

        Raises:
            InputError: a growth is unknown, or there is no turn.
        """
        for name in self.only:
            if name not in GROWTHS:
                raise unknown("growth", name, GROWTHS)
        if self.turns < 1:
            raise InputError(f"turns is {self.turns}; expected a whole number >= 1")
        torch.set_num_threads(self.threads)
        before = os.getloadavg()[0]
        found: list[dict[str, Any]] = []
        with (
            threadpoolctl.threadpool_limits(self.threads),
            tempfile.TemporaryDirectory() as folder,
        ):
            for name in self.only or GROWTHS:
                found += self._growth(name, GROWTHS[name], Path(folder))
        result = {
            "threads": self.threads,
            "clock": self.clock,
            "turns": self.turns,
            "seed": self.seed,
            "quick": self.quick,
            "growths": found,
            "load": [before, os.getloadavg()[0]],
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _growth(self, name: str, growth: Growth, folder: Path) -> list[dict[str, Any]]:
        sizes = growth.small if self.quick else growth.sizes
        works = [growth.make(size, self.seed, folder) for size in sizes]
        seconds = self._seconds(works)
        print(f"{name}: {growth.work}, {growth.at}", flush=True)
        rows = [self._row(growth, "seconds", seconds, growth.expected, growth.why)]
        if growth.kept is not None:
            exponent, why = growth.kept
            kept = {w.size: [float(w.kept_bytes or 0)] for w in works}
            rows.append(self._row(growth, "kept_bytes", kept, (exponent, exponent), why))
        return [{"name": name} | row for row in rows]

    def _seconds(self, works: Sequence[Work]) -> dict[int, list[float]]:
        """Seconds of one piece of each work, by its size."""
        now = time.process_time if self.clock == "cpu" else time.perf_counter
        counts, steps = {}, {}
        for work in works:
            for _ in range(self.warmup):
                work.step()
            start = now()
            work.step()
            counts[work.size] = max(1, math.ceil(self.least / max(now() - start, 1e-9)))
            steps[work.size] = _repeated(work.step, counts[work.size])
        taken = alternate(steps, self.turns, 1, now)
        return {size: [s / counts[size] for s in seconds] for size, seconds in taken.items()}

    def _row(
        self,
        growth: Growth,
        quantity: str,
        costs: Mapping[int, Sequence[float]],
        expected: tuple[float, float],
        why: str,
    ) -> dict[str, Any]:
        points = [{"size": size, **quartiles(values)} for size, values in costs.items()]
        fitted = upper_half(list(costs))
        line = fit(fitted, [float(np.median(costs[size])) for size in fitted])
        turns = np.array([costs[size] for size in fitted]).T
        # What is counted and not sampled has no interval.
        ends = interval(fitted, turns, self.seed) if len(turns) > 1 else None
        wanted = " to ".join(f"{e:g}" for e in dict.fromkeys(expected))
        print(
            f"  {quantity:10} ~ {growth.along}^{line.exponent:.2f}"
            + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")
            + f", expected {wanted}: {why}; within a factor of {line.misfit:.2f}",
            flush=True,
        )
        return {
            "quantity": quantity,
            "work": growth.work,
            "along": growth.along,
            "at": growth.at,
            "expected": list(expected),
            "why": why,
            "points": points,
            "fitted_from": fitted[0],
            "exponent": line.exponent,
            "interval": list(ends) if ends else None,
            "coefficient": line.coefficient,
            "misfit": line.misfit,
        }


def _repeated(step: Callable[[], object], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            step()

    return repeated


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
