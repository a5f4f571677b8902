"""A text in a template: its tokens, the words that are read, training, saving, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

import deltacontrol as dc
from deltacontrol.experiments import models
from deltacontrol.experiments.runs.experiment import PausedError, Workspace
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.tasks.encoding import without_labels
from deltacontrol.experiments.tasks.templates import Template
from deltacontrol.experiments.training.finetune import FineTuning
from tests.experiments.word_models import (
    KINDS,
    TEMPLATES,
    VERBALISER,
    setting_of,
    tiny,
    write,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write(tmp_path_factory.mktemp("places"))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def plain(places: dict[str, str], kind: str) -> Any:
    """The language model alone, and its tokenizer."""
    return models.load(places[kind], kind=models.language_kind(places[kind]))


def read(logits: torch.Tensor, batch: dict[str, torch.Tensor], tokenizer: Any) -> torch.Tensor:
    """The words' logits by hand, one text after another: (batch, 2)."""
    words = tokenizer.convert_tokens_to_ids(["terrible", "great"])
    rows = []
    texts = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    for row, (ids, mask) in enumerate(texts):
        place = int(mask.sum()) - 1
        if tokenizer.mask_token is not None:
            place = ids.tolist().index(tokenizer.mask_token_id)
        rows.append(logits[row, place, words])
    return torch.stack(rows)


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_cut_and_the_template_never(places: dict[str, str], kind: str) -> None:
    setting = setting_of(places, kind, text=f"the film : {TEMPLATES[kind]}")
    _, tokenizer = plain(places, kind)
    rows, batch = setting.frame("train"), setting.batch("train")
    tokens, cut = zip(batch["input_ids"], batch["attention_mask"], strict=True), 0
    for text, (ids, mask) in zip(rows["text"], tokens, strict=True):
        found = tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
        before, behind = ["the", "film", tokenizer.unk_token], ["It", "was"]
        if kind == "masked":
            before, behind = ["[CLS]", *before], ["it", "was", "[MASK]", ".", "[SEP]"]
        room = 12 - len(before) - len(behind)
        assert found == [*before, *text.split()[:room], *behind]
        cut += len(text.split()) > room
    assert 0 < cut < len(rows)
    whole = setting.encode(rows, cut=False)
    assert whole.lengths.max() > 12 == setting.split("train").lengths.max()


def test_of_a_pair_the_longer_text_is_cut(places: dict[str, str]) -> None:
    text = "{text_pair} and {text} is [MASK]"
    setting = setting_of(places, "masked", "pairs", text=text, max_length=13)
    tokenizer = setting.tokenizer
    frame = setting.frame("train")
    assert "token_type_ids" not in setting.batch()
    for row, ids in zip(frame.itertuples(), setting.batch()["input_ids"], strict=True):
        first, second = str(row.text_pair).split(), str(row.text).split()
        while len(first) + len(second) > 8:
            longer = first if len(first) > len(second) else second
            longer.pop()
        found = [t for t in tokenizer.convert_ids_to_tokens(ids.tolist()) if t != "[PAD]"]
        assert found == ["[CLS]", *first, "and", *second, "is", "[MASK]", "[SEP]"]


def test_a_mask_in_a_text_is_not_that_of_the_template(places: dict[str, str]) -> None:
    setting = setting_of(places, "masked")
    frame = pd.DataFrame({"text": ["the [MASK] film", "[MASK]"], "label": [0, 1]})
    with pytest.warns(UserWarning, match=r"2 texts of .* hold \[MASK\].*taken for \[UNK\]"):
        batch = setting.encode(frame).batch()
    for ids in batch["input_ids"].tolist():
        assert ids.count(setting.tokenizer.mask_token_id) == 1
        assert ids.count(setting.tokenizer.unk_token_id) == 1


