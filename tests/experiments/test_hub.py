"""The hub out of reach: one message at once, or the copy that an earlier download has left."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from deltacontrol.deltas import hub
from deltacontrol.experiments import models
from deltacontrol.theory.errors import InputError

NAME = "someone/some-model"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, an empty cache, and an address on this machine where nobody listens."""
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def never(*arguments: object, **options: object) -> None:
    raise AssertionError("transformers may not be asked, for it tries again and again")


def test_a_hub_that_refuses_is_told_before_anything_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(models.loading, "build", never)
    with pytest.raises(InputError) as caught:
        models.load(NAME, kind="backbone")
    text = str(caught.value)
    assert text.startswith(f"{NAME} could not be loaded from the hub: 127.0.0.1 cannot be reached")
    assert "deltacontrol models" in text and "\n" not in text


def test_offline_mode_asks_nobody(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.socket, "create_connection", never)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and no earlier download"):
        models.load(NAME, kind="backbone")


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch) -> None:
    done = threading.Event()
    monkeypatch.setenv(hub.SECONDS_VARIABLE, "0.05")

    def silent(*arguments: object, **options: object) -> None:
        done.wait(60)
        raise TimeoutError

    monkeypatch.setattr(hub.socket, "create_connection", silent)
    try:
        told = hub.unreachable()
    finally:
        done.set()
    assert told is not None and "does not answer within 0.05 s" in told
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv(hub.SECONDS_VARIABLE, wrong)
        with pytest.raises(InputError, match="expected seconds above 0"):
            hub.unreachable()


def test_a_hub_that_answers_is_asked_by_the_id(listening: int, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    assert hub.located(NAME) == NAME


def test_a_proxy_is_what_is_tried(listening: int, monkeypatch) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": f"http://127.0.0.1:{listening}"})
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: False)
    assert hub.located(NAME) == NAME
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: True)
    assert hub.unreachable() is not None
    assert hub._asked("https://hub.example") == ("hub.example", 443)


def test_without_a_connection_an_earlier_download_serves(tmp_path: Path) -> None:
    kept = tmp_path / "hub" / "models--someone--some-model"
    snapshot = kept / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    assert hub.located(NAME) == snapshot
