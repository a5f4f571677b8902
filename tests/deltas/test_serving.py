"""Rows of one batch under different deltas: each as if it were alone with its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    BitFit,
    Delta,
    HeadTuning,
    HoulsbyAdapter,
    LoRA,
    PrefixTuning,
    load,
    serve,
)
from deltacontrol.deltas.ensemble.stack import UnstackableError
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, METHODS, assert_same, attached, relative, snapshot, texts

Build = Callable[..., PreTrainedModel]
NAMES = ("film", "news", "mail")
WHICH = ["news", "film", "news", "news", "mail"]  # not as many rows of each


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Save deltas of one kind under three names, each with values of its own."""

    def kept(model: PreTrainedModel, *deltas: Delta, names=NAMES) -> dict[str, Path]:
        folders = {}
        for seed, name in enumerate(names):
            tuned = attached(model, *deltas, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for value in tuned.trainable().values():
                    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                    value.add_(0.2 * noise.to(value.dtype))
            folders[name] = tmp_path / name
            tuned.save(folders[name])
            tuned.detach()
        return folders

    return kept


CELLS = [
    (family, method)
    for family in ("bert", "gpt2", "t5", "llama")
    for method in ("lora", "houlsby", "prefix", "prompt", "bitfit", "ia3", "vera")
    if method != "bitfit" or family in ("bert", "gpt2")  # the others have no bias
]


@pytest.mark.parametrize(("family", "method"), CELLS)
@pytest.mark.one_in(3)
def test_each_row_has_its_own_delta(build: Build, keep, family: str, method: str) -> None:
    model = build(family, attention="sdpa").eval()
    before = snapshot(model)
    folders = keep(model, METHODS[method][0])
    batch = texts(model, (7, 5, 6, 4, 7), seed=3)
    server = serve(model, folders)
    with torch.no_grad():
        found = server(WHICH, **batch)[0]
    assert_same(before, snapshot(server.detach()))
    for row, name in enumerate(WHICH):
        tuned = load(model, folders[name])
        with torch.no_grad():
            alone = tuned(**batch)[0][row]
        tuned.detach()
        assert relative([found[row]], [alone]) <= FAMILIES[family].tolerance


def test_heads_and_several_deltas_go_along(build: Build, keep) -> None:
    model = build("bert", kind="classification").eval()
    folders = keep(model, LoRA(rank=2), BitFit(), HeadTuning())
    batch = texts(model, (5, 5), seed=1)
    server = serve(model, folders)
    with torch.no_grad():
        mixed = server(["mail", "film"], **batch).logits
        same = server(["mail", "mail"], **batch).logits
    assert torch.equal(mixed[0], same[0]) and not torch.allclose(mixed[1], same[1])
    server.detach()


def test_answers_are_generated_row_by_row(build: Build, keep) -> None:
    model = build("gpt2", kind="causal-lm").eval()
    folders = keep(model, LoRA(rank=2), names=("a", "b"))
    batch = texts(model, (4, 4), seed=2)
    more = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    server = serve(model, folders)
    with server.rows(["a", "b"]) as controlled:
        together = controlled.generate(**batch, **more)
    server.detach()
    for row, name in enumerate("ab"):
        tuned = load(model, folders[name])
        assert torch.equal(tuned.generate(**batch, **more)[row], together[row])
        tuned.detach()


def test_what_cannot_be_served_together_is_told(build: Build, keep, tmp_path: Path) -> None:
    model = build("bert").eval()
    before = snapshot(model)
    first = keep(model, LoRA(rank=2), names=("a",))
    other = keep(model, LoRA(rank=3), names=("b",))
    with pytest.raises(InputError, match="a and b differ in more than their values.*rank"):
        serve(model, first | other)
    with pytest.raises(InputError, match="at least"):
        serve(model, {})
    with pytest.raises(InputError):
        serve(model, {"a": tmp_path / "absent"})
    subspace = keep(model, METHODS["subspace"][0], names=("s", "t"))
    with pytest.raises(UnstackableError, match="serve these deltas apart"):
        serve(model, subspace)
    assert_same(before, snapshot(model))


def test_names_and_rows_have_to_fit(build: Build, keep) -> None:
    model = build("bert").eval()
    batch = texts(model, (5, 5), seed=1)
    server = serve(model, keep(model, PrefixTuning(2), HoulsbyAdapter(bottleneck=2)))
    with pytest.raises(InputError, match="adapter.*male.*mail"):
        server(["film", "male"], **batch)
    with pytest.raises(InputError, match="3 adapters are named and .* has 2 rows"):
        server(["film", "news", "mail"], **batch)
    for wrong in ("film", []):
        with pytest.raises(InputError, match="a list with a name"):
            server(wrong, **batch)
    with torch.no_grad():
        assert server(["film", "film"], **batch)[0].isfinite().all()
    server.detach()
