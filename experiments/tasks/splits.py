"""Seeded, stratified splits that keep whatever belongs together on one side.

Rows with the same text always belong together; rows of one document (or film) do too when a group
column says so. The seed is part of a task, never of a run: everyone sees the same test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20230302
VALIDATION_SHARE = 0.1
VALIDATION_LIMIT = 1000


def split(frame: pd.DataFrame, test_rows: int | None = None) -> pd.DataFrame:
    """Add a column `split` and order the rows so that any head of a split is a fair sample of it.

    Args:
        frame: columns `text`, `label` (absent when there are no labels) and optionally `text_pair`
            and `group`.
        test_rows: size of the test split; a tenth of the rows when not given.

    Returns:
        A frame with a fresh index, `split` in `SPLITS`, and no column `group`. The test split has
        exactly `test_rows` rows when groups of fitting size exist, else slightly fewer. Validation
        is a tenth of what is left, at most `VALIDATION_LIMIT` rows.
    """
    groups = _merged_groups(frame)
    strata = frame["label"] if "label" in frame else None
    wanted = len(frame) // 10 if test_rows is None else test_rows
    in_test = _choose(groups, strata, wanted, seed=SPLIT_SEED)
    rest = np.flatnonzero(~in_test)
    wanted = min(int(VALIDATION_SHARE * len(rest)), VALIDATION_LIMIT)
    rest_strata = None if strata is None else strata.iloc[rest]
    chosen = _choose(groups[rest], rest_strata, wanted, seed=SPLIT_SEED + 1)
    part = np.where(in_test, "test", "train").astype(object)
    part[rest[chosen]] = "validation"
    return in_fair_order(frame.assign(split=part))


def in_fair_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Order rows with a column `split` so that any head of a split is a fair sample of it.

    Returns:
        The rows, train before validation before test, with a fresh index and no column `group`.
    """
    classes = _classes(frame["label"]) if "label" in frame else None
    part = frame["split"].to_numpy()
    order = []
    for name in SPLITS:
        rows = np.flatnonzero(part == name)
        of_part = None if classes is None else classes[rows]
        order.append(rows[_fair_order(of_part, len(rows), seed=SPLIT_SEED + 2)])
    ordered = frame.iloc[np.concatenate(order)]
    return ordered.drop(columns="group", errors="ignore").reset_index(drop=True)


def carve_validation(frame: pd.DataFrame) -> np.ndarray:
    """Return a mask (rows,) of the validation rows to take out of a given training split."""
    groups = _merged_groups(frame)
    wanted = min(int(VALIDATION_SHARE * len(frame)), VALIDATION_LIMIT)
    strata = frame["label"] if "label" in frame else None
    return _choose(groups, strata, wanted, seed=SPLIT_SEED + 1)


def order_of(rows: pd.DataFrame, order: str, seed: int) -> np.ndarray:
    """Numbers of all rows (rows,) in the order "given", "shuffled" or "sampled"."""
    if order == "shuffled":
        return np.random.default_rng(seed).permutation(len(rows))
    if order == "sampled":
        # A sample of n rows is the head of a sample of all of them.
        return rows.reset_index(drop=True).sample(frac=1, random_state=seed).index.to_numpy()
    return np.arange(len(rows))


def require_rows(rows: pd.DataFrame, needed: int, what: str) -> None:
    """Refuse a split with fewer rows than are needed.

    Raises:
        InputError: it has fewer.
    """
    if needed > len(rows):
        raise InputError(f"{needed} {what} were asked for; it has {len(rows)}")


