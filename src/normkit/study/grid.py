"""What to run: a study's settings, the cells that they span, and the cells' keys.

Here: Settings, Cell (one training run), expand.
May import: placement, and normkit's version.
Read next: train.py, which runs one cell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from normkit import __version__
from normkit.placement import PLACEMENT_NAMES

TASK = "text"
NORMS = ("none", "batch", "layer", "rms", "group", "dyt")
INITS = ("xavier", "torch", "gpt2")


@dataclass(frozen=True)
class Settings:
    """A study as asked for: the axes of its grid, what all cells share, and how to run them.

    Raises:
        ValueError: "name: expected ..., got ...", where name is the field that is wrong.
    """

    norms: tuple[str, ...]
    placements: tuple[str, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    lr: float
    warmup: int
    width: int
    heads: int
    batch: int
    seq: int
    init: str
    jobs: int
    threads: int

    def __post_init__(self) -> None:
        _expect_some_of("norms", self.norms, NORMS)
        _expect_some_of("placements", self.placements, PLACEMENT_NAMES)
        _expect_some_of("init", (self.init,), INITS)
        for name in ("steps", "width", "heads", "batch", "seq", "jobs", "threads"):
            _expect_at_least(1, name, (getattr(self, name),))
        _expect_at_least(1, "depths", self.depths)
        _expect_at_least(0, "seeds", self.seeds)
        _expect_at_least(0, "warmup", (self.warmup,))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: expected a positive number, got {self.lr}")
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}")
        if "batch" in self.norms and self.batch * self.seq < 2:
            raise ValueError("batch: expected 2 or more bytes (batch x seq) for norm batch's variance, got 1")


@dataclass(frozen=True)
class Cell:
    """The settings of one training run; everything that its numbers depend on, up to the last digits."""

    norm: str
    placement: str | None  # None exactly for norm "none"
    depth: int
    seed: int
    lr: float
    steps: int
    warmup: int
    width: int
    heads: int
    batch: int
    seq: int
    init: str
    data: str  # Corpus.digest
    task: str = TASK

    @property
    def key(self) -> str:
        """What makes a record reusable: equal settings, equal bytes of text and the same version of normkit.

        The versions of torch and Python and the number of threads are recorded, not part of the key: they move the
        last digits, and a long study should survive an update of torch. Another Python brings other sources, which
        the data's digest tells apart.
        """
        settings = json.dumps({**asdict(self), "normkit": __version__}, sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    @property
    def configuration(self) -> Cell:
        """The cell without its seed: cells that share it take equally long per step."""
        return replace(self, seed=0)

    @property
    def label(self) -> str:
        placement = "" if self.placement is None else f" {self.placement}"
        return f"{self.norm}{placement}, depth {self.depth}, seed {self.seed}"


def expand(settings: Settings, data: str) -> list[Cell]:
    """All combinations, identical cells once: norm "none" has no placement and runs once per depth and seed."""
    axes = itertools.product(settings.depths, settings.norms, settings.placements, settings.seeds)
    cells = (
        Cell(
            norm=norm,
            placement=None if norm == "none" else placement,
            depth=depth,
            seed=seed,
            lr=settings.lr,
            steps=settings.steps,
            warmup=settings.warmup,
            width=settings.width,
            heads=settings.heads,
            batch=settings.batch,
            seq=settings.seq,
            init=settings.init,
            data=data,
        )
        for depth, norm, placement, seed in axes
    )
    return list(dict.fromkeys(cells))


def _expect_some_of(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [one for one in given if one not in allowed]
    if wrong or not given:
        raise ValueError(
            f"{name}: expected one of {', '.join(allowed)}, got {wrong[0]!r}"
            if wrong
            else f"{name}: expected one or more of {', '.join(allowed)}, got none"
        )


def _expect_at_least(least: int, name: str, given: Sequence[int]) -> None:
    if not given or min(given) < least:
        got = min(given) if given else "none"
        raise ValueError(
            f"{name}: expected {'a whole number' if given else 'one or more'} of at least {least}, got {got}"
        )
