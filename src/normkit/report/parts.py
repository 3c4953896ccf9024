"""What all pages are made of: drawn charts, sortable tables, the templates' environment, a file written whole.

Here: Drawn, draw, write_figures, Table, environment, write.
May import: jinja2, matplotlib (through figures.py), style, shapes, table.
Read next: templates/parts.html.j2; page.py, lab.py and observation.py, the pages.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from normkit.report.shapes import Chart
from normkit.report.style import VARIANTS, LegendEntry, legend, look, theme
from normkit.report.table import Column, Entry, csv_text


@dataclass(frozen=True)
class Drawn:
    """A chart with everything that stands around it on a page."""

    chart: Chart
    panels: tuple[str, ...]  # SVG elements, whose labels matplotlib has escaped
    legend: tuple[LegendEntry, ...]
    sentences: tuple[str, ...]  # what it shows
    meaning: tuple[str, ...]  # what that says
    measured: str
    csv_uri: str


def draw(chart: Chart, sentences: Sequence[str], measured: str, meaning: Sequence[str] = ()) -> Drawn:
    from normkit.report.figures import panel_svgs

    return Drawn(
        chart=chart,
        panels=() if chart.empty else tuple(panel_svgs(chart)),
        legend=legend(chart),
        sentences=tuple(sentences),
        meaning=tuple(meaning),
        measured=measured,
        csv_uri="data:text/csv;charset=utf-8," + quote(csv_text(chart.columns, chart.rows)),
    )


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on a column."""

    name: str
    title: str
    about: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]


def environment() -> Environment:
    """jinja2's, with the look of the pages; what is undefined is an error, and every string is escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals.update(look=look, variants=VARIANTS, light=theme(dark=False), dark=theme(dark=True))
    return made


def write_figures(drawn: Sequence[Drawn], folder: Path) -> None:
    """NAME.png of every chart with its legend; that of an earlier report goes where a chart has no panels now."""
    from normkit.report.figures import png

    folder.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        path = folder / f"{figure.chart.name}.png"
        if figure.panels:
            write(path, png(figure.chart, figure.legend))
        else:
            path.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """The whole file or none of it, whenever the process ends."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide the report from a web server
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