def few(
    rows: pd.DataFrame, classes: Sequence[str], shots: int, seed: Sequence[int], what: str
) -> pd.DataFrame:
    """So many rows of each class (in all, where there are no classes), in random order.

    Args:
        rows: with the column `label`, numbers of the ``classes``, where there are some.
        classes: names of the classes.
        shots: rows of each.
        seed: of `numpy.random.default_rng`.
        what: the rows' name in an error.

    Raises:
        InputError: there are fewer.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    labels = rows["label"].to_numpy()[order] if classes else np.zeros(len(rows), dtype=int)
    count = np.bincount(labels, minlength=max(len(classes), 1))
    if count.min() < shots:
        of_class = f" of the class {classes[int(count.argmin())]}" if classes else ""
        raise InputError(
            f"shots is {shots}, but there are {count.min()} {what}{of_class}; choose at most that "
            "many"
        )
    kept = [np.flatnonzero(labels == c)[:shots] for c in range(len(count))]
    return rows.iloc[order[np.sort(np.concatenate(kept))]]


def normalised(text: pd.Series) -> pd.Series:
    """Texts that differ only in case or white space count as the same text."""
    return text.str.split().str.join(" ").str.casefold()


def doubts(frame: pd.DataFrame) -> list[str]:
    """What makes scores on these rows less than they seem, in words; empty where nothing does.

    Counted are texts that have several labels, for no model can be right on all of their rows, and
    test rows whose text training or validation has as well, which a model may know by heart. Texts
    are compared as `normalised`; the second one of a pair belongs to its text.

    Args:
        frame: columns `text`, `split`, and optionally `label` and `text_pair`.
    """
    text = normalised(frame["text"])
    if "text_pair" in frame:
        text = text + "\x1e" + normalised(frame["text_pair"])
    found = []
    if "label" in frame:
        several = frame["label"].groupby(text).nunique() > 1
        if count := int(several.sum()):
            rows = int(text.isin(several.index[several]).sum())
            found.append(f"{count:,d} equal texts have several labels ({rows:,d} rows)")
    in_test = frame["split"] == "test"
    if count := int(text[in_test].isin(set(text[~in_test])).sum()):
        found.append(f"{count:,d} of {int(in_test.sum()):,d} test rows are in training too")
    return found


def _merged_groups(frame: pd.DataFrame) -> np.ndarray:
    """Number the connected components of "same text or same group" (rows,)."""
    import pandas as pd

    text = normalised(frame["text"])
    if "text_pair" in frame:
        text += "\x1e" + normalised(frame["text_pair"])
    component = pd.Series(pd.factorize(text)[0], index=frame.index)
    if "group" not in frame:
        return component.to_numpy()
    text = component.copy()
    while True:
        merged = component.groupby(frame["group"]).transform("min").groupby(text).transform("min")
        if merged.equals(component):
            return component.to_numpy()
        component = merged


def _choose(groups: np.ndarray, strata: pd.Series | None, rows: int, seed: int) -> np.ndarray:
    """Return a mask (rows,) that picks whole groups, `rows` rows in all or the nearest below."""
    sizes = np.bincount(groups)
    present = np.flatnonzero(sizes)
    classes = None
    if strata is not None:
        # A group of mixed labels is placed by its most frequent one: later writes win.
        codes = _classes(strata)
        num_classes = codes.max() + 1
        pairs, counts = np.unique(groups * num_classes + codes, return_counts=True)
        pairs = pairs[np.argsort(counts, kind="stable")]
        majority = np.zeros(len(sizes), dtype=int)
        majority[pairs // num_classes] = pairs % num_classes
        classes = majority[present]
    taken = np.zeros(len(sizes), dtype=bool)
    left = rows
    for group in present[_fair_order(classes, len(present), seed)]:
        if sizes[group] <= left:
            taken[group] = True
            left -= sizes[group]
    return taken[groups]


def _fair_order(classes: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    """Return a random order (count,) of which every head has the class shares of the whole.

    The i-th of n members of a class is placed at (i + 1/2)/n, so the classes are interleaved, and a
    class of one or two members comes too late to land in a small head: training sees every class.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    if classes is None:
        return order
    classes = classes[order]
    place = np.empty(count)
    for value in np.unique(classes):
        members = np.flatnonzero(classes == value)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place, kind="stable")]


def _classes(strata: pd.Series) -> np.ndarray:
    """Codes (rows,): the labels themselves, or ten quantile bins of a real-valued label."""
    import pandas as pd

    if pd.api.types.is_float_dtype(strata):
        return pd.qcut(strata.rank(method="first"), min(10, len(strata)), labels=False).to_numpy()
    return pd.factorize(strata, sort=True)[0]
