"""Adapters of the real peft library: imported, exported, and loaded by it again."""

import ast
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import deltacontrol.deltas.interop
from deltacontrol.deltas import BitFit, DoRA, HeadTuning, LayerNormTuning, LoRA, SelectedModules
from deltacontrol.deltas.interop import export_peft, import_peft
from deltacontrol.deltas.interop.peft import available
from tests.deltas import peft_cases
from tests.deltas.peft_models import logits, peft, same, save
from tests.deltas.zoo import batch_of, out

Build = Callable[..., PreTrainedModel]

CLS, LM, BASE = "classification", "causal-lm", "backbone"
TASKS = {CLS: "SEQ_CLS", LM: "CAUSAL_LM", BASE: "FEATURE_EXTRACTION"}
KINDS = {"gpt2": LM, "llama": LM, "opt": LM, "gemma3": LM, "qwen3": LM, "gpt_neox": LM}
QV = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
QV |= {"t5": ["q", "v"], "roberta": ["query"], "distilbert": ["q_lin"], "gemma3": ["q_proj"]}
UP = {"bert": "intermediate.dense", "gpt2": "c_fc", "llama": "up_proj", "t5": "wi"}
DOWN = {"bert": "output.dense", "gpt2": "mlp.c_proj", "llama": "down_proj", "t5": "wo"}
TABLE = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens", "t5": "embed_tokens"}
TABLE |= {"gemma3": "embed_tokens"}
NORMS = {"bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_2", "ln_f"], "t5": ["layer_norm"]}
NORMS |= {"llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
ALL = ("bert", "gpt2", "llama", "t5")
SHRINK = {"init_r": 4, "target_r": 2, "total_step": 100, "lora_alpha": 9}


def prune(model) -> None:
    """Keep other ranks in every module, and none in the first."""
    names = [n for n, _ in model.base_model.model.named_parameters() if "lora_E" in n]
    kept = {name: [(i + j) % 3 > 0 and j > 0 for i in range(4)] for j, name in enumerate(names)}
    model.peft_config["default"].rank_pattern = kept
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, kept)


