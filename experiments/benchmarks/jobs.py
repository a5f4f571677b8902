"""Whole jobs, from the command to the score: LoRA, Houlsby adapters, the last two blocks.

    python -m deltacontrol.experiments.benchmarks.jobs
    python -m deltacontrol.experiments.benchmarks.jobs --kinds lora --turns 3

Ours is the command ``deltacontrol finetune``. The rival of LoRA is `peft` with
``transformers.Trainer`` and dynamic padding, that of the last two blocks the Trainer with all
other blocks frozen, and that of Houlsby's adapters the Trainer on a plain model whose blocks got
two bottlenecks each by hand (Houlsby et al., ICML 2019, Fig. 2), because the library `adapters`
(1.3.0) asks for transformers 4.57. All read the same rows and tokens, train as many steps of as
many examples with AdamW at one rate, rising over a tenth of the steps and falling to zero, in the
same number format, and are scored on the whole test split. Each job is a process of its own,
contestants in turn; the time is the clock's, with the start of Python and all imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from deltacontrol.experiments.benchmarks.contest import quartiles
from deltacontrol.experiments.runs import provenance
from deltacontrol.theory.errors import InputError

Kind = Literal["lora", "houlsby", "last-layers"]
DELTAS = {
    "lora": "lora:rank=8,alpha=16",
    "houlsby": "houlsby:bottleneck=32",
    "last-layers": "last-layers:num_layers=2",
}
RATES = {"lora": 3e-3, "houlsby": 1e-3, "last-layers": 3e-4}


@dataclass(frozen=True)
class Benchmark:
    """Time whole jobs.

    Attributes:
        kinds: what is trained.
        model: a model of the BERT kind.
        task: a classification.
        steps: updates.
        batch_size: examples of an update.
        max_length: tokens of a text at most.
        turns: jobs of each contestant.
        threads: threads of each job.
        precision: fp32, or bf16 where the hardware computes in it; auto takes the faster one.
        rival: run the rival's job of this kind in this process, and nothing else.
        out: also write the result to this JSON file, after each kind; other kinds of the same
            setting that it has stay.
    """

    kinds: tuple[Kind, ...] = ("lora", "houlsby", "last-layers")
    model: str = "minilm-l6"
    task: str = "movie"
    steps: int = 300
    batch_size: int = 16
    max_length: int = 64
    turns: int = 3
    threads: int = 2
    precision: str = "auto"
    rival: Kind | None = None
    out: Path | None = None

    def run(self) -> dict[str, Any]:
        """All kinds in turn."""
        if self.rival is not None:
            found = rival_job(self, self.rival)
            print(json.dumps(found))
            return found
        result: dict[str, Any] = {
            "model": self.model,
            "task": self.task,
            "steps": self.steps,
            "batch": [self.batch_size, self.max_length],
            "threads": self.threads,
            "precision": self.settled_precision(),
            "hardware": provenance.hardware(),
            "packages": provenance.package_versions(),
        }
        print(f"{self.model} on {self.task}, {self.steps} steps, {result['precision']}", flush=True)
        result |= self._measured(result)
        for kind in self.kinds:
            result[kind] = self._contest(kind)
            if self.out is not None:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _measured(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Kinds that the file has already, of the same setting on the same machine."""
        try:
            found = json.loads(self.out.read_text(encoding="utf-8")) if self.out else {}
        except (OSError, ValueError):
            return {}
        alike = all(found.get(name) == value for name, value in setting.items())
        return {kind: found[kind] for kind in DELTAS if kind in found} if alike else {}

    def settled_precision(self) -> str:
        """The number format of all contestants."""
        from deltacontrol.experiments.training.devices import choose_precision

        return choose_precision(self.precision, "cpu")

    def _contest(self, kind: Kind) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {"ours": [], "rival": []}
        scores: dict[str, list[float]] = {"ours": [], "rival": []}
        for turn in range(self.turns):
            order = ("ours", "rival") if turn % 2 else ("rival", "ours")
            for who in order:
                taken, score = self._job(who, kind, turn)
                seconds[who].append(taken)
                scores[who].append(score)
        ratio = quartiles(np.divide(seconds["ours"], seconds["rival"]))
        spread = {who: quartiles(values) for who, values in seconds.items()}
        print(
            f"  {kind:12} ours {spread['ours']['median']:6.1f} s, rival "
            f"{spread['rival']['median']:6.1f} s, ratio {ratio['median']:.2f} "
            f"({ratio['q25']:.2f}-{ratio['q75']:.2f}); accuracy ours "
            f"{np.mean(scores['ours']):.3f}, rival {np.mean(scores['rival']):.3f}",
            flush=True,
        )
        return {"seconds": spread, "ratio": ratio, "accuracy": scores}

    def _job(self, who: str, kind: Kind, seed: int) -> tuple[float, float]:
        """Seconds and accuracy of one process.

        Raises:
            InputError: the process failed.
        """
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        common = [
            *("--model", self.model, "--task", self.task, "--steps", str(self.steps)),
            *("--batch-size", str(self.batch_size), "--max-length", str(self.max_length)),
        ]
        with tempfile.TemporaryDirectory() as folder:
            precision = ["--precision", self.settled_precision()]
            if who == "ours":
                words = ["deltacontrol", "finetune", "--delta", DELTAS[kind], *common, *precision]
                words += ["--learning-rate", str(RATES[kind]), "--seed", str(seed)]
                words += ["--runs", folder]
            else:
                words = [__spec__.name, "--rival", kind, *common, *precision]
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", *words],
                env=os.environ | threads,
                capture_output=True,
                text=True,
                check=False,
            )
            taken = time.perf_counter() - began
            if done.returncode:
                raise InputError(f"the job {' '.join(words)} failed:\n{done.stderr[-2000:]}")
            if who == "rival":
                return taken, json.loads(done.stdout.splitlines()[-1])["accuracy"]
            (record,) = Path(folder).glob("*/run.json")
            return taken, json.loads(record.read_text())["result"]["accuracy"]


