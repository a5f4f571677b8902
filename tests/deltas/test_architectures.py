"""Blocks and sites are where the model's own forward pass has them, known family or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    AttentionControl,
    BitFit,
    LadderSideTuning,
    LastLayers,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    attach,
)
from deltacontrol.deltas.editing.passes import first_tensor, with_first_tensor
from deltacontrol.deltas.editing.sites import Site, SiteMap
from deltacontrol.theory.errors import InputError
from tests.deltas.test_padding_side import DECODERS, MORE_DECODERS
from tests.deltas.zoo import FAMILIES, METHODS, H, L, P, V, attached, batch_of, d, m, move, out

Build = Callable[..., PreTrainedModel]
SIZE: dict[str, Any] = {
    "hidden_size": d,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "intermediate_size": m,
}
TEXT: dict[str, Any] = SIZE | {"vocab_size": V, "max_position_embeddings": P, "pad_token_id": 0}
GPT: dict[str, Any] = {"n_embd": d, "n_layer": L, "n_head": H, "vocab_size": V, "n_positions": P}
VISION: dict[str, Any] = SIZE | {"image_size": 8, "patch_size": 4}
CONVOLUTIONS: dict[str, Any] = {"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3)}
CONVOLUTIONS |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

# Architectures that are not in the zoo.
DECODING: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "gpt_neo": lambda: hf.GPTNeoConfig(
        hidden_size=d, num_layers=L, num_heads=H, attention_types=[[["global", "local"], 1]],
        vocab_size=V, max_position_embeddings=P, intermediate_size=m, window_size=4,
    ),
    "biogpt": lambda: hf.BioGptConfig(**TEXT),
    "codegen": lambda: hf.CodeGenConfig(**GPT, rotary_dim=4),
    "ctrl": lambda: hf.CTRLConfig(**GPT, dff=m),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT, n_inner=m),
    "openai-gpt": lambda: hf.OpenAIGPTConfig(**GPT),
    "glm4": lambda: hf.Glm4Config(**TEXT, num_key_value_heads=2, head_dim=d // H),
    "starcoder2": lambda: hf.Starcoder2Config(**TEXT, num_key_value_heads=2),
}  # fmt: skip
OTHER: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "deberta_v2": lambda: hf.DebertaV2Config(**TEXT),
    "xlnet": lambda: hf.XLNetConfig(d_model=d, n_layer=L, n_head=H, d_inner=m, vocab_size=V),
    "siglip": lambda: hf.SiglipVisionConfig(**VISION),
    "wav2vec2": lambda: hf.Wav2Vec2Config(**SIZE, **CONVOLUTIONS),
    "convnext": lambda: hf.ConvNextConfig(
        patch_size=2, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=8
    ),
}  # fmt: skip


def mostly_slow(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


def unlisted(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = hf.AutoModel.from_config((DECODING | OTHER)[name]()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(3, 64, dtype=torch.float64)}
    return batch_of(model)


def calls(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[str]:
    """The blocks in the order in which one forward pass calls them."""
    sites, called = SiteMap(model), []
    handles = [
        sites.modules[path].register_forward_pre_hook(lambda *_, p=path: called.append(p))
        for path in sites.block_paths
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ("bert", "t5-seq2seq", "albert")))
def test_the_blocks_are_what_a_pass_calls_once_each_in_order(build: Build, family: str) -> None:
    model = build(family)
    sites = SiteMap(model)
    assert len(sites.block_paths) == FAMILIES[family].layers
    called = calls(model, batch_of(model))
    assert called == [path for path in sites.block_paths for _ in range(sites.calls)]
    assert sites.calls == (L if family == "albert" else 1)


@pytest.mark.parametrize("name", mostly_slow([*DECODING, *OTHER], ("wav2vec2", "convnext")))
def test_so_they_are_in_an_architecture_that_is_not_listed(name: str) -> None:
    model = unlisted(name)
    assert calls(model, inputs(model)) == SiteMap(model).block_paths
    assert len(SiteMap(model).block_paths) == L


def changed(model: PreTrainedModel, site: Site, token: int, batch: dict[str, Tensor]) -> Tensor:
    """How far each token of the block's output moves when a site's output moves at one token."""
    block, states = SiteMap(model).blocks[site.layer or 0], []

    def disturb(_module: nn.Module, _args: tuple, output: Any) -> Any:
        state = first_tensor(output).clone()
        moved = site.spread(torch.ones(site.out_features, dtype=state.dtype))
        state[:, token] += moved
        return with_first_tensor(output, state)

    handle = block.register_forward_hook(
        lambda _module, _args, output: states.append(first_tensor(output))
    )
    with torch.no_grad():
        model(**batch)
        disturbing = site.module.register_forward_hook(disturb)
        model(**batch)
    disturbing.remove()
    handle.remove()
    return (states[0] - states[1]).abs().amax((0, 2))


ATTENDING = [*(f for f in (*DECODERS, *MORE_DECODERS) if f != "mamba2"), *DECODING]
FUSED = ("gpt2", "gpt_neox", "bloom", "falcon", "mpt", "phi3", "deepseek-v3", "gpt_bigcode")


@pytest.mark.parametrize("family", mostly_slow(ATTENDING, (*FUSED, "codegen")))
def test_query_key_and_value_are_what_they_are_called(build: Build, family: str) -> None:
    """Of a causal model's first token, which sees itself alone.

    Its query changes nothing, its key only what later tokens see, and its value all of it. So the
    slices of a map that computes all three are told apart.
    """
    model = build(family) if family in FAMILIES else unlisted(family)
    sites, batch = SiteMap(model), batch_of(model, 0)
    found = {}
    for name in ("query", "key", "value"):
        try:
            found[name] = sites.resolve([f"attention.{name}"], layers=[0])
        except InputError as error:
            assert family in ("codegen", "deepseek-v3"), error
            assert "at once" in str(error) or "from a latent" in str(error)
            continue
        (site,) = found[name]
        change = changed(model, site, 0, batch)
        first, later = float(change[0]), float(change[1:].max())
        at_first = {"query": False, "key": False, "value": True}[name]
        at_later = {"query": False, "key": True, "value": True}[name]
        # Where norms are in float32, so is the rounding of what follows.
        assert (first > 1e-6, later > 1e-6) == (at_first, at_later), name
    slices = [(s.path, s.groups, s.part) for each in found.values() for s in each]
    assert len(slices) == len(set(slices))


@pytest.mark.parametrize("family", ["phi3", "modernbert", "mt5"])
def test_the_upper_half_of_a_gated_mlp_is_the_one_without_activation(
    build: Build, family: str
) -> None:
    """What goes into the lower map is linear in it."""
    model = build(family)
    sites = SiteMap(model)
    up, down = (sites.resolve([name], layers=[0])[0] for name in ("mlp.up", "mlp.down"))
    seen: list[Tensor] = []
    handle = down.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    move_by = site_vector(up)
    for factor in (0.0, 1.0, 2.0):
        disturbing = up.module.register_forward_hook(
            lambda _module, _args, output, f=factor: output + f * move_by
        )
        with torch.no_grad():
            model(**batch_of(model))
        disturbing.remove()
    handle.remove()
    torch.testing.assert_close(seen[2] - seen[1], seen[1] - seen[0], rtol=0, atol=1e-12)
    assert float((seen[1] - seen[0]).abs().max()) > 1e-3


def site_vector(site: Site) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(site.out_features, generator=generator, dtype=torch.float64)
    return site.spread(values)


MIXING = [AttentionControl(rank=2, around=a) for a in ("mlp", "attention", "block")]
MIXING += [PromptTuning(length=2), PrefixTuning(length=2), LoRA(rank=2)]


@pytest.mark.parametrize("name", mostly_slow(DECODING, ("openai-gpt", "gpt_neo", "ctrl")))
def test_an_architecture_that_is_not_listed_stays_causal_or_is_refused(name: str) -> None:
    model = unlisted(name)
    batch = batch_of(model, 0)
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] = 3 + (other["input_ids"][:, -1] - 2) % (V - 3)
    worked = 0
    for delta in MIXING:
        try:
            tuned = move(attach(model, delta))
        except InputError:
            continue
        try:
            with torch.no_grad():
                for names in (("input_ids", "attention_mask"), ("input_ids",)):
                    given = [{n: each[n] for n in names} for each in (batch, other)]
                    change = (out(tuned, given[0]) - out(tuned, given[1])).abs().amax(-1)
                    assert float(change[:, :-1].max()) == 0.0 < float(change[:, -1].min())
            worked += 1
        except InputError as error:
            assert "which tokens may be mixed" in str(error)
        finally:
            tuned.detach()
    assert worked >= 1


@pytest.mark.parametrize("name", mostly_slow(OTHER, ("wav2vec2", "convnext")))
def test_every_method_works_or_is_refused_where_nothing_is_listed(name: str) -> None:
    model = unlisted(name)
    batch, worked = inputs(model), []
    for method, (delta, _) in METHODS.items():
        try:
            controlled = attach(model, delta)
        except InputError:
            continue
        with torch.no_grad():
            if not controlled.needs_data:
                before = out(controlled, batch)
                assert not torch.equal(out(move(controlled), batch), before), method
                worked.append(method)
        controlled.detach()
    assert {"full", "last-layers", "layer-norm", "random-mask"} <= set(worked) | {"random-mask"}
    assert ("lora" in worked) == (name not in ("xlnet", "convnext"))


def test_two_towers_are_refused_and_one_of_them_is_not() -> None:
    config = hf.CLIPConfig(
        text_config=TEXT | {"projection_dim": 8}, vision_config=VISION | {"projection_dim": 8},
        projection_dim=8,
    )  # fmt: skip
    model = hf.CLIPModel(config)
    for delta in (LoRA(rank=2), LastLayers(), LadderSideTuning(), BitFit(part="attention")):
        with pytest.raises(InputError, match="several towers of blocks .*text_model.*vision_model"):
            attach(model, delta)
    by_name = attach(model, LoRA(rank=2, sites=("text_model.encoder.layers.0.self_attn.q_proj",)))
    assert by_name.num_trainable == 2 * 2 * d
    by_name.detach()
    for tower in ("text_model", "vision_model"):
        inner = hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT))
        if tower == "vision_model":
            inner = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))
        assert len(SiteMap(inner).block_paths) == L


def test_a_decoder_alone_is_not_taken_for_shared_layers() -> None:
    """Its configuration tells the encoder's depth as well."""
    config = hf.BartConfig(
        d_model=d, encoder_layers=2 * L, decoder_layers=L, encoder_attention_heads=H,
        decoder_attention_heads=H, encoder_ffn_dim=m, decoder_ffn_dim=m, vocab_size=V,
        is_encoder_decoder=False, is_decoder=True,
    )  # fmt: skip
    sites = SiteMap(hf.BartForCausalLM(config))
    assert (len(sites.block_paths), sites.calls) == (L, 1)


