"""d90 against curves whose crossing is known."""

import math

import numpy as np
import pandas as pd
import pytest

from paper_figures.intrinsic import d90, targets


def test_crossing_is_exact_where_accuracy_is_linear_in_log_d() -> None:
    dimensions = np.array([10.0, 100.0, 1000.0, 10000.0])
    accuracy = 0.2 * np.log10(dimensions)
    found = d90(dimensions, accuracy, 0.5)
    assert found == pytest.approx(10**2.5, rel=1e-12)


def test_ends() -> None:
    dimensions, accuracy = np.array([10.0, 100.0]), np.array([0.5, 0.8])
    assert d90(dimensions, accuracy, 0.5) == 10.0
    assert d90(dimensions, accuracy, 0.8) == pytest.approx(100.0)
    assert d90(dimensions, accuracy, 0.81) is None


def test_the_two_rules() -> None:
    """Pre-trained: full 1.0, so the line is 0.9. Random: full 0.5, own line 0.45."""
    rows = [
        (True, "full", 10**6, 0, 1.0),
        (False, "full", 10**6, 0, 0.5),
        (True, "subspace", 10, 0, 0.8),
        (True, "subspace", 1000, 0, 1.0),
        (False, "subspace", 10, 0, 0.4),
        (False, "subspace", 1000, 0, 0.5),
    ]
    columns = ["pretrained", "method", "dimension", "seed", "accuracy"]
    table = pd.DataFrame(rows, columns=columns).assign(model="m", task="t")
    found = {(t.pretrained, t.rule): t for t in targets(table)}
    assert found[True, "absolute"].dimension == pytest.approx(100.0)
    assert found[True, "baseline"].dimension == pytest.approx(100.0)
    assert found[False, "absolute"].dimension is None
    assert found[False, "absolute"].range == (math.inf, math.inf)
    assert found[False, "absolute"].reading == "not reached up to d = 1,000"
    assert found[False, "baseline"].dimension == pytest.approx(100.0)
    assert found[False, "baseline"].reading == "= 100 [100, 100]"
