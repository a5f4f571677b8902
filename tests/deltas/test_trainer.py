"""The Trainer of transformers trains, saves and resumes all controls, and nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from deltacontrol.deltas import (
    AdaLoRA,
    BitFit,
    Delta,
    DeltaModel,
    FisherMask,
    FullFineTuning,
    HeadTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    StructuredSubspace,
    attach,
)
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, V, move

NUM_ROWS, TOKENS = 8, 6
DELTAS: dict[str, tuple[Delta, ...]] = {
    "lora+head": (LoRA(rank=2, dropout=0.2), HeadTuning()),
    "prefix": (PrefixTuning(length=2),),
    "prompt": (PromptTuning(length=2),),
    "bitfit": (BitFit(),),
    "said": (StructuredSubspace(dimension=8),),
    "full": (FullFineTuning(),),
}


def rows(labels: str = "classes") -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (NUM_ROWS, TOKENS), generator=generator)
    made = []
    for i in range(NUM_ROWS):
        label = torch.tensor(i % 2) if labels == "classes" else ids[i]
        made.append(
            {"input_ids": ids[i], "attention_mask": torch.ones(TOKENS).long(), "labels": label}
        )
    return made


def trainer(model: Any, folder: Path, data: list[dict[str, Tensor]], **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def float32(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).float()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestTrainer:
    @pytest.mark.parametrize("name", DELTAS)
    def test_it_trains_and_saves_the_controls_alone(self, build, tmp_path, name):
        base = float32(build("bert"))
        before = {key: value.clone() for key, value in base.state_dict().items()}
        tuned = attach(base, *DELTAS[name])
        start = tuned.state()
        training = trainer(tuned, tmp_path, rows())
        training.train()
        end = tuned.state()
        for namespace in (attachment.namespace for attachment in tuned.attachments):
            own = [key for key in end if key.startswith(namespace + ".")]
            assert any(not torch.equal(start[key], end[key]) for key in own), namespace
        saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
        assert same({f"controls.{key}": value for key, value in end.items()}, saved)
        assert "eval_loss" in training.evaluate()
        assert same(before, tuned.detach().state_dict())

    @pytest.mark.parametrize(
        "name",
        [
            "lora+head",
            *(pytest.param(n, marks=pytest.mark.slow) for n in ("prefix", "said", "full")),
        ],
    )
    def test_a_resumed_training_equals_one_without_a_break(self, build, tmp_path, name):
        """With dropout, so that the generators' states count."""
        model = float32(build("bert"))
        tuned = attach(copy.deepcopy(model), *DELTAS[name])
        trainer(tuned, tmp_path / "whole", rows()).train()
        again = attach(copy.deepcopy(model), *DELTAS[name])
        trainer(again, tmp_path / "whole", rows()).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )
        assert same(tuned.state(), again.state())
        fresh = attach(copy.deepcopy(model), *DELTAS[name])
        trainer(fresh, tmp_path / "half", rows(), max_steps=2).train()
        assert not same(tuned.state(), fresh.state())

    def test_the_best_model_is_loaded_at_the_end(self, build, tmp_path):
        tuned = attach(float32(build("bert")), LoRA(rank=2), HeadTuning())
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "score"}
        training = trainer(tuned, tmp_path, rows(), greater_is_better=True, **options)
        scores = iter([1.0, 2.0, 0.0])
        training.compute_metrics = lambda _: {"score": next(scores)}
        training.train()
        assert str(training.state.best_model_checkpoint).endswith("checkpoint-2")
        best, last = (load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3))
        assert same({f"controls.{key}": value for key, value in tuned.state().items()}, best)
        assert not same(best, last)

    def test_save_model_writes_what_load_state_dict_takes(self, build, tmp_path):
        base = float32(build("bert"))
        tuned = move(attach(base, LoRA(rank=2), PromptTuning(length=2)))
        trainer(tuned, tmp_path / "out", rows()).save_model(str(tmp_path / "saved"))
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        expected = tuned.state()
        again = attach(tuned.detach(), LoRA(rank=2), PromptTuning(length=2))
        assert not same(again.state(), expected)
        again.load_state_dict(saved, strict=False)
        assert same(again.state(), expected)

    def test_checkpoints_of_other_deltas_are_refused(self, build, tmp_path):
        base = float32(build("bert"))
        tuned = attach(base, LoRA(rank=2))
        trainer(tuned, tmp_path, rows(), max_steps=2).train()
        other = attach(tuned.detach(), BitFit())
        with pytest.raises(InputError, match=r"do not fit.*missing.*bitfit"):
            trainer(other, tmp_path, rows()).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-2")
            )
        with pytest.raises(InputError, match=r"are no controls: bert.*'controls.'"):
            other.load_state_dict(other.model.state_dict(), strict=False)

    def test_columns_that_the_base_does_not_take_are_dropped(self, build, tmp_path):
        data = [{**row, "comment": torch.tensor(i)} for i, row in enumerate(rows())]
        training = trainer(attach(float32(build("bert")), LoRA(rank=2)), tmp_path, data)
        assert set(next(iter(training.get_train_dataloader()))) == set(rows()[0])

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_language_models_get_the_gradient_of_the_whole_batch(self, tmp_path, family):
        """Accumulated over batches with unequal numbers of labels; the first label never counts."""
        torch.manual_seed(0)
        config: Any = FAMILIES[family].config()
        base = AutoModelForCausalLM.from_config(config).float().eval()
        data = rows("text")
        for i, row in enumerate(data):
            # Of GPT-2 the Trainer does not know that labels are shifted, and counts the first one.
            ignored = i % 4 + (family == "gpt2")
            row["labels"] = torch.where(torch.arange(TOKENS) < ignored, -100, row["labels"])
        tuned = attach(copy.deepcopy(base), LoRA(rank=2))
        options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        training = trainer(
            tuned, tmp_path, data, max_steps=1, gradient_accumulation_steps=4, **options
        )
        assert training.label_names == ["labels"]
        training.train()
        plain = attach(copy.deepcopy(base), LoRA(rank=2))
        start = plain.state()
        plain(**{key: torch.stack([row[key] for row in data]) for key in data[0]}).loss.backward()
        moved = False
        for key, parameter in plain.trainable().items():
            assert parameter.grad is not None
            expected = start[key] - 1e-2 * parameter.grad
            torch.testing.assert_close(tuned.state()[key], expected, rtol=1e-5, atol=1e-8)
            moved = moved or not torch.equal(expected, start[key])
        assert moved

    def test_a_seq2seq_model_trains_under_checkpointing(self, tmp_path):
        torch.manual_seed(0)
        config: Any = FAMILIES["t5-seq2seq"].config()
        base = T5ForConditionalGeneration(config).float()
        tuned = attach(base, LoRA(rank=2), PromptTuning(length=2))
        start = tuned.state()
        trainer(tuned, tmp_path, rows("text"), activation_checkpointing=True, max_steps=2).train()
        assert not any(same({key: start[key]}, {key: tuned.state()[key]}) for key in start)

    @pytest.mark.parametrize(
        "delta",
        [AdaLoRA(rank=3, target_rank=2), FisherMask(density=0.01), LoRA(rank=2, step_ratio=16.0)],
        ids=lambda delta: delta.name,
    )
    def test_deltas_that_ask_for_more_than_gradients_are_refused(self, build, tmp_path, delta):
        tuned = attach(float32(build("bert")), delta)
        with pytest.raises(InputError, match=f"{delta.name} ask the training for more than grad"):
            trainer(tuned, tmp_path, rows())

    def test_only_the_deltas_that_ask_for_more_are_named(self, build, tmp_path):
        both = (LoRA(rank=2), AdaLoRA(rank=3, target_rank=2), LoRA(rank=2, step_ratio=16.0))
        tuned = attach(float32(build("bert")), *both)
        with pytest.raises(InputError, match="^adalora and lora_2 ask the training for more"):
            tuned.accepts_loss_kwargs  # noqa: B018 - a property that refuses
        tuned.train_only(["adalora"])
        with pytest.raises(InputError, match="^adalora ask the training for more than gradients"):
            tuned.accepts_loss_kwargs  # noqa: B018
        tuned.train_only(["lora"])
        assert tuned.accepts_loss_kwargs in (True, False)


