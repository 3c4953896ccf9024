"""The command line: `normkit study`, `normkit report`, `normkit info`, `normkit explain`.

Here: flags, the progress display, what is printed. The work is done in study and report.
May import: any public module; report, which brings matplotlib, only inside the commands.
Read next: study/plan.py.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import normkit
from normkit.explain.command import explain_command
from normkit.kernels import cpu
from normkit.placement import PLACEMENT_NAMES
from normkit.studies.command import other_studies
from normkit.study import data
from normkit.study.clock import TimeLeft
from normkit.study.grid import NORMS, Cell, Settings
from normkit.study.plan import Study
from normkit.study.records import Record, RecordStore, read_records, read_study
from normkit.study.run import Watcher, default_jobs

app = typer.Typer(
    help="Normalization in deep networks: a study of what it does, and the layers it runs on.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # errors as one plain sentence: rich would break it over the lines of a box
    pretty_exceptions_enable=False,
)


app.command("explain")(explain_command)


def _whole_number(given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise typer.BadParameter(f"expected a whole number, got {given!r}") from None


def _real_number(given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise typer.BadParameter(f"expected a number, got {given!r}") from None


# typer's own sentence for these does not say what came
_WHOLE: Any = {"parser": _whole_number, "metavar": "<int>"}
_REAL: Any = {"parser": _real_number, "metavar": "<float>"}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"normkit {normkit.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# ----------------------------------------------------------------------------------------------- study


@app.command()
def study(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="placement; warmup, batch-size, running, saturation, padding, cost or claims; or all of those seven."
        ),
    ] = "placement",
    norms: Annotated[str, typer.Option(help=f"Of {', '.join(NORMS)}, with commas.")] = "none,batch,layer,rms",
    placements: Annotated[str, typer.Option(help=f"Of {', '.join(PLACEMENT_NAMES)}, with commas.")] = "pre,post",
    depths: Annotated[str, typer.Option(help="Numbers of transformer blocks, with commas.")] = "2,12",
    seeds: Annotated[str, typer.Option(help="Seeds of weights and batches, with commas.")] = "0",
    steps: Annotated[int, typer.Option(**_WHOLE, help="Training steps of each cell.")] = 200,
    lr: Annotated[float, typer.Option(**_REAL, help="Learning rate of AdamW.")] = 3e-3,
    warmup: Annotated[
        int | None, typer.Option(**_WHOLE, help="Linear warm-up.  [default: a tenth of the steps]")
    ] = None,
    width: Annotated[int, typer.Option(**_WHOLE, help="Features of the residual stream.")] = 64,
    heads: Annotated[int, typer.Option(**_WHOLE, help="Attention heads; they divide the width.")] = 4,
    batch: Annotated[int, typer.Option(**_WHOLE, help="Sequences in a batch.")] = 16,
    seq: Annotated[int, typer.Option(**_WHOLE, help="Bytes in a sequence.")] = 64,
    init: Annotated[str, typer.Option(help="Initialisation: xavier, torch or gpt2.")] = "xavier",
    text: Annotated[Path | None, typer.Option(help="A file to learn.  [default: the Python library's sources]")] = None,
    jobs: Annotated[int | None, typer.Option(**_WHOLE, help="Worker processes.  [default: cores / threads]")] = None,
    threads: Annotated[int, typer.Option(**_WHOLE, help="Threads of each worker.")] = 1,
    out: Annotated[Path, typer.Option(help="The study's folder.")] = Path("normkit-study"),
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on, or move the old records aside.")] = True,
    thorough: Annotated[
        bool, typer.Option(help="The other studies in their long form: more seeds, more steps.")
    ] = False,
) -> None:
    """Train small language models with each norm in each placement, and report what it did to them.

    Other studies have their own grids; of the flags below they take --thorough, --jobs, --out and --resume.

    Each cell's record is kept the moment it is done: Ctrl-C, or worse, loses only the cells that were running, and
    the same command goes on from there.
    """
    if name != "placement":
        other_studies(context, name, thorough=thorough, jobs=jobs or default_jobs(1), out=out, fresh=not resume)
        return
    with _flag_errors():
        settings = Settings(
            norms=_words(norms),
            placements=_words(placements),
            depths=_numbers("depths", depths),
            seeds=_numbers("seeds", seeds),
            steps=steps,
            lr=lr,
            warmup=max(steps, 0) // 10 if warmup is None else warmup,
            width=width,
            heads=heads,
            batch=batch,
            seq=seq,
            init=init,
            jobs=default_jobs(max(threads, 1)) if jobs is None else jobs,
            threads=threads,
        )
        corpus = _corpus(text, seq)
        store = _store(out, fresh=not resume)
    with store:
        _run_and_report(Study(settings, corpus, store, command=_command(sys.argv[1:]), backend=_backend(threads)))


def _run_and_report(study: Study) -> None:
    from normkit import report

    console = _console()
    _print(console, _opening(study))
    try:
        with _terminate_as_interrupt():
            with _watcher(console, study) as watcher:
                study.run(watcher)
            path = report.write(study.store.folder)
    except KeyboardInterrupt as interrupt:
        kept = f"{study.done} of {len(study.cells)} cells are kept in {study.store.folder}"
        _print(console, f"Stopped; {kept}. Go on with:")
        _print(console, f"  {_command([argument for argument in sys.argv[1:] if argument != '--fresh'])}")
        raise typer.Exit(143 if isinstance(interrupt, _Terminated) else 130) from None
    _print_summary(console, study.records)
    _print(console, f"Report: {path}")
    failed = [record for record in study.records if record["status"] == "failed"]
    if failed:
        count = f"{len(failed)} of {len(study.cells)} cells"
        _print(console, f"{count} failed; the same command runs them again. The first:\n  {failed[0]['reason']}")
        raise typer.Exit(1)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="A study's folder.", show_default=False)] = Path("normkit-study"),
) -> None:
    """Write a study's report again from its records."""
    from normkit import report

    for name in ("records.jsonl", "study.json"):
        if not (folder / name).is_file():
            raise typer.BadParameter(
                f"expected the folder of a study, found no {name} in {folder}; run normkit study first",
                param_hint="'FOLDER'",
            )
    path = report.write(folder)
    by_key = {record["key"]: record for record in read_records(folder / "records.jsonl")[0]}
    console = _console()
    _print_summary(console, [by_key[key] for key in read_study(folder).get("keys", by_key) if key in by_key])
    _print(console, f"Report: {path}")


