"""Each test must leave the shared models as it found them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.deltas import zoo


@pytest.fixture(scope="module", autouse=True)
def fresh_models() -> Iterator[None]:
    """Models are built once for a test module."""
    yield
    zoo.build.cache_clear()


@pytest.fixture
def build() -> Iterator[Callable[..., PreTrainedModel]]:
    """Build a model, or take the module's own; afterwards it must be free of deltas."""
    used: dict[int, tuple[PreTrainedModel, dict[str, Any]]] = {}

    def make(*args: Any, **kwargs: Any) -> PreTrainedModel:
        model = zoo.build(*args, **kwargs)
        used.setdefault(id(model), (model, zoo.snapshot(model)))
        return model

    yield make
    for model, before in used.values():
        try:
            zoo.assert_same(before, zoo.snapshot(model))
        except AssertionError:
            zoo.build.cache_clear()
            raise
