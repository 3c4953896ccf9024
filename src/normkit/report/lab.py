"""The page of several studies: findings of all, then a section for each.

Here: Section, measured_table, save, render.
May import: jinja2 and the rest of this package.
Read next: templates/lab.html.j2; placement.py, one section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.report.parts import Drawn, Table, environment, write, write_figures
from normkit.report.table import Column, Entry
from normkit.report.wording import DASH, significant


@dataclass(frozen=True)
class Section:
    """What one study found."""

    name: str
    question: str
    data: str
    findings: tuple[str, ...]
    figures: tuple[Drawn, ...]
    table: Table
    notes: tuple[str, ...]
    seconds: float  # of all cells together
    command: str  # that runs this study alone

    @property
    def minutes(self) -> str:
        return significant(self.seconds / 60, 2)


def _entry(value: Any) -> Entry:
    if isinstance(value, bool):
        return Entry("yes" if value else "no", "yes" if value else "no")
    if isinstance(value, int):
        return Entry(str(value), value)
    if isinstance(value, float):
        return Entry(significant(value), value if math.isfinite(value) else None)
    return Entry(DASH, None) if value is None else Entry(str(value), str(value))


def measured_table(
    name: str, about: str, columns: Sequence[tuple[str, str, str]], rows: Sequence[Mapping[str, Any]]
) -> Table:
    """A table of records.

    Args:
        name: the element's id.
        about: what a row is.
        columns: of each its field, title and what it means.
        rows: the records.
    """
    made = []
    for field, title, help in columns:
        values = [row.get(field) for row in rows]
        numeric = all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values
        )
        made.append(Column(title, numeric, help))
    entries = tuple(tuple(_entry(row.get(field)) for field, _, _ in columns) for row in rows)
    return Table(name, "All numbers", about, tuple(made), entries)


def render(sections: Sequence[Section], command: str, versions: Mapping[str, str]) -> str:
    """The page as text."""
    return (
        environment()
        .get_template("lab.html.j2")
        .render(
            sections=sections,
            command=command,
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        )
    )


def save(sections: Sequence[Section], path: Path, command: str, versions: Mapping[str, str]) -> Path:
    """Write the page, and its figures into figures/ beside it, each file atomically."""
    write_figures([figure for section in sections for figure in section.figures], path.parent / "figures")
    write(path, render(sections, command, versions).encode())
    return path