@app.command()
def info() -> None:
    """Print version, backend, instruction set and threads, and for each backend that is off, why."""
    off = cpu.unavailable()
    typer.echo(f"normkit          {normkit.__version__}")
    typer.echo(f"torch            {torch.__version__}")
    typer.echo(f"python           {sys.version.split()[0]}")
    typer.echo(f"threads          {torch.get_num_threads()}")
    typer.echo(f"backend          {next(reason.name for reason in normkit.reasons() if reason.chosen)}")
    typer.echo(f"instruction set  {'none (no compiled core)' if off else cpu.isa()}")
    typer.echo(f"openmp           {'yes' if not off and cpu.openmp() else 'no'}")
    for reason in normkit.reasons():
        if not reason.chosen:
            typer.echo(f"off: {reason.name}: {reason.why}")


# ----------------------------------------------------------------------------------------------- flags


@contextmanager
def _flag_errors() -> Iterator[None]:
    """An error "name: sentence" about one of the study's settings as an error of the flag --name."""
    try:
        yield
    except ValueError as error:
        name, _, sentence = str(error).partition(": ")
        if not name.isidentifier():  # not one of ours
            raise
        raise typer.BadParameter(sentence, param_hint=f"'--{name}'") from None


def _words(given: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in given.split(","))


def _numbers(name: str, given: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in given.split(","))
    except ValueError:
        raise ValueError(f"{name}: expected whole numbers separated by commas, got {given!r}") from None


def _corpus(text: Path | None, seq: int) -> data.Corpus:
    corpus = data.standard_library() if text is None else data.text_file(text)
    data.check_length(corpus, seq)
    return corpus


def _store(out: Path, *, fresh: bool) -> RecordStore:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = RecordStore(out, fresh=fresh)
    for warning in caught:
        typer.echo(f"Warning: {warning.message}", err=True)
    return store


def _command(arguments: list[str]) -> str:
    return shlex.join(["normkit", *arguments])


def _backend(threads: int) -> str:
    """Who computes the norms, for study.json."""
    name = next(reason.name for reason in normkit.reasons() if reason.chosen)
    isa = f" ({cpu.isa()})" if name == "cpu" else ""
    return f"{name}{isa}, {threads} thread{'s' if threads > 1 else ''} a worker"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------------- display


