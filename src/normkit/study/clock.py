"""How long a study will still take.

Here: TimeLeft.
May import: study.grid.
Read next: run.py, whose events feed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from normkit.study.grid import Cell

_SETTLED_SECONDS = 10.0  # before that the rate says little: workers are still starting


class TimeLeft:
    """The time left for cells that run `jobs` at a time, in words.

    A step counts as much work as it took seconds in the timing pass, so that deep cells weigh what they cost. Cells
    share the machine: the rate is what was seen, at first `jobs` seconds of work per second.
    """

    def __init__(
        self,
        cells: list[Cell],
        seconds_per_step: dict[Cell, float | None],
        jobs: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = {cell: seconds_per_step[cell.configuration] or 0.01 * cell.depth for cell in cells}
        self._steps = dict.fromkeys(cells, 0)
        self._total = sum(cell.steps * seconds for cell, seconds in self._seconds.items())
        self._jobs = jobs
        self._now = now
        self._started = now()

    def at(self, cell: Cell, step: int) -> None:
        """The cell has done this many steps."""
        self._steps[cell] = step

    def __str__(self) -> str:
        done = sum(steps * self._seconds[cell] for cell, steps in self._steps.items())
        elapsed = self._now() - self._started
        rate = done / elapsed if elapsed > _SETTLED_SECONDS and done > 0 else float(self._jobs)
        left = (self._total - done) / rate
        if left < 100:
            return f"{left:.0f} s"
        return f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
