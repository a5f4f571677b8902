"""Fine-tuning beside weights in 4 and 8 bits, from the fields to the record and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig

import deltacontrol as dc
from deltacontrol.deltas.quantised import is_quantised
from deltacontrol.experiments import models
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(minilm_l6: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the real tokenizer."""
    made = tmp_path_factory.mktemp("tiny")
    AutoTokenizer.from_pretrained(models.resolve(minilm_l6).location).save_pretrained(made)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    AutoModel.from_config(config).save_pretrained(made)
    return made


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    given = {
        "model": str(folder), "task": "movie", "deltas": ("lora:rank=2",), "steps": 2,
        "batch_size": 4, "max_length": 16, "eval_limit": 20, "learning_rate": 1e-3,
    }  # fmt: skip
    return given | changed


@pytest.mark.parametrize(
    "weights", ["nf4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int8", "bfloat16"))]
)
@pytest.mark.slow
def test_a_record_gives_the_model_back(folder: Path, tmp_path: Path, weights: Any) -> None:
    precision = "bf16" if weights == "bfloat16" else "auto"
    given = options(folder, weights=weights, precision=precision)
    record = dc.finetune(**given, runs=tmp_path, progress=False)
    assert record.config["weights"] == weights and record.status == "completed"
    tuned = record.model()
    assert any(map(is_quantised, tuned.model.parameters())) is (weights != "bfloat16")
    head = tuned.model.get_submodule("classifier").weight
    assert isinstance(head, torch.Tensor) and not is_quantised(head)
    whole = torch.bfloat16 if weights == "bfloat16" else torch.float32
    assert {p.dtype for p in tuned.controls.parameters()} == {whole}
    assert record.result["num_total"] == sum(
        p.numel()
        for p in models.load(str(folder), kind="classification", num_labels=2)[0].parameters()
    )


def test_without_the_field_a_run_keeps_its_id(folder: Path) -> None:
    assert "weights" not in FineTuning(**options(folder)).to_config()
    assert FineTuning(**options(folder, weights="nf4")).to_config()["weights"] == "nf4"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "int4"}, "unknown kind of weights .int4.; nearest: int8"),
        ({"weights": "bfloat16"}, "give precision bf16"),
        ({"weights": "nf4", "optimiser": "newton-cg"}, "without.*weights"),
    ],
)
def test_what_does_not_go_together_is_refused(
    folder: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        FineTuning(**options(folder, **changed))


def test_drawn_weights_are_not_quantised(folder: Path) -> None:
    with pytest.raises(InputError, match="quantises the weights of a checkpoint"):
        models.load(str(folder), kind="classification", num_labels=2, dtype="nf4", pretrained=False)


def test_a_saved_quantised_model_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = models.load(str(folder), kind="classification", num_labels=2, dtype="nf4")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = models.load(str(tmp_path), kind="classification", num_labels=2)
    ids = torch.arange(200, 208)[None]
    assert any(map(is_quantised, again.parameters()))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    for dtype in ("float64", "int8"):
        with pytest.raises(InputError, match="are quantised already"):
            models.load(str(tmp_path), kind="classification", num_labels=2, dtype=dtype)
