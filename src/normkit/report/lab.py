"""The page of the studies beside `placement`: findings of all, then a section for each.

Here: Section, save, render.
May import: jinja2, matplotlib (through figures.py) and the rest of this package.
Read next: templates/lab.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from normkit.report.observation import Figure, Table
from normkit.report.page import PACKAGE, _environment, _write
from normkit.report.shapes import Chart
from normkit.report.style import legend, theme
from normkit.report.table import Column, Entry, csv_text
from normkit.report.wording import DASH, significant


@dataclass(frozen=True)
class Section:
    """What one study found."""

    name: str
    question: str
    data: str
    findings: tuple[str, ...]
    figures: tuple[tuple[Chart, tuple[str, ...], str], ...]  # the chart, sentences, how it was measured
    columns: tuple[tuple[str, str, str], ...]  # of the table: field, title, help
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    seconds: float  # of all cells together


def _figure(chart: Chart, sentences: Sequence[str], measured: str) -> Figure:
    from normkit.report.figures import panel_svgs

    uri = "data:text/csv;charset=utf-8," + quote(csv_text(chart.columns, chart.rows))
    return Figure(chart, panel_svgs(chart), legend(chart), list(sentences), measured, uri)


def _entry(value: Any) -> Entry:
    if isinstance(value, bool):
        return Entry("yes" if value else "no", "yes" if value else "no")
    if isinstance(value, int):
        return Entry(str(value), value)
    if isinstance(value, float):
        return Entry(significant(value), value if math.isfinite(value) else None)
    return Entry(DASH, None) if value is None else Entry(str(value), str(value))


def _table(section: Section) -> Table:
    columns = []
    for field, title, help in section.columns:
        values = [row.get(field) for row in section.rows]
        numeric = all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values
        )
        columns.append(Column(title, numeric, help))
    rows = tuple(tuple(_entry(row.get(field)) for field, _, _ in section.columns) for row in section.rows)
    return Table(section.name, "Every cell", "A row per cell.", tuple(columns), rows)


def render(sections: Sequence[Section], command: str, versions: Mapping[str, str]) -> str:
    """The page as text."""
    css, script = (
        (PACKAGE / "templates" / name).read_text(encoding="utf-8").replace("#verdict", ".sortable")
        for name in ("report.css", "sort.js")
    )
    return _environment().get_template("lab.html.j2").render(
        sections=[
            {
                "section": section,
                "figures": [_figure(*each) for each in section.figures if not each[0].empty],
                "table": _table(section),
                "minutes": significant(section.seconds / 60, 2),
            }
            for section in sections
        ],
        command=command,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        css=css,
        script=script,
        light=theme(dark=False),
        dark=theme(dark=True),
    )  # fmt: skip


def save(sections: Sequence[Section], path: Path, command: str, versions: Mapping[str, str]) -> Path:
    """Write the page, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, render(sections, command, versions).encode())
    return path
