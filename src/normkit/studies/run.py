"""Run a study's cells, keep every record the moment it is there, and write the report.

Here: run_study, report_studies.
May import: study (its record store, its executors), report, protocol.
Read next: protocol.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from normkit import __version__
from normkit.report import lab
from normkit.report.parts import draw
from normkit.studies import STUDIES
from normkit.studies.protocol import Settings, Study
from normkit.study.processes import Executor, Failed
from normkit.study.records import RecordStore

Kept = dict[str, Any]  # a line of records.jsonl
Say = Callable[[str], None]


def key(study: str, settings: Settings) -> str:
    """What makes a record reusable: the study, equal settings and the same version of normkit."""
    text = json.dumps({"study": study, "normkit": __version__, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_study(
    study: Study, folder: Path, executor: Executor, *, thorough: bool, jobs: int, fresh: bool, say: Say
) -> list[Kept]:
    """The study's records in the order of its cells; those that the folder holds are not measured again.

    Cells run `jobs` at a time, on one thread each. A cell that raises is kept as failed, with the reason, and runs
    again the next time; so does one whose process dies.

    Raises:
        ValueError: the folder cannot be used.
    """
    cells = study.cells(thorough)
    keys = [key(study.name, settings) for settings in cells]
    with RecordStore(folder, fresh=fresh) as store:
        pending = [(study.name, k, cell) for k, cell in zip(keys, cells, strict=True) if store.done(k) is None]
        done = len(cells) - len(pending)
        say(f"{study.name}: {len(cells)} cells, {done} of them already done")
        for index, found in executor.results(measure, pending, jobs=jobs, threads=1):
            done += 1
            failed = isinstance(found, Failed)
            kept = store.add(_record(*pending[index], {}, None, found.reason) if failed else found)
            what = f"failed: {kept['reason']}" if kept["status"] == "failed" else f"{kept['seconds']:.1f} s"
            say(f"[{done}/{len(cells)}] {study.name}: {_label(kept['settings'])}; {what}")
        return store.get(keys)


def _label(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("text", "lr", "rounds"))


def measure(name: str, cell_key: str, settings: Settings) -> Kept:
    """One cell's record, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        found = STUDIES[name].run(settings)
    finally:
        torch.set_num_threads(threads)
    return _record(name, cell_key, settings, found, time.perf_counter() - begin, None)


def _record(
    name: str, cell_key: str, settings: Settings, measured: dict[str, Any], seconds: float | None, reason: str | None
) -> Kept:
    return {
        "key": cell_key,
        "study": name,
        "status": "ok" if reason is None else "failed",
        "reason": reason,
        "settings": settings,
        "measured": measured,
        "seconds": seconds,
        "versions": {"normkit": __version__, "torch": torch.__version__},
    }


def report_studies(
    records: dict[str, list[Kept]],
    folder: Path,
    name: str,
    command: Callable[[str], str],
    first: Sequence[lab.Section] = (),
) -> Path:
    """Write folder/report.html with a section for each study that has records, and folder/figures/*.png.

    Args:
        records: of each study, by its name.
        folder: where the page goes.
        name: of the study, or "all".
        command: a name -> the command that runs it.
        first: sections that come before these.
    """
    sections = list(first)
    for each, kept in records.items():
        study = STUDIES[each]
        good = [{**record["settings"], **record["measured"]} for record in kept if record["status"] == "ok"]
        failed = [record for record in kept if record["status"] != "ok"]
        notes = [f"{len(failed)} of {len(kept)} cells failed; the first: {failed[0]['reason']}"] if failed else []
        sections.append(
            lab.Section(
                name=each,
                question=study.question,
                data=study.data,
                findings=tuple(study.findings(good)) if good else (),
                figures=tuple(
                    draw(figure.chart, figure.sentences, figure.measured)
                    for figure in (study.figures(good) if good else ())
                    if not figure.chart.empty
                ),
                table=lab.measured_table(f"cells-{each}", study.table_about, study.columns, study.table_rows(good)),
                notes=tuple(notes),
                seconds=sum(record["seconds"] or 0.0 for record in kept),
                command=command(each),
            )
        )
    versions: dict[str, str] = next((record["versions"] for kept in records.values() for record in kept), {})
    return lab.save(sections, folder / "report.html", command(name), versions)
