"""A mistake gets one message: what was wrong, what was expected, what to try."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, T5ForConditionalGeneration

from deltacontrol.deltas import (
    IA3,
    AdaLoRA,
    AdapterDrop,
    AttentionControl,
    BitFit,
    Compacter,
    Delta,
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
    available,
    from_dict,
    parse,
    patterns,
    registry,
)
from deltacontrol.deltas.dynamics.transformer import control_problem
from deltacontrol.deltas.registry import completed
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, METHODS, P, V, assert_same, batch_of, d, out, snapshot

Build = Callable[..., PreTrainedModel]

CLS, LM = "classification", "causal-lm"
QUERY = ("attention.query",)

# delta, family, kind, what the message must hold
REFUSALS: list[tuple[Delta, str, str, tuple[str, ...]]] = [
    (LoRA(sites=("attention.qeury",)), "bert", CLS, ("'attention.qeury'", "attention.query")),
    (LoRA(sites=("q_proj",)), "bert", CLS, ("'q_proj'", "matches no module of bert", "nearest")),
    (LoRA(sites=("",)), "bert", CLS, ("''", "matches no module")),
    (LoRA(sites=("(",)), "bert", CLS, ("'('", "not a regular expression")),
    (LoRA(sites=("norm",)), "bert", CLS, ("LayerNorm", "not a linear map", "attention.query")),
    (HoulsbyAdapter(sites=("embedding",)), "gpt2", CLS, ("Embedding", "not a linear map")),
    (LoRA(sites=("embedding",)), "t5", CLS, ("tokens up at encoder.embed_tokens", "no effect")),
    (LoRA(sites=("embedding",), init="svd"), "gpt2", CLS, ("embedding", "init=svd", "kaiming")),
    (LoRA(rank=33, init="svd"), "bert", CLS, ("rank 33", "width 32", "self.query", "1 to 32")),
    (LoRA(rank=17, init="olora"), "llama", CLS, ("rank 17", "width 16", "v_proj", "1 to 16")),
    (LoRA(rank=9, init="lora-ga"), "llama", CLS, ("rank 9", "half the width 16", "1 to 8")),
    (LoRA(layers=(2,)), "bert", CLS, ("[2]", "blocks 0 to 1")),
    (LoRA(layers=(-1,)), "bert", CLS, ("[-1]", "blocks 0 to 1")),
    (LoRA(layers=()), "bert", CLS, ("layers", "empty", "blocks 0 to 1")),
    (LoRA(sites=("classifier",), layers=(0,)), "bert", CLS, ("classifier", "layers [0]")),
    (LoRA(sites=("mlp",)), "bert", CLS, ("no single module for 'mlp'", "mlp.up")),
    (HoulsbyAdapter(bottleneck=33), "bert", CLS, ("bottleneck 33", "width 32", "1 to 32")),
    (HoulsbyAdapter(sites=QUERY), "gpt2", CLS, ("c_attn", "attention.output")),
    (BitFit(), "llama", CLS, ("llama has no bias", "lora")),
    (BitFit(), "t5", CLS, ("t5 has no bias", "lora")),
    (BitFit(sites=("embedding",)), "bert", CLS, ("no bias at ('embedding',)",)),
    (BitFit(sites=QUERY), "gpt2", CLS, ("c_attn", "several maps")),
    (HeadTuning(), "t5", CLS, ("T5EncoderModel", "no head", "AutoModelForSequence")),
    (HeadTuning(), "bert", "backbone", ("BertModel", "no head")),
    (HeadTuning(), "gpt2", LM, ("lm_head.weight", "tied to transformer.wte.weight", "full")),
    (PrefixTuning(), "mpnet", CLS, ("MPNet", "attention interface", "prompt")),
    (PrefixTuning(layers=(9,)), "bert", CLS, ("[9]", "blocks 0 to 1")),
    (SelectedModules(QUERY), "gpt2", CLS, ("selected-modules", "c_attn", "several maps")),
    (LayerNormTuning(layers=(7,)), "bert", CLS, ("[7]", "blocks 0 to 1")),
    (RandomMask(sites=("attention",), layers=(5,)), "bert", CLS, ("[5]", "blocks 0 to 1")),
    (RandomMask(sites=("mlp.pu",)), "bert", CLS, ("'mlp.pu'", "mlp.up")),
    (LoRA(rank=3, init="svd", sites=("embedding",)), "bert", CLS, ("init=svd does not start",)),
    (LoHa(sites=("norm",)), "bert", CLS, ("LayerNorm", "not a linear map")),
    (LastLayers(num_layers=3), "bert", CLS, ("num_layers is 3", "2 blocks")),
    (IA3(input_sites=QUERY), "gpt2", CLS, ("c_attn", "scale their outputs", "mlp.down")),
    (IA3(sites=("norm",)), "bert", CLS, ("LayerNorm", "not a linear map")),
    (IA3(sites=("mlp.down",)), "bert", CLS, ("two controllers at", "output.dense")),
    (PfeifferAdapter(bottleneck=33), "bert", CLS, ("pfeiffer", "bottleneck 33", "1 to 32")),
    (AdapterDrop(num_dropped=2), "bert", CLS, ("num_dropped is 2", "2 blocks", "0 to 1")),
    (AdapterDrop(sites=("classifier",), bottleneck=2), "bert", CLS, ("classifier", "no block")),
    (Compacter(bottleneck=30, num_terms=5), "bert", CLS, ("width 32", "num_terms 5", "divisor")),
    (ParallelAdapter(bottleneck=33), "bert", CLS, ("bottleneck 33", "output.dense", "1 to 32")),
    (ParallelAdapter(layers=(5,)), "opt", CLS, ("[5]", "blocks 0 to 1")),
    (StateBasedTuning(rank=33), "gpt2", CLS, ("rank 33", "1 to 32")),
    (StateBasedTuning(around="mlps"), "bert", CLS, ("'mlps'", "mlp")),  # type: ignore[arg-type]
    (AttentionControl(rank=33), "llama", CLS, ("attention-control", "rank 33", "1 to 32")),
    (MixtureOfControl(rank=40), "t5", CLS, ("mixture-of-control", "rank 40", "1 to 32")),
    (LadderSideTuning(reduction=5), "bert", CLS, ("width 32", "reduction 5", "divisor")),
    (LadderSideTuning(), "bart", CLS, ("two stacks", "encoder")),
    (PTuning(), "vit", CLS, ("reads pixel_values", "prefix or lora")),
    (MixAndMatch(), "mpnet", CLS, ("MPNet", "attention interface")),
    (UniPELT(rank=17), "llama", CLS, ("rank 17", "width 16", "v_proj")),
    (UniPELT(bottleneck=33), "bert", CLS, ("bottleneck 33", "output.dense")),
    (UniPELT(), "mpnet", CLS, ("MPNet", "attention interface")),
    (Subspace(dimension=10**7), "bert", CLS, ("10000000", "parameters of the model")),
]  # fmt: skip


def raises(*parts: str):
    """Expects an InputError whose message holds all parts."""
    return pytest.raises(InputError, match="".join(f"(?=.*{re.escape(p)})" for p in parts))


@pytest.mark.parametrize(
    ("delta", "family", "kind", "parts"), REFUSALS, ids=[f"{r[0].name}-{r[1]}" for r in REFUSALS]
)
def test_attaching_refuses(build: Build, delta, family, kind, parts):
    model = build(family, kind)
    before = snapshot(model)
    with raises(*parts):
        attach(model, PromptTuning(length=2), delta)  # the first one must go as well
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: LoRA(rank=0), ("lora", "rank is 0", "at least 1")),
        (lambda: LoRA(dropout=1.0), ("dropout is 1.0", "< 1")),
        (lambda: LoRA(dropout=-0.1), ("dropout is -0.1",)),
        (lambda: HoulsbyAdapter(bottleneck=0), ("bottleneck is 0", "at least 1")),
        (lambda: HoulsbyAdapter(activation="gleu"), ("'gleu'", "gelu")),
        (lambda: HoulsbyAdapter(activation="prelu"), ("'prelu'", "parameters of its own", "relu")),
        (lambda: PrefixTuning(length=0), ("prefix", "length is 0", "at least 1")),
        (lambda: PromptTuning(length=-2), ("prompt", "length is -2", "at least 1")),
        (lambda: PrefixTuning(projection=0), ("prefix", "projection is 0")),
        (lambda: IA3(sites=(), input_sites=()), ("ia3", "empty", "at least one")),
        (lambda: AdapterDrop(num_dropped=-1), ("num_dropped is -1", "0 or more")),
        (lambda: AdapterDrop(activation="prelu"), ("adapterdrop", "'prelu'", "relu")),
        (lambda: LowRankAdapter(bottleneck=4, rank=5), ("rank 5", "bottleneck", "1 to 4")),
        (lambda: Compacter(bottleneck=30), ("bottleneck 30", "num_terms 4", "multiple")),
        (lambda: Compacter(bottleneck=8, rank=3), ("rank 3", "2")),
        (lambda: ParallelAdapter(sites=("block",)), ("('block',)", "attention, mlp or both")),
        (lambda: ParallelAdapter(sites=()), ("sites is ()", "attention, mlp or both")),
        (lambda: StateBasedTuning(rank=0), ("state-based", "rank is 0")),
        (lambda: MixtureOfControl(num_controls=0), ("num_controls is 0",)),
        (lambda: LadderSideTuning(reduction=0), ("ladder", "reduction is 0")),
        (lambda: PTuning(encoder="gru"), ("encoder", "'gru'", "lstm")),  # type: ignore[arg-type]
        (lambda: parse("p-tuning:encoder=gru"), ("encoder", "'gru'", "lstm")),
        (lambda: MixAndMatch(bottleneck=0), ("mam", "bottleneck is 0")),
        (lambda: UniPELT(length=0), ("unipelt", "length is 0")),
        (lambda: LastLayers(num_layers=0), ("num_layers is 0",)),
        (lambda: BitFit(part="head"), ("part of the delta bitfit", "'head'", "attention, mlp")),
        (lambda: BitFit(("norm",), "mlp"), ("bitfit", "('norm',)", "'mlp'", "give one")),
        (lambda: LoRA(scaling="root"), ("scaling", "'root'", "rslora, standard")),
        (lambda: LoRA(init="pissa"), ("init", "'pissa'", "gaussian, kaiming, lora-ga")),
        (lambda: LoRA(step_ratio=0.0), ("step_ratio is 0.0", "positive")),
        (lambda: LoRA(alpha=0.0, init="svd"), ("alpha is 0.0", "init=svd", "positive")),
        (lambda: DoRA(rank=0), ("dora", "rank is 0")),
        (lambda: VeRA(rank=0), ("vera", "rank is 0")),
        (lambda: LoHa(dropout=1.5), ("loha", "dropout is 1.5")),
        (lambda: LoKr(factor=0), ("lokr", "factor is 0", "at least 1, or none")),
        (lambda: AdaLoRA(rank=4, target_rank=5), ("target_rank 5", "rank 4")),
        (lambda: AdaLoRA(warmup=0.5, final=0.5), ("warmup 0.5", "final 0.5", "below 1")),
        (lambda: AdaLoRA(uncertainty_decay=1.0), ("uncertainty_decay is 1.0", "0 and 1")),
        (lambda: AdaLoRA(orthogonality=-1.0), ("orthogonality is -1.0", "at least 0")),
        (lambda: RandomMask(density=0.0), ("random-mask", "density is 0.0", "fraction")),
        (lambda: FisherMask(density=1.5), ("fisher-mask", "density is 1.5")),
        (lambda: LotteryTicket(rounds=0), ("lottery-ticket", "rounds is 0")),
        (lambda: LotteryTicket(search=1.0), ("search is 1.0", "between 0 and 1")),
        (lambda: DiffPruning(low=0.0), ("(0.0, 1.5)", "[0, 1]", "low < 0")),
        (lambda: DiffPruning(prune_at=0.0), ("prune_at is 0.0", "fraction")),
        (lambda: DiffPruning(penalty=-1.0), ("penalty is -1.0", "at least 0")),
        (lambda: StructuredSubspace(projection="sparse"), ("'sparse'", "dense, fastfood")),
        (lambda: IntrinsicPrompt(dimension=0), ("intrinsic-prompt", "dimension is 0")),
        (lambda: Subspace(dimension=0), ("dimension is 0",)),
        (lambda: parse("lorra"), ("unknown delta 'lorra'", "nearest: lora", "known: ada")),
        (lambda: parse(""), ("unknown delta ''", "known: ada")),
        (lambda: parse("lora:rnak=3"), ("'rnak'", "nearest: rank", "known: alpha")),
        (lambda: parse("lora:name=bitfit"), ("'name'", "known: alpha")),
        (lambda: parse("lora:rank"), ("'rank'", "FIELD=VALUE", "rank, alpha")),
        (lambda: parse("lora:rank=2,rank=3"), ("rank is given twice",)),
        (lambda: parse("lora:rank=two"), ("rank='two'", "an integer")),
        (lambda: parse("lora:rank=2.5"), ("rank='2.5'", "an integer")),
        (lambda: parse("lora:rank=none"), ("rank='none'", "an integer")),
        (lambda: parse("lora:alpha=big"), ("alpha='big'", "a number")),
        (lambda: parse("lora:layers=0+x"), ("layers='x'", "an integer")),
        (lambda: parse("prompt:init=vocab"), ("init", "'vocab'", "nearest: vocabulary")),
        (lambda: parse("subspace:projection=sparse"), ("'sparse'", "dense, fastfood")),
        (lambda: from_dict({"rank": 2}), ("needs a name",)),
        (lambda: from_dict({"name": "lora", "rank": 2.5}), ("rank=2.5", "an integer")),
        (lambda: from_dict({"name": "lora", "rank": True}), ("rank=True", "an integer")),
        (lambda: from_dict({"name": "lora", "rank": None}), ("rank=None", "an integer")),
        (lambda: from_dict({"name": "lora", "depth": 1}), ("'depth'", "known: alpha")),
    ],
)  # fmt: skip
def test_configurations_refuse(make, parts):
    with raises(*parts):
        make()


@pytest.mark.parametrize(
    ("deltas", "parts"),
    [
        ((), ("at least one delta", "LoRA(rank=8)")),
        (("lora",), ("not 'lora'", "deltas.parse")),
        ((LoRA,), ("LoRA(rank=8)", "not <class")),
    ],
)
def test_attach_takes_deltas(build, deltas, parts):
    with raises(*parts):
        attach(build("bert"), *deltas)


def test_attach_takes_models_of_transformers():
    with raises("PreTrainedModel", "not Linear"):
        attach(torch.nn.Linear(2, 2), LoRA())  # type: ignore[arg-type]


def test_a_tied_head_names_the_way_out(build):
    model = build("llama", "causal-lm", tie_word_embeddings=True)
    with raises("lm_head.weight", "tied to model.embed_tokens.weight", "tie_word_embeddings=False"):
        attach(model, HeadTuning())
    attach(model, FullFineTuning()).detach()
    untied = build("llama", "causal-lm")
    controlled = attach(untied, HeadTuning())
    assert list(controlled.trainable()) == ["head.lm_head.weight"]
    controlled.detach()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_an_encoder_decoder_is_found(tied):
    config = FAMILIES["t5"].config()
    config.update({"tie_word_embeddings": tied})
    model = T5ForConditionalGeneration(config)
    if tied:
        with raises("lm_head.weight", "tied to"):
            attach(model, HeadTuning())
    else:
        assert attach(model, HeadTuning()).num_trainable == V * d


def test_other_attention_kernels_are_refused(build):
    model = copy.deepcopy(build("bert"))
    model.config._attn_implementation_internal = "flash_attention_2"
    with raises("eager and sdpa", "not 'flash_attention_2'", "attn_implementation='sdpa'"):
        attach(model, PrefixTuning())
    assert model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation_internal = "eager"
    attach(model, PrefixTuning()).detach()


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "electra", "distilbert", "mpnet", "gpt2", "opt"]
)
def test_a_prompt_must_fit_in_front_of_the_text(build, family):
    """To the position: one more is refused, before the embedding table is left."""
    model = build(family)
    room = P - 2 if family in ("roberta", "mpnet") else P  # they spend two positions on padding
    controlled = attach(model, PromptTuning(length=room - 7))
    ids = torch.randint(3, V, (1, 8))
    assert out(controlled, {"input_ids": ids[:, :7]}).isfinite().all()
    with raises(f"prompt of {room - 7}", "text of 8", f"{room} positions", "max_length"):
        controlled(input_ids=ids)
    assert out(controlled, {"input_ids": ids[:, :7]}).isfinite().all()
    controlled.detach()


def test_a_prompt_needs_a_plain_mask(build):
    controlled = attach(build("bert"), PromptTuning(length=2))
    batch = batch_of(controlled.model)
    with raises("attention mask of shape (batch, tokens)"):
        controlled(batch["input_ids"], attention_mask=batch["attention_mask"][:, None, None])
    controlled.detach()


def test_the_registry_knows_every_delta_and_returns_it():
    assert sorted(available()) == sorted(METHODS)
    for delta, _ in METHODS.values():
        assert from_dict(delta.to_dict()) == delta
        assert parse(delta.name) == type(delta)()
    text = "lora:rank=4,alpha=2,sites=attention.key+mlp.up,layers=0+1,dropout=0.5"
    expected = LoRA(4, 2.0, ("attention.key", "mlp.up"), (0, 1), 0.5)
    assert parse(text) == expected == from_dict(expected.to_dict())
    assert parse("lora:layers=none").layers is None
    assert parse("subspace:projection=dense,projection_seed=3") == Subspace(1000, "dense", 3)


def test_a_record_without_a_new_field_is_completed_by_its_default():
    whole = LoRA(rank=4).to_dict()
    old = {key: value for key, value in whole.items() if key != "dropout"}
    config = {"deltas": [old], "delta": old, "name": "lora of another kind", "steps": 3}
    found = completed(config)
    assert found == {**config, "deltas": [whole], "delta": whole}
    assert completed({"name": "lora", "colour": "red"}) == {"name": "lora", "colour": "red"}


@pytest.mark.parametrize("pattern", [r"(a|aa)+c", r"(a|aa)+b?c", r"((a|aa)+)+c"])
def test_an_expression_that_backtracks_for_ever_is_refused(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    with pytest.raises(InputError, match="takes over.*a repetition within a repetition"):
        patterns.match_whole(pattern, "a" * 200)


@pytest.mark.parametrize("odd", ["sparse", "meta", "complex"])
def test_saved_controls_are_dense_and_real(build, odd):
    model = attach(build("bert"), LoRA(rank=2))
    state = model.state()
    name = next(iter(state))
    made = {
        "sparse": lambda x: x.to_sparse(),
        "meta": lambda x: x.to("meta"),
        "complex": lambda x: x.to(torch.complex64),
    }
    before = model.state()
    with pytest.raises(InputError, match="expected a dense tensor of real values"):
        model.load(state | {name: made[odd](state[name])})
    assert all(torch.equal(before[key], value) for key, value in model.state().items())
    model.detach()


@pytest.mark.parametrize(
    "name", [f"{n}={10**13}" for n in ("vera:rank", "randlora:rank", "intrinsic-prompt:length")]
)
def test_what_no_memory_holds_is_refused(build, name):
    """Their constants and their prompts are no parameters, which are counted before."""
    with pytest.raises(InputError, match=r"larger than the memory|GiB"):
        attach(build("bert"), registry.parse(name))


@pytest.mark.parametrize("wrong", [b"x", None, 3])
def test_a_site_is_a_text(wrong):
    with pytest.raises(InputError, match="sites="):
        registry.delta_of({"name": "lora", "sites": [wrong]})


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_deviation_is_not_negative(name):
    with pytest.raises(InputError, match="init_std is -1; expected 0 or more"):
        registry.parse(f"{name}:init_std=-1")


@pytest.mark.parametrize("rows", [(3, 4), (2, 3), (2, 5)])
def test_a_mask_fits_its_tokens(build, rows):
    model = attach(build("bert"), LoRA(rank=2))
    ids, labels = torch.ones(2, 4, dtype=torch.long), torch.tensor([0, 1])
    batch = {"input_ids": ids, "attention_mask": torch.ones(rows, dtype=torch.long)}
    with pytest.raises(InputError, match="expected one entry for each token"):
        control_problem(model, {**batch, "labels": labels})
    model.detach()


@pytest.mark.parametrize("name", ["randlora", "fourierft"])
@pytest.mark.parametrize("seed", [-1, -(2**70), 2**63])
def test_a_seed_of_a_delta_is_one(name, seed):
    with pytest.raises(InputError, match="seed is"):
        registry.delta_of({"name": name, "seed": seed})


def test_an_array_in_a_batch_is_named(build):
    model = attach(build("bert"), LoRA(rank=2))
    ids = torch.ones(2, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids.numpy(), "labels": torch.tensor([0, 1])}
    with pytest.raises(InputError, match="attention_mask of the batch is ndarray"):
        control_problem(model, batch)
    model.detach()


@pytest.mark.parametrize("name", [[None], 3, None, {}])
def test_a_name_of_a_delta_is_a_text(name):
    with pytest.raises(InputError):
        registry.from_dict({"name": name})


@pytest.mark.parametrize("number", [33, 2**70])
def test_a_butterfly_has_few_factors(number):
    with pytest.raises(InputError, match="num_factors"):
        registry.delta_of({"name": "boft", "num_factors": number})
