"""Pieces of work that grow along one size, for the benchmark `growth`.

A `Growth` names the size, the sizes that are measured, the exponent that the costs should have and
why, and makes the work of a size. Models are BERT's blocks with random weights, four heads and
hidden layers of four times the width, in float32; problems of control are in float64.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from deltacontrol.deltas import DeltaStack, HeadTuning, LoRA, attach, attach_many
from deltacontrol.experiments.benchmarks.contest import saved_bytes, training_step
from deltacontrol.experiments.benchmarks.solvers import Problem
from deltacontrol.experiments.runs.experiment import Digests, run_id
from deltacontrol.experiments.runs.index import LEAST
from deltacontrol.experiments.runs.record import CURVE_FILE, RUN_FILE, sealed
from deltacontrol.experiments.runs.store import COMMITTED, RunStore
from deltacontrol.experiments.training.settings import Settings
from deltacontrol.experiments.training.together.loop import Loop
from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import ResidualNetwork
from deltacontrol.theory.linear.model_curvature import ModelCurvature
from deltacontrol.theory.lq import riccati
from deltacontrol.theory.solvers import ILQR, solve

HEADS, RANK, VOCABULARY = 4, 8, 100
SETTLED_SECONDS = 2.1  # a file that changed just before is not taken into the index of a store


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        step: one piece of work.
        size: how large it is, on the axis of its growth.
        kept_bytes: what a training step keeps for its backward pass, where it is one.
    """

    step: Callable[[], object]
    size: int
    kept_bytes: int | None = None


Make: TypeAlias = Callable[[int, int, Path], Work]  # from a size, a seed and a scratch folder


@dataclass(frozen=True)
class Growth:
    """How a cost should grow.

    Attributes:
        work: what is done.
        along: the size that grows.
        at: the sizes that do not.
        sizes: those measured, ascending; a line is fitted to the upper half of them.
        small: those of a quick run.
        expected: the least and the largest exponent of time that theory allows.
        why: one sentence.
        make: the work of a size.
        kept: the exponent of the memory kept for backward, and why.
    """

    work: str
    along: str
    at: str
    sizes: tuple[int, ...]
    small: tuple[int, ...]
    expected: tuple[float, float]
    why: str
    make: Make
    kept: tuple[float, str] | None = None


