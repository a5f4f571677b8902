"""One folder that a colleague can load: the same outputs on the same base, a refusal elsewhere."""

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from deltacontrol.deltas import (
    BitFit,
    Delta,
    FullFineTuning,
    HeadTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    RandomMask,
    StructuredSubspace,
    attach,
    load,
    saved_folder,
)
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, assert_same, batch_of, build, move, out, snapshot

DELTAS: dict[str, tuple[Delta, ...]] = {
    "lora": (LoRA(rank=2, sites=("attention.query", "attention.output")), LoRA(rank=3)),
    "prefix": (PrefixTuning(length=2, init_std=1.0),),
    "prompt": (PromptTuning(length=3),),
    "said": (StructuredSubspace(dimension=9),),
    "full": (FullFineTuning(),),
    "random-mask": (RandomMask(density=0.01),),
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def described(folder: Path, **changes: Any) -> None:
    """Change entries of the description; those of the base by a dictionary."""
    path = folder / "deltas.json"
    description = json.loads(path.read_text())
    for key, value in changes.items():
        if isinstance(description.get(key), dict):
            description[key] |= value
        else:
            description[key] = value
    path.write_text(json.dumps(description))


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5-seq2seq"])
@pytest.mark.one_in(5)
def test_a_colleague_has_the_same_model(tmp_path, family, name):
    model = copy.deepcopy(build(family))
    batch = batch_of(model)
    tuned = move(attach(model, *DELTAS[name], seed=5))
    expected, state = out(tuned, batch), tuned.state()
    tuned.save(tmp_path / "saved")
    assert set(files(tmp_path / "saved")) == set(saved_folder.FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "nothing is left beside it"
    theirs = load(copy.deepcopy(build(family)), tmp_path / "saved")
    assert theirs.deltas == DELTAS[name]
    assert all(torch.equal(value, state[key]) for key, value in theirs.state().items())
    assert torch.equal(out(theirs, batch), expected)


class TestTheBase:
    @pytest.fixture
    def saved(self, build, tmp_path):
        tuned = move(attach(copy.deepcopy(build("bert")), LoRA(rank=2), HeadTuning()))
        tuned.save(tmp_path / "saved")
        return tmp_path / "saved"

    def refused(self, base: Any, folder: Path, message: str) -> None:
        before = snapshot(base)
        with pytest.raises(InputError, match=message):
            load(base, folder)
        assert_same(before, snapshot(base))

    def test_another_architecture_is_refused(self, build, saved):
        self.refused(
            build("gpt2"), saved, "class is BertForSequenceClassification there and GPT2ForSeq"
        )

    def test_another_configuration_is_refused_and_both_sides_are_named(self, saved):
        config = FAMILIES["bert"].config()
        config.layer_norm_eps = 1e-5
        other = AutoModelForSequenceClassification.from_config(config).double().eval()
        self.refused(other, saved, "layer_norm_eps of the configuration is 1e-12 there and 1e-05 h")

    def test_another_number_format_is_refused(self, build, saved):
        other = copy.deepcopy(build("bert")).float()
        self.refused(other, saved, "dtype is float64 there and float32 here")

    @pytest.mark.parametrize("entry", [0, 1, 1234, -1])
    def test_any_other_entry_of_its_weights_is_refused(self, build, saved, entry):
        """Also one that lies between those which the digest samples."""
        other: Any = copy.deepcopy(build("bert"))
        weight = other.bert.embeddings.word_embeddings.weight
        assert weight.numel() > 2000
        with torch.no_grad():
            weight.view(-1)[entry].nextafter_(torch.tensor(9.0, dtype=weight.dtype))
        self.refused(
            other, saved, "the weights have the digest [0-9a-f]{12} there and [0-9a-f]{12}"
        )

    def test_what_a_control_stands_for_may_be_different(self, build, saved):
        """A colleague's head is drawn anew when the base is loaded."""
        other: Any = copy.deepcopy(build("bert"))
        expected = out(load(copy.deepcopy(other), saved), batch_of(other))
        with torch.no_grad():
            other.classifier.weight.normal_()
        assert torch.equal(out(load(other, saved), batch_of(other)), expected)

    def test_what_a_pass_or_a_trainer_writes_into_the_configuration_does_not_count(
        self, build, saved
    ):
        other: Any = copy.deepcopy(build("bert"))
        other(**batch_of(other), labels=torch.zeros(len(batch_of(other)["input_ids"])).long())
        assert other.config.problem_type is not None
        other.config.use_cache = False
        load(other, saved)

    def test_a_configuration_may_hold_numbers_without_an_end(self, build, tmp_path):
        """As that of Mamba2 does; one without them is what it was."""
        base = copy.deepcopy(build("bert"))
        plain = saved_folder.architecture(base)["config"]
        odd = {"time_step_limit": (0.0, math.inf), "low": [{"end": -math.inf}], "mean": math.nan}
        base.config.update(odd)
        named = {"time_step_limit": [0.0, "inf"], "low": [{"end": "-inf"}], "mean": "nan"}
        assert saved_folder.architecture(base)["config"] == plain | named
        tuned = move(attach(base, LoRA(rank=2)))
        expected = out(tuned, batch_of(base))
        tuned.save(tmp_path / "saved")
        theirs = load(tuned.detach(), tmp_path / "saved")
        assert torch.equal(out(theirs, batch_of(base)), expected)
        base = theirs.detach()
        base.config.time_step_limit = (0.0, 1.0)
        self.refused(base, tmp_path / "saved", r"time_step_limit .* \[0.0, 'inf'\] there and")

    def test_private_paths_are_not_named(self, build, tmp_path):
        build("bert").save_pretrained(tmp_path / "secret" / "my-bert")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "secret" / "my-bert")
        for name, public in (
            (str(tmp_path / "secret" / "my-bert"), "my-bert"),
            ("C:\\Users\\someone\\my-bert\\", "my-bert"),
            ("google/bert_uncased", "google/bert_uncased"),
        ):
            base.name_or_path = name
            tuned = attach(base, LoRA(rank=2))
            tuned.save(tmp_path / "saved")
            tuned.detach()
            text = (tmp_path / "saved" / "deltas.json").read_text()
            assert json.loads(text)["base"]["name"] == public
            text += (tmp_path / "saved" / "README.md").read_text()
            assert "secret" not in text and "someone" not in text and str(tmp_path) not in text


class TestTheFolder:
    @pytest.fixture
    def saved(self, build, tmp_path):
        tuned = move(attach(copy.deepcopy(build("bert")), LoRA(rank=2), BitFit()))
        tuned.save(tmp_path / "saved")
        return tmp_path / "saved"

    def refused(self, base: Any, folder: Path, message: str) -> None:
        before = snapshot(base)
        with pytest.raises(InputError, match=message):
            load(base, folder)
        assert_same(before, snapshot(base))

    def test_missing_files_and_foreign_ones_are_refused(self, build, saved, tmp_path):
        base = build("bert")
        self.refused(base, tmp_path / "nowhere", "nowhere has no deltas.json")
        content = (saved / "deltas.json").read_text()
        for text, message in (
            ("no json", "is no JSON"),
            ("[1]", "holds a list; expected the JSON object that save"),
            ('{"format": "deltacontrol deltas 2"}', "another version of this one"),
            ('{"format": "deltacontrol deltas 1"}', "entries format where base, controls, deltas"),
        ):
            (saved / "deltas.json").write_text(text)
            self.refused(base, saved, message)
        (saved / "deltas.json").write_text(content)
        described(saved, deltas=[{"name": "lora", "rang": 2}])
        self.refused(base, saved, "deltas.json: unknown field of the delta lora 'rang'")
        (saved / "controls.safetensors").unlink()
        self.refused(base, saved, "has no controls.safetensors")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "is no JSON .*; expected the JSON object"),
            ("{" * 9, "is no JSON"),
            ("[" * 100_000, "is no JSON"),
            ("\udcff", "is no JSON"),
            ("null", "holds a NoneType; expected the JSON object"),
            ('"text"', "holds a str; expected the JSON object"),
        ],
    )
    def test_a_description_that_is_no_object_is_refused(self, saved, text, expected):
        (saved / "deltas.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=rf"deltas\.json {expected}"):
            saved_folder.read(saved)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"seed": "0"}, 'seed is "0"; expected an integer'),
            ({"seed": True}, "seed is true; expected an integer of 64 bits"),
            ({"seed": 2**70}, "seed is [0-9]*; expected an integer of 64 bits"),
            ({"deltas": {}}, "deltas is {}; expected a list"),
            ({"deltas": ["lora"]}, 'delta 1 is "lora"; expected an object with the name'),
            ({"deltas": [{"rank": 2}]}, "delta 1 is .*; expected an object with the name"),
            ({"deltas": [{"name": ["lora"]}]}, "delta 1 is .*; expected an object with the name"),
            ({"controls": 3}, "controls is 3; expected a text"),
            ({"base": {"config": []}}, r"config of base is \[\]; expected an object"),
            ({"base": {"dtype": None}}, "dtype of base is null; expected a text"),
            ({"base": {"more": 1}}, "the entries of base .* where .* are expected"),
            ({"more": 1}, "the entries .*more.* where .* are expected"),
        ],
    )
    def test_wrong_entries_are_refused_by_name(self, saved, changes, expected):
        described(saved, **changes)
        with pytest.raises(InputError, match=rf"deltas\.json.*{expected}"):
            saved_folder.read(saved)

    def test_a_base_that_is_no_object_is_refused(self, saved):
        description = json.loads((saved / "deltas.json").read_text())
        (saved / "deltas.json").write_text(json.dumps({**description, "base": "bert"}))
        with pytest.raises(InputError, match=r'deltas\.json: base is "bert"; expected an object'):
            saved_folder.read(saved)

    def test_changed_controls_are_refused(self, build, saved):
        file = saved / "controls.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
        self.refused(build("bert"), saved, "were not saved together, or the file was changed")

    @pytest.mark.parametrize("change", ["missing", "unknown", "size"])
    def test_other_controls_are_refused(self, build, saved, change):
        """Under a right digest, so that names and sizes are what is read."""
        file = saved / "controls.safetensors"
        controls = load_file(file)
        first = next(iter(controls))
        if change == "missing":
            del controls[first]
        elif change == "unknown":
            controls["lora.extra"] = torch.zeros(1)
        else:
            controls[first] = controls[first][..., :1].contiguous()
        save_file(controls, file)
        described(saved, controls=hashlib.sha256(file.read_bytes()).hexdigest())
        message = {"missing": "1 missing", "unknown": "1 unknown", "size": "has shape .* expected"}
        self.refused(build("bert"), saved, message[change])

    def test_it_replaces_its_own_kind_and_nothing_else(self, build, saved, tmp_path):
        tuned = move(attach(copy.deepcopy(build("bert")), LoRA(rank=3)))
        before = files(saved)
        tuned.save(saved)
        after = files(saved)
        assert before.keys() == after.keys() and before != after
        notes = tmp_path / "notes"
        notes.mkdir()
        tuned.save(notes)  # an empty folder is free
        (notes / "diary.txt").write_text("mine")
        with pytest.raises(InputError, match=r"holds other files \(diary.txt\)"):
            tuned.save(notes)
        assert (notes / "diary.txt").read_text() == "mine"
        (tmp_path / "file").write_text("mine")
        with pytest.raises(InputError, match="is a file"):
            tuned.save(tmp_path / "file")
        other = tmp_path / "other"
        other.mkdir()
        (other / "deltas.json").write_text("{}")
        with pytest.raises(InputError, match="format None"):
            tuned.save(other)
        (other / "deltas.json").rename(other / "controls.safetensors")
        with pytest.raises(InputError, match="was not written by save"):
            tuned.save(other)

    def test_a_readme_that_somebody_wrote_or_changed_is_kept(self, build, saved):
        tuned = move(attach(copy.deepcopy(build("bert")), LoRA(rank=3)))
        readme = saved / "README.md"
        for text in (readme.read_text().replace("# ", "# My ", 1), "mine", "\udcff"):
            readme.write_bytes(text.encode("utf-8", "surrogateescape"))
            before = files(saved)
            with pytest.raises(InputError, match=r"README\.md was changed since save"):
                tuned.save(saved)
            assert files(saved) == before
        readme.unlink()  # as folders of before there was a card
        tuned.save(saved)
        assert set(files(saved)) == set(saved_folder.FILES)

    def test_a_failing_save_leaves_the_earlier_one(self, build, saved, tmp_path, monkeypatch):
        tuned = move(attach(copy.deepcopy(build("bert")), LoRA(rank=3)))
        before = files(saved)
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if self.name == "new":
                raise OSError("disk")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="disk"):
            tuned.save(saved)
        assert files(saved) == before
        monkeypatch.undo()
        monkeypatch.setattr("deltacontrol.deltas.saved_folder.save_file", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tuned.save(saved)
        assert files(saved) == before
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]

    @pytest.mark.parametrize("moment", ["before", "between", "behind", "twice"])
    def test_an_interrupted_save_is_whole_or_has_not_been(
        self, build, saved, tmp_path, monkeypatch, moment
    ):
        """Ctrl-C around the two renamings; the second time also while the first is taken back."""
        tuned = move(attach(copy.deepcopy(build("bert")), LoRA(rank=3)))
        before = files(saved)
        rename, done = Path.rename, []

        def interrupted(self: Path, target: Path) -> Path:
            stops = {"before": [0], "between": [1], "behind": [], "twice": [1, 2]}[moment]
            done.append(self.name)
            if len(done) - 1 in stops:
                raise KeyboardInterrupt
            moved = rename(self, target)
            if moment == "behind" and self.name == "new":
                raise KeyboardInterrupt
            return moved

        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned.save(saved)
        monkeypatch.undo()
        if moment == "twice":  # the earlier one is still beside the place
            (beside,) = tmp_path.iterdir()
            assert files(beside / "old") == before
            return
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]
        assert (files(saved) == before) == (moment != "behind")
        assert saved_folder.read(saved).deltas[0]["rank"] == (3 if moment == "behind" else 2)

    def test_controls_finer_than_the_base_stay_so(self, build, tmp_path):
        base = copy.deepcopy(build("bert")).bfloat16()
        tuned = attach(base, LoRA(rank=2))
        tuned.controls.float()
        move(tuned, scale=1e-4)
        tuned.save(tmp_path / "saved")
        state = tuned.state()
        theirs = load(tuned.detach(), tmp_path / "saved")
        for key, value in theirs.state().items():
            assert value.dtype == torch.float32 and torch.equal(value, state[key])

    def test_a_detached_model_is_not_saved(self, build, tmp_path):
        tuned = attach(build("bert"), LoRA(rank=2))
        tuned.detach()
        with pytest.raises(InputError, match="were detached"):
            tuned.save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


def test_a_folder_whose_name_is_too_long_is_named():
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        load(build("bert"), "a" * 300)