def test_a_letter_of_several_tokens_does_not_hold_the_cut_up(tmp_path: Path) -> None:
    """Bytes are tokens there: 🙂 is four, of which none is cut off alone."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ġ", "b"), ("Ġ", "c")]
    known = {t: i for i, t in enumerate(["<pad>", *alphabet, *(a + b for a, b in merges)])}
    inner = Tokenizer(BPE(known, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    bound = Template("{text} c", ("x=a", "y=b")).bound(tokenizer, "causal-lm", ("x", "y"), "t")
    assert bound.tokens == (known["Ġa"], known["Ġb"]) and bound.mask is None
    frame = pd.DataFrame({"text": ["🙂🙂🙂", "🙂", "aaaaaaaa"]})
    rows = [tokenizer.decode(ids) for ids in bound.rows(frame, 7, "t")]
    assert rows == ["🙂 c", "🙂 c", "aaaaaa c"]


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_the_words_at_their_place(places: dict[str, str], kind: str) -> None:
    setting = setting_of(places, kind)
    model, tokenizer = plain(places, kind)
    batch = setting.batch()
    assert setting.data.labels == ("negative", "positive")
    assert batch["attention_mask"].min() == 0  # some are padded
    with torch.no_grad():
        found = setting.base(**batch)
        expected = read(model(**without_labels(batch)).logits, batch, tokenizer)
    assert torch.allclose(found.logits, expected, atol=1e-6, rtol=1e-5)
    assert torch.isclose(found.loss, cross_entropy(expected, batch["labels"]))
    assert setting.classes is None and setting.class_order is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_template_serves_both(places: dict[str, str], kind: str) -> None:
    """A causal model reads up to a mask at the end."""
    shared = setting_of(places, kind, text="{text} It was [MASK]")
    assert len(shared.split("train")) == 40
    if kind == "causal":
        same = setting_of(places, kind).split("train")
        assert np.array_equal(shared.split("train").tokens, same.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", ["prompt:length=3", "prompt:length=3,strip=false", "prefix"])
def test_padding_and_rows_in_front_do_not_move_the_place(
    places: dict[str, str], kind: str, delta: str
) -> None:
    setting = setting_of(places, kind, deltas=[delta], dtype="float64")
    model = setting.controlled.eval()
    with torch.no_grad():
        together = model(**without_labels(setting.batch())).logits
        alone = [model(**without_labels(setting.batch("train", [i]))).logits for i in range(6)]
        with model.disable():
            before = model(**without_labels(setting.batch())).logits
    assert torch.allclose(together[:6], torch.cat(alone), atol=1e-10)
    assert (together - before).abs().max() > 1e-6


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "delta",
    ["lora:rank=2", "prefix:length=2", "prompt:length=2", "bitfit", "houlsby:bottleneck=4", "full"],
)
@pytest.mark.one_in(2)
def test_a_run_trains_the_delta_alone_and_is_saved_and_loaded(
    places: dict[str, str], store: RunStore, tmp_path: Path, kind: str, delta: str
) -> None:
    """What is saved acts on the plain language model as it did in the run."""
    if (kind, delta) == ("causal", "bitfit"):
        delta = "layer-norm"  # Llama has no biases
    experiment = tiny(places, kind, deltas=(delta,))
    record = run(experiment, store, progress=False)
    assert record is not None and record.status == "completed"
    result = record.result
    assert result["num_labels"] == 2 and result["majority_share"] == pytest.approx(0.5, abs=0.05)
    assert {name.split(".")[0] for name in record.controls()} == {delta.split(":")[0]}
    assert FineTuning.from_config(record.config) == experiment
    setting = record.setting()
    batch = setting.batch("test")
    with torch.no_grad():
        logits = setting.controlled.eval()(**without_labels(batch)).logits
    right = (logits.argmax(1) == batch["labels"]).double().mean()
    assert float(right) == pytest.approx(result["accuracy"], abs=1e-9)
    dc.save(record, tmp_path / "saved")
    model, tokenizer = plain(places, kind)
    tuned = dc.load(model, tmp_path / "saved").eval()
    with torch.no_grad():
        whole = tuned(**without_labels(batch)).logits
    assert whole.shape[-1] == len(tokenizer) > 2
    assert torch.allclose(read(whole, batch, tokenizer), logits, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert TEMPLATES[kind] in card and "`great`" in card and "type: text-classification" in card


@pytest.mark.parametrize("kind", KINDS)
def test_training_finds_the_word_that_tells_the_class(
    places: dict[str, str], store: RunStore, kind: str
) -> None:
    record = run(
        tiny(places, kind, deltas=("lora:rank=4",), steps=80, learning_rate=2e-2, shots=20,
             max_length=22),
        store, progress=False,
    )  # fmt: skip
    assert record is not None
    assert record.result["accuracy"] > 0.9 > record.result["majority_share"] + 0.2
    assert record.result["num_head"] == 0
    assert len(record.setting().split("train")) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_paused_training_goes_on(places: dict[str, str], tmp_path: Path, kind: str) -> None:
    experiment = tiny(places, kind, deltas=("lora:rank=2", "prompt:length=2"))
    whole = experiment.execute(Workspace(tmp_path / "whole", progress=False))
    with pytest.raises(PausedError) as paused:
        experiment.execute(Workspace(tmp_path / "part", progress=False, pause_after=5))
    assert set(paused.value.metrics) == {"accuracy", "macro_f1", "loss"}
    part = experiment.execute(Workspace(tmp_path / "part", progress=False))
    assert whole.controls is not None and part.controls is not None
    for name, value in whole.controls.items():
        assert torch.equal(part.controls[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_kept_states_change_nothing(
    places: dict[str, str], tmp_path: Path, kind: str
) -> None:
    def controls(**options: Any) -> dict[str, torch.Tensor]:
        deltas, rate = ("lora:rank=2,layers=1",), {"optimiser": "sgd", "learning_rate": 0.1}
        experiment = tiny(places, kind, deltas=deltas, shots=8, **rate, **options)
        folder = tmp_path / "-".join(options)
        outcome = experiment.execute(Workspace(folder, progress=False))
        if options.get("cache_frozen"):
            assert outcome.result["kept_blocks"] == 1
        assert outcome.controls is not None
        return outcome.controls

    plain = controls(cache_frozen=False)
    for options in ({"cache_frozen": True}, {"grad_accumulation": 3, "cache_frozen": False}):
        for name, value in controls(**options).items():
            assert torch.allclose(value, plain[name], atol=1e-5), (options, name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_solver_takes_the_control_problem_of_the_words(
    places: dict[str, str], store: RunStore, kind: str
) -> None:
    record = run(
        tiny(places, kind, deltas=("ia3",), optimiser="lbfgs", precision="auto", train_limit=8,
             steps=2, learning_rate=None, batch_size=16),
        store, progress=False,
    )  # fmt: skip
    assert isinstance(record, Record)
    assert record.result["objective"] < record.result["initial_objective"]
    problem = record.control_problem()
    setting = record.setting(dtype="float64")
    batch = setting.batch("train")
    with torch.no_grad():
        loss = setting.controlled.eval()(**batch).loss
    assert float(problem.objective(problem.initial_controls())) == pytest.approx(float(loss), 1e-9)


# -- identity ------------------------------------------------------------------------------------


def test_a_run_without_a_template_keeps_its_identity(places: dict[str, str]) -> None:
    config = tiny(places, "masked", template=None, verbaliser=()).to_config()
    assert not {"template", "verbaliser", "shots"} & set(config)
    with_words = tiny(places, "masked")
    assert with_words.to_config()["verbaliser"] == list(VERBALISER)
    assert with_words == tiny(places, "masked", verbaliser=VERBALISER[::-1])
    as_dictionary = {"positive": "great", "negative": "terrible"}
    assert with_words == tiny(places, "masked", verbaliser=as_dictionary)
    assert with_words != tiny(places, "masked", template="{text} is [MASK].")
    assert with_words.company() is None
    assert tiny(places, "masked", template=None, verbaliser=()).company() is not None
