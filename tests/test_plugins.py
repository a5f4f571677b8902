"""A user's own files work without a fork: in Python, on the command line, in sweeps."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltacontrol.deltas import registry
from deltacontrol.experiments import models, studies, tasks
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError

DELTA = (Path(__file__).with_name("user_files") / "my_delta.py").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test loads is not there for the next one."""
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_adopted", {})
    yield


@pytest.fixture
def my_delta(tmp_path: Path) -> Path:
    file = tmp_path / "my_delta.py"
    file.write_text(DELTA)
    return file


def test_a_delta_is_found_and_configures_a_fine_tuning(my_delta: Path) -> None:
    module = plugins.load(my_delta)
    assert plugins.load(str(my_delta)) is module
    assert registry.available()["mine"] is module.Mine
    by_name, by_object = FineTuning(deltas=("mine",)), FineTuning(deltas=(module.Mine(),))
    assert by_name.deltas == by_object.deltas == ({"name": "mine"},)


def test_a_class_of_an_imported_module_is_adopted(
    my_delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(my_delta.parent)
    monkeypatch.delitem(sys.modules, "my_delta", raising=False)
    import my_delta as module  # type: ignore[import-not-found]

    with pytest.raises(InputError, match="unknown delta 'mine'"):
        FineTuning(deltas=("mine",))
    assert FineTuning(deltas=(module.Mine(),)).deltas == ({"name": "mine"},)
    assert plugins.sources() == ("my_delta",)
    monkeypatch.setattr(plugins, "_adopted", {})
    plugins.load_sources(("my_delta",))
    assert FineTuning(deltas=("mine",)).deltas == ({"name": "mine"},)


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "second_lora.py"
    file.write_text(DELTA.replace('"mine"', '"lora"'))
    plugins.load(file)
    with pytest.raises(InputError, match="'lora' of a delta is taken"):
        registry.available()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "expected the path of a Python file"),
        ("import torch\nx = undefined\n", r"NameError.*line 2"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        plugins.load(file)
    assert "broken.py" in str(caught.value)
    assert plugins.sources() == ()


def test_tasks_models_and_studies_are_found(tmp_path: Path) -> None:
    file = tmp_path / "my_things.py"
    file.write_text(
        textwrap.dedent(
            """
            from dataclasses import replace

            from deltacontrol.experiments import models, tasks

            TASK = replace(tasks.available()["movie"], name="my-task")
            MODEL = replace(models.available()["minilm-l6"], name="my-model")


            def experiments(preset):
                return []
            """
        )
    )
    plugins.load(file)
    assert "my-task" in tasks.available()
    assert "my-model" in models.available()
    assert studies.experiments("my_things", "quick") == []


def test_a_digest_follows_the_text(my_delta: Path) -> None:
    module = plugins.load(my_delta)
    before = plugins.digest(module.Mine)
    my_delta.write_text(DELTA.replace('1 + control["s"]', '1 - control["s"]'))
    with pytest.raises(InputError, match="my_delta.py has changed since it was loaded"):
        plugins.digest(module.Mine)
    my_delta.write_text(DELTA)
    assert before and plugins.digest(module.Mine) == before
    assert plugins.digest(registry.available()["lora"]) is None


def test_files_of_the_nearest_pyproject(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.deltacontrol]\nload = ["my_delta.py"]\n')
    (tmp_path / "below").mkdir()
    assert plugins.configured(tmp_path / "below") == [tmp_path / "my_delta.py"]
    (tmp_path / "below" / "pyproject.toml").write_text("[tool.deltacontrol]\nload = 3\n")
    with pytest.raises(InputError, match="load is 3; expected paths"):
        plugins.configured(tmp_path / "below")


@pytest.mark.slow
def test_on_the_command_line(my_delta: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deltacontrol", *arguments]
        return subprocess.run(
            command, cwd=my_delta.parent, capture_output=True, text=True, check=False
        )

    done = call("--load", "my_delta.py", "deltas")
    assert done.returncode == 0 and "h (1 + s)" in done.stdout, done.stderr
    refused = call("--load")
    assert refused.returncode == 2 and "--load needs the path" in refused.stderr