class TestTheBaseAlone:
    """``Trainer(model=tuned.model)`` saw 770 of 37,634 parameters and left the rest at zero."""

    def test_a_trainer_of_the_base_is_refused_before_the_first_step(self, build, tmp_path):
        tuned = attach(float32(build("bert")), LoRA(rank=2), HeadTuning())
        start = tuned.state()
        with pytest.raises(InputError, match=r"carries deltas.*Trainer\(model=tuned"):
            trainer(tuned.model, tmp_path, rows()).train()
        assert same(start, tuned.state())
        base: Any = tuned.detach()
        head = base.classifier.weight.detach().clone()
        base.requires_grad_(True)
        trainer(base, tmp_path, rows(), max_steps=1).train()
        assert not torch.equal(base.classifier.weight, head), "a detached base trains as ever"

    def test_evaluation_of_the_base_is_that_of_the_model(self, build, tmp_path):
        tuned = move(attach(float32(build("bert")), LoRA(rank=2, dropout=0.5)).train())
        of_base = trainer(tuned.model, tmp_path, rows()).evaluate()["eval_loss"]
        assert not any(module.training for module in tuned.controls.modules())
        assert of_base == trainer(tuned, tmp_path, rows()).evaluate()["eval_loss"]

    def test_its_own_files_and_copies_are_refused_until_it_is_detached(self, build, tmp_path):
        base = float32(build("bert"))
        tuned: DeltaModel = attach(base, LoRA(rank=2))
        writers: list[Any] = [base.save_pretrained, tuned.save_pretrained, base.push_to_hub]
        for write in writers:
            with pytest.raises(InputError, match=r"tuned\.save\(folder\).*merge\(\) or detach\(\)"):
                write(str(tmp_path / "base"))
        with pytest.raises(InputError, match="cannot be copied"):
            copy.deepcopy(base)
        with pytest.raises(InputError, match="carries deltas"):
            base.train()
        assert not (tmp_path / "base").exists()
        tuned.detach()
        base.save_pretrained(tmp_path / "base")
        assert copy.deepcopy(base).train().training
        assert (tmp_path / "base" / "model.safetensors").is_file()
