"""The family: names and shapes, the same weights always, also after a kill, and used by name."""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, ModernBertConfig

from deltacontrol.experiments import models, sources, tasks
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.cli import pretrain as command
from deltacontrol.experiments.models import family
from deltacontrol.experiments.runs import sweep
from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.runs.running import run
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.tasks import corpus
from deltacontrol.experiments.tasks.encoding import IGNORED
from deltacontrol.experiments.tasks.templates import Template
from deltacontrol.experiments.training import gradients
from deltacontrol.experiments.training.checkpoints import FILE, steps_done
from deltacontrol.experiments.training.evaluation import evaluate
from deltacontrol.experiments.training.pretraining import batches, experiment, tokens
from deltacontrol.experiments.training.pretraining.experiment import Pretraining
from deltacontrol.theory.errors import InputError
from tests.experiments import tiny_text

ROOT = Path(__file__).resolve().parents[2]
STEPS, WIDTH = 6, 16
CHILD = """
import sys
from pathlib import Path
import torch
from deltacontrol.experiments import tasks
from deltacontrol.experiments.runs.running import run
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.training.pretraining.experiment import Pretraining
from tests.experiments import tiny_text

torch.set_num_threads(int(sys.argv[4]))
tasks._packaged_tasks = lambda: {"small": tiny_text.TASK}
tiny_text.install()
one = Pretraining("encoder", int(sys.argv[2]), int(sys.argv[3]))
run(one, RunStore(Path(sys.argv[1])), progress=False, checkpoint_seconds=0.0)
"""
OPTIONS = f"@steps={STEPS}"


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tokens.Tokens]:
    """A tiny text and an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTACONTROL_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("CORPORA", "TASKS", "HELD_OUT_SHARE"):
            patch.setattr(corpus, name, getattr(corpus, name))
        patch.setattr(tasks, "_packaged_tasks", lambda: {"small": tiny_text.TASK})
        tiny_text.install()
        yield tokens.tokens()


@pytest.fixture(scope="module")
def made(text: tokens.Tokens, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A store with an encoder and a decoder of width 16."""
    store = RunStore(tmp_path_factory.mktemp("runs"))
    for kind in family.FAMILIES:
        run(Pretraining(kind, WIDTH, STEPS), store, progress=False)
    return store


