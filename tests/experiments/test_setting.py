"""A setting gives what its fields say: rows in their order, tokens, heads, deltas, the problem."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from deltacontrol.deltas import BitFit, LoRA
from deltacontrol.experiments import tasks
from deltacontrol.experiments.heads import head_inputs, linear_head, loss_and_accuracy
from deltacontrol.experiments.measures.identities import identity_difference, perturbed
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.tasks.encoding import without_labels
from deltacontrol.theory.errors import InputError
from tests import tiny_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("good", "bad", "fine", "poor", "the", "film", "it", "was", "terrible", "great")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random model, and files of two classes, three classes, numbers and plain text."""
    folder = tmp_path_factory.mktemp("places")
    model = folder / "tiny-bert"
    tiny_model.bert(model, WORDS)
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 2 + i % 9)) + f" {WORDS[i % 4]}" for i in range(200)]
    frame = pd.DataFrame({"text": texts})
    frame["label"] = [("no", "yes")[i % 2] for i in range(200)]
    frame.to_csv(folder / "two.csv", index=False)
    frame.assign(label=[("a", "b", "c")[i % 3] for i in range(200)]).to_csv(
        folder / "three.csv", index=False
    )
    frame.assign(label=generator.normal(size=200)).to_csv(folder / "numbers.csv", index=False)
    named = {name: str(folder / f"{name}.csv") for name in ("two", "three", "numbers")}
    return {"model": str(model), **named}


@pytest.fixture
def make(places: dict[str, str]) -> Any:
    def made(task: str | None = "two", **options: Any) -> Setting:
        options = {"max_length": 8, "dtype": "float64"} | options
        return Setting(places["model"], task and places[task], **options)

    return made


def first_tokens(setting: Setting, split: str = "train") -> list[list[int]]:
    ids = setting.batch(split)["input_ids"]
    return [[int(t) for t in row if t] for row in ids]


# -- rows and tokens -----------------------------------------------------------------------------


def test_a_batch_is_what_the_tokenizer_makes_of_the_first_rows(make: Any, places: dict) -> None:
    setting = make(train_rows=12, test_rows=5)
    tokenizer = AutoTokenizer.from_pretrained(places["model"])
    task = tasks.load(places["two"])
    for split, count in (("train", 12), ("test", 5), ("validation", len(task.validation))):
        rows = getattr(task, split).head(count)
        expected = tokenizer(
            rows["text"].tolist(), truncation=True, max_length=8, padding=True, return_tensors="pt"
        )
        batch = setting.batch(split)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert batch["labels"].tolist() == rows["label"].tolist()
        assert len(setting.encoded.split(split)) == count
    chosen = setting.batch("train", [7, 2])
    assert chosen["labels"].tolist() == task.train["label"][[7, 2]].tolist()


def test_the_orders_of_training_rows(make: Any, places: dict) -> None:
    train = tasks.load(places["two"]).train

    def texts(**options: Any) -> list[str]:
        return make(train_rows=9, **options).frame("train")["text"].tolist()

    assert texts() == texts(seed=5) == train["text"].head(9).tolist()
    shuffled = train["text"].iloc[np.random.default_rng(3).permutation(len(train))[:9]].tolist()
    assert texts(order="shuffled", seed=3) == shuffled != texts()
    assert texts(order="shuffled", seed=1, order_seed=3) == shuffled
    sampled = train.sample(9, random_state=3)["text"].tolist()
    assert texts(order="sampled", seed=3) == sampled != shuffled
    held = make(validation_rows=4, order="shuffled").frame("validation")
    assert held["text"].tolist() == tasks.load(places["two"]).validation["text"].head(4).tolist()


