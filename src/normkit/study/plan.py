"""One study from its settings to its folder: which cells it has, which are left, and study.json.

Here: Study.
May import: theory, study.{data, grid, processes, records, run}.
Read next: run.py, which runs the cells that are left.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from normkit.study.data import Corpus
from normkit.study.grid import Settings, expand
from normkit.study.processes import Executor
from normkit.study.records import Record, RecordStore, read_study, write_study
from normkit.study.run import Watcher, run_cells
from normkit.theory import post_skip_weight


class Study:
    """The cells of a grid and what a folder already holds of them.

    Args:
        settings: the grid and how to run it.
        corpus: the text to learn.
        store: the folder's records.
        command, backend: words for study.json: how the study was started, and who computes the norms.
        executor: where the cells run.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        store: RecordStore,
        *,
        command: str,
        backend: str,
        executor: Executor,
    ) -> None:
        self.settings, self.corpus, self.store, self.executor = settings, corpus, store, executor
        self.cells = expand(settings, corpus.digest)
        self.keys = [cell.key for cell in self.cells]
        self.description = self._describe(command, backend)

    @property
    def records(self) -> list[Record]:
        """The records that there are, in the order of the cells."""
        return self.store.get(self.keys)

    @property
    def done(self) -> int:
        """How many cells need not run (again)."""
        return sum(self.store.done(key) is not None for key in self.keys)

    def run(self, watcher: Watcher) -> None:
        """Run what is left, and keep study.json up to date; an interrupt leaves both as far as they are."""
        if self.description["finished"] is not None:
            return
        before, started = self.description["seconds"] or 0.0, time.monotonic()
        write_study(self.store.folder, self.description)
        try:
            jobs, threads = self.settings.jobs, self.settings.threads
            run_cells(self.executor, self.cells, self.corpus, self.store, jobs=jobs, threads=threads, watcher=watcher)
            self.description["finished"] = _now()
        finally:
            self.description["seconds"] = before + time.monotonic() - started
            write_study(self.store.folder, self.description)

    def _describe(self, command: str, backend: str) -> dict[str, Any]:
        """study.json. Going on with a study keeps when it was created, when it finished and the seconds so far."""
        earlier = read_study(self.store.folder)
        same = earlier if earlier.get("keys") == self.keys else {}
        return {
            "study": "placement",
            "command": command,
            "created": same.get("created") or _now(),
            "finished": same.get("finished") if self.done == len(self.cells) else None,
            "settings": asdict(self.settings),
            "data": {
                "name": self.corpus.name,
                "digest": self.corpus.digest,
                "files_train": self.corpus.files_train,
                "files_held_out": self.corpus.files_held_out,
                "bytes_train": len(self.corpus.train),
                "bytes_held_out": len(self.corpus.held_out),
            },
            "machine": self.executor.machine,
            "backend": backend,
            "keys": self.keys,
            "seconds": same.get("seconds"),
            "unit_variance_skip_weight": post_skip_weight(),
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
