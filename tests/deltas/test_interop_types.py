"""Every type of peft with its options, on several architectures: in, out, and merged, in float64.

`make test` takes one configuration of each type; `make slow` takes them all.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from deltacontrol.deltas.interop import export_peft, import_peft
from deltacontrol.deltas.interop.peft import available
from deltacontrol.deltas.methods.fourierft import SpectralPath
from deltacontrol.theory.errors import InputError
from tests.deltas.peft_cases import CASES, KINDS, QV, TABLE
from tests.deltas.peft_models import logits, peft, same, save
from tests.deltas.zoo import batch_of, out

Build = Callable[..., PreTrainedModel]
CLS = "classification"
TASKS = {CLS: "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
# Their table of embeddings is the head's, or another stack's.
TIED = ("gpt2", "t5", "gemma3")
# Types that `test_interop` runs in `make test` already.
DETAILED = {"LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR"}
TYPES = {config: kind.value for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _parameters() -> Iterator[Any]:
    """The cases; all but one of each type are marked slow, and these are of all architectures."""
    quick: dict[str, int] = {}
    for kind in dict.fromkeys(TYPES[config] for _, _, config, _ in CASES):
        places = [i for i, case in enumerate(CASES) if TYPES[case[2]] == kind]
        if kind not in DETAILED:
            quick[kind] = places[len(quick) % 3 % len(places)]
    for i, (name, family, config, fields) in enumerate(CASES):
        marks = [] if i in quick.values() else [pytest.mark.slow]
        yield pytest.param(family, config, fields, id=f"{name}-{family}", marks=marks)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Their warnings are not ours to keep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("family", "kind", "fields"), list(_parameters()))
@pytest.mark.one_in(2)
def test_in_and_out_and_merged(build: Build, tmp_path: Path, family, kind, fields):
    theirs_, ours_ = tmp_path / "theirs", tmp_path / "ours"
    model = build(family, KINDS.get(family, CLS))
    task = "FEATURE_EXTRACTION" if family == "t5" else TASKS[KINDS.get(family, CLS)]
    single = build(family, KINDS.get(family, CLS), dtype=torch.float32)
    save(single, kind(task_type=task, **fields), theirs_)
    batch = batch_of(model)
    theirs = logits(model, theirs_, batch)

    controlled = import_peft(theirs_, copy.deepcopy(model))
    with torch.no_grad():
        ours, base = out(controlled, batch), out(model, batch)
        export_peft(controlled, ours_)
        tied = family in TIED and TABLE.get(family) in fields.get("target_modules", ())
        if tied:  # peft merges all the same, and the tied head changes with the table
            with pytest.raises(InputError, match="which is tied to"):
                controlled.merge()
        merged = ours if tied else out(controlled.merge(), batch)
    same(ours, theirs)
    same(merged, ours)
    assert float((ours - base).abs().max()) > 1e-3, "it has no effect"

    same(logits(model, ours_, batch), ours)
    if tied or family == "roberta":
        return  # of RoBERTa's trained head peft asks a weight of its own, and merges nothing
    loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), ours_)
    with torch.no_grad():
        same(out(loaded.to(torch.float64).merge_and_unload().eval(), batch), ours)


def test_twenty_types_and_more_go_in_and_out():
    assert len(available()) >= 24
    assert len(CASES) >= 150
    listed = {TYPES[config] for _, _, config, _ in CASES}
    prompts = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LN_TUNING"}
    assert listed | prompts == set(available())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_fourierft_at_the_scaling_of_peft(build: Build, tmp_path: Path, family: str):
    """ΔW at peft's default scaling of 150, to the rounding of its transform in float32.

    ‖ΔW₃₂ - ΔW‖ ≤ ε₃₂ log₂(N) ‖ΔW‖ for a transform of N numbers (Higham, Accuracy and Stability of
    Numerical Algorithms, Theorem 24.2). Logits say less: there the rounding is multiplied.
    """
    kind = KINDS.get(family, CLS)
    task = "FEATURE_EXTRACTION" if family == "t5" else TASKS[kind]
    config = peft.FourierFTConfig(n_frequency=200, target_modules=QV[family], task_type=task)
    assert config.scaling == 150
    single = build(family, kind, dtype=torch.float32)
    save(single, config, tmp_path)
    model = build(family, kind)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    layers = [m for m in theirs.modules() if hasattr(m, "fourierft_spectrum")]
    controlled = import_peft(tmp_path, copy.deepcopy(model))
    ours = [m for m in controlled.controls.modules() if isinstance(m, SpectralPath)]
    assert len(ours) == len(layers) > 0
    for path, layer in zip(ours, layers, strict=True):
        change, theirs_ = path.change(), layer.get_delta_weight("default").detach().double()
        theirs_ = theirs_ if theirs_.shape == change.shape else theirs_.T
        rounding = torch.finfo(torch.float32).eps * math.log2(change.numel())
        error = float((change - theirs_).norm() / change.norm())
        assert 0 < error <= rounding
