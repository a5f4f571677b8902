"""Every delta on the small models of ``architectures``: what it must cost, and what is refused.

The counts are formulas of the dimensions, written here a second time on purpose: they never ask a
delta or a model. A delta that is not listed is tested as its ``example()``, against the formula in
its own file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_type_hints

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from deltacontrol.deltas import (
    IA3,
    AdaLoRA,
    AdapterDrop,
    AttentionControl,
    BitFit,
    Compacter,
    Delta,
    DeltaModel,
    DiffPruning,
    DoRA,
    FisherMask,
    FullFineTuning,
    HeadTuning,
    HoulsbyAdapter,
    IntrinsicPrompt,
    LadderSideTuning,
    LastLayers,
    LayerNormTuning,
    LoHa,
    LoKr,
    LoRA,
    LotteryTicket,
    LowRankAdapter,
    MixAndMatch,
    MixtureOfControl,
    ParallelAdapter,
    PfeifferAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    RandomMask,
    SelectedModules,
    StateBasedTuning,
    StructuredSubspace,
    Subspace,
    UniPELT,
    VeRA,
    attach,
    registry,
)
from tests.deltas import support_table
from tests.deltas.architectures import (  # noqa: F401 - tests take all of it from here
    CLASSES,
    FAMILIES,
    MAIN,
    ONE_STACK,
    TEXT,
    TOKENS,
    Family,
    H,
    L,
    P,
    V,
    batch_of,
    build,
    d,
    e,
    m,
    texts,
)

_COUNTED: dict[str, tuple[Delta, Callable[[Family], int]]] = {
    "full": (FullFineTuning(), lambda f: f.total),
    "head": (HeadTuning(), lambda f: f.head),
    "bitfit": (BitFit(), lambda f: f.biases),
    "lora": (LoRA(rank=3), lambda f: f.layers * 3 * f.ends),
    "houlsby": (HoulsbyAdapter(bottleneck=5), lambda f: f.layers * 2 * (2 * 5 * d + d + 5)),
    "prefix": (PrefixTuning(length=3, init_std=1.0), lambda f: f.layers * 2 * 3 * f.key_width),
    "prompt": (PromptTuning(length=4), lambda f: 4 * f.embedding_width),
    "last-layers": (LastLayers(num_layers=1), lambda f: f.block),
    "layer-norm": (LayerNormTuning(), lambda f: f.norms),
    "selected-modules": (
        SelectedModules(("mlp.down",)),
        lambda f: f.layers * f.down,
    ),
    "dora": (DoRA(rank=3), lambda f: f.layers * (3 * f.ends + f.outputs)),
    "adalora": (
        AdaLoRA(rank=3, target_rank=2, sites=("attention.query", "attention.value")),
        lambda f: f.layers * 3 * (f.ends + 2),
    ),
    "vera": (VeRA(rank=5), lambda f: f.layers * (2 * 5 + f.outputs)),
    "loha": (LoHa(rank=3), lambda f: f.layers * 2 * 3 * f.ends),
    # 32 = 4 * 8 and 16 = 4 * 4: a full first factor, and a product of rank 3 for the second.
    "lokr": (LoKr(rank=3), lambda f: f.layers * (2 * 4 * 4 + 3 * (2 * 8 + 8 + f.key_width // 4))),
    "random-mask": (RandomMask(density=0.01), lambda f: round(0.01 * (f.total - f.head))),
    "fisher-mask": (FisherMask(density=0.01), lambda f: round(0.01 * (f.total - f.head))),
    "lottery-ticket": (LotteryTicket(), lambda f: f.total - f.head),
    # Gates half open: at their usual start they are clamped, and have no gradient.
    "diff-pruning": (
        DiffPruning(structured=False, log_alpha=1.0),
        lambda f: 2 * (f.total - f.head),
    ),
    "said": (StructuredSubspace(dimension=11), lambda f: 11),
    "intrinsic-prompt": (IntrinsicPrompt(length=4, dimension=3), lambda f: 3),
    "subspace": (Subspace(dimension=11), lambda f: 11),
    "pfeiffer": (PfeifferAdapter(bottleneck=5), lambda f: f.layers * (2 * 5 * d + d + 5)),
    "adapterdrop": (
        AdapterDrop(num_dropped=0, random=True, bottleneck=5),
        lambda f: f.layers * (2 * 5 * d + d + 5),
    ),
    "low-rank-adapter": (
        LowRankAdapter(bottleneck=6, rank=2),
        lambda f: f.layers * 2 * (2 * (d + 6) + 2 * (6 + d) + 6 + d),
    ),
    "compacter": (
        Compacter(bottleneck=8, num_terms=4),
        lambda f: 4**3 + f.layers * 2 * (4 * (d // 4 + 8 // 4) + 4 * (8 // 4 + d // 4) + 8 + d),
    ),
    "parallel-adapter": (ParallelAdapter(bottleneck=5), lambda f: f.layers * 2 * 5 * d),
    "state-based": (StateBasedTuning(rank=3), lambda f: f.layers * 2 * 3 * d),
    "attention-control": (AttentionControl(rank=3), lambda f: f.layers * 2 * 3 * d),
    "mixture-of-control": (
        MixtureOfControl(num_controls=3, rank=2),
        lambda f: f.layers * (3 * 2 * 2 * d + 3 * d),
    ),
    "ladder": (
        LadderSideTuning(reduction=4),
        lambda f: d * 8 + f.layers * (d * 8 + 2 * 8 * 32 + 1) + 8 * d,
    ),
    "ia3": (IA3(), lambda f: f.layers * (2 * f.key_width + f.inner)),
    "p-tuning": (
        PTuning(length=4, hidden=6),
        lambda f: (lambda w: 4 * w + w * 6 + 6 + 6 * 6 + 6 + 6 * w + w)(f.embedding_width),
    ),
    "mam": (
        MixAndMatch(length=3, bottleneck=5, init_std=1.0),
        lambda f: f.layers * (2 * 3 * f.key_width + 2 * 5 * d),
    ),
    "unipelt": (
        UniPELT(rank=3, bottleneck=5, length=2, init_std=1.0),
        lambda f: (
            f.layers
            * (3 * (3 * d + f.key_width) + 2 * 2 * f.key_width + 2 * 5 * d + 5 + d + 3 * (d + 1))
        ),
    ),
}

METHODS: dict[str, tuple[Delta, Callable[[Family], int] | None]] = {
    name: _COUNTED.get(name) or (kind.example(), None)
    for name, kind in registry.available().items()
}
# Other starts of LoRA's factors, held to the same contract on each kind of map.
STARTS: dict[str, tuple[Delta, Callable[[Family], int] | None]] = {
    f"lora:init={init}": (LoRA(rank=2, init=init), lambda f: f.layers * 2 * f.ends)
    for init in get_args(get_type_hints(LoRA)["init"])
    if init != LoRA().init
}
# What the README's support matrix refuses, with the reason: tested in test_support.py. A method
# that it does not list yet must work everywhere.
REFUSED = support_table.refused()
PAIRS = [(f, name) for f in FAMILIES for name in METHODS if (f, name) not in REFUSED]
# Every way in which a delta may act on a model, for what costs too much in every pair.
REPRESENTATIVE = ("bitfit", "lora", "prefix", "prompt", "subspace")
DEEP = [(f, name) for f, name in PAIRS if f in ("bert", "gpt2", "llama") or name in REPRESENTATIVE]
SMOKE = ("lora",)  # what `make test` takes of the families of `more_architectures`
# An encoder, and a decoder that fuses its projections: `make test`
# takes every method on these and the representative ones everywhere, `make slow` the other cells.
QUICK_FAMILIES = ("bert", "gpt2")
# Changes of weight that act where and as LoRA does. Of these `make test` takes the cells on GPT-2,
# with its slices of fused, transposed matrices; `oft` and `road` stand for them in dearer tests.
AS_LORA = (
    *("boft", "c3a", "delora", "fourierft", "gralora", "hira", "hra", "miss", "randlora"),
    "vblora",
)


def one_of_a_kind(methods: Iterable[str]) -> list[Any]:
    """Methods as parameters of a test; those that act as LoRA does are left to `make slow`."""
    return [
        pytest.param(name, marks=pytest.mark.slow if name in AS_LORA else ()) for name in methods
    ]


def cells(
    pairs: Iterable[tuple[str, str]],
    quick: Iterable[str] = QUICK_FAMILIES,
    everywhere: Iterable[str] = REPRESENTATIVE,
    smoke: Iterable[str] = (),
) -> list[Any]:
    """Cells of the support matrix as parameters (family, method) of a test.

    Those that `make test` leaves out are marked slow, and are not even made by it.

    Args:
        pairs: the cells.
        quick: families of which `make test` takes every method.
        everywhere: methods that it takes on every family but those of `more_architectures`.
        smoke: methods that it takes on those.
    """
    made = []
    for family, method in pairs:
        cheap = family == "gpt2" and quick is QUICK_FAMILIES
        taken = family in quick and (cheap or method not in AS_LORA)
        if taken or method in (smoke if FAMILIES[family].is_more else everywhere):
            made.append(pytest.param(family, method, id=f"{family}-{method}"))
        elif os.environ.get("SUPPORT_MATRIX") != "quick":
            made.append(
                pytest.param(family, method, id=f"{family}-{method}", marks=pytest.mark.slow)
            )
    return made


def each_family(*methods: str) -> list[Any]:
    """Every family that takes all of some methods, as a parameter of a test.

    Those of `more_architectures` are marked slow.
    """
    return [
        pytest.param(family, marks=pytest.mark.slow if sizes.is_more else ())
        for family, sizes in FAMILIES.items()
        if not any((family, method) in REFUSED for method in methods)
    ]


def num_parameters(method: str, sizes: Family, controlled: DeltaModel) -> int:
    """What the method must cost: the formula above, or the one in the method's own file."""
    delta, count = (METHODS | STARTS)[method]
    count = None if method in sizes.by_formula else count
    return delta.num_parameters(controlled.host) if count is None else count(sizes)