def test_few_shots_of_each_class(make: Any, places: dict) -> None:
    def few(split: str, **options: Any) -> pd.DataFrame:
        return make(shots=3, **options).frame(split)

    counts = few("train")["label"].value_counts()
    assert list(counts) == [3] * len(counts) and len(counts) == 2
    assert len(few("validation")) == 6
    assert few("train")["text"].tolist() == few("train")["text"].tolist()
    assert few("train")["text"].tolist() != few("train", seed=1)["text"].tolist()
    other = few("train", seed=1, order_seed=0)["text"].tolist()
    assert other == few("train")["text"].tolist()
    assert len(make(shots=3).frame("test")) == len(make().frame("test"))
    with pytest.raises(InputError, match="shots is 1000, but there are .* of the class"):
        make(shots=1000).frame("train")
    with pytest.raises(InputError, match="shots counts the rows"):
        make(shots=2, train_rows=4)
    assert len(make(task="numbers", shots=4).frame("train")) == 4


def test_more_rows_than_there_are(make: Any) -> None:
    there = len(make().data.test)
    assert len(make(test_rows=10**6).split("test")) == there
    with pytest.raises(InputError, match=f"1000000 test rows .* it has {there}"):
        make(test_rows=10**6, strict_rows=True).batch("test")
    with pytest.raises(InputError, match="1000000 training rows"):
        make(train_rows=10**6, strict_rows=True).batch()


def test_texts_that_are_not_cut(make: Any) -> None:
    setting = make(train_rows=20)
    frame = setting.frame("train")
    whole, cut = setting.encode(frame, cut=False), setting.encode(frame)
    assert whole.lengths.max() > 8 == cut.lengths.max()
    assert (np.minimum(whole.lengths, 8) == cut.lengths).all()


# -- model and deltas ----------------------------------------------------------------------------


def test_nothing_is_loaded_before_it_is_asked_for_and_everything_once(make: Any) -> None:
    Setting("no-such-model", "no-such-task", deltas=["no-such-delta"])
    setting = make(deltas=["bitfit"])
    assert setting.base is setting.base and setting.controlled is setting.controlled
    assert setting.data is setting.data and setting.split("test") is setting.split("test")
    assert setting.base.dtype is torch.float64


def test_deltas_as_texts_dictionaries_and_themselves_and_the_head_beside_them(make: Any) -> None:
    wanted = None
    for delta in ("lora:rank=2", {"name": "lora", "rank": 2}, LoRA(rank=2)):
        controlled = make(deltas=[delta], seed=4).controlled
        names = {name.partition(".")[0] for name in controlled.trainable()}
        assert names == {"lora", "head"}
        state = controlled.state()
        assert wanted is None or all(torch.equal(state[name], v) for name, v in wanted.items())
        wanted = state
    other = make(deltas=["lora:rank=2"], seed=5).controlled.state()
    assert any(not torch.equal(other[name], value) for name, value in (wanted or {}).items())
    for options, expected in (
        ({"deltas": ["bitfit"], "add_head": False}, {"bitfit"}),
        ({"deltas": ["full"]}, {"full"}),
        ({}, {"head"}),
        ({"task": None, "model_kind": "backbone", "deltas": ["bitfit"]}, {"bitfit"}),
    ):
        trained = make(**options).controlled.trainable()
        assert {name.partition(".")[0] for name in trained} == expected
    with pytest.raises(InputError, match="at least one delta"):
        _ = make(add_head=False).controlled


def test_detaching_gives_the_base_back(make: Any) -> None:
    setting = make(deltas=[BitFit()])
    before = {name: value.clone() for name, value in setting.base.state_dict().items()}
    setting.controlled.detach()
    after = setting.base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_drawn_weights_depend_on_the_seed_alone(make: Any) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make(pretrained=False, seed=2).base.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = make(pretrained=False, seed=2).base.state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    other = make(pretrained=False, seed=3).base.state_dict()
    assert not torch.equal(other["classifier.weight"], first["classifier.weight"])


def test_the_head_fits_the_task_or_what_is_said(make: Any, places: dict) -> None:
    assert (make("three").classes, make("three").kind) == (3, "classification")
    assert make("three").base.config.num_labels == 3
    alone = make(None, model_kind="classification", num_labels=5)
    assert alone.base.config.num_labels == 5
    told = make("two", model_kind="classification", num_labels=4)  # as a record says
    assert told.base.config.num_labels == 4
    number = make("numbers", train_rows=6, deltas=["bitfit"])
    assert (number.kind, number.classes) == ("regression", None)
    problem = number.control_problem()
    with torch.no_grad():
        outputs = number.controlled(**without_labels(number.batch())).logits[:, 0]
        squares = (outputs - number.batch()["labels"]).square()
        J = problem.objective(problem.dynamics.controls())  # type: ignore[attr-defined]
    assert float(J) == pytest.approx(float(squares.mean()) / 2, rel=1e-12)


