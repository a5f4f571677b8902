"""LoRA's starts from data: each against a dense computation on a plain copy of the model."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import FisherMask, HeadTuning, LoRA, PromptTuning, attach
from deltacontrol.deltas.interop import export_peft
from deltacontrol.theory.errors import InputError
from tests.deltas.data_starts import (
    DATA,
    SHAPES,
    SITES,
    batches_of,
    best,
    close,
    factors,
    gradients_of,
    inputs_of,
    loss_of,
    shown,
)
from tests.deltas.zoo import d, move, out, snapshot, texts

Build = Callable[..., PreTrainedModel]


@SHAPES
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_lora_ga_first_moves_along_the_gradient_of_twice_the_rank(build: Build, family, scaling):
    """The derivative of W along -∇ of A and B is -s² c² times the best G of rank 2r."""
    model = build(family)
    dense = gradients_of(model)
    delta = LoRA(rank=2, alpha=5.0, sites=SITES, init="lora-ga", scaling=scaling)
    controlled = shown(model, delta)
    torch.stack([loss_of(controlled, b) for b in batches_of(model)]).mean().backward()
    for site in controlled.host.find(SITES):
        f = factors(controlled, site)
        path = controlled.controls.get_submodule(f"lora.{site.key}")
        moved = delta.scale * (-path.B.grad @ f["A"] - f["B"] @ path.A.grad)  # type: ignore[operator]
        gradient = site.rows(dense[f"{site.path}.weight"])
        size = math.sqrt(site.out_features) / 16.0  # c²
        close(moved, -(delta.scale**2) * size * best(gradient, 4))
        close(f["A"] @ f["A"].T, size * torch.eye(2, dtype=torch.float64))
        close(f["B"].T @ f["B"], size * torch.eye(2, dtype=torch.float64))
        assert torch.equal(f["A_0"], f["A"]) and torch.equal(f["B_0"], f["B"])
    controlled.detach()


@SHAPES
def test_lora_one_starts_at_the_gradient_of_its_rank(build: Build, family):
    model = build(family)
    dense = gradients_of(model)
    controlled = shown(model, LoRA(rank=3, alpha=5.0, sites=SITES, init="lora-one"))
    for site in controlled.host.find(SITES):
        f = factors(controlled, site)
        gradient = site.rows(dense[f"{site.path}.weight"])
        largest = torch.linalg.matrix_norm(gradient, 2)
        close(f["B"] @ f["A"], -best(gradient, 3) / (128.0 * largest))
        close(f["A"] @ f["A"].T, f["B"].T @ f["B"])  # balanced
        assert f.keys() == {"A", "B", "started"}  # nothing is taken away
        merged = site.rows(controlled.host.original(f"{site.path}.weight").detach())
        path = controlled.controls.get_submodule(f"lora.{site.key}")
        expected = merged + 5.0 / 3 * f["B"] @ f["A"]
        close(merged + path.change(), expected)  # type: ignore[operator]
    controlled.detach()


@SHAPES
def test_eva_starts_at_the_principal_directions_of_the_inputs(build: Build, family):
    model = build(family)
    plain = copy.deepcopy(model)
    controlled = shown(model, LoRA(rank=4, sites=SITES, init="eva"))
    for site in controlled.host.find(SITES):
        f = factors(controlled, site)
        rows = inputs_of(plain, site.path)
        right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
        close((f["A"] @ right.T).abs(), torch.eye(4, dtype=torch.float64), 1e-8)
        assert not f["B"].any()
        assert f.keys() == {"A", "B", "started"}
    controlled.detach()


@SHAPES
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_at_components_oriented_by_the_inputs(build: Build, family, mode):
    """s·B₀ A₀ = U S V' C⁻¹ of the largest or of the smallest components; all of them give W."""
    model = build(family)
    plain = copy.deepcopy(model)
    for rank in (3, 16 if family == "llama" else d):
        delta = LoRA(rank=rank, alpha=5.0, sites=SITES, init=f"corda-{mode}")
        controlled = shown(model, delta)
        for site in controlled.host.find(SITES):
            f = factors(controlled, site)
            weight = site.rows(model.get_parameter(f"{site.path}.weight").detach())
            rows = inputs_of(plain, site.path)
            second = rows.T @ rows
            second /= second.diagonal().mean()
            second += 0.01 * torch.eye(len(second), dtype=torch.float64)
            left, values, right = torch.linalg.svd(weight @ second, full_matrices=False)
            count = len(values)
            taken = range(rank) if mode == "ipm" else range(count - rank, count)
            inverse = torch.linalg.inv(second)
            expected = sum(values[i] * torch.outer(left[:, i], right[i] @ inverse) for i in taken)
            close(delta.scale * f["B"] @ f["A"], expected)  # type: ignore[arg-type]
            if rank == count:
                close(delta.scale * f["B"] @ f["A"], weight)
            assert torch.equal(f["A_0"], f["A"]) and torch.equal(f["B_0"], f["B"])
            sizes = values[taken.start : taken.stop] / delta.scale
            close(f["B"].T @ f["B"], torch.diag(sizes))
        controlled.detach()