def draws_at_random(controlled: DeltaModel, seed: int) -> bool:
    """Whether attaching with this seed drew anything from the generator of controls."""
    fresh = torch.Generator().manual_seed(seed)
    return not torch.equal(controlled.host.generator.get_state(), fresh.get_state())


def out(model: nn.Module, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """The logits; the last hidden states, where there are none."""
    output = model(**batch, **more)
    return output.logits if hasattr(output, "logits") else output[0]


def move(controlled: DeltaModel, scale: float = 0.2, seed: int = 3) -> DeltaModel:
    """Move all controls away from their start, which often is a stationary point."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controlled.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))
    return controlled


def attached(model: hf.PreTrainedModel, *deltas: Delta, seed: int = 0) -> DeltaModel:
    """The controlled model, shown two batches where a delta depends on the data."""
    controlled = attach(model, *deltas, seed=seed)
    if controlled.needs_data:
        batches = [batch_of(model, pad) for pad in (0, 2)]
        controlled.prepare(lambda: (out(controlled, b).square().sum() for b in batches))
    return controlled


def snapshot(model: hf.PreTrainedModel) -> dict[str, Any]:
    """Everything that detaching has to give back."""
    modules = list(model.named_modules())
    return {
        "state": {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "attention": [m_.config._attn_implementation for _, m_ in modules if hasattr(m_, "config")],
        "hooks": [(n, len(h._forward_hooks), len(h._forward_pre_hooks)) for n, h in modules],
        "modules": [(n, id(h)) for n, h in modules],
        "marks": [(n, a) for n, h in modules for a in h.__dict__ if "deltacontrol" in a],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Fails with the first difference between two snapshots."""
    old, new = before["state"], after["state"]
    assert list(old) == list(new)
    for key, (identity, value) in old.items():
        assert new[key][0] == identity, f"{key} is another tensor"
        assert torch.equal(new[key][1], value), f"{key} has changed"
    for part in before.keys() - {"state"}:
        assert before[part] == after[part], part


def gradients(loss: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients; zero where the loss does not depend on a parameter."""
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def relative(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    left = torch.cat([x.detach().reshape(-1) for x in a])
    right = torch.cat([x.detach().reshape(-1) for x in b])
    return float((left - right).norm() / right.norm().clamp_min(1e-300))
