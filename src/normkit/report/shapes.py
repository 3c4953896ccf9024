"""Shapes: what a figure is, before it is drawn: a chart of panels of series.

Here: dataclasses, and shared_limits.
May import: report.load.
Read next: charts.py, which fills them from cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normkit.report.load import NAN

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Series:
    """One line of a panel, or one row of a panel of dots."""

    label: str
    norm: str
    placement: str | None
    points: Points  # a line: (x, median over seeds); dots: (value, 0) per seed
    band: tuple[tuple[float, float, float], ...] = ()  # (x, lowest, highest over seeds), from two seeds on
    faint: tuple[Points, ...] = ()  # raw curves behind a smoothed one
    variant: str = ""  # a thin line, style.VARIANTS; "batch": second dot of a row
    stopped: bool = False  # diverged: the line's last point is marked
    note: str = ""  # dots: written where there is no value


@dataclass(frozen=True)
class Reference:
    """A line to compare with: a level, or a curve through points."""

    label: str
    points: Points = ()
    level: float = NAN
    solid: bool = False  # measured cells that all lie on this line, rather than a theory or a baseline


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    limits: tuple[float, float] = (NAN, NAN)  # of the axis that carries the measured number


@dataclass(frozen=True)
class Chart:
    """One figure: panels of one kind on one scale."""

    name: str  # file name and anchor
    title: str
    kind: str  # "curves" over steps, "profile" over blocks or sublayers, "dots"
    panels: tuple[Panel, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    log: bool = False
    from_zero: bool = False
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not any(series.points for panel in self.panels for series in panel.series)


def shared_limits(values: Sequence[float], log: bool, from_zero: bool = False) -> tuple[float, float]:
    """One scale for all panels of a chart, a little wider than its values."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not finite:
        return NAN, NAN
    low, high = min(finite), max(finite)
    if log:
        margin = max((high / low) ** 0.06, 1.02)
        return low / margin, high * margin
    if from_zero:
        return 0.0, high * 1.08 or 1.0
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
