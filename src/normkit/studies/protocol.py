"""What a study is: a grid of cells, what one cell measures, and what figures and sentences make of all records.

Here: Study, Figure, and what the studies share to group records and draw lines.
May import: report (its shapes, which are data).
Read next: run.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normkit.report.shapes import Chart, Panel, Reference, Series, shared_limits

__all__ = [
    "Chart",
    "Figure",
    "Record",
    "Reference",
    "Series",
    "Settings",
    "Study",
    "each",
    "line",
    "median",
    "panel",
    "percent",
    "where",
]

Settings = dict[str, Any]  # of a cell: names and JSON values; everything that its numbers depend on
Record = Mapping[str, Any]  # settings and measurements of a cell that is done, in one dict


@dataclass(frozen=True)
class Figure:
    """A chart, the sentences that it shows, and how it was measured."""

    chart: Chart
    sentences: tuple[str, ...]
    measured: str


@dataclass(frozen=True)
class Study:
    """One question and how it is answered.

    Args:
        name: as on the command line.
        question: in a sentence.
        data: on what, in words.
        cells: whether the thorough form is asked for -> the settings of every cell.
        run: a cell's settings -> its measurements; seeded, on one thread, the same numbers on the same machine.
        columns: of the report's table: field, title, what it means.
        figures, findings: what all records show; the sentences hold the records' numbers.
        table_rows: the rows of the table, where they are not the records themselves.
        table_about: what a row is.

    Figures, findings and rows take whatever part of the grid there is, as cells may fail: what has no number is not
    said, or said to be not measured.
    """

    name: str
    question: str
    data: str
    cells: Callable[[bool], list[Settings]]
    run: Callable[[Settings], dict[str, Any]]
    columns: tuple[tuple[str, str, str], ...]
    figures: Callable[[Sequence[Record]], list[Figure]]
    findings: Callable[[Sequence[Record]], list[str]]
    table_rows: Callable[[Sequence[Record]], Sequence[Record]] = lambda records: records
    table_about: str = "A row for each cell."


def where(records: Iterable[Record], **settings: Any) -> list[Record]:
    """The records with these settings."""
    return [record for record in records if all(record[name] == value for name, value in settings.items())]


def each(records: Iterable[Record], name: str) -> list[Any]:
    """The values of a setting, in the order in which they come."""
    return list(dict.fromkeys(record[name] for record in records))


def median(records: Iterable[Record], field: str, missing: float = math.nan) -> float:
    """Over the records, NaN where there are none; one without a number counts as `missing`, or not at all if NaN."""
    values = [missing if record[field] is None else float(record[field]) for record in records]
    values = [value for value in values if not math.isnan(value)]
    return statistics.median(values) if values else math.nan


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def line(
    label: str, records: Sequence[Record], x: str, y: str, look: tuple[str, str | None], log2: bool = False
) -> Series:
    """Medians of `y` by `x`, with the range over seeds where there are several."""
    points, band = [], []
    for value in sorted({record[x] for record in records}):
        some = where(records, **{x: value})
        values = [float(record[y]) for record in some if record[y] is not None]
        if values:
            at = math.log2(value) if log2 else float(value)
            points.append((at, statistics.median(values)))
            band.append((at, min(values), max(values)))
    several = any(low != high for _, low, high in band)
    return Series(label, *look, tuple(points), band=tuple(band) if several else ())


def panel(
    title: str,
    labels: tuple[str, str],
    series: Sequence[Series],
    references: Sequence[Reference] = (),
    log: bool = False,
) -> Panel:
    """With limits that hold all points and bands."""
    values = [y for one in series for _, y in one.points] + [reference.level for reference in references]
    values += [y for one in series for _, *ends in one.band for y in ends]
    return Panel(title, *labels, tuple(series), tuple(references), shared_limits(values, log))
