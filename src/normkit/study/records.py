"""What is kept: one JSON object a line, written the moment a cell is done, and never lost.

Here: new_record (the schema, docs/records.md), RecordStore (records.jsonl), study.json.
May import: study.grid.
Read next: run.py, which fills a store.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import warnings
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from normkit import __version__
from normkit.study.grid import Cell

Record = dict[str, Any]

MEASURED = (
    "grad_norm_by_layer",
    "residual_rms_by_sublayer",
    "skip_weight_by_sublayer",
    "skip_weight_with_gain_by_sublayer",
    "identity_weight_by_sublayer",
    "identity_weight_with_gain_by_sublayer",
    "uncorrelated_identity_weight_by_sublayer",
)


def new_record(cell: Cell, guess_loss: float, seconds_per_step: float | None) -> Record:
    """A record with all fields of the schema; what is not known yet is None."""
    return {
        "key": cell.key,
        **asdict(cell),
        "status": "ok",
        "reason": None,
        "val_loss": None,
        "val_loss_batch_statistics": None,
        "guess_loss": guess_loss,
        "train_loss": [],
        "seconds": None,
        "seconds_per_step": seconds_per_step,
        "parameters": None,
        **{name: {"init": None, "end": None} for name in MEASURED},
        "threads": torch.get_num_threads(),
        "versions": {
            "normkit": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


class RecordStore:
    """The records of one folder, in memory and in records.jsonl, always both or neither.

    Every change rewrites the file beside the old one and renames it over: a reader, or a study that is killed, sees
    the records before or after, never a part. Lines that are no records (torn, or foreign) are moved to
    unreadable.jsonl with a warning. While a store is open the folder is locked against a second study.

    Raises:
        ValueError: another study is running in the folder, or the folder cannot be used.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self.path = folder / "records.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._lock = _lock(folder)
        except OSError as error:
            raise ValueError(f"out: expected a folder to write to, {folder} cannot be one: {error.strerror}") from None
        if fresh:
            _put_aside(folder)
        records, unreadable = read_records(self.path)
        self._records = {record["key"]: record for record in records}  # of several with one key the last counts
        if unreadable:
            self._keep_unreadable(unreadable)

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def __len__(self) -> int:
        return len(self._records)

    def done(self, key: str) -> Record | None:
        """The record of this cell if it need not run again: one that is there and did not fail."""
        record = self._records.get(key)
        return None if record is None or record["status"] == "failed" else record

    def get(self, keys: list[str]) -> list[Record]:
        """The records of these cells, in this order, as far as there are any."""
        return [self._records[key] for key in keys if key in self._records]

    def add(self, record: Record) -> Record:
        """Keep a record, in place of an earlier one with its key; on return it is on the disk."""
        record = finite(record)
        records = {**self._records, record["key"]: record}
        try:
            replace_file(self.path, "".join(json.dumps(one, allow_nan=False) + "\n" for one in records.values()))
            self._records = records
        except BaseException:  # Ctrl-C may fall between the file and the memory: the file is right
            self._records = {one["key"]: one for one in read_records(self.path)[0]}
            raise
        return record

    def _keep_unreadable(self, lines: list[str]) -> None:
        aside = self.folder / "unreadable.jsonl"
        known = aside.read_text(encoding="utf-8", errors="replace").splitlines() if aside.exists() else []
        lines_aside = [*known, *(line for line in lines if line not in known)]
        replace_file(aside, "".join(line + "\n" for line in lines_aside))
        warnings.warn(
            f"{len(lines)} of the lines in {self.path} are no records of a study; they are kept in {aside.name}",
            stacklevel=3,
        )


def read_records(path: Path) -> tuple[list[Record], list[str]]:
    """The records of a file and the lines that are none; nothing of either if the file is missing."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    records, unreadable = [], []
    for line in content.split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("key"), str) and "status" in record:
            records.append(record)
        else:
            unreadable.append(line)
    return records, unreadable


def read_study(folder: Path) -> dict[str, Any]:
    """study.json, or nothing where there is none that can be read."""
    try:
        study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return study if isinstance(study, dict) else {}


def write_study(folder: Path, study: dict[str, Any]) -> None:
    """Write study.json, atomically."""
    replace_file(folder / "study.json", json.dumps(finite(study), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, which is what JSON has for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def replace_file(path: Path, content: str) -> None:
    """Write a file that holds the old content or the new one at every moment, and the new one, on disk, on return."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is on disk when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _put_aside(folder: Path) -> None:
    """Move the study that is in the folder to earlier-1, earlier-2, ... inside it."""
    files = [folder / name for name in ("records.jsonl", "study.json", "unreadable.jsonl")]
    if not any(file.exists() for file in files):
        return
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for file in files:
        if file.exists():
            file.rename(aside / file.name)


def _lock(folder: Path) -> int | None:
    """Hold the folder for this process until the descriptor is closed; the system lets go of a killed one's lock."""
    try:
        import fcntl
    except ImportError:  # Windows: two studies in one folder are then the user's to avoid
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"out: expected a folder that no study uses, another one is running in {folder}; wait or name another"
        ) from None
    return descriptor