@pytest.mark.parametrize("init", DATA)
def test_the_same_from_single_examples_and_whatever_the_padding(build: Build, init):
    """Moments do not depend on how rows come; a mean of losses of equal batches neither."""
    model = build("bert")
    batches = [texts(model, (4, 6, 2), seed=s) for s in (3, 4)]
    wide = [texts(model, (4, 6, 2), seed=s) for s in (3, 4)]
    for batch in wide:
        for name in batch:
            batch[name] = torch.nn.functional.pad(batch[name], (0, 5))
    alone = [{k: v[row : row + 1] for k, v in b.items()} for b in batches for row in range(3)]
    found = []
    for some in (batches, wide, alone, batches):
        controlled = attach(model, LoRA(rank=2, sites=SITES, init=init))
        controlled.prepare(lambda some=some, c=controlled: (loss_of(c, b) for b in some))
        state = controlled.state()
        found.append(
            {k: state[f"{k}.B"] @ state[f"{k}.A"] if init != "eva" else state[f"{k}.A"]
             for k in (name.removesuffix(".A") for name in state if name.endswith(".A"))}
        )  # fmt: skip
        controlled.detach()
    assert all(torch.equal(found[3][key], value) for key, value in found[0].items())
    for other in found[1:3]:
        for key, value in found[0].items():
            # The product of LoRA-GA's factors has the signs of two vectors each.
            close(other[key].abs() if init == "lora-ga" else other[key],
                  value.abs() if init == "lora-ga" else value, 1e-7)  # fmt: skip


@pytest.mark.parametrize("init", DATA)
def test_it_must_see_data_first(build: Build, tmp_path, init):
    model = build("bert")
    (batch, *_) = batches_of(model)
    before = out(model, batch).detach()
    controlled = attach(model, LoRA(rank=2, init=init))
    unseen = r"lora has not seen data.*prepare\(losses\)"
    for act in (
        lambda: controlled(**batch),
        controlled.merge,
        lambda: export_peft(controlled, tmp_path / "adapter"),
    ):
        with pytest.raises(InputError, match=unseen):
            act()
    one = loss_of
    wrong = [
        (lambda: iter(()), "got no loss"),
        (
            lambda: (one(controlled, batch) * math.nan for _ in range(1)),
            "loss 1 of the data is nan",
        ),
        (lambda: iter([torch.zeros((), requires_grad=True)]), "query took no part in the losses"),
    ]
    if init in ("lora-ga", "lora-one"):
        wrong.append((lambda: iter([torch.zeros(())]), "loss 1 of the data has no graph"))
    for losses, message in wrong:
        with pytest.raises(InputError, match=message):
            controlled.prepare(losses)
        with pytest.raises(InputError, match=unseen):
            controlled(**batch)
    controlled.train_only(None)
    controlled.prepare(lambda: (one(controlled, b) for b in batches_of(model)))
    assert torch.equal(out(controlled, batch).detach(), before) == (init != "lora-one")
    assert all(p.grad is None for p in controlled.parameters())
    controlled.detach()


