"""Records: a study folder -> typed values.

Here: reading `records.jsonl` and `study.json`: strict about missing files, forgiving about torn lines.
May import: the standard library.
Read next: cells.py, which puts the seeds of one setting together. The format is described in docs/records.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAN = math.nan
STATUSES = ("ok", "diverged", "failed")


@dataclass(frozen=True)
class Profile:
    """One number per block or sublayer at init and at the end; () where it was not measured."""

    init: tuple[float, ...] = ()
    end: tuple[float, ...] = ()

    def at(self, moment: str) -> tuple[float, ...]:
        return self.init if moment == "init" else self.end


@dataclass(frozen=True)
class Record:
    """One trained cell. Missing numbers are NaN."""

    key: str
    norm: str
    placement: str | None
    depth: int
    seed: int
    lr: float
    status: str
    reason: str
    val_loss: float
    val_loss_batch_statistics: float
    guess_loss: float
    train_loss: tuple[tuple[float, float], ...]
    seconds: float
    seconds_per_step: float
    parameters: float
    profiles: Mapping[str, Profile]
    versions: Mapping[str, str]


PROFILES = (
    "grad_norm_by_layer",
    "residual_rms_by_sublayer",
    "skip_weight_by_sublayer",
    "skip_weight_with_gain_by_sublayer",
    "identity_weight_by_sublayer",
    "identity_weight_with_gain_by_sublayer",
    "uncorrelated_identity_weight_by_sublayer",
)


@dataclass(frozen=True)
class Study:
    """What study.json says of the whole run; empty where it says nothing."""

    name: str = "study"
    command: str = ""
    created: str = ""
    finished: str = ""
    seconds: float = NAN
    backend: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    unit_variance_skip_weight: float = 1 / math.sqrt(2)


@dataclass(frozen=True)
class Run:
    """A study folder, read: the grid's records in the grid's order, and what had to be left out."""

    study: Study
    records: tuple[Record, ...]
    skipped_lines: int = 0  # lines that are no record: torn by a kill, or edited
    other_records: int = 0  # records of an earlier grid in the same folder
    cells_to_come: int = 0  # cells of this grid without a record


def number(value: object) -> float:
    """`value` as float; NaN for null, for what is no number and for infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NAN
    return float(value) if math.isfinite(value) else NAN


def _numbers(value: object) -> tuple[float, ...]:
    return tuple(number(item) for item in value) if isinstance(value, list | tuple) else ()


def _profile(value: object) -> Profile:
    return Profile(_numbers(value.get("init")), _numbers(value.get("end"))) if isinstance(value, Mapping) else Profile()


def _curve(value: object) -> tuple[tuple[float, float], ...]:
    pairs = (_numbers(item) for item in value) if isinstance(value, list | tuple) else iter(())
    return tuple((pair[0], pair[1]) for pair in pairs if len(pair) == 2 and math.isfinite(pair[0]))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str:
    return "" if value is None else str(value)


def parse_record(raw: object) -> Record | None:
    """One line's object as a Record; None when it lacks what makes it a cell (norm, depth, status)."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("norm"), str) or raw.get("status") not in STATUSES:
        return None
    depth = number(raw.get("depth"))
    if not depth >= 1:
        return None
    seed = number(raw.get("seed"))
    return Record(
        key=_text(raw.get("key")),
        norm=raw["norm"],
        placement=None if raw.get("placement") is None else str(raw["placement"]),
        depth=int(depth),
        seed=0 if math.isnan(seed) else int(seed),
        lr=number(raw.get("lr")),
        status=raw["status"],
        reason=_text(raw.get("reason")),
        val_loss=number(raw.get("val_loss")),
        val_loss_batch_statistics=number(raw.get("val_loss_batch_statistics")),
        guess_loss=number(raw.get("guess_loss")),
        train_loss=_curve(raw.get("train_loss")),
        seconds=number(raw.get("seconds")),
        seconds_per_step=number(raw.get("seconds_per_step")),
        parameters=number(raw.get("parameters")),
        profiles={name: _profile(raw.get(name)) for name in PROFILES},
        versions={str(name): _text(version) for name, version in _mapping(raw.get("versions")).items()},
    )


def parse_records(raw_records: Iterable[object]) -> tuple[tuple[Record, ...], int]:
    """The records among `raw_records`, the last one where a key repeats, and how many were none."""
    kept: dict[object, Record] = {}
    skipped = 0
    for position, raw in enumerate(raw_records):
        record = parse_record(raw)
        if record is None:
            skipped += 1
        else:
            kept[record.key or position] = record  # a failed cell that ran again has two lines
    return tuple(kept.values()), skipped


def _lines(text: str) -> Iterable[object]:
    for line in text.splitlines():
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                yield None


def _study(path: Path) -> Study:
    try:
        raw = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"report: study.json must hold one JSON object, got unreadable text at line {error.lineno}; "
            "run the study again with the same command, finished cells are kept."
        ) from None
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"report: study.json must hold one JSON object, got {type(raw).__name__}; "
            "run the study again with the same command, finished cells are kept."
        )
    unit = number(raw.get("unit_variance_skip_weight"))
    keys = raw.get("keys")
    return Study(
        name=_text(raw.get("study")) or "study",
        command=_text(raw.get("command")),
        created=_text(raw.get("created")),
        finished=_text(raw.get("finished")),
        seconds=number(raw.get("seconds")),
        backend=_text(raw.get("backend")),
        settings=_mapping(raw.get("settings")),
        data=_mapping(raw.get("data")),
        machine=_mapping(raw.get("machine")),
        keys=tuple(str(key) for key in keys) if isinstance(keys, list) else (),
        unit_variance_skip_weight=1 / math.sqrt(2) if math.isnan(unit) else unit,
    )


def load(folder: Path) -> Run:
    """Read a study folder.

    Raises: FileNotFoundError when the folder, its records.jsonl or its study.json is missing; ValueError when
    study.json is no JSON object. A torn line of records.jsonl is skipped and counted.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"report: expected a study folder, got {str(folder)!r}, which is no folder; "
            f"write one with: normkit study --out {folder}"
        )
    for name in ("records.jsonl", "study.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"report: expected {name} in {str(folder)!r}, found none; write it with: normkit study --out {folder}"
            )
    study = _study(folder / "study.json")
    text = (folder / "records.jsonl").read_text(encoding="utf-8", errors="replace")
    records, skipped = parse_records(_lines(text))
    if not study.keys:
        return Run(study, records, skipped_lines=skipped)
    by_key = {record.key: record for record in records}
    of_grid = tuple(by_key[key] for key in dict.fromkeys(study.keys) if key in by_key)
    return Run(
        study,
        of_grid,
        skipped_lines=skipped,
        other_records=len(records) - len(of_grid),
        cells_to_come=len(dict.fromkeys(study.keys)) - len(of_grid),
    )
