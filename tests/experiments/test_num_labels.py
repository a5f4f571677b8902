"""A number of classes that no memory holds is refused before anything is built."""

from __future__ import annotations

import json

import pytest

from deltacontrol.experiments import models
from deltacontrol.experiments.models import loading
from deltacontrol.theory.errors import InputError
from tests import tiny_model


def test_a_number_of_classes_beyond_memory_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    places = tiny_model.write(folder)
    model = places["model"]
    for number in (loading.MOST_CLASSES + 1, 100_000_000):
        with pytest.raises(InputError, match=f"num_labels is {number}; expected at most 100000"):
            models.load(model, kind="classification", num_labels=number)
    path = next(folder.rglob("config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_labels": 10**7}))
    with pytest.raises(InputError, match="config.json of .* has num_labels 10000000"):
        models.load(model, kind="classification", num_labels=2)