def cases():
    """Name, family, kind, peft's class, its fields; what else happens before it is saved."""
    for f in (*ALL, "roberta", "distilbert"):
        yield "lora", f, peft.LoraConfig, {"r": 4, "lora_alpha": 7, "target_modules": QV[f]}
    for f in ALL:
        qv, both = QV[f], [*QV[f], UP[f]]
        ranks = {"r": 4, "rank_pattern": {UP[f]: 2, r".*\.1\..*" + qv[0]: 3}}
        alphas = {"lora_alpha": 7, "alpha_pattern": {qv[0]: 5}}
        yield "patterns", f, peft.LoraConfig, {"target_modules": both, **ranks, **alphas}
        yield "rslora", f, peft.LoraConfig, {"target_modules": both, **ranks, "use_rslora": True}
        yield "dora", f, peft.LoraConfig, {"target_modules": both, "r": 3, "use_dora": True}
        yield "adalora", f, peft.AdaLoraConfig, {"target_modules": both, **SHRINK}
        yield "pruned", f, peft.AdaLoraConfig, {"target_modules": both, **SHRINK}, prune
        yield "ia3", f, peft.IA3Config, {
            "target_modules": [*qv, DOWN[f]], "feedforward_modules": [DOWN[f]],
        }  # fmt: skip
        yield "vera", f, peft.VeraConfig, {"target_modules": both, "r": 6, "projection_prng_key": 3}
        yield "ln", f, peft.LNTuningConfig, {"target_modules": NORMS[f]}
    for f in (*ALL, "gemma3"):
        yield "embedding", f, peft.LoraConfig, {"target_modules": [*QV[f], TABLE[f]], "r": 4}
    for f in ("bert", "llama", "t5"):
        linear = {"target_modules": [*QV[f], UP[f]], "alpha": 5}
        yield "loha", f, peft.LoHaConfig, {**linear, "r": 3, "rank_pattern": {UP[f]: 2}}
        yield "lokr", f, peft.LoKrConfig, {**linear, "r": 2}
        yield "lokr-both", f, peft.LoKrConfig, {**linear, "r": 2, "decompose_both": True}
        yield "lokr-factor", f, peft.LoKrConfig, {**linear, "r": 9, "decompose_factor": 4}
    lora = {"r": 4, "lora_alpha": 7}
    for f in ("bert", "gpt2"):
        yield (
            "bias-only",
            f,
            peft.LoraConfig,
            {**lora, "target_modules": QV[f], "bias": "lora_only"},
        )
        yield "bias-all", f, peft.LoraConfig, {**lora, "target_modules": QV[f], "bias": "all"}
    dora = {**lora, "target_modules": ["query"], "bias": "lora_only", "use_dora": True}
    yield "dora-bias", "bert", peft.LoraConfig, dora
    vera = {"target_modules": ["c_attn"], "r": 40, "bias": "vera_only", "save_projection": False}
    yield "vera-bias", "gpt2", peft.VeraConfig, vera
    saved = {**lora, "target_modules": ["query"], "modules_to_save": ["pooler", "output.LayerNorm"]}
    yield "saved", "bert", peft.LoraConfig, saved
    head = {**lora, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    yield "saved-embedding", "llama", peft.LoraConfig, head
    yield "head-path", "llama", peft.LoraConfig, {**lora, "target_modules": ["q_proj", "lm_head"]}
    layers = {"layers_to_transform": [1], "target_modules": ["query", "value"]}
    yield "layers", "bert", peft.LoraConfig, {**lora, **layers, "layers_pattern": "layer"}
    pattern = {"target_modules": r".*layer\.\d+\..*dense"}
    yield "regex", "bert", peft.LoraConfig, {**lora, **pattern}
    every = {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]}
    yield "all-linear", "bert", peft.LoraConfig, {**lora, **every}
    yield "norms-of-one", "bert", peft.LNTuningConfig, {"target_modules": r".*layer\.1\..*Norm"}
    for f in (*ALL, "roberta"):
        yield "prompt", f, peft.PromptTuningConfig, {"num_virtual_tokens": 3}
        yield "p-tuning", f, peft.PromptEncoderConfig, {
            "num_virtual_tokens": 3, "encoder_hidden_size": 8,
            "encoder_reparameterization_type": "LSTM" if f == "bert" else "MLP",
        }  # fmt: skip
    for f in ("bert", "gpt2", "llama", "roberta", "electra", "opt", "qwen3", "gpt_neox"):
        yield "prefix", f, peft.PrefixTuningConfig, {"num_virtual_tokens": 3}
    inner = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 9}
    yield "prefix-mlp", "llama", peft.PrefixTuningConfig, inner


def unlisted(known: set[str]) -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    """A format without a case of its own: peft's defaults, at queries or with a prompt of three."""
    for name in sorted(set(available()) - known):
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
        fields = {field.name for field in dataclasses.fields(config)}
        for f in ALL:
            targets = {"target_modules": QV[f], "num_virtual_tokens": 3}
            yield name.lower(), f, config, {k: v for k, v in targets.items() if k in fields}


