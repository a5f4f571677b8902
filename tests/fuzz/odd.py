"""Values that nobody should give, and some that one may: as words of a command line, as objects."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBERS = (
    "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e308", "1e-320", "1e400", "-0.0",
    "99999999999999999999", "0x10", "1_000", "many", "", " ", "²", "٣", "None", "True", "1,5",
)  # fmt: skip
WORDS = (
    "", " ", "ä€𝄞", "\u202e", "-", "none", "nan", "0", "..", "/", "%s%n", "{0}", "'", '"', "a" * 3000,  # noqa: E501
    "lora", "movie", "\ud800", "\n", "=", ":", ",", "None", "*", "tiny", "full",
)  # fmt: skip
PATHS = (
    "", ".", "missing", "missing/deeper", "task.csv", "task.csv/inner", "tiny", "a" * 300, "ä€𝄞",
    " ", "runs", "~nobody", "out.csv", "/dev/null/x", "empty",
)  # fmt: skip
# What cannot be refused and only takes long is not drawn large.
WORK = {
    "steps", "budget", "seeds", "baseline_seeds", "eval_every", "workers", "limit_minutes",
    "max_steps", "num_samples",
}  # fmt: skip
_HUGE = {"1e308", "1e400", "99999999999999999999", "inf"}
SYNTAX = (
    ":",
    "=",
    ",",
    "+",
    ";",
    "::",
    ",,",
    "=,",
    ":=",
    "name",
    " ",
    "\t",
    "ä",
    "none",
    "(",
    "(a+)+$",
)
BACKTRACK = ("(a+)+b", "(.*)*x", "(.|.)*!", "([a-z.]+)*Z", "(", "[", "a{999999}", "(?P<x>", "\\")


def number(chance: random.Random, field: str) -> str:
    """A number as a text."""
    values = [v for v in NUMBERS if not (field in WORK and v in _HUGE)]
    return chance.choice(values)


def near(chance: random.Random, name: str) -> str:
    """A name with one letter changed."""
    if not name:
        return "x"
    place = chance.randrange(len(name))
    kinds = ("", "x", name[place] * 2, name[place].upper())
    return name[:place] + chance.choice(kinds) + name[place + 1 :]


def spec(chance: random.Random, known: dict[str, dict[str, Any]]) -> str:
    """A text of a delta or a solver, right or wrong.

    Args:
        chance: draws.
        known: the default of every field, by the name of the delta or solver.
    """
    name = chance.choice(sorted(known))
    items = []
    for field in chance.sample(
        sorted(known[name]), min(len(known[name]), chance.choice((0, 1, 1, 2)))
    ):
        default = known[name][field]
        if isinstance(default, bool):
            value = chance.choice(("true", "false", "yes", "1", ""))
        elif isinstance(default, int | float):
            value = chance.choice((str(default), number(chance, field)))
        elif isinstance(default, str):
            value = chance.choice((default, near(chance, default), *BACKTRACK, "none"))
        else:
            value = chance.choice(("none", "0", "0+1", "-1", "1+1", "", "x", *NUMBERS, *BACKTRACK,
                                   "attention.query", "attention.query+mlp.up", "head", ".*"))  # fmt: skip  # noqa: E501
        items.append(f"{field}={value}")
    text = name + (":" + ",".join(items) if items else "")
    if chance.random() < 0.3:
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice(SYNTAX) + text[place + chance.choice((0, 1)) :]
    return text


def values(chance: random.Random, like: Any) -> tuple[str, Any]:
    """An odd value in place of ``like``: what it is, and itself."""
    anything: list[tuple[str, Any]] = [
        ("None", None), ("''", ""), ("'x'", "x"), ("-1", -1), ("nan", math.nan), ("[]", []),
        ("{}", {}), ("object()", object()), ("True", True), ("1.5", 1.5), ("()", ()), ("b'x'", b"x"),  # noqa: E501
        ("[None]", [None]), ("1j", 1j), ("int", int),
    ]  # fmt: skip
    own: list[tuple[str, Any]] = []
    if isinstance(like, bool):
        own = [("'yes'", "yes"), ("2", 2), ("not it", not like)]
    elif isinstance(like, int):
        own = [("0", 0), ("-1", -1), ("2**70", 2**70), (f"{like}.0", float(like)),
               (f"'{like}'", str(like)), ("nan", math.nan), ("inf", math.inf), ("-2**70", -(2**70)),
               (f"np.int64({like})", np.int64(like)), (f"{like + 1}", like + 1)]  # fmt: skip
    elif isinstance(like, float):
        own = [("0.0", 0.0), ("-1.0", -1.0), ("nan", math.nan), ("inf", math.inf),
               ("-inf", -math.inf), ("1e308", 1e308), ("5e-324", 5e-324), ("'0.1'", "0.1"),
               ("torch.tensor(0.5)", torch.tensor(0.5)), ("10**400", 10**400)]  # fmt: skip
    elif isinstance(like, str):
        words = [near(chance, like), *WORDS]
        own = [(repr(word), word) for word in words]
    elif isinstance(like, Path):
        own = [(f"Path({p!r})", Path(p)) for p in PATHS] + [("'a\\0b'", "a\0b")]
    elif isinstance(like, Tensor):
        own = [(name, made) for name, made in _tensors(like)]
    elif isinstance(like, list | tuple) and like:
        kind = type(like) if type(like) in (list, tuple) else tuple
        place = chance.randrange(len(like))
        name, inner = values(chance, like[place])
        changed = list(like)
        changed[place] = inner
        own = [("its first item alone", kind(like[:1])), ("one item more", kind([*like, like[-1]])),
               ("reversed", kind(like[::-1])), ("a generator", (x for x in like))]  # fmt: skip
        own += [(f"item {place} = {name}", kind(changed))] * 6
    elif isinstance(like, dict) and like:
        key = chance.choice(sorted(like, key=str))
        name, inner = values(chance, like[key])
        own = [(f"without {key!r}", {k: v for k, v in like.items() if k != key}),
               ("with 'surprise'", {**like, "surprise": 1}), ("with 3", {**like, 3: 1})]  # fmt: skip  # noqa: E501
        own += [(f"{key!r} = {name}", {**like, key: inner})] * 5
    elif callable(like) and not isinstance(like, type):
        own = [("lambda *a: None", lambda *a, **k: None)]
    return chance.choice(own) if own and chance.random() < 0.75 else chance.choice(anything)


def _tensors(like: Tensor) -> list[tuple[str, Any]]:
    broken = like.clone()
    if broken.is_floating_point() and broken.numel():
        broken.view(-1)[0] = math.nan
    endless = like.clone()
    if endless.is_floating_point() and endless.numel():
        endless.view(-1)[-1] = math.inf
    found = [
        ("NaN in it", broken), ("inf in it", endless), ("zeros", torch.zeros_like(like)),
        ("its list", like.tolist()), ("its array", like.detach().numpy()), ("empty", like[:0] if like.dim() else like.new_empty(0)),  # noqa: E501
        ("one axis more", like[None]), ("flat", like.reshape(-1)), ("a scalar", like.new_zeros(())),
        ("int64", like.long()), ("float32", like.float()), ("float16", like.half()),
        ("complex", like.to(torch.complex128)), ("bool", like.bool()), ("on meta", like.to("meta")),
        ("sparse", like.to_sparse()), ("times 1e300", like * 1e300),
        ("with requires_grad", like.clone().requires_grad_() if like.is_floating_point() else like),
    ]  # fmt: skip
    if like.dim():
        found += [("one row more", torch.cat([like, like[:1]])), ("a row less", like[:-1])]
    if like.dim() > 1:
        found += [("transposed", like.mT), ("minus", -like)]
    return found
