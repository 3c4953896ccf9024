"""Run a study's cells, keep every record the moment it is there, and write the report.

Here: run_study, report_studies.
May import: study (its record store, its cluster), report, protocol.
Read next: protocol.py.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from normkit import __version__
from normkit.report import lab
from normkit.report.parts import draw
from normkit.studies import STUDIES
from normkit.studies.protocol import Settings, Study
from normkit.study.cluster import Cluster, why
from normkit.study.records import RecordStore
from normkit.study.worker import sentence

Kept = dict[str, Any]  # a line of records.jsonl
Say = Callable[[str], None]


def key(study: str, settings: Settings) -> str:
    """What makes a record reusable: the study, equal settings and the same version of normkit."""
    text = json.dumps({"study": study, "normkit": __version__, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_study(
    study: Study, folder: Path, *, thorough: bool, jobs: int, fresh: bool, say: Say, cluster: Cluster | None = None
) -> list[Kept]:
    """The study's records in the order of its cells; those that the folder holds are not measured again.

    Cells run in `jobs` processes of one thread each, here or on a Ray cluster. A cell that raises is kept as failed,
    with the reason, and runs again the next time; so does one whose process dies.

    Raises:
        ValueError: the folder cannot be used.
    """
    cells = study.cells(thorough)
    keys = [key(study.name, settings) for settings in cells]
    with RecordStore(folder, fresh=fresh) as store:
        pending = [(k, settings) for k, settings in zip(keys, cells, strict=True) if store.done(k) is None]
        done = len(cells) - len(pending)
        say(f"{study.name}: {len(cells)} cells, {done} of them already done")
        for record in (
            _measured(study.name, pending, jobs) if cluster is None else _on(cluster, study.name, pending, jobs)
        ):
            done += 1
            kept = store.add(record)
            what = f"failed: {kept['reason']}" if kept["status"] == "failed" else f"{kept['seconds']:.1f} s"
            say(f"[{done}/{len(cells)}] {study.name}: {_label(kept['settings'])}; {what}")
        return store.get(keys)


def _label(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("text", "lr", "rounds"))


def _measured(name: str, pending: Sequence[tuple[str, Settings]], jobs: int) -> Iterator[Kept]:
    """Records as they come. A pool whose process died is replaced; the cell that it had is failed."""
    waiting = list(pending)
    while waiting:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_leave_interrupts_to_the_parent)
        try:
            running: dict[Future[Kept], tuple[str, Settings]] = {}
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    running[pool.submit(measure, name, *cell)] = cell
                broken = False
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    if (error := future.exception()) is not None:
                        broken = True
                        yield _record(name, *cell, {}, None, f"the worker process died: {error}")
                    else:
                        yield future.result()
                if broken:
                    waiting = [*running.values(), *waiting]
                    break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.kill()


def _on(cluster: Cluster, name: str, pending: Sequence[tuple[str, Settings]], jobs: int) -> Iterator[Kept]:
    """Records as they come from a Ray cluster."""
    for index, future in cluster.results(measure, [(name, *cell) for cell in pending], jobs=jobs, threads=1):
        error = future.exception()
        yield future.result() if error is None else _record(name, *pending[index], {}, None, sentence(why(error)))


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group


def measure(name: str, cell_key: str, settings: Settings) -> Kept:
    """One cell, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        found = STUDIES[name].run(settings)
    except Exception as error:  # whatever a cell raises is its own failure, not the study's
        return _record(name, cell_key, settings, {}, None, sentence(error))
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
