"""A figure, and records that it can be drawn from."""

import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base
from tests.paper_figures.synthetic import GRIDS, Grid, committed, write

# Drawing and writing a figure takes seconds; `make slow` does it with each. The gallery is held
# against tables and code of all of them in the quick suite too.
QUICK = ("threshold",)


@pytest.fixture(
    scope="module",
    params=[n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in base.names()],
)
def name(request: pytest.FixtureRequest) -> str:
    """Each figure."""
    return request.param


@pytest.fixture(scope="module")
def grid(name: str) -> Grid:
    return GRIDS[name]()


@pytest.fixture(scope="module")
def records(
    tmp_path_factory: pytest.TempPathFactory, name: str, request: pytest.FixtureRequest
) -> list[Record]:
    """Synthetic ones, or the committed ones of a figure that has no grid."""
    if name in GRIDS:
        store = RunStore(tmp_path_factory.mktemp(name))
        return write(store, request.getfixturevalue("grid"))
    return committed(name)
