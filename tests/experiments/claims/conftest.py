"""Claims on a tiny setting: their modules' constants replaced, what they have cached forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from tests import tiny_model


class Tiny(Protocol):
    """Give the module of a claim, with these of its constants replaced."""

    def __call__(self, name: str, **constants: Any) -> Any: ...


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random model of two layers and width 16, and a task of two classes, in files."""
    return tiny_model.write(tmp_path_factory.mktemp("claims"), classes=2)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal language model of random weights that knows the prompt and its two words."""
    folder: Path = tmp_path_factory.mktemp("lm")
    words = (*tiny_model.WORDS, "it", "great", "terrible")
    config = LlamaConfig(
        vocab_size=tiny_model.tokenizer(folder, words),
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.3,
        **tiny_model.SIZES,
    )
    tiny_model.saved(LlamaForCausalLM, config, folder)
    return str(folder)


@pytest.fixture
def tiny(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    """The claim's own functions, on the tiny model and task and on few of everything."""
    used: list[ModuleType] = []

    def made(name: str, **constants: Any) -> Any:
        module = import_module(f"deltacontrol.experiments.claims.{name}")
        own = {"MODEL": places["model"], "TASK": places["task"]}
        replaced = {key: value for key, value in own.items() if hasattr(module, key)} | constants
        for key, value in replaced.items():
            monkeypatch.setattr(module, key, value)
        used.append(module)
        _forget(module)
        return module

    yield made
    for module in used:
        _forget(module)


def _forget(module: ModuleType) -> None:
    for value in vars(module).values():
        if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
            value.cache_clear()