@pytest.mark.parametrize("init", [init for init in DATA if init != "lora-one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_start_is_the_base_model_in_short_numbers_too(build: Build, init, dtype):
    """What is taken away is what the factors were rounded to."""
    model = build("bert", dtype=dtype)
    (batch, *_) = batches_of(model)
    with torch.no_grad():
        before = out(model, batch)
        controlled = shown(model, LoRA(rank=2, init=init, sites=SITES))
        assert torch.equal(out(controlled, batch), before)
        assert not torch.equal(out(move(controlled), batch), before)
        assert torch.equal(out(controlled.detach(), batch), before)


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_activations_that_are_computed_again_count_once(build: Build, init):
    model = copy.deepcopy(build("gpt2"))  # what checkpointing puts on it stays there
    states = []
    for again in (False, True):
        controlled = attach(model, LoRA(rank=2, init=init))
        if again:
            controlled.train()  # a block is computed again only then; there is no dropout in it
            controlled.gradient_checkpointing_enable()
        batches = [b | {"use_cache": False} for b in batches_of(model)]
        controlled.prepare(lambda c=controlled, bs=batches: (loss_of(c, b) for b in bs))
        states.append(controlled.state())
        controlled.eval()
        controlled.gradient_checkpointing_disable()
        controlled.detach()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_one_that_is_not_trained_yet_waits_without_acting(build: Build):
    """In a sequence of deltas a later one sees the data when its turn comes."""
    model = build("bert")
    batches = batches_of(model)
    before = out(model, batches[0]).detach()
    controlled = attach(model, HeadTuning(), LoRA(rank=2, init="lora-one"))
    controlled.train_only(["head"])
    assert not controlled.needs_data
    assert torch.equal(out(controlled, batches[0]).detach(), before)
    controlled.train_only(["lora"])
    controlled.prepare(lambda: (loss_of(controlled, b) for b in batches))
    assert not torch.equal(out(controlled, batches[0]).detach(), before)
    controlled.detach()


def test_several_deltas_see_the_same_data(build: Build):
    """A mask that wants single examples, and two starts: none waits for another one's look."""
    model = build("bert")
    examples = [{k: v[:1] for k, v in b.items()} for b in batches_of(model)] + [
        {k: v[1:2] for k, v in b.items()} for b in batches_of(model)
    ]
    alone = {}
    deltas = [
        LoRA(rank=2, init="lora-ga"),
        FisherMask(density=0.01, sites=("embedding",)),
        LoRA(rank=2, init="eva", sites=("mlp.up",)),
    ]
    for delta in deltas:
        controlled = attach(model, delta)
        controlled.prepare(lambda: (loss_of(controlled, b) for b in examples))  # noqa: B023
        alone[delta.name, getattr(delta, "init", "")] = controlled.state()
        controlled.detach()
    controlled = attach(model, *deltas)
    assert controlled.needs_examples
    controlled.prepare(lambda: (loss_of(controlled, b) for b in examples))
    together = controlled.state()
    controlled.detach()
    for name, value in together.items():
        start = alone["fisher-mask", ""] if name.startswith("fisher") else (
            alone["lora", "eva" if name.startswith("lora_2") else "lora-ga"])  # fmt: skip
        assert torch.equal(start[name.replace("lora_2", "lora", 1)], value), name


def test_rows_that_another_delta_puts_before_the_text_count(build: Build):
    model = build("bert")
    controlled = attach(model, PromptTuning(length=2), LoRA(rank=2, init="eva"))
    batches = batches_of(model)
    controlled.prepare(lambda: (loss_of(controlled, b) for b in batches))
    (site, *_) = controlled.host.find(("attention.query",))
    rows = []
    for batch in batches:
        text = torch.nn.functional.pad(batch["attention_mask"].bool(), (2, 0), value=True)
        hook = site.module.register_forward_hook(
            lambda _, x, y, text=text: rows.append(x[0].detach()[text])
        )
        with torch.no_grad():
            controlled(**batch)
        hook.remove()
    found = torch.cat(rows)
    right = torch.linalg.svd(found - found.mean(0), full_matrices=False)[2][:2]
    start = factors(controlled, site)["A"]
    close((start @ right.T).abs(), torch.eye(2, dtype=torch.float64), 1e-8)
    controlled.detach()


def test_encoder_and_decoder_have_masks_of_their_own(build: Build):
    """Rows of a decoder are as its own mask says, whatever the encoder's padding."""
    model = build("t5-seq2seq")
    batches = [texts(model, (6, 3, 4), seed=s) for s in (3, 4)]
    for batch in batches:
        batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    controlled = attach(model, LoRA(rank=2, init="eva"))
    seen: dict[str, list[Tensor]] = {}
    controlled.prepare(lambda: (loss_of(controlled, b) for b in batches))
    for site in controlled.host.find(("attention.query",)):
        own = "attention_mask" if site.path.startswith("encoder") else "decoder_attention_mask"
        for batch in batches:
            text = batch[own].bool()
            hook = site.module.register_forward_hook(
                lambda _, x, y, text=text, path=site.path: seen.setdefault(path, []).append(
                    x[0][text]
                )
            )
            with torch.no_grad():
                controlled(**batch)
            hook.remove()
        rows = torch.cat(seen[site.path])
        right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
        start = factors(controlled, site)["A"]
        close((start @ right.T).abs(), torch.eye(2, dtype=torch.float64), 1e-8)
    controlled.detach()


@pytest.mark.parametrize(
    ("init", "rank", "rows", "message"),
    [
        ("eva", 5, (3, 2), "inputs vary in 4 directions at .*query.* needs 5; try a rank of at mo"),
        ("lora-ga", 2, (6, 6), "layer.1.*query.* needs 4; try a rank of at most 1"),
        ("lora-one", 4, (6, 6), "layer.1.*query.* needs 4; try a rank of at most"),
    ],
)
def test_data_of_too_few_directions_are_refused(build: Build, init, rank, rows, message):
    """Five tokens vary in four directions; the last query of a classifier reads one a text."""
    model = build("bert")
    controlled = attach(model, LoRA(rank=rank, init=init))
    batch = texts(model, rows)
    with pytest.raises(InputError, match=message):
        controlled.prepare(lambda: iter([loss_of(controlled, batch)]))
    with pytest.raises(InputError, match="has not seen data"):
        controlled(**batch)
    controlled.detach()


@pytest.mark.parametrize("init", DATA)
def test_sizes_and_sites_that_no_data_can_start_are_refused_before_any(build: Build, init):
    model = build("bert")
    before = snapshot(model)
    half = init == "lora-ga"
    for delta, message in (
        (
            LoRA(rank=d // 2 + 1 if half else d + 1, init=init),
            rf"width {d} of .*1 to {d // (1 + half)}",
        ),
        (
            LoRA(rank=2, init=init, sites=("embedding",)),
            f"an embedding, which init={init} does not",
        ),
        (LoRA(rank=2, init=init, sites=("norm",)), "LayerNorm, not a linear map"),
    ):
        with pytest.raises(InputError, match=message):
            attach(model, delta)
        assert all(torch.equal(v, before["state"][k][1]) for k, v in model.state_dict().items())


def test_a_start_that_is_part_of_the_weight_needs_a_positive_scale():
    with pytest.raises(InputError, match="init=corda-kpm needs a positive one"):
        LoRA(init="corda-kpm", alpha=0.0)
