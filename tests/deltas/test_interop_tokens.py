"""Tokens that were added before training, and saved in the adapter: equal to peft."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, SelectedModules
from deltacontrol.deltas.interop import export_peft, import_peft
from deltacontrol.theory.errors import InputError
from tests.deltas.peft_cases import KINDS, QV, TABLE
from tests.deltas.peft_models import logits, peft, same
from tests.deltas.zoo import V, batch_of, out

Build = Callable[..., PreTrainedModel]
CLS = "classification"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Their warnings are not ours to keep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def resized(build: Build, family: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """The base with four more tokens, whose rows are random by the seed."""
    model = copy.deepcopy(build(family, KINDS.get(family, CLS), dtype=torch.float32))
    torch.manual_seed(seed)
    model.resize_token_embeddings(V + 4, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[V:] += torch.randn(4, 32)
    return model.to(dtype).eval()


def trained(build: Build, family: str, folder: Path, targets: list[str]) -> None:
    """An adapter of a resized model, its table saved with it."""
    model = resized(build, family, 1, torch.float32)
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, task_type=task))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(folder, save_embedding_layers=True)


def with_new_tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch that holds the added tokens."""
    batch = batch_of(model)
    batch["input_ids"][:, 1:4] = torch.tensor([V, V + 1, V + 3])
    return batch


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("table_too", [False, True], ids=["attention", "table"])
def test_added_tokens_are_those_of_the_file(build: Build, tmp_path: Path, family, table_too):
    targets = [*QV[family], TABLE[family]] if table_too else QV[family]
    trained(build, family, tmp_path / "theirs", targets)
    fresh = resized(build, family, 2, torch.float64)  # its added rows are other ones
    batch = with_new_tokens(fresh)
    theirs = logits(fresh, tmp_path / "theirs", batch)
    base = out(fresh, batch).detach()

    controlled = import_peft(tmp_path / "theirs", fresh)
    with torch.no_grad():
        same(out(controlled, batch), theirs)
    assert isinstance(controlled.deltas[0], SelectedModules)
    assert isinstance(controlled.deltas[1], LoRA)
    if not table_too:  # peft gives a module one adapter or trains it whole
        export_peft(controlled, tmp_path / "ours")
    controlled.detach()
    assert torch.equal(out(fresh, batch), base)
    if not table_too:
        same(logits(fresh, tmp_path / "ours", batch), theirs)


def test_a_model_without_the_tokens_is_told_to_grow(build: Build, tmp_path: Path):
    trained(build, "bert", tmp_path / "a", ["query"])
    advice = re.escape(f"call model.resize_token_embeddings({V + 4})")
    with pytest.raises(InputError, match=f"has {V + 4} tokens.*has {V}; {advice}"):
        import_peft(tmp_path / "a", build("bert"))


def test_a_table_of_another_base_is_refused(build: Build, tmp_path: Path):
    trained(build, "bert", tmp_path / "a", ["query"])
    model = resized(build, "bert", 2, torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    with pytest.raises(InputError, match="word_embeddings.weight is not what this model has"):
        import_peft(tmp_path / "a", model)