def test_layers_that_share_a_block_share_its_controls(build: Build) -> None:
    """As a model does whose layers are copies of the block, each with the same controls."""
    model = build("albert")
    for delta, found in ((LastLayers(), "last-layers"), (LadderSideTuning(), "ladder")):
        with pytest.raises(InputError, match=f"{found}: albert calls the same block for 2 layers"):
            attach(model, delta)
    tuned = move(attach(model, LoRA(rank=2)))
    assert tuned.num_trainable == 2 * 2 * 2 * d  # query and value, once
    called: list[int] = []
    (query,) = tuned.host.find(("attention.query",))
    handle = query.module.register_forward_hook(lambda *_: called.append(1))
    out(tuned, batch_of(model))
    handle.remove()
    tuned.detach()
    assert len(called) == L


class TestNormsAndBiases:
    def test_gated_norms(self, build: Build) -> None:
        """Mamba2 has one of d in front of each block and one of 2 d in it."""
        tuned = attach(build("mamba2"), LayerNormTuning())
        assert tuned.num_trainable == L * (d + 2 * d) + d
        tuned.detach()

    def test_norms_whose_gain_starts_at_one_plus(self, build: Build) -> None:
        tuned = attach(build("nemotron"), LayerNormTuning())
        assert tuned.num_trainable == L * 2 * 2 * d + 2 * d
        tuned.detach()

    def test_a_layer_around_a_norm_is_no_norm(self) -> None:
        """Wav2Vec2's first convolution is in a `…GroupNormConvLayer`."""
        model = unlisted("wav2vec2")
        norms = SiteMap(model).resolve(["norm"])
        assert not any("Conv" in type(site.module).__name__ for site in norms)
        assert any(isinstance(site.module, nn.GroupNorm) for site in norms)

    def test_the_bias_of_three_maps_in_one(self) -> None:
        """SigLIP pools by torch's own attention, whose three biases are one parameter of 3 d."""
        model = unlisted("siglip")
        biases = {n: p.numel() for n, p in model.named_parameters() if "bias" in n}
        assert biases["head.attention.in_proj_bias"] == 3 * d
        tuned = attach(model, BitFit())
        block = 4 * d + m + d + 2 * d
        pooling = 3 * d + d + d + m + d  # both maps, the norm, and the MLP
        assert tuned.num_trainable == d + L * block + d + pooling == sum(biases.values())
        tuned.detach()


def test_experts_are_no_single_map(build: Build) -> None:
    """But around the whole of them a control can act, and in a block without experts as well."""
    model = build("deepseek-v3")
    with pytest.raises(InputError, match=r"'mlp.down' in model.layers.1, .* mixture of experts"):
        attach(model, LoRA(rank=2, sites=("mlp.down",)))
    for delta in (LoRA(rank=2, sites=("mlp.down",), layers=(0,)), METHODS["parallel-adapter"][0]):
        tuned = attached(model, delta)
        before = out(tuned, batch_of(model))
        assert not torch.equal(out(move(tuned), batch_of(model)), before)
        tuned.detach()
    with pytest.raises(InputError, match="MixtralExperts, not a linear map"):
        attach(build("mixtral"), LoRA(rank=2, sites=("mlp.experts",)))
