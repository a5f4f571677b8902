"""A figure, its synthetic grid, and the records of that grid."""

import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from tests.paper_figures.synthetic import GRIDS, Grid, write


@pytest.fixture(scope="module", params=sorted(GRIDS))
def name(request: pytest.FixtureRequest) -> str:
    """Each figure that has synthetic records; `test_mechanism` checks that all have."""
    return request.param


@pytest.fixture(scope="module")
def grid(name: str) -> Grid:
    return GRIDS[name]()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, name: str, grid: Grid) -> list[Record]:
    return write(RunStore(tmp_path_factory.mktemp(name)), grid)