def rival_job(job: Benchmark, kind: Kind) -> dict[str, float]:
    """Train and score as a user of transformers would."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from deltacontrol.experiments.setting import Setting

    torch.set_num_threads(job.threads)
    setting = Setting(job.model, job.task, max_length=job.max_length)

    def encoded(name: str) -> list[dict[str, Any]]:
        split = setting.split(name)
        assert split.labels is not None
        rows = np.split(split.tokens, split.offsets[1:-1])
        return [
            {"input_ids": row.tolist(), "attention_mask": [1] * len(row), "labels": int(label)}
            for row, label in zip(rows, split.labels, strict=True)
        ]

    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=_rival_model(setting.base, kind),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=job.steps,
                per_device_train_batch_size=job.batch_size,
                per_device_eval_batch_size=job.batch_size,
                learning_rate=RATES[kind],
                warmup_steps=job.steps // 10,
                weight_decay=0.0,
                bf16=job.settled_precision() == "bf16",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=encoded("train"),  # type: ignore[arg-type]
            eval_dataset=encoded("test"),  # type: ignore[arg-type]
            data_collator=DataCollatorWithPadding(setting.tokenizer),
            compute_metrics=accuracy,
        )
        trainer.train()
        return {"accuracy": trainer.evaluate()["eval_accuracy"]}


def _rival_model(model: Any, kind: Kind) -> Any:
    """The model with what is trained in it.

    Raises:
        InputError: peft is not installed.
    """
    if kind == "lora":
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError as error:
            raise InputError("this benchmark compares with peft: pip install peft") from error
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS
        )
        return get_peft_model(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(True)
    blocks = model.base_model.encoder.layer
    if kind == "last-layers":
        for parameter in blocks[-2:].parameters():
            parameter.requires_grad_(True)
        return model
    for block in blocks:
        for output in (block.attention.output, block.output):
            output.dense = _with_bottleneck(output.dense)
    return model


def _with_bottleneck(dense: Any) -> Any:
    """A linear map with a bottleneck of 32 behind it, which starts at the identity."""
    import torch
    from torch import nn

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = dense
            self.down = nn.Linear(dense.out_features, 32)
            self.up = nn.Linear(32, dense.out_features)
            nn.init.normal_(self.down.weight, std=0.01)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.dense(x)
            return y + self.up(nn.functional.gelu(self.down(y)))

    return Adapted()


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
