"""Page: a run -> report.html, summary.csv and figures/*.png in its folder.

Here: what goes where; every string from the records is escaped by the template.
May import: jinja2 and the rest of this package.
Read next: templates/report.html.j2.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from normkit.report.captions import CAPTIONS, MEANING, MEASURED
from normkit.report.cells import most_seeds
from normkit.report.charts import all_charts
from normkit.report.findings import batch_paragraph, findings, init_paragraph, notes, opening, scope
from normkit.report.load import load, number
from normkit.report.shapes import Chart
from normkit.report.style import LegendEntry, legend, look, theme
from normkit.report.table import csv_text, summary_csv, verdict
from normkit.report.view import View, view
from normkit.report.wording import duration, listing, plural, size, whole

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Drawn:
    """A chart with everything that stands around it on the page."""

    chart: Chart
    panels: list[str]  # SVG elements, whose labels matplotlib has escaped
    legend: tuple[LegendEntry, ...]
    sentences: list[str]
    meaning: list[str]
    measured: str
    csv_uri: str


def _draw(chart: Chart, of: View) -> Drawn:
    from normkit.report.figures import panel_svgs

    sentences = CAPTIONS[chart.name](of)
    meaning = [MEANING[chart.name]] if chart.name in MEANING else []
    if chart.name == "batchnorm-at-eval":
        meaning.append(batch_paragraph(of))
    if chart.name == "identity-weight":
        meaning.append(init_paragraph(of))
    return Drawn(
        chart=chart,
        panels=[] if chart.empty else panel_svgs(chart),
        legend=legend(chart),
        sentences=sentences,
        meaning=[paragraph for paragraph in meaning if paragraph],
        measured=MEASURED[chart.name],
        csv_uri="data:text/csv;charset=utf-8," + quote(csv_text(chart.columns, chart.rows)),
    )


def _words(value: object) -> str:
    """A setting as text: lists with commas, whole floats without their point."""
    if isinstance(value, list | tuple):
        return ", ".join(_words(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("data", str(data["name"]))] if data.get("name") else []
    for title, part in (("trained on", "train"), ("held out", "held_out")):
        files, count = number(data.get(f"files_{part}")), number(data.get(f"bytes_{part}"))
        if math.isfinite(files) or math.isfinite(count):
            rows.append((title, f"{whole(files)} files, {size(count)} ({whole(count)} bytes)"))
    return rows


def _reproduction(of: View) -> list[tuple[str, str]]:
    """What another person needs to run this again, and what to expect."""
    study = of.run.study
    versions: dict[str, list[str]] = {}
    for record in of.run.records:
        for name, version in record.versions.items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    cores = number(study.machine.get("cores"))
    machine = [str(study.machine.get("cpu") or ""), plural(int(cores), "core") if math.isfinite(cores) else ""]
    rows = [
        ("versions", ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())),
        ("machine", ", ".join(part for part in (*machine, str(study.machine.get("platform") or "")) if part)),
        ("backend", study.backend),
        *_data_rows(study.data),
        *((name, _words(value)) for name, value in study.settings.items()),
        ("started", study.created),
        ("finished", study.finished or "not yet"),
        ("took", duration(study.seconds) if math.isfinite(study.seconds) else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["look"] = look
    return environment


def render(of: View, drawn: list[Drawn]) -> str:
    """The page as text."""
    columns, rows = verdict(of.cells)
    study = of.run.study
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            study=study,
            opening=opening(of),
            scope=scope(of),
            findings=findings(of),
            notes=notes(of),
            facts=[
                fact
                for fact in (
                    study.created[:10],
                    plural(len(of.run.records), "cell"),
                    plural(most_seeds(of.cells), "seed") + " per setting" if of.cells else "",
                    str(study.machine.get("cpu") or ""),
                    f"{duration(study.seconds)} in all" if math.isfinite(study.seconds) else "",
                )
                if fact
            ],
            columns=columns,
            rows=rows,
            drawn=[figure for figure in drawn if figure.panels],
            undrawn=listing([figure.chart.title.lower() for figure in drawn if not figure.panels]),
            reproduction=_reproduction(of),
            light=theme(dark=False),
            dark=theme(dark=True),
        )
    )


def _write(path: Path, content: bytes) -> None:
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


def write(folder: Path) -> Path:
    """Write the report of a study folder: summary.csv, figures/*.png and report.html, each atomically.

    Args:
        folder: holds records.jsonl and study.json (docs/records.md).

    Returns:
        The path of report.html: one self-contained file.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: study.json is no JSON object.
    """
    from normkit.report.figures import png

    of = view(load(folder))
    drawn = [_draw(chart, of) for chart in all_charts(of.shown, of.run.study.unit_variance_skip_weight).values()]
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for figure in drawn:
        path = figures / f"{figure.chart.name}.png"
        if figure.panels:
            _write(path, png(figure.chart, figure.legend))
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    _write(folder / "summary.csv", summary_csv(of.cells).encode())
    _write(folder / "report.html", render(of, drawn).encode())
    return folder / "report.html"