@pytest.fixture
def other_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with the text in it."""
    monkeypatch.setenv("DELTACONTROL_CACHE", str(tmp_path / "cache"))
    tiny_text.install()
    return tmp_path / "cache"


def weights(member: family.Member) -> dict[str, torch.Tensor]:
    return load_file(member.path / "model.safetensors")


# ---- names and shapes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("family/encoder-192", family.Member("encoder", 192)),
        ("family/decoder-48@quick", family.Member("decoder", 48, family.PRESETS["quick"])),
        ("family/decoder-16@steps=12,seed=3", family.Member("decoder", 16, 12, 3)),
        ("family/encoder-80@seed=1", family.Member("encoder", 80, seed=1)),
    ],
)
def test_a_name_and_its_member(name: str, expected: family.Member) -> None:
    assert family.parse(name) == expected and expected.name == name
    made_by = cli.available()["pretrain"]
    assert expected.command.startswith("deltacontrol pretrain ") and made_by is command.Pretrain


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("family/encoder", "names no model of the family"),
        ("family/encoder-50", "multiple of 16"),
        ("family/coder-48", "nearest"),
        ("family/encoder-48@fast", "neither steps="),
        ("family/encoder-48@quick,steps=3", "is there twice"),
        ("family/encoder-48@steps=0", "steps is 0"),
    ],
)
def test_a_wrong_name_is_refused(name: str, words: str) -> None:
    for ask in (models.resolve, models.digest):
        with pytest.raises(InputError, match=words):
            ask(name)


def test_other_names_are_none_of_the_family() -> None:
    assert family.parse("minilm-l6") is None and family.parse("owner/encoder-48") is None
    assert models.digest("owner/encoder-48") is None


@pytest.mark.parametrize("member", [*family.members(), family.Member("decoder", 16)],
                         ids=lambda m: m.name)  # fmt: skip
def test_the_number_of_parameters_is_the_formula(member: family.Member) -> None:
    config = (ModernBertConfig if member.family == "encoder" else LlamaConfig)(
        **member.configuration(family.VOCABULARY, {"pad_token_id": 0})
    )
    auto = AutoModelForMaskedLM if member.family == "encoder" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == member.num_parameters
    assert config.num_attention_heads * family.HEAD == member.width


def test_digests_tell_members_apart() -> None:
    one = family.Member("encoder", 48)
    others = [replace(one, **change) for change in
              ({"family": "decoder"}, {"width": 80}, {"steps": 7}, {"seed": 1})]  # fmt: skip
    assert len({m.digest for m in (one, *others)}) == 5
    assert len({m.path for m in (one, *others)}) == 5


# ---- batches


def test_masks_are_four_in_ten_and_shown_as_those_of_bert() -> None:
    body = np.random.default_rng(0).integers(5, 100, (2000, 60))
    hidden, labels = batches.masked(body, 100, np.random.default_rng(1))
    chosen = labels != IGNORED
    assert (chosen.sum(axis=1) == 24).all()
    np.testing.assert_array_equal(labels[chosen], body[chosen])
    np.testing.assert_array_equal(hidden[~chosen], body[~chosen])
    shown, own = hidden[chosen], body[chosen]
    # Binomial shares of 48,000: five standard deviations are 0.0092. Of 95 tokens one is the own.
    assert np.mean(shown == tokens.MASK) == pytest.approx(0.8, abs=0.0092)
    assert np.mean(shown == own) == pytest.approx(0.1 + 0.1 / 95, abs=0.007)
    assert shown[shown != tokens.MASK].min() >= len(tokens.SPECIAL)
    assert abs(chosen.mean(axis=0) - 0.4).max() < 0.06  # no place is left out


def test_batches_have_no_state_and_families_see_the_same_rows(text: tokens.Tokens) -> None:
    rows = text.rows["training"]
    both = [batches.RowBatches(rows, kind, text.vocabulary, seed=3) for kind in family.FAMILIES]
    last = len(rows) // family.BATCH_ROWS
    for step in (0, last - 1, last, 3 * last):
        encoder, decoder = (one.batch(step) for one in both)
        again = batches.RowBatches(rows, "encoder", text.vocabulary, seed=3).batch(step)
        assert all(torch.equal(encoder[k], again[k]) for k in encoder)
        truth = torch.where(encoder["labels"] == IGNORED, encoder["input_ids"], encoder["labels"])
        assert torch.equal(truth[:, :-1], decoder["input_ids"])
        assert (encoder["input_ids"][:, -1] == tokens.SEP).all()
        assert encoder["input_ids"].shape == (family.BATCH_ROWS, family.LENGTH)
    epoch = torch.cat([both[1].batch(step)["input_ids"] for step in range(last)])[:, 1:]
    shown, whole = sorted(map(tuple, epoch.tolist())), sorted(map(tuple, rows.tolist()))
    assert set(shown) <= set(whole) and len(shown) == last * family.BATCH_ROWS
    assert len(set(shown)) >= len(set(whole)) - family.BATCH_ROWS  # each once, but for the rest
    other = batches.RowBatches(rows, "decoder", text.vocabulary, seed=4)
    assert not torch.equal(other.batch(0)["input_ids"], both[1].batch(0)["input_ids"])


def test_a_masked_loss_is_the_mean_over_masked_tokens(made: RunStore, text: tokens.Tokens) -> None:
    from accelerate import Accelerator

    model = models.load(f"family/encoder-16{OPTIONS}", kind="masked-lm")[0]
    rows = batches.RowBatches(text.rows["held_out"], "encoder", text.vocabulary, seed=0)
    found = list(rows.held_out(16))
    losses, count = 0.0, 0
    for batch in found:
        logits = model(input_ids=batch["input_ids"]).logits.double()
        there = batch["labels"] != IGNORED
        rest = torch.nn.functional.cross_entropy(
            logits[there], batch["labels"][there], reduction="sum"
        )
        losses, count = losses + float(rest.detach()), count + int(there.sum())
    measured = evaluate(model, found, "masked-lm")
    assert measured["loss"] == pytest.approx(losses / count, rel=1e-6)
    assert measured["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-5)
    # Slices of unequal numbers of masked tokens give the gradient of the whole batch.
    uneven = {k: v.clone() for k, v in found[0].items()}
    uneven["labels"][0] = IGNORED
    grads = []
    for slices in (1, 4):
        model.zero_grad()
        gradients.accumulate(
            Accelerator(cpu=True), model, uneven, kind="masked-lm", seed=0, step=0, slices=slices
        )
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


# ---- the pre-training


def test_the_loss_of_single_tokens(tmp_path: Path) -> None:
    """By hand: tokens 1 and 2 are as frequent held out, 3 + 1 and 1 + 1 of 4 + 3 in training."""
    save_file(
        {
            "training": np.array([[1, 1], [1, 2]], np.int16),
            "held_out": np.array([[1, 2]], np.int16),
        },
        tmp_path / "rows.safetensors",
    )
    made = tokens.Tokens(tmp_path)
    vars(made)["vocabulary"] = 3  # of the tokenizer, which is not there
    expected = -0.5 * math.log(4 / 7) - 0.5 * math.log(2 / 7)
    assert made.unigram_loss == pytest.approx(expected, rel=1e-12)


def test_a_word_of_a_template_is_one_token_where_the_mask_stands(
    made: RunStore, text: tokens.Tokens
) -> None:
    """The mask takes the space before it; a full stop has one behind it, and none behind a word."""
    member = family.Member("encoder", WIDTH, STEPS)
    tokenizer = text.tokenizer(member)
    vocabulary = tokenizer.get_vocab()
    words = [t[1:] for t in vocabulary if t[0] == "Ġ" and t[1:].isalpha() and t[1:].isascii()][:2]
    verbaliser = tuple(f"{n}={word}" for n, word in enumerate(words))
    bound = Template("{text} It was [MASK].", verbaliser).bound(
        tokenizer, "masked-lm", ["0", "1"], "a task"
    )
    assert list(bound.tokens) == [vocabulary["Ġ" + word] for word in words]
    shown = tokenizer.convert_ids_to_tokens(tokenizer("it was [MASK].")["input_ids"])
    assert shown[shown.index("[MASK]") - 1] not in ("Ġ", "▁")


def test_a_model_that_learnt_no_context_is_named(made: RunStore) -> None:
    found = [Pretraining(kind, WIDTH, STEPS) for kind in family.FAMILIES]
    records = [made.find(one) for one in found]
    assert all(r is not None and r.result["unigram_loss"] > 0 for r in records)
    losses = ({"loss": 6.9, "unigram_loss": 6.8}, {"loss": 6.7, "unigram_loss": 6.8})
    told = [
        replace(r, result=r.result | loss) for r, loss in zip(records, losses, strict=True) if r
    ]
    said = command._table(found, told).splitlines()
    assert said[-2].endswith("alone: 6.800")
    assert said[-1].startswith("NOT BETTER") and "encoder" in said[-1] and "decoder" not in said[-1]
    assert "NOT BETTER" not in command._table(found[1:], told[1:])


@pytest.mark.parametrize("kind", ["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
def test_two_pre_trainings_are_equal(
    kind: family.FamilyName, made: RunStore, other_cache: Path
) -> None:
    first = made.find(Pretraining(kind, WIDTH, STEPS))
    assert first is not None
    again = Pretraining(kind, WIDTH, STEPS).execute(Workspace(other_cache / "work", False))
    for name in ("loss", "weights_sha256", "tokens_sha256", "num_total"):
        assert first.result[name] == again.result[name]
    clocks = ["seconds"]
    pd.testing.assert_frame_equal(
        first.curve().drop(columns=clocks), again.curve.drop(columns=clocks)
    )
    other = Pretraining(kind, WIDTH, STEPS, seed=1).execute(Workspace(other_cache / "1", False))
    assert other.result["weights_sha256"] != first.result["weights_sha256"]
    assert other.result["tokens_sha256"] == first.result["tokens_sha256"]


@pytest.mark.parametrize("kind", family.FAMILIES)
def test_it_is_a_plain_training(kind: family.FamilyName, made: RunStore, tmp_path: Path) -> None:
    """Against AdamW on the model of transformers in ten lines."""
    one, texts = Pretraining(kind, WIDTH, STEPS), tokens.tokens()
    model = one.start(tmp_path / "start").train()
    rows = batches.RowBatches(texts.rows["training"], kind, texts.vocabulary, seed=0)
    decay = experiment.WEIGHT_DECAY
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=decay, fused=True)
    losses = []
    for step in range(STEPS):
        risen = min(1.0, step + 1)  # the warm-up is one update
        turned = (1 + math.cos(math.pi * max(step - 1, 0) / (STEPS - 1))) / 2
        optimiser.param_groups[0]["lr"] = one.member.rate * risen * turned
        loss = model(**rows.batch(step)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    record = made.find(one)
    assert record is not None
    assert record.curve()["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    ours = weights(one.member)
    for name, value in model.state_dict().items():
        if name in ours:
            torch.testing.assert_close(value, ours[name], rtol=1e-3, atol=1e-5)


def test_a_killed_one_goes_on_to_the_same_weights(made: RunStore, other_cache: Path) -> None:
    one = Pretraining("encoder", WIDTH, STEPS)
    store = RunStore(other_cache.parent / "runs")
    tokens.tokens()
    # It saves behind each update, and is killed at the third or soon after.
    given = [str(store.root), str(WIDTH), str(STEPS), str(torch.get_num_threads())]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *given], cwd=ROOT)
    try:
        _await(lambda: steps_done(store.partial(one)) >= 3 or child.poll() is not None)
    finally:
        child.kill()
        child.wait()
    assert not one.member.path.exists() and (store.partial(one) / FILE).is_file()
    run(one, store, progress=False)
    resumed, whole = store.find(one), made.find(one)
    assert resumed is not None and whole is not None
    assert resumed.result["weights_sha256"] == whole.result["weights_sha256"]
    assert resumed.result["loss"] == whole.result["loss"]
    assert not store.partial(one).exists()


def _await(there, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_is_recorded_is_what_is_in_the_cache(made: RunStore, tmp_path: Path) -> None:
    for kind in family.FAMILIES:
        one = Pretraining(kind, WIDTH, STEPS)
        record = made.find(one)
        assert record is not None and record.kind == "pre-training"
        path = one.member.path
        assert record.result["weights_sha256"] == sources.sha256_of(path / "model.safetensors")
        assert record.result["tokens_seen"] == STEPS * 1024
        assert record.curve()["validation_loss"].count() == STEPS
        # Another store has the same record of it, without a training.
        other = RunStore(tmp_path / kind)
        again = run(one, other, progress=False)
        assert again is not None and again.id == record.id and again.result == record.result


# ---- the models by name


def test_a_missing_one_says_what_makes_it() -> None:
    with pytest.raises(InputError, match=r"not pre-trained yet.*`deltacontrol pretrain --family "
                                         r"decoder --sizes 288`.*min on one core"):  # fmt: skip
        models.load("family/decoder-288", kind="causal-lm")
    with pytest.raises(InputError, match=r"--sizes 48 --preset quick --seed 2`"):
        models.resolve("family/encoder-48@quick,seed=2")
    with pytest.raises(InputError, match="nearest: family/encoder-48"):
        models.resolve("familyencoder-48")


def test_a_damaged_one_is_refused(
    made: RunStore, other_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_verified", set())
    one = Pretraining("decoder", WIDTH, 1)
    one.execute(Workspace(other_cache / "work", False))
    sources._verified.clear()  # as in another process
    file = one.member.path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    with pytest.raises(InputError, match="was damaged"):
        models.resolve(one.member.name)
    with pytest.raises(InputError, match="not pre-trained yet"):
        models.resolve(one.member.name)


@pytest.mark.parametrize("kind", family.FAMILIES)
def test_the_head_of_the_pre_training_is_loaded(kind: str, made: RunStore) -> None:
    name = f"family/{kind}-16{OPTIONS}"
    auto, own = ((AutoModelForMaskedLM, "masked-lm") if kind == "encoder"
                 else (AutoModelForCausalLM, "causal-lm"))  # fmt: skip
    model, tokenizer = models.load(name, kind=own)
    plain = auto.from_pretrained(family.parse(name).path).eval()  # type: ignore[union-attr]
    batch = tokenizer("The film was [MASK], but the story was not.", return_tensors="pt")
    assert (batch["input_ids"] == tokens.MASK).sum() == 1
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert batch["input_ids"][0, 0] == tokens.CLS
    assert (batch["input_ids"][0, -1] == tokens.SEP) == (kind == "encoder")
    if kind == "decoder":
        with pytest.raises(InputError, match="no masked-lm model"):
            models.load(name, kind="masked-lm")


def test_a_head_that_is_missing_is_not_drawn_for_prompts(tmp_path: Path, made: RunStore) -> None:
    model, tokenizer = models.load(f"family/encoder-16{OPTIONS}", kind="backbone")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="no head that fills masked tokens in .*family/encoder-192"
    ):
        models.load(str(tmp_path), kind="masked-lm")


def call(*words: str) -> int:
    return cli._main(list(words))


@pytest.mark.parametrize("kind", family.FAMILIES)
def test_finetune_takes_a_model_of_the_family(
    kind: str, made: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--task", "small", "--steps", "3", "--eval-limit", "20", "--max-length", "16"]
    words = ["--model", f"family/{kind}-16{OPTIONS}", "--delta", "lora:rank=2", *small]
    assert call("finetune", *words, "--runs", str(tmp_path)) == 0
    assert "accuracy" in capsys.readouterr().out
    (record,) = RunStore(tmp_path).records()
    assert record.config["model"] == words[1] and record.result["num_evaluated"] == 20


def test_a_missing_one_is_said_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "family/encoder-288@quick", "--task", "small", "--runs", str(tmp_path)]
    assert call("finetune", *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "`deltacontrol pretrain --family encoder --sizes 288 --preset quick`" in said


@pytest.mark.slow
def test_dimension_takes_a_model_of_the_family(
    made: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "run_all", _serially)
    words = ["--model", f"family/encoder-16{OPTIONS}", "--task", "small", "--steps", "2"]
    small = ["--budget", "2", "--eval-limit", "4", "--seeds", "2", "--largest", "100"]
    more = ["--no-predict", "--target", "0.99", "--runs", str(tmp_path)]
    assert call("dimension", *words, *small, *more) in (0, 1)
    kinds = {record.kind for record in RunStore(tmp_path).records()}
    assert {"dimension", "fine-tuning"} <= kinds


def _serially(experiments, store, workers=None, progress=True, **options):
    """`run_all` without processes, which would not have the tiny text."""
    found = []
    for one in experiments:
        found.append(run(one, store, progress=False))
        if options.get("watch"):
            options["watch"](1)
    return found


# ---- the command


def test_the_command_pre_trains_once(
    other_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sweep, "run_all", _serially)
    words = ["pretrain", "--sizes", "16", "32", "--steps", "2", "--runs", str(tmp_path / "runs")]
    assert call(*words, "--plan") == 0
    shown = capsys.readouterr().out
    assert "family/decoder-32@steps=2" in shown and "on two cores" in shown
    assert not (tmp_path / "runs").exists()
    assert call(*words, "--family", "encoder", "--out", str(tmp_path / "out")) == 0
    seen = capsys.readouterr()
    assert "2 updates each, 2,048 tokens" in seen.out and "12 left out" in seen.out
    assert "100%" in seen.err and "left" in seen.err
    records = RunStore(tmp_path / "runs").records()
    assert sorted(record.config["width"] for record in records) == [16, 32]
    for record in records:
        assert record.result["weights_sha256"][:12] in seen.out
        folder = tmp_path / "out" / f"encoder-{record.config['width']}"
        copied = models.load(str(folder), kind="masked-lm")[0]
        assert copied.config.hidden_size == record.config["width"]
    # Again: nothing is computed, and the other family's is added.
    monkeypatch.setattr(Pretraining, "_train", None)
    assert call(*words, "--family", "encoder", "--out", str(tmp_path / "out")) == 0
    assert "is there" in capsys.readouterr().out
    assert call("runs", "--runs", str(tmp_path / "runs")) == 0
    assert capsys.readouterr().out.count("family/encoder-") == 2


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full once does not leave a part, which would count as another model."""
    made = tmp_path / "made"
    made.mkdir()
    for name in ("config.json", "model.safetensors"):
        (made / name).write_text(name)
    monkeypatch.setattr(family.Member, "folder", lambda _: made)
    one, out = family.Member("encoder", 16), tmp_path / "out"
    copyfile = shutil.copyfile

    def full(source: str, target: str, **options: bool) -> str:
        if os.fspath(source).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copyfile(source, target, **options)

    with monkeypatch.context() as once:
        once.setattr(shutil, "copyfile", full)
        with pytest.raises(InputError, match="cannot be copied to .*No space left.* in the cache"):
            command._copy(one, out)
    assert not list(out.iterdir())
    for _ in range(2):
        command._copy(one, out)
    copied = out / "encoder-16"
    assert sorted(path.name for path in copied.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_that_left_the_cache_is_made_again(
    other_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sweep, "run_all", _serially)
    words = ["pretrain", "--family", "decoder", "--sizes", "16", "--steps", "2"]
    assert call(*words, "--runs", str(tmp_path / "runs")) == 0
    one = family.Member("decoder", 16, 2)
    before = weights(one)
    shutil.rmtree(one.path)
    assert call(*words, "--runs", str(tmp_path / "runs")) == 0
    assert "its weights are those of the record" in capsys.readouterr().out
    assert all(torch.equal(before[k], v) for k, v in weights(one).items())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "5", "--minutes", "5"], "give one"),
        (["--minutes", "0.001"], "more minutes or smaller sizes"),
        (["--minutes", "-1"], "above 0"),
        (["--sizes", "50"], "multiple of 16"),
        (["--sizes"], "no sizes"),
        (["--steps", "0"], "steps is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--workers", "0", "--plan"], "workers is 0"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("pretrain", *words, "--runs", str(tmp_path / "runs")) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_minutes_are_turned_into_the_same_number_of_updates_always() -> None:
    found = experiment.experiments()
    assert len(found) == 10 and found[0].width == 288
    steps = experiment.affordable_steps(60.0, found, workers=2)
    assert steps == experiment.affordable_steps(60.0, found, workers=2) and steps % 10 == 0
    spent = sum(replace(one, steps=steps).member.seconds for one in found) / 2
    assert 3500 < spent <= 3600
    quick, paper = (experiment.experiments(preset)[0].steps for preset in ("quick", "paper"))
    assert quick < paper