# -- the problem ---------------------------------------------------------------------------------


def test_the_problem_is_the_fine_tuning_of_the_rows(make: Any) -> None:
    setting = make(deltas=["lora:rank=2"], train_rows=10)
    problem: Any = setting.control_problem([4, 0, 7], weight_decay=0.1)
    u = perturbed(problem.dynamics.controls(), 0.1)
    assert identity_difference(problem, u) < 1e-12
    batch = setting.batch("train", [4, 0, 7])  # the controls of u are in the model now
    with torch.no_grad():
        logits = setting.controlled(**without_labels(batch)).logits
    loss = cross_entropy(logits, batch["labels"]) + 0.05 * sum(a.square().sum() for a in u)
    assert float(problem.objective(u)) == pytest.approx(float(loss), rel=1e-12)
    other: Any = setting.control_problem(split="test")
    assert len(other.x0) == len(setting.data.test) and other.dynamics.delta_model is (
        setting.controlled
    )


# -- heads ---------------------------------------------------------------------------------------


def test_a_fitted_head_solves_its_convex_program(make: Any) -> None:
    """min 1/N Σ CE(W [h; 1]) + λ/2 ‖W‖²: the gradient vanishes at λ, which held-out rows chose."""
    setting = make("three", head="fitted", train_rows=40, validation_rows=20)
    head, batch = linear_head(setting.base), setting.batch()
    fit = setting.head_fit
    assert fit is not None and 0 <= fit.gap < 1e-7
    h = head_inputs(setting.base, [batch])
    W = torch.cat([head.weight, head.bias[:, None]], 1).detach().requires_grad_()
    logits = torch.cat([h, torch.ones_like(h[:, :1])], 1) @ W.mT
    objective = cross_entropy(logits, batch["labels"]) + 0.5 * fit.weight * W.square().sum()
    (gradient,) = torch.autograd.grad(objective, W)
    # ‖∇‖² <= 2 L gap for an L-smooth program
    smooth = float((h.square().sum(1) + 1).mean()) / 2 + fit.weight
    assert float(gradient.square().sum()) <= 2 * smooth * max(fit.gap, 1e-14)
    with torch.no_grad():
        found = setting.base(**without_labels(batch)).logits
    assert torch.allclose(found, logits, rtol=1e-12)
    drawn = make("three", train_rows=40).base
    with torch.no_grad():
        before = loss_and_accuracy(drawn(**without_labels(batch)).logits, batch["labels"])
    assert loss_and_accuracy(found, batch["labels"])[0] < before[0]


def test_a_ridge_head_is_fitted_to_the_rows_behind_the_chosen_ones(make: Any) -> None:
    """min Σ log(1 + exp(-s z)) + ½ ‖w‖², z = wᵀh + b: stationary at scikit-learn's tolerance."""
    setting = make(
        head="ridge", head_rows=60, train_rows=4, order="shuffled", seed=1, strict_rows=True
    )
    behind = make(train_rows=64, order="shuffled", seed=1).batch("train", range(4, 64))
    head = linear_head(setting.base)
    assert torch.equal(head.weight[0], -head.weight[1]) and head.bias[0] == -head.bias[1]
    w, b = ((2 * p[1]).detach().requires_grad_() for p in (head.weight, head.bias))
    z = head_inputs(setting.base, [behind]) @ w + b
    signs = 2.0 * behind["labels"] - 1
    total = torch.nn.functional.softplus(-signs * z).sum() + 0.5 * w.square().sum()
    found = torch.autograd.grad(total, [w, b])
    assert max(float(g.abs().max()) for g in found) < 1e-3 * 60
    with pytest.raises(InputError, match="training rows .* were asked for"):
        _ = replace(setting, head_rows=10**6).base
    with pytest.raises(InputError, match="one class"):
        _ = replace(setting, head_rows=1).base


