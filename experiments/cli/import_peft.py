"""``deltacontrol import-peft``: a peft adapter as a run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import tyro

from deltacontrol.experiments import tasks
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.training.peft_import import ImportedAdapter

_SHOWN = {
    "accuracy": ".4f",
    "macro_f1": ".4f",
    "pearson": ".4f",
    "mse": ".4f",
    "loss": ".4f",
    "perplexity": ".2f",
    "majority_share": ".4f",
    "num_evaluated": "d",
    "num_trainable": ",d",
    "num_total": ",d",
    "trainable_share": ".4%",
}


@dataclass(frozen=True)
class ImportPeft(ImportedAdapter):
    """Attach an adapter that peft saved to its base model, evaluate it, and record it as a run.

    Every field and every tensor of the adapter must be known and fit the model; what does not is
    listed. The run holds the deltas that the adapter is, and their controls.

    For example

        deltacontrol import-peft adapter/ --model minilm-l6 --task movie
        deltacontrol import-peft adapter/
    """

    adapter: tyro.conf.Positional[Path]
    """Folder with adapter_config.json and adapter_model.safetensors, or owner/name on the hub."""
    runs: Path = Path("runs")
    """Folder in which the run is recorded."""

    def run(self) -> None:
        """Import, evaluate, record, print."""
        from deltacontrol.experiments.runs.running import run

        names = [f.name for f in fields(ImportedAdapter)]
        experiment = ImportedAdapter(**{name: getattr(self, name) for name in names})
        store = RunStore(self.runs)
        known = store.find(experiment) is not None
        if not known and (told := tasks.reading_of(experiment)):
            print(told)
        record = run(experiment, store)
        if record is None:  # another process of the launch writes and prints
            return
        print(f"{record.config['delta']['name']} on {record.config['model']}:")
        for delta in record.result["deltas"]:
            given = ", ".join(f"{k}={v}" for k, v in delta.items() if k != "name" and v is not None)
            print(f"  {delta['name']:18} {given}")
        for name, form in _SHOWN.items():
            value = record.result.get(name)
            if value is not None:
                print(f"  {name:18} {value:{form}}")
        if record.result["model_kind"] == "classification" and not record.result["num_head"]:
            print("  the adapter holds no head: it is the base's, or random where that has none")
        print(f"{'found' if known else 'recorded'} {store.path(experiment)}")


COMMAND = ImportPeft
