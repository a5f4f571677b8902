"""The grids behind the figures, and how a learning rate is chosen."""

import json
import math
from dataclasses import dataclass, field, replace
from typing import get_args

import pytest
from transformers import BertConfig, BertForSequenceClassification

from deltacontrol.deltas import LoRA, attach, registry
from deltacontrol.deltas.base import CATEGORY_RATES, Category
from deltacontrol.experiments import studies
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.studies.learning_rates import grid as learning_rates
from deltacontrol.experiments.training import rates
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError


def record(rate: float, accuracy: float | None, loss: float | None = 0.5, **config) -> Record:
    experiment = FineTuning(deltas=("lora",), learning_rate=rate, **config)
    result = {"accuracy": accuracy, "loss": loss}
    return Record(f"{rate:g}", "fine-tuning", experiment.to_config(), result, {}, "completed")


@pytest.mark.parametrize("name", sorted(studies.available()))
def test_presets_have_distinct_runs_and_quick_is_smaller(name: str) -> None:
    sizes = []
    for preset in studies.PRESETS:
        runs = studies.experiments(name, preset)
        assert len(set(map(repr, runs))) == len(runs) > 0
        sizes.append(sum(run.steps for run in runs))
    assert sizes[0] < sizes[1] or name == "learning_rates"


def test_each_method_of_the_taxonomy_can_be_laid_on_a_model() -> None:
    """One that is refused with its defaults would stop every figure's command at the end."""
    config = BertConfig(vocab_size=64, hidden_size=96, num_hidden_layers=3, num_attention_heads=12,
                        intermediate_size=384, max_position_embeddings=64)  # fmt: skip
    model = BertForSequenceClassification(config)
    runs = studies.experiments("taxonomy", "quick")
    assert {run.deltas[0]["name"] for run in runs} == set(registry.available())
    for run in runs:
        attached = attach(model, *map(registry.delta_of, run.deltas), seed=0)
        assert attached.num_trainable > 0, run.label
        attached.detach()


def test_a_method_without_defaults_says_what_it_needs_to_be_compared() -> None:
    @dataclass(frozen=True)
    class Needy(LoRA):
        width: int = field(kw_only=True)
        name = "needy"

    with pytest.raises(InputError, match=r"needy: width has no default.*`example`"):
        Needy.example()


def test_figures_never_tune_on_test_rows() -> None:
    assert {run.evaluate_on for run in learning_rates.experiments("paper")} == {"validation"}
    tuned = [r for name in ("performance", "taxonomy") for r in studies.experiments(name, "paper")]
    for run in tuned:
        key = learning_rates.key(run.to_config())
        assert run.learning_rate == rates.recorded_rates()[key]


def test_unknown_studies_and_presets_are_named() -> None:
    with pytest.raises(InputError, match="nearest: performance"):
        studies.experiments("performanse", "quick")
    with pytest.raises(InputError, match="known: paper, quick"):
        studies.experiments("performance", "slow")


def test_the_best_rate_has_the_best_validation_accuracy_then_the_least_loss() -> None:
    records = [
        record(1e-3, 0.7),
        record(3e-3, 0.8, 0.6),
        record(1e-2, 0.8, 0.5),
        record(3e-2, None),
    ]
    chosen = learning_rates.choose(records)
    assert chosen["rates"] == {"minilm-l6/movie/lora": 1e-2}
    assert chosen["at_end_of_grid"] == []
    assert [row["rate"] for row in chosen["trials"]["minilm-l6/movie/lora"]] == [
        1e-3,
        3e-3,
        1e-2,
        3e-2,
    ]
    assert learning_rates.choose(records[:3])["at_end_of_grid"] == ["minilm-l6/movie/lora"]
    random = learning_rates.choose([record(1e-3, 0.5, pretrained=False)])
    assert random["rates"] == {"minilm-l6@random/movie/lora": 1e-3}


def test_the_written_rates_are_what_the_records_say() -> None:
    from deltacontrol.experiments.runs.store import RunStore

    store = RunStore(rates.RATES_FILE.parent / "runs")
    chosen = learning_rates.choose(store.records())
    assert json.loads(rates.RATES_FILE.read_text()) == chosen


def test_a_subspace_rate_moves_alike_in_every_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "minilm-l6/movie/subspace/100": 0.1,
        "minilm-l6/movie/subspace/10000": 0.04,
    }
    monkeypatch.setattr(learning_rates, "recorded_rates", lambda: known)
    assert learning_rates.subspace_rate(100) == 0.1
    assert learning_rates.subspace_rate(10_000) == 0.04
    assert learning_rates.subspace_rate(10) == pytest.approx(1.0 / math.sqrt(10), rel=1e-2)
    middle = learning_rates.subspace_rate(1000) * math.sqrt(1000)
    assert middle == pytest.approx(math.sqrt(1.0 * 4.0), rel=1e-2)
    with pytest.raises(InputError, match="learning_rates"):
        learning_rates.subspace_rate(100, pretrained=False)


def test_runs_of_another_seed_differ() -> None:
    run = studies.experiments("performance", "quick")[0]
    assert replace(run, seed=9).to_config() != run.to_config()


def test_a_rate_is_the_searched_one_else_the_methods_else_its_categorys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "recorded_rates", lambda: {"m/t/lora": 0.5})

    def rate(*names: str, task: str = "t") -> rates.Rate:
        return rates.default_rate("m", task, tuple({"name": name} for name in names))

    assert rate("lora") == rates.Rate(0.5, "tuned on m/t")
    told = rate("lora", task="u")
    assert told.value == LoRA.default_rate and told.source.startswith("default of the method; no ")
    told = rate("loha")
    assert told.value == CATEGORY_RATES["reparametrisation"]
    assert told.source.startswith("default of the category of loha, reparametrisation; no search")
    told = rate("prompt", "lora")
    assert told.value == LoRA.default_rate and "of lora, the smallest of the deltas'" in told.source
    assert "m/t/lora+prompt" in told.source


def test_every_category_has_a_rate_that_its_methods_have() -> None:
    for category in get_args(Category):
        kinds = [kind for kind in registry.available().values() if kind.category == category]
        assert CATEGORY_RATES[category] in {kind.rate() for kind in kinds}
    assert registry.available()["fisher-mask"].rates_to_search() == (1e-3, 3e-3, 1e-2, 3e-2)
    assert registry.available()["head"].rates_to_search() == (1e-2, 3e-2, 1e-1, 3e-1)
