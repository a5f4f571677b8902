"""The next batch, made ahead by a thread: the same batches, errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deltacontrol.experiments.training.gradients import Ahead, ahead


class Counted:
    """Batches that are functions of the step, and who made which."""

    name = "counted"

    def __init__(self, broken: int | None = None) -> None:
        self.made: list[tuple[int, str]] = []
        self.broken = broken

    def batch(self, step: int) -> dict[str, Any]:
        if step == self.broken:
            raise ValueError(f"step {step}")
        self.made.append((step, threading.current_thread().name))
        return {"labels": torch.tensor([step]), "note": "text"}


@pytest.fixture
def data() -> Counted:
    return Counted()


@pytest.fixture
def made(data: Counted) -> Iterator[Ahead]:
    found = Ahead(data, steps=4, pin=False)
    yield found
    found.close()


def test_the_next_batch_is_made_by_the_thread(made: Ahead, data: Counted) -> None:
    assert [int(made.batch(step)["labels"]) for step in range(4)] == [0, 1, 2, 3]
    assert [step for step, _ in data.made] == [0, 1, 2, 3]  # nothing beyond the last one
    by_thread = [step for step, name in data.made if name.startswith("batches")]
    assert by_thread == [1, 2, 3]


def test_a_step_that_was_not_foreseen_has_its_own_batch(made: Ahead) -> None:
    assert [int(made.batch(step)["labels"]) for step in (2, 0, 3, 1)] == [2, 0, 3, 1]


def test_all_other_calls_go_to_the_batches(made: Ahead) -> None:
    assert made.name == "counted"
    with pytest.raises(AttributeError):
        _ = made.absent


def test_an_error_comes_at_its_step() -> None:
    found = Ahead(Counted(broken=1), steps=3, pin=False)
    assert int(found.batch(0)["labels"]) == 0
    with pytest.raises(ValueError, match="step 1"):
        found.batch(1)
    found.close()


def test_on_the_cpu_nothing_is_made_ahead(data: Counted) -> None:
    with ahead(data, 4, torch.device("cpu")) as found:
        assert found is data


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_tensors_are_pinned(data: Counted) -> None:
    with ahead(data, 4, torch.device("cuda")) as found:
        assert found.batch(0)["labels"].is_pinned() and found.batch(1)["labels"].is_pinned()