CASES: list[Any] = [(*case, None)[:5] for case in cases()]
TYPES = {config: kind.value for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
KNOWN = {TYPES[config] for _, _, config, *_ in (*CASES, *peft_cases.CASES)}
CASES += [(*case, None) for case in unlisted(KNOWN)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Their warnings are not ours to keep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def task_of(family: str) -> str:
    return TASKS[BASE if family == "t5" else KINDS.get(family, CLS)]


def rows_in_front(config: type) -> int:
    """peft's outputs of every position start with those of the prompt."""
    return 3 if config in (peft.PromptTuningConfig, peft.PromptEncoderConfig) else 0


@pytest.mark.parametrize(
    ("family", "kind", "fields", "change"),
    [pytest.param(*case[1:], id=f"{case[0]}-{case[1]}") for case in CASES],
)
@pytest.mark.one_in(5)
def test_round_trip(build: Build, tmp_path: Path, family, kind, fields, change):
    model = build(family, KINDS.get(family, CLS), dtype=torch.float32)
    batch = batch_of(model)
    folder, again = tmp_path / "theirs", tmp_path / "ours"
    save(model, kind(task_type=task_of(family), **fields), folder, change)
    theirs = logits(model, folder, batch)
    if KINDS.get(family) == LM:
        theirs = theirs[:, rows_in_front(kind) :]

    controlled = import_peft(folder, model)
    with torch.no_grad():
        ours = out(controlled, batch)
    export_peft(controlled, again)
    controlled.detach()
    same(ours, theirs)
    if ours.shape == out(model, batch).shape:
        assert float((ours - out(model, batch)).detach().abs().max()) > 1e-3, "it has no effect"

    back = logits(model, again, batch)
    same(back[:, -theirs.shape[1] :], theirs)

    twice = import_peft(again, model)
    with torch.no_grad():
        same(out(twice, batch), ours)
    twice.detach()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (peft.LoraConfig, {"target_modules": ["query", "word_embeddings"], "use_rslora": True}),
        (peft.LoraConfig, {"target_modules": ["query"], "use_dora": True, "bias": "all"}),
        (peft.AdaLoraConfig, {"target_modules": ["query"], **SHRINK}),
        (peft.VeraConfig, {"target_modules": ["query", "intermediate.dense"], "r": 6}),
        (peft.LoHaConfig, {"target_modules": ["query"], "r": 4}),
        (peft.LoKrConfig, {"target_modules": ["query"], "r": 3}),
        (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    ],
    ids=["lora", "dora", "adalora", "vera", "loha", "lokr", "prefix"],
)
def test_in_float64_the_laws_are_the_same(build: Build, tmp_path, kind, fields):
    """What is left in float32 is rounding: AdaLoRA's 1e-5 beside the rank, say, is not."""
    model = build("bert")
    save(build("bert", dtype=torch.float32), kind(task_type="SEQ_CLS", **fields), tmp_path / "a")
    controlled = import_peft(tmp_path / "a", model)
    with torch.no_grad():
        ours = out(controlled, batch_of(model))
    controlled.detach()
    same(ours, logits(model, tmp_path / "a", batch_of(model)), tolerance=1e-12)


def test_says_what_the_adapter_is(build: Build, tmp_path):
    """One LoRA for each rank and α, names as short as they can be, head and biases beside."""
    model = build("bert", dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=7, target_modules=["query", "value"],
        rank_pattern={"query": 2}, bias="lora_only", lora_dropout=0.1, use_rslora=True,
    )  # fmt: skip
    save(model, config, tmp_path / "a")
    controlled = import_peft(tmp_path / "a", model)
    rooted: dict[str, Any] = {"alpha": 7.0, "dropout": 0.1, "scaling": "rslora"}
    assert controlled.deltas == (
        LoRA(rank=2, sites=("query",), **rooted),
        LoRA(rank=4, sites=("value",), **rooted),
        HeadTuning(),
        BitFit(sites=("query", "value")),
    )
    controlled.detach()
    config = peft.LoraConfig(target_modules=["query"], use_dora=True, r=4, use_rslora=True)
    save(model, config, tmp_path / "b")
    controlled = import_peft(tmp_path / "b", model)
    assert controlled.deltas == (DoRA(rank=4, alpha=16.0, sites=("query",)),)
    controlled.detach()
    save(model, peft.LNTuningConfig(target_modules=["LayerNorm"]), tmp_path / "c")
    controlled = import_peft(tmp_path / "c", model)
    assert controlled.deltas == (LayerNormTuning(),)
    controlled.detach()
    save(model, peft.LNTuningConfig(target_modules=["embeddings.LayerNorm"]), tmp_path / "d")
    controlled = import_peft(tmp_path / "d", model)
    assert controlled.deltas == (SelectedModules(sites=("embeddings.LayerNorm",)),)
    controlled.detach()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generates_what_peft_generates(build: Build, tmp_path, family):
    """With a cache, whose positions start behind the prefix."""
    model = build(family, LM, dtype=torch.float32)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    save(model, config, tmp_path / "a")
    ids = batch_of(model, pad=0)["input_ids"][:1]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    controlled = import_peft(tmp_path / "a", model)
    ours = model.generate(
        input_ids=ids,  # type: ignore[operator]
        attention_mask=torch.ones_like(ids),
        **options,
    )
    controlled.detach()
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours, expected)


def test_a_format_without_a_case_is_tested_with_the_defaults_of_peft():
    assert not list(unlisted(set(available())))
    assert [case[:2] for case in unlisted(set(available()) - {"LORA"})] == [
        ("lora", family) for family in ALL
    ]


def test_needs_no_peft():
    """The library is a test's reference, never a dependency."""
    for path in Path(deltacontrol.deltas.interop.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "peft" for name in names), path