def _console() -> Console:
    """rich's console; for a file or a pipe as wide as its lines and without escape sequences, whatever FORCE_COLOR."""
    terminal = sys.stdout.isatty()
    return Console(force_terminal=terminal, width=None if terminal else 200, highlight=False)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _opening(study: Study) -> str:
    done, settings = study.done, study.settings
    kept = f", {done} of them already done" if done else ""
    return (
        f"{len(study.cells)} cells{kept}: {settings.steps} steps of {settings.batch} x {settings.seq} bytes each, "
        f"{settings.jobs} at a time, on {study.corpus.name} ({len(study.corpus.train) / 1e6:.1f} MB, "
        f"{len(study.corpus.held_out) / 1e6:.1f} MB held out)"
    )


def _print_summary(console: Console, records: list[Record]) -> None:
    from normkit import report

    columns, rows = report.summary_rows(records)
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):  # on a narrow terminal headers break before values do
        table.add_column(column, overflow="fold", min_width=max((len(row[index]) for row in rows), default=0))
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table, markup=False)
    console.print()


def _outcome(record: Record) -> str:
    """What a finished cell's line says."""
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    loss = "no loss" if record["val_loss"] is None else f"loss {record['val_loss']:.3f}"
    return f"{record['status']}, {loss} (guessing {record['guess_loss']:.3f}), {record['seconds']:.1f} s"


def _watcher(console: Console, study: Study) -> _Lines | _Bars:
    return _Bars(console, study) if console.is_terminal and not console.is_dumb_terminal else _Lines(console, study)


class _Lines(Watcher, AbstractContextManager[Watcher]):
    """Progress as plain lines, for logs: one for each finished cell, and now and then one in between."""

    def __init__(self, console: Console, study: Study) -> None:
        self._console, self._study = console, study
        self._time_left = TimeLeft([], {}, 1)
        self._said = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        pass

    def timing(self, done: int, total: int) -> None:
        if done == 1:
            self._say("Measuring seconds per step, one configuration at a time ...")

    def planned(self, cells: list[Cell], seconds_per_step: dict[Cell, float | None]) -> None:
        self._time_left = TimeLeft(cells, seconds_per_step, self._study.settings.jobs)
        self._say(f"Training; about {self._time_left} left")

    def stepped(self, cell: Cell, step: int, loss: float) -> None:
        self._time_left.at(cell, step)
        if time.monotonic() - self._said > 30:
            self._say(f"  {cell.label}: step {step} of {cell.steps}, loss {loss:.3f}; {self._time_left} left")

    def finished(self, cell: Cell, record: Record) -> None:
        self._time_left.at(cell, cell.steps)
        count = f"[{self._study.done}/{len(self._study.cells)}]"
        self._say(f"{count} {cell.label}: {_outcome(record)}; {self._time_left} left")

    def _say(self, line: str) -> None:
        _print(self._console, line)
        self._said = time.monotonic()


class _Bars(Watcher, AbstractContextManager[Watcher]):
    """Progress on a terminal: a bar for the study, one for each running cell, a line for each that is done."""

    def __init__(self, console: Console, study: Study) -> None:
        self._console, self._study = console, study
        self._time_left = TimeLeft([], {}, 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._all = self._progress.add_task("starting", total=1, unit="rounds", note="")
        self._bars: dict[Cell, TaskID] = {}

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def timing(self, done: int, total: int) -> None:
        self._progress.update(
            self._all, completed=done, total=total, description="seconds per step", note="one configuration at a time"
        )

    def planned(self, cells: list[Cell], seconds_per_step: dict[Cell, float | None]) -> None:
        self._time_left = TimeLeft(cells, seconds_per_step, self._study.settings.jobs)
        self._progress.reset(self._all, description="study", total=len(self._study.cells), unit="cells", note="")
        self._show_total()

    def started(self, cell: Cell) -> None:
        self._bars[cell] = self._progress.add_task(f"  {cell.label}", total=cell.steps, unit="steps", note="")

    def stepped(self, cell: Cell, step: int, loss: float) -> None:
        self._time_left.at(cell, step)
        self._progress.update(self._bars[cell], completed=step, note=f"loss {loss:.3f}")
        self._show_total()

    def finished(self, cell: Cell, record: Record) -> None:
        self._time_left.at(cell, cell.steps)
        self._progress.remove_task(self._bars.pop(cell))
        _print(self._console, f"{cell.label}: {_outcome(record)}")
        self._show_total()

    def _show_total(self) -> None:
        self._progress.update(self._all, completed=self._study.done, note=f"{self._time_left} left")


if __name__ == "__main__":
    app(prog_name="normkit")