def upper_half(sizes: Sequence[int]) -> list[int]:
    """The sizes that a line is fitted to: where the largest term of a cost should outweigh others.

    It is fixed here, before anything is measured.
    """
    return sorted(sizes)[len(sizes) // 2 :]


# -- training steps --------------------------------------------------------------------------------


def bert(num_layers: int, width: int, tokens: int, seed: int) -> BertForSequenceClassification:
    """A random classifier; its table of tokens is so small that it counts for nothing."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        intermediate_size=4 * width,
        max_position_embeddings=tokens,
    )
    return BertForSequenceClassification(config)


def random_batch(rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Full rows of random tokens with random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    labels = torch.randint(2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def lora_step(size: int, num_layers: int, width: int, rows: int, tokens: int, seed: int) -> Work:
    """Forward, backward and AdamW of LoRA and the head."""
    base = bert(num_layers, width, tokens, seed)
    model = attach(base, LoRA(rank=RANK), HeadTuning(), seed=seed).eval()
    batch = random_batch(rows, tokens, seed)
    kept = sum(saved_bytes(model, batch, "fp32", "cpu").values())
    return Work(training_step(model, batch, "fp32", "cpu"), size, kept)


class _Summed(nn.Module):
    """All copies of a stack, as a model whose loss is the sum of theirs."""

    def __init__(self, stack: DeltaStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, labels: Tensor, **batch: Tensor) -> Any:
        logits = self.stack(**batch).logits
        return SimpleNamespace(loss=self.stack.losses(logits, labels, self.stack.num_copies).sum())


@dataclass(frozen=True)
class _Same:
    """The same batch at every step."""

    whole: dict[str, Tensor]

    def batch(self, step: int) -> dict[str, Tensor]:
        return self.whole


def copies_step(copies: int, seed: int, _folder: Path) -> Work:
    """One update of all copies, in one pass."""
    rows, tokens, width = 8, 16, 128
    stack = attach_many(
        bert(2, width, tokens, seed), LoRA(rank=RANK), HeadTuning(), seeds=range(copies)
    )
    batch = random_batch(rows, tokens, seed)
    settings = [
        Settings(steps=10**6, learning_rate=1e-4, seed=k, precision="fp32", device="cpu")
        for k in range(copies)
    ]
    whole = {name: torch.cat([values] * copies) for name, values in batch.items()}
    kept = sum(saved_bytes(_Summed(stack.eval()), whole, "fp32", "cpu").values())
    loop = Loop(stack, [_Same(batch)] * copies, settings, "cpu")
    return Work(lambda: loop.update(0, copies), copies, kept)


# -- theory ----------------------------------------------------------------------------------------


def ilqr_iteration(size: int, horizon: int, width: int, seed: int) -> Work:
    """One iteration from zero controls, on a residual network, with the evaluation before it."""
    generator = torch.Generator().manual_seed(seed)
    x0, target = torch.randn((2, width), generator=generator, dtype=torch.float64)
    dynamics = ResidualNetwork.random(horizon, width, width, width, seed=seed)
    problem = ControlProblem(dynamics, SquaredErrorCost(target, 1e-2), x0)
    return Work(lambda: solve(problem, ILQR(), max_steps=1, tol=0.0), size)


def riccati_recursion(size: int, horizon: int, states: int, seed: int) -> Work:
    """The gains of all steps; half as many controls as states."""
    problem = Problem.random(states, max(1, states // 2), horizon, seed=seed)
    return Work(lambda: riccati(*problem.quadratic), size)


def gauss_newton_product(width: int, seed: int, _folder: Path) -> Work:
    """``G v`` of a network of three layers on 256 rows, over all its parameters."""
    torch.manual_seed(seed)
    maps = [nn.Linear(width, width) for _ in range(3)]
    network = nn.Sequential(maps[0], nn.Tanh(), maps[1], nn.Tanh(), maps[2]).double()
    inputs, targets = torch.randn((2, 256, width), dtype=torch.float64)
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(theta: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, theta, (inputs,))

    def loss(found: Tensor) -> Tensor:
        return (found - targets).square().mean()

    curvature = ModelCurvature(outputs, loss, parameters)
    v = torch.randn(curvature.num_parameters, dtype=torch.float64)
    return Work(lambda: curvature.gauss_newton @ v, curvature.num_parameters)


# -- records ---------------------------------------------------------------------------------------


def store(number: int, folder: Path) -> RunStore:
    """A store of so many records: a committed one, each time with another seed."""
    root = folder / f"{number}"
    if root.exists():
        return RunStore(root)
    source = min((COMMITTED / "figures" / "performance").glob(f"*/{RUN_FILE}")).parent
    document: Mapping[str, Any] = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))
    for seed in range(number):
        config = {**document["config"], "seed": seed}
        identity = run_id(document["kind"], config, Digests(**document["digests"]))
        own = root / identity
        own.mkdir(parents=True)
        copied = {name: value for name, value in document.items() if name != "completed"}
        text = json.dumps(sealed(copied | {"id": identity, "config": config}), indent=2)
        (own / RUN_FILE).write_text(text, encoding="utf-8")
        shutil.copyfile(source / CURVE_FILE, own / CURVE_FILE)
    return RunStore(root)


def read_anew(number: int, _seed: int, folder: Path) -> Work:
    """The list of a store of which every record is read and checked."""
    return Work(store(number, folder).records, number)


def read_from_the_index(number: int, _seed: int, folder: Path) -> Work:
    """The list of a store whose index was written before."""
    found = store(number, folder)
    age = time.time() - max(path.stat().st_ctime for path in found.root.glob(f"*/{RUN_FILE}"))
    if number >= LEAST and age < SETTLED_SECONDS:
        time.sleep(SETTLED_SECONDS - age)
    found.listed()
    return Work(found.listed, number)


GROWTHS: dict[str, Growth] = {
    "layers": Growth(
        work="training step with LoRA",
        along="layers",
        at="width 64, 4 rows of 32 tokens",
        sizes=(1, 2, 4, 8, 16, 32, 64),
        small=(1, 2, 3),
        expected=(1, 1),
        why="each block is passed once forward and once backward",
        make=lambda size, seed, _: lora_step(size, size, 64, 4, 32, seed),
        kept=(1, "each block keeps its own activations"),
    ),
    "tokens": Growth(
        work="training step with LoRA",
        along="tokens a row",
        at="2 layers of width 64, 1 row",
        sizes=(32, 64, 128, 256, 512, 1024, 2048),
        small=(8, 16, 32),
        expected=(1, 2),
        why="maps of T tokens cost T d^2 and attention T^2 d, equal at about T = 6 d",
        make=lambda size, seed, _: lora_step(size, 2, 64, 1, size, seed),
        kept=(1, "the fused kernel of attention keeps no matrix of T x T"),
    ),
    "width": Growth(
        work="training step with LoRA",
        along="width",
        at="1 layer, 2 rows of 64 tokens",
        sizes=(64, 128, 256, 512, 1024, 2048),
        small=(16, 32, 64),
        expected=(2, 2),
        why="the maps are matrices of d x d, and all else is linear in d",
        make=lambda size, seed, _: lora_step(size, 1, size, 2, 64, seed),
        kept=(1, "activations are vectors of d entries, and frozen maps are not kept"),
    ),
    "copies": Growth(
        work="update of K LoRAs",
        along="deltas",
        at="one pass, 2 layers of width 128, 8 rows of 16 tokens each",
        sizes=(1, 2, 4, 8, 16, 32, 64),
        small=(1, 2, 3),
        expected=(1, 1),
        why="K batches go through the frozen maps; what a pass costs beside is shared by all",
        make=copies_step,
        kept=(1, "each delta keeps the activations of its own batch"),
    ),
    "ilqr-horizon": Growth(
        work="iLQR iteration",
        along="horizon",
        at="16 states, 16 controls",
        sizes=(16, 32, 64, 128, 256, 512, 1024),
        small=(2, 4, 6),
        expected=(1, 1),
        why="derivatives, backward sweep and rollout visit each step once",
        make=lambda size, seed, _: ilqr_iteration(size, size, 16, seed),
    ),
    "ilqr-width": Growth(
        work="iLQR iteration",
        along="states",
        at="horizon 4, as many controls as states",
        sizes=(16, 32, 64, 128, 256, 512),
        small=(2, 4, 6),
        expected=(3, 3),
        why="derivatives and sweep multiply matrices of n x n",
        make=lambda size, seed, _: ilqr_iteration(size, 4, size, seed),
    ),
    "riccati-horizon": Growth(
        work="Riccati recursion",
        along="horizon",
        at="16 states, 8 controls",
        sizes=(64, 128, 256, 512, 1024, 2048, 4096),
        small=(2, 4, 6),
        expected=(1, 1),
        why="it visits each step once",
        make=lambda size, seed, _: riccati_recursion(size, size, 16, seed),
    ),
    "riccati-width": Growth(
        work="Riccati recursion",
        along="states",
        at="horizon 4, half as many controls",
        sizes=(32, 64, 128, 256, 512, 1024),
        small=(2, 4, 6),
        expected=(3, 3),
        why="it multiplies and factors matrices of n x n",
        make=lambda size, seed, _: riccati_recursion(size, 4, size, seed),
    ),
    "gauss-newton": Growth(
        work="Gauss-Newton product",
        along="parameters",
        at="3 layers, 256 rows",
        sizes=(32, 64, 128, 256, 512, 1024),
        small=(2, 4, 8),
        expected=(1, 1),
        why="one product forward and one backward use each parameter a fixed number of times",
        make=gauss_newton_product,
    ),
    "records": Growth(
        work="list of runs, read",
        along="records",
        at="records of a fine-tuning",
        sizes=(128, 256, 512, 1024, 2048),
        small=(2, 4, 8),
        expected=(1, 1),
        why="each record is read and checked once",
        make=read_anew,
    ),
    "index": Growth(
        work="list of runs, index",
        along="records",
        at="records of a fine-tuning",
        sizes=(128, 256, 512, 1024, 2048),
        small=(2, 4, 8),
        expected=(1, 1),
        why="each record has one entry and one look at its file's times",
        make=read_from_the_index,
    ),
}
