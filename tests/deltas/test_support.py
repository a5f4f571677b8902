"""The support matrix: what is refused says why, and the README shows what the suite tests.

The README is where the matrix is kept: `test_conformance` tests its ticks, this one its refusals.
"""

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from deltacontrol.deltas import attach, registry
from deltacontrol.theory.errors import InputError
from tests.deltas import support_matrix, support_table
from tests.deltas.zoo import FAMILIES, METHODS, PAIRS, REFUSED, assert_same, snapshot


@pytest.mark.parametrize(("family", "method"), REFUSED, ids=lambda value: value)
def test_what_an_architecture_cannot_take_is_refused(
    build: Callable[..., PreTrainedModel], family: str, method: str
) -> None:
    model = build(family)
    before = snapshot(model)
    with pytest.raises(InputError, match=re.escape(REFUSED[family, method])) as caught:
        attach(model, METHODS[method][0])
    assert re.search("choose|use |load |give |untie|drop", str(caught.value).lower()), "a way out"
    assert_same(before, snapshot(model))


def test_every_method_and_architecture_has_its_cells() -> None:
    assert set(METHODS) == set(registry.available())
    assert set(support_table.TITLES) == set(FAMILIES)
    every = {(family, method) for family in FAMILIES for method in METHODS}
    assert set(PAIRS) | set(REFUSED) == every and not set(PAIRS) & set(REFUSED)
    assert len(METHODS) >= 28 and len(FAMILIES) >= 40


def test_the_matrix_in_the_readme_is_up_to_date() -> None:
    text = support_table.README.read_text(encoding="utf-8")
    begin, end = support_table.BEGIN, support_table.END
    assert text.count(begin) == 1 and text.count(end) == 1, "README.md lacks its support markers"
    assert text.split(begin)[1].split(end)[0] == support_table.render(REFUSED), (
        "the support matrix in README.md is stale: run python -m tests.deltas.support_matrix"
    )


def test_the_matrix_is_measured_as_it_is_written() -> None:
    """On the architectures that refuse something, one method of each kind of refusal."""
    wanted = dict({reason: cell for cell, reason in REFUSED.items()})
    for reason, (family, method) in wanted.items():
        assert support_matrix.refusal(family, method, set(wanted)) == reason
    assert support_matrix.refusal("bert", "lora", set(wanted)) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("FooModel has no valves, so nothing can be opened; choose lora.", "has no valves"),
        ("valves: foo has two stacks: choose one.", "foo has two stacks"),
        (
            "lm.weight is tied to shared.weight: training both.",
            "lm.weight is tied to shared.weight",
        ),
    ],
)
def test_a_new_reason_is_the_first_clause_of_the_message(message: str, reason: str) -> None:
    assert support_matrix.short(message, "FooModel", "valves") == reason
