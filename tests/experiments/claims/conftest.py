"""Claims on a tiny setting: their modules' constants replaced, what they have cached forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import pytest

from tests import tiny_model


class Tiny(Protocol):
    """Give the module of a claim, with these of its constants replaced."""

    def __call__(self, name: str, **constants: Any) -> Any: ...


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random model of two layers and width 16, and a task of two classes, in files."""
    return tiny_model.write(tmp_path_factory.mktemp("claims"), classes=2)


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
