"""Page: a run -> report.html, summary.csv and figures/*.png in its folder.

Here: what goes where; every string from the records is escaped by the template.
May import: jinja2 and the rest of this package.
Read next: templates/report.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normkit.report.captions import CAPTIONS, MEANING, MEASURED
from normkit.report.cells import most_seeds
from normkit.report.charts import all_charts
from normkit.report.findings import batch_paragraph, findings, init_paragraph, notes, opening, scope
from normkit.report.load import load, number
from normkit.report.parts import Drawn, Table, draw, environment, write_figures
from normkit.report.parts import write as write_file
from normkit.report.table import summary_csv, verdict
from normkit.report.view import View, view
from normkit.report.wording import duration, listing, plural, size, whole


def drawn_charts(of: View) -> list[Drawn]:
    """Every chart of the study with its sentences; one that no record has numbers for has no panels."""
    drawn = []
    for chart in all_charts(of.shown, of.run.study.unit_variance_skip_weight).values():
        meaning = [MEANING[chart.name]] if chart.name in MEANING else []
        if chart.name == "batchnorm-at-eval":
            meaning.append(batch_paragraph(of))
        if chart.name == "identity-weight":
            meaning.append(init_paragraph(of))
        meaning = [paragraph for paragraph in meaning if paragraph]
        drawn.append(draw(chart, CAPTIONS[chart.name](of), MEASURED[chart.name], meaning))
    return drawn


def cells_table(of: View) -> Table:
    """A row per setting."""
    columns, rows = verdict(of.cells)
    about = (
        "A row per setting, by depth and within it lowest validation loss first. Losses are in nats per byte, lower is "
        "better; the lowest of each depth is bold."
    )
    return Table("verdict", "Every cell", about, columns, rows)


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


def render(of: View, drawn: list[Drawn]) -> str:
    """The page as text."""
    study = of.run.study
    return (
        environment()
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
            table=cells_table(of),
            drawn=[figure for figure in drawn if figure.panels],
            undrawn=listing([figure.chart.title.lower() for figure in drawn if not figure.panels]),
            reproduction=_reproduction(of),
        )
    )


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
    of = view(load(folder))
    drawn = drawn_charts(of)
    write_figures(drawn, folder / "figures")
    write_file(folder / "summary.csv", summary_csv(of.cells).encode())
    write_file(folder / "report.html", render(of, drawn).encode())
    return folder / "report.html"