def test_words_are_read_out_after_a_prompt(make: Any) -> None:
    setting = make(head="words", train_rows=30, pretrained=False)
    ids = {word: 5 + i for i, word in enumerate(WORDS)}
    assert setting.kind == "causal-lm"
    assert setting.words == (ids["terrible"], ids["great"])
    assert setting.base(**without_labels(setting.batch())).logits.shape[-1] == 5 + len(WORDS)
    plain = first_tokens(make(train_rows=30))
    assert first_tokens(setting) == [[*row, ids["it"], ids["was"]] for row in plain]
    assert max(map(len, plain)) == 8  # the prompt comes after the cut
    with pytest.raises(InputError, match="words"):
        replace(setting, deltas=["bitfit"]).control_problem()
    assert make().words is None


def test_a_head_of_two_maps_cannot_be_fitted() -> None:
    config = DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    with pytest.raises(InputError, match="not one linear map with a bias"):
        linear_head(DistilBertForSequenceClassification(config))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "shufled"}, "unknown order 'shufled'; nearest: shuffled"),
        ({"head": "fited"}, "unknown head 'fited'; nearest: fitted"),
        ({"train_rows": 0}, "train_rows is 0"),
        ({"test_rows": -1}, "test_rows is -1"),
        ({"task": None}, "model_kind"),
    ],
)
def test_a_setting_that_cannot_be(make: Any, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("options", "part", "words"),
    [
        ({"task": "numbers", "expects": "classification"}, "data", "regression task; expected a"),
        ({"task": "three", "head": "ridge"}, "data", "no classification of two classes"),
        ({"max_length": 17}, "encoded", "choose max_length <= 16"),
        ({"max_length": 3}, "encoded", "leaves no room"),
        ({"task": None, "model_kind": "backbone"}, "data", "has no task"),
        ({"deltas": ["lorra"]}, "controlled", "nearest: lora"),
    ],
)
def test_what_a_part_refuses(make: Any, options: dict, part: str, words: str) -> None:
    setting = make(**options)
    with pytest.raises(InputError, match=words):
        getattr(setting, part)


def test_splits_by_name_and_empty_ones(make: Any) -> None:
    with pytest.raises(InputError, match="unknown split 'tset'"):
        make().frame("tset")
    none = make(validation_rows=0)
    assert len(none.split("validation")) == 0
    with pytest.raises(InputError, match="no rows"):
        none.batch("validation")


# -- how it shows itself, and that it is the only one --------------------------------------------


def test_a_loaded_task_is_taken_and_shown_by_its_name(make: Any, places: dict) -> None:
    task = tasks.load(places["two"])
    few = replace(task, train=task.train.head(3))
    setting = Setting(places["model"], few, max_length=8, deltas=("lora",))
    assert len(setting.batch()["labels"]) == 3 and setting.data is few
    assert repr(setting) == (
        f"Setting(model={places['model']!r}, task='two', deltas=('lora',), max_length=8)"
    )
    with pytest.raises(InputError, match="two is a classification task; expected a regression"):
        _ = replace(setting, expects="regression").data
    assert repr(Setting("minilm-l6", "movie", seed=1)) == "Setting(task='movie', seed=1)"


def test_the_tokenizer_and_the_models_are_called_in_one_place() -> None:
    found: dict[str, set[str]] = {"tokenizer": set(), "models.load": set()}
    for file in sorted((ROOT / "experiments").rglob("*.py")):
        if file.parent.name == "pretraining":
            continue  # it makes the tokenizer and the models, of text that is no task
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                name = "tokenizer" if called.endswith("tokenizer") else called
                if name in found:
                    found[name].add(file.stem)
    found["tokenizer"].discard("loading")  # `_config_and_tokenizer` makes one
    assert {name: len(files) for name, files in found.items()} == {"tokenizer": 1, "models.load": 1}
