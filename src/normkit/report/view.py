"""View: a run as the sentences see it.

Here: which cells count, and how a number over seeds is written. Pure.
May import: report.cells, report.charts, report.load, report.wording.
Read next: findings.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normkit.report.cells import SEEDS_FOR_A_MEDIAN, Cell, Spread, at_best_rate, group, spread
from normkit.report.charts import blocks, depths_of, rescales_skip
from normkit.report.load import Run
from normkit.report.wording import loss


@dataclass(frozen=True)
class View:
    """A run and its cells: all of them for the table, each at its best learning rate for sentences and figures."""

    run: Run
    cells: tuple[Cell, ...]
    shown: tuple[Cell, ...]

    @property
    def depths(self) -> tuple[int, ...]:
        return depths_of(self.shown)

    @property
    def deepest(self) -> int:
        return max(self.depths, default=0)

    @property
    def guess_loss(self) -> float:
        return spread(cell.guess_loss for cell in self.cells).median

    @property
    def several_rates(self) -> bool:
        return len(self.cells) > len(self.shown)

    def at(self, depth: int) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.shown if cell.depth == depth)

    def cell(self, norm: str, placement: str | None, depth: int) -> Cell | None:
        return next((c for c in self.at(depth) if (c.norm, c.placement) == (norm, placement)), None)

    @property
    def rescaling(self) -> tuple[Cell, ...]:
        """Cells of the deepest stack whose norms rescale the identity branch."""
        return tuple(cell for cell in self.at(self.deepest) if rescales_skip(cell))


def view(run: Run) -> View:
    cells = group(run.records)
    return View(run, cells, at_best_rate(cells))


def with_range(value: Spread, write: Callable[[float], str] = loss) -> str:
    """ "2.368" of one seed, "2.368 (2.350 to 2.401)" of a few, "2.368 [2.350, 2.401]" of five or more."""
    if value.count < 2:
        return write(value.median)
    low, high = write(value.low), write(value.high)
    if value.count < SEEDS_FOR_A_MEDIAN:
        return f"{write(value.median)} ({low} to {high})"
    return f"{write(value.median)} [{low}, {high}]"


def place(cell: Cell) -> str:
    return f"{cell.label} at {blocks(cell.depth)}"
