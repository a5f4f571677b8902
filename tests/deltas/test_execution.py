"""Deltas under torch.compile and in a data-parallel training of two processes."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from tests.deltas.zoo import (
    METHODS,
    attached,
    batch_of,
    build,
    gradients,
    move,
    out,
    relative,
    texts,
)

Build = Callable[..., PreTrainedModel]
SOME = ("bitfit", "houlsby", "ia3", "lora", "prefix", "prompt")


def assert_compiles(
    build: Build, family: str, method: str, backend: str = "aot_eager", rounding: float = 1e-12
) -> None:
    """The traced graph gives the outputs and gradients of the eager model."""
    torch._dynamo.reset()
    model = build(family, attention="sdpa")
    batch = batch_of(model)
    controlled = move(attached(model, METHODS[method][0]))
    parameters = controlled.trainable().values()
    expected = out(controlled, batch)
    compiled = torch.compile(controlled, backend=backend)
    found = out(compiled, batch)  # type: ignore[arg-type]
    assert relative([found], [expected]) <= rounding
    wanted = gradients(expected.square().sum(), parameters)
    assert relative(gradients(found.square().sum(), parameters), wanted) <= 10 * rounding
    with torch.no_grad():  # the graph reads the controls, it has not kept their values
        move(controlled)
        assert relative([out(compiled, batch)], [out(controlled, batch)]) <= rounding  # type: ignore[arg-type]
    controlled.detach()
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiles(build: Build) -> None:
    assert_compiles(build, "bert", "lora")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's own, while it traces functions of autograd
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_compiles(build: Build, method: str) -> None:
    assert_compiles(build, "bert", method)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("method", SOME)
def test_compiles_to_machine_code(build: Build, method: str) -> None:
    """With inductor, torch's default, which reorders sums."""
    assert_compiles(build, "bert", method, backend="inductor", rounding=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_compiles_on(build: Build, family: str, method: str) -> None:
    assert_compiles(build, family, method)


def train(model: nn.Module, controls: Iterable[Tensor], batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD(controls, lr=0.1)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def data_parallel(rank: int, meeting: str) -> None:
    """One of two processes: each has half of a batch, and both end with the whole batch's step."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    model = build("bert", attention="sdpa")
    batch = texts(model, (7, 7, 5, 7)) | {"labels": torch.tensor([0, 1, 1, 0])}
    for method in SOME:
        delta = METHODS[method][0]
        controlled = move(attached(model, delta))
        share = {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}
        train(DistributedDataParallel(controlled), controlled.trainable().values(), share)
        found = controlled.state()
        controlled.detach()
        controlled = move(attached(model, delta))
        before = controlled.state()
        train(controlled, controlled.trainable().values(), batch)
        expected = controlled.state()
        controlled.detach()
        assert relative(found.values(), expected.values()) <= 1e-10, method
        assert relative(before.values(), expected.values()) >= 1e-4, method
    distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_training_of_two_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(data_parallel, (str(tmp_path / "meeting"),), nprocs=2)
