"""The report: a study folder's records -> report.html, summary.csv and figures/*.png.

Here: the two public names. Reading is load.py, numbers cells.py, sentences findings.py and captions.py, figures
    charts.py (data) and figures.py (drawing), the page page.py. matplotlib is loaded only when a figure is drawn.
May import: the standard library, numpy, matplotlib, jinja2; nothing of torch, nothing else of normkit.
Read next: load.py.
"""

from __future__ import annotations

from pathlib import Path

from normkit.report.table import summary_rows

__all__ = ["summary_rows", "write"]


def write(folder: Path) -> Path:
    """Write summary.csv, figures/*.png and report.html into a study folder, each atomically; return report.html's path.

    Raises:
        FileNotFoundError: the folder, its records.jsonl or its study.json is missing.
        ValueError: study.json is no JSON object.
    """
    from normkit.report.page import write as write_page  # loads jinja2

    return write_page(Path(folder))
