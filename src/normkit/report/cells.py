"""Cells: the records of one setting over its seeds, and the numbers that are read off them.

Here: grouping, medians and ranges, differences paired by seed. Pure.
May import: numpy, report.load, report.wording.
Read next: findings.py, which puts these numbers into sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normkit.report.load import NAN, Record
from normkit.report.wording import cell_label, norm_order, placement_order, significant

OFF_SCALE = 1.3  # a final loss above this many times guessing has blown up; figures do not stretch to show it
SEEDS_FOR_A_MEDIAN = 5  # fewer are observations: their range is shown and nothing is concluded


@dataclass(frozen=True)
class Spread:
    """Median of a measured number over seeds, its lowest and highest value, and how many seeds measured it."""

    median: float
    low: float
    high: float
    count: int

    def __bool__(self) -> bool:
        return self.count > 0


def spread(values: Iterable[float]) -> Spread:
    """Median and range of the finite `values`."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return Spread(NAN, NAN, NAN, 0)
    return Spread(float(np.median(finite)), finite[0], finite[-1], len(finite))


def range_coverage(count: int) -> float:
    """Probability that the range of `count` independent draws holds the median of their (continuous) distribution."""
    return 1 - 2 * 0.5**count


def on_scale(record: Record) -> bool:
    """Whether the record's validation loss is a number that has not blown up."""
    return math.isfinite(record.val_loss) and not record.val_loss > OFF_SCALE * record.guess_loss


@dataclass(frozen=True)
class Cell:
    """One (norm, placement, depth, lr) with one record per seed."""

    norm: str
    placement: str | None
    depth: int
    lr: float
    label: str  # "LayerNorm pre", with the learning rate where the study has several
    records: tuple[Record, ...]

    def count(self, status: str) -> int:
        return sum(record.status == status for record in self.records)

    @property
    def counted(self) -> tuple[Record, ...]:
        """The records whose numbers stand for the cell: the ok ones, or all where none is ok."""
        ok = tuple(record for record in self.records if record.status == "ok")
        return ok or self.records

    @property
    def ok(self) -> bool:
        """Whether a seed ended well and its validation loss was measured."""
        return any(record.status == "ok" and math.isfinite(record.val_loss) for record in self.records)

    @property
    def on_scale(self) -> bool:
        """Whether it ended with a loss that can be compared: perhaps no better than guessing, but not blown up."""
        return any(on_scale(record) for record in self.counted)

    @property
    def status(self) -> str:
        """ "ok", "diverged", "failed", or the counts where seeds differ."""
        counts = {status: self.count(status) for status in ("ok", "diverged", "failed")}
        present = [status for status, count in counts.items() if count]
        return present[0] if len(present) == 1 else ", ".join(f"{counts[status]} {status}" for status in present)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why seeds diverged or failed, each reason once."""
        return tuple(dict.fromkeys(r.reason for r in self.records if r.status != "ok" and r.reason))

    @property
    def val_loss(self) -> Spread:
        return spread(record.val_loss for record in self.counted)

    @property
    def val_loss_batch_statistics(self) -> Spread:
        return spread(record.val_loss_batch_statistics for record in self.counted)

    @property
    def guess_loss(self) -> float:
        return spread(record.guess_loss for record in self.records).median

    @property
    def seconds_per_step(self) -> Spread:
        return spread(record.seconds_per_step for record in self.records)

    @property
    def parameters(self) -> float:
        return spread(record.parameters for record in self.records).median

    def profile(self, name: str, moment: str) -> NDArray[np.float64]:
        """(seeds that measured it, positions) of one profile; (0, 0) where none did."""
        rows = [record.profiles[name].at(moment) for record in self.counted]
        rows = [row for row in rows if any(math.isfinite(value) for value in row)]
        length = max((len(row) for row in rows), default=0)
        same = [row for row in rows if len(row) == length]
        return np.array(same, dtype=np.float64).reshape(len(same), length)

    def curve(self, name: str, moment: str) -> NDArray[np.float64]:
        """(positions,) medians over seeds of one profile; NaN where no seed has a number, () where none measured it."""
        rows = self.profile(name, moment)
        return np.array([spread(column).median for column in rows.T], dtype=np.float64)

    def last(self, name: str, moment: str) -> Spread:
        """The profile's last position (the end of the stack) over seeds."""
        rows = self.profile(name, moment)
        return spread(rows[:, -1]) if rows.size else spread(())

    def gradient_ratio(self, moment: str) -> Spread:
        """Gradient norm of the first block over that of the last."""
        rows = self.profile("grad_norm_by_layer", moment)
        return spread(row[0] / row[-1] for row in rows if row[-1] > 0)


def group(records: Sequence[Record]) -> tuple[Cell, ...]:
    """Cells by depth, then norm, then placement, then learning rate."""
    groups: dict[tuple[str, str | None, int, float], list[Record]] = {}
    for record in records:
        lr = -1.0 if math.isnan(record.lr) else record.lr  # NaN equals nothing, itself included
        groups.setdefault((record.norm, record.placement, record.depth, lr), []).append(record)
    several_rates = len({lr for *_, lr in groups}) > 1
    cells = []
    for (norm, placement, depth, lr), members in groups.items():
        label = cell_label(norm, placement) + (f", lr {significant(lr)}" if several_rates and lr >= 0 else "")
        members.sort(key=lambda record: record.seed)
        cells.append(Cell(norm, placement, depth, NAN if lr < 0 else lr, label, tuple(members)))
    return tuple(sorted(cells, key=_order))


def _order(cell: Cell) -> tuple[int, tuple[int, str], tuple[int, str], float]:
    lr = -1.0 if math.isnan(cell.lr) else cell.lr
    return cell.depth, norm_order(cell.norm), placement_order(cell.placement), lr


def at_best_rate(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Of each (norm, placement, depth) the cell whose learning rate gave the lowest validation loss."""
    best: dict[tuple[str, str | None, int], Cell] = {}
    for cell in cells:
        place = (cell.norm, cell.placement, cell.depth)
        if place not in best or _loss_rank(cell) < _loss_rank(best[place]):
            best[place] = cell
    return tuple(best.values())


def _loss_rank(cell: Cell) -> tuple[bool, float]:
    loss = cell.val_loss.median
    return not cell.ok, math.inf if math.isnan(loss) else loss


def ranked(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Lowest validation loss first; cells that did not end well last."""
    return tuple(sorted(cells, key=_loss_rank))


def best_by_depth(cells: Iterable[Cell]) -> dict[int, Cell]:
    """The cell with the lowest validation loss at each depth; only cells that ended well take part."""
    best: dict[int, Cell] = {}
    for cell in ranked(cells):
        if cell.ok:
            best.setdefault(cell.depth, cell)
    return dict(sorted(best.items()))


def paired(left: Cell, right: Cell) -> Spread:
    """left - right in validation loss, seed by seed, over the seeds in which both are on the scale.

    A seed that ended just above guessing ("diverged") takes part: leaving it out would flatter its setting.
    """
    losses = {record.seed: record.val_loss for record in right.records if on_scale(record)}
    return spread(r.val_loss - losses[r.seed] for r in left.records if on_scale(r) and r.seed in losses)


def most_seeds(cells: Iterable[Cell]) -> int:
    return max((len(cell.records) for cell in cells), default=0)
