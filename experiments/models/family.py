"""A family of models of one recipe: their names, shapes, and where they are once pre-trained.

    family/encoder-192            of the preset paper, seed 0
    family/decoder-48@quick       of the preset quick
    family/decoder-48@steps=50,seed=1

An encoder is a ModernBERT with a masked language model's head, a decoder a Llama with a causal one:
both normalise before a block, turn queries and keys by position, and gate the inner map. (BERTs of
recipe 1, at these rates and with 15 % of the tokens masked, ended at 6.7 to 6.9 nats a token, where
the frequencies of single tokens reach 6.8.) Of width d, a multiple of `HEAD`, each has

    L = max(2, round(d/48)) blocks,   d/16 heads of 16,   a rate of pre-training of 0.5/d,

weights drawn with the standard deviation (0.02² · 768/d)^½ (BERT's own at its own width), and the
embedding as output map. All have one vocabulary and see the same rows of text in the same order.
Families differ in attention (both ways, or to the left), the gate (GELU or SiLU), the normalisation
(by mean and variance, or by the root mean square), and what they predict.

`deltacontrol pretrain` makes them; this file knows no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deltacontrol.experiments.sources import build_once, cache_dir
from deltacontrol.theory.errors import InputError, unknown

FamilyName = Literal["encoder", "decoder"]
FAMILIES: tuple[FamilyName, ...] = get_args(FamilyName)

# Part of every member's digest: raise it when the recipe changes, here or where it is followed.
RECIPE = 2
SIZES = (48, 80, 128, 192, 288)
PRESETS = {"quick": 60, "paper": 2000}
PREFIX = "family/"
HEAD = 16
LENGTH = 128  # positions
BATCH_ROWS = 8
VOCABULARY = 4096
MOST_WIDTH = 4096

# Measured on one core of an EPYC of the third generation in float32: an update of a model of N
# parameters takes about 6·N operations a token at this speed, and a constant for the softmax.
OPERATIONS_PER_SECOND = 45e9
SECONDS_PER_UPDATE = 0.08

_NAME = re.compile(r"family/([a-z]+)-(\d{1,5})(?:@(.+))?")
_FORM = "family/encoder-192, family/decoder-48@quick or family/encoder-80@steps=50,seed=1"


@dataclass(frozen=True)
class Member:
    """One model of the family.

    Attributes:
        family: encoder or decoder.
        width: d, a multiple of 16.
        steps: updates of the pre-training.
        seed: of the weights at the start, the order of the rows, and the masks.

    Raises:
        InputError: a width or a number that it cannot have.
    """

    family: FamilyName
    width: int
    steps: int = PRESETS["paper"]
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.family not in FAMILIES:
            raise unknown("family of models", str(self.family), FAMILIES)
        for name, least in (("width", HEAD), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is {value!r}; expected a whole number >= {least}")
        if self.width % HEAD or self.width > MOST_WIDTH:
            raise InputError(
                f"width is {self.width}; expected a multiple of {HEAD}, which is the size of a "
                f"head, of at most {MOST_WIDTH}, such as one of {', '.join(map(str, SIZES))}"
            )

    @property
    def name(self) -> str:
        """By which it is given as a model."""
        preset = next((n for n, steps in PRESETS.items() if steps == self.steps), None)
        parts = [preset or f"steps={self.steps}"] if preset != "paper" else []
        parts += [f"seed={self.seed}"] if self.seed else []
        return f"{PREFIX}{self.family}-{self.width}" + ("@" + ",".join(parts) if parts else "")

    @property
    def depth(self) -> int:
        """L."""
        return max(2, round(self.width / 48))

    @property
    def rate(self) -> float:
        """Peak learning rate of the pre-training."""
        return 0.5 / self.width

    @property
    def num_parameters(self) -> int:
        """Of the model with its head for a full vocabulary, the tied embedding once.

        With width d, L blocks, V tokens, and the inner width m, both have Vd and L(4d² + 3dm + 2d)
        and the last norm d; an encoder has one norm d less in its first block, d behind the
        embedding, and the head d² + d + V.
        """
        d, blocks, inner = self.width, self.depth, self._inner
        body = VOCABULARY * d + blocks * (4 * d * d + 3 * d * inner + 2 * d) + d
        return body + (d * d + d + VOCABULARY) * (self.family == "encoder")

    @property
    def seconds(self) -> float:
        """About how long its pre-training takes on one core."""
        work = 6.0 * self.num_parameters * BATCH_ROWS * LENGTH / OPERATIONS_PER_SECOND
        return self.steps * (SECONDS_PER_UPDATE + work)

    @property
    def command(self) -> str:
        """What makes it."""
        preset = next((n for n, steps in PRESETS.items() if steps == self.steps), None)
        budget = {"paper": "", None: f" --steps {self.steps}"}.get(preset, f" --preset {preset}")
        seed = f" --seed {self.seed}" if self.seed else ""
        sizes = f"--family {self.family} --sizes {self.width}"
        return f"deltacontrol pretrain {sizes}{budget}{seed}"

    @property
    def digest(self) -> str:
        """Identifies recipe and text, known before it is pre-trained.

        The weights' own digest is in the record of the pre-training: their last digits depend on
        the hardware and on the number of threads.
        """
        from deltacontrol.experiments.tasks import corpus

        own = [self.family, self.width, self.steps, self.seed, RECIPE, corpus.digest()]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """Its folder in the cache, whether it is there or not."""
        name = f"family-{self.family}-{self.width}-{self.digest[:8]}"
        return cache_dir() / "models" / name

    @property
    def description(self) -> str:
        """One line for listings."""
        kind = "ModernBERT" if self.family == "encoder" else "Llama"
        there = "pre-trained" if self.path.is_dir() else "not pre-trained yet"
        size = f"{self.num_parameters / 1e6:.2f}M parameters"
        return f"{kind}, {self.depth} layers, width {self.width}, {size}, {there}"

    def folder(self) -> Path:
        """The plain transformers folder, verified at its first use in a process.

        Raises:
            InputError: it is not pre-trained yet, or its files are damaged, and what makes it.
        """
        if not self.path.is_dir():
            raise self._missing("is not pre-trained yet")
        return build_once(self.path, self._refuse)

    def _refuse(self, _: Path) -> None:
        raise self._missing("was damaged and is no longer there")

    def _missing(self, what: str) -> InputError:
        return InputError(
            f"{self.name} {what}; pre-train it with `{self.command}`, which takes about "
            f"{told_time(self.seconds)} on one core"
        )

    def configuration(self, vocabulary: int, special: dict[str, int]) -> dict[str, Any]:
        """The arguments of its transformers configuration.

        Args:
            vocabulary: number of tokens.
            special: numbers of the special tokens, as ``pad_token_id``.
        """
        shared = {
            "vocab_size": vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self._inner,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.width // HEAD,
            "max_position_embeddings": LENGTH,
            "initializer_range": 0.02 * (768 / self.width) ** 0.5,
            "tie_word_embeddings": True,
            **special,
        }
        if self.family == "encoder":
            return shared | {"layer_types": ["full_attention"] * self.depth}
        return shared

    @property
    def _inner(self) -> int:
        return 8 * self.width // 3 // HEAD * HEAD


def parse(name: str) -> Member | None:
    """The member of that name; None where the name is none of the family.

    Raises:
        InputError: it begins as one, and is none.

    Example:
        >>> parse("family/decoder-48@quick").steps == PRESETS["quick"]
        True
    """
    if not name.startswith(PREFIX):
        return None
    found = _NAME.fullmatch(name)
    if found is None:
        raise InputError(f"{name!r} names no model of the family; expected a name such as {_FORM}")
    family, width, options = found.groups()
    given: dict[str, int] = {}
    for part in options.split(",") if options else ():
        field, equals, value = part.partition("=")
        if not equals and field in PRESETS:
            field, value = "steps", str(PRESETS[field])
        if field not in ("steps", "seed") or not value.isdigit() or field in given:
            raise InputError(
                f"{part!r} in {name!r} is neither steps=, seed= nor one of {', '.join(PRESETS)}, "
                f"or is there twice; expected a name such as {_FORM}"
            )
        given[field] = int(value)
    return Member(family, int(width), **given)  # type: ignore[arg-type] - checked there


def members() -> list[Member]:
    """The ten of the preset paper."""
    return [Member(family, width) for family in FAMILIES for width in SIZES]


def told_time(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> told_time(45.0), told_time(200.0), told_time(9000.0)
        ('45 s', '3 min', '2 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
