"""The study of placements as one section among others.

Here: placement_section.
May import: the rest of this package.
Read next: lab.py, the page; page.py, the study's own page, which shows more.
"""

from __future__ import annotations

import math
from pathlib import Path

from normkit.report.findings import findings, notes, opening, scope
from normkit.report.lab import Section
from normkit.report.load import load
from normkit.report.page import cells_table, drawn_charts
from normkit.report.view import view


def placement_section(folder: Path, command: str) -> Section:
    """What the study in a folder (docs/records.md) found; `command` runs it alone.

    Raises:
        FileNotFoundError: its records.jsonl or its study.json is missing.
        ValueError: study.json is no JSON object.
    """
    of = view(load(folder))
    return Section(
        name="placement",
        question="Which norm, where, and how deep?",
        data=opening(of).rstrip("."),
        findings=tuple(text for text in (scope(of), *(finding.text for finding in findings(of))) if text),
        figures=tuple(drawn for drawn in drawn_charts(of) if drawn.panels),
        table=cells_table(of),
        notes=notes(of),
        seconds=sum(record.seconds for record in of.run.records if math.isfinite(record.seconds)),
        command=command,
    )
