"""The command line: `normkit study`, `normkit report`, `normkit info`, `normkit explain`.

Here: flags, what is printed, what an interrupt leaves. The work is done in study, studies and report.
May import: any public module; report, which brings matplotlib, only inside the commands.
Read next: study/plan.py.
"""

from __future__ import annotations

import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import normkit
from normkit.explain.command import explain_command
from normkit.kernels import cpu
from normkit.placement import PLACEMENT_NAMES
from normkit.studies import STUDIES
from normkit.study import data
from normkit.study.cluster import Cluster
from normkit.study.grid import NORMS, Settings
from normkit.study.plan import Study
from normkit.study.processes import Executor, Processes
from normkit.study.progress import say, watcher
from normkit.study.records import Record, RecordStore, read_records, read_study

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


_OF_EVERY_STUDY = ("context", "name", "thorough", "jobs", "ray", "out", "resume")

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
        typer.Argument(help=f"placement, {', '.join(STUDIES)}, or all of them in one report."),
    ] = "placement",
    norms: Annotated[str, typer.Option(help=f"Of {', '.join(NORMS)}, with commas.")] = "none,batch,layer,rms",
    placements: Annotated[str, typer.Option(help=f"Of {', '.join(PLACEMENT_NAMES)}, with commas.")] = "pre,post",
    depths: Annotated[str, typer.Option(help="Numbers of transformer blocks, with commas.")] = "2,12",
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of weights and batches, with commas.  [default: 0; with --thorough 0 to 4]"),
    ] = None,
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
    jobs: Annotated[int | None, typer.Option(**_WHOLE, help="Cells at a time.  [default: cores / threads]")] = None,
    threads: Annotated[int, typer.Option(**_WHOLE, help="Threads of each worker.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Run on Ray: local starts one here; host:port, or auto, is a cluster that runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The study's folder.")] = Path("normkit-study"),
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on, or move the old records aside.")] = True,
    thorough: Annotated[
        bool, typer.Option(help="The long form: more seeds; of the other studies more steps or settings, too.")
    ] = False,
) -> None:
    """Train small language models with each norm in each placement, and report what it did to them.

    Other studies have their own grids; of the flags below they take --thorough, --jobs, --ray, --out and --resume.

    Each cell's record is kept the moment it is done: Ctrl-C, or worse, loses only the cells that were running, and
    the same command goes on from there.
    """
    _expect_a_study(context, name)
    records: list[Record] = []
    with _flag_errors():
        settings = Settings(
            norms=_words(norms),
            placements=_words(placements),
            depths=_numbers("depths", depths),
            seeds=_numbers("seeds", seeds or ("0,1,2,3,4" if thorough else "0")),
            steps=steps,
            lr=lr,
            warmup=max(steps, 0) // 10 if warmup is None else warmup,
            width=width,
            heads=heads,
            batch=batch,
            seq=seq,
            init=init,
            jobs=1 if jobs is None else jobs,
            threads=threads,
        )
        corpus = _corpus(text, seq) if name in ("placement", "all") else None
        executor: Executor = Processes() if ray is None else Cluster(ray)
    with executor:
        if jobs is None:
            settings = replace(settings, jobs=max(1, executor.cores // threads))
        if corpus is not None:
            folder = out if name == "placement" else out / "placement"
            records += _placement(settings, corpus, folder, executor, fresh=not resume)
        if name != "placement":
            records += _others(name, settings.jobs, out, executor, thorough=thorough, fresh=not resume)
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        count = f"{len(failed)} of {len(records)} cells"
        say(_console(), f"{count} failed; the same command runs them again. The first:\n  {failed[0]['reason']}")
        raise typer.Exit(1)


def _placement(
    settings: Settings, corpus: data.Corpus, folder: Path, executor: Executor, *, fresh: bool
) -> list[Record]:
    """Run the study of placements and write its report; the records of all cells."""
    from normkit import report

    console = _console()
    with _flag_errors():
        store = _store(folder, fresh=fresh)
    with store:
        words = {"command": _command(sys.argv[1:]), "backend": _backend(settings.threads)}
        study = Study(settings, corpus, store, executor=executor, **words)
        say(console, _opening(study))
        with _interruptible(console, lambda: f"{study.done} of {len(study.cells)} cells are kept in {folder}"):
            with watcher(console, study) as watching:
                study.run(watching)
            path = report.write(folder)
        _print_summary(console, study.records)
        say(console, f"Report: {path}")
        return study.records


def _others(name: str, jobs: int, out: Path, executor: Executor, *, thorough: bool, fresh: bool) -> list[Record]:
    """Run another study, or all of them, and write their report; the records of all cells."""
    from normkit.studies.run import report_studies, run_study

    console = _console()
    records = {}
    with _interruptible(console, lambda: f"what is done is kept in {out}"):
        for each in STUDIES if name == "all" else (name,):
            with _flag_errors():
                records[each] = run_study(
                    STUDIES[each], out / each, executor, thorough=thorough, jobs=jobs, fresh=fresh,
                    say=lambda line: say(console, line),
                )  # fmt: skip

        def command(each: str) -> str:
            return _command(["study", each, *(["--thorough"] if thorough else [])])

        if name == "all":
            from normkit.report.placement import placement_section

            first = (placement_section(out / "placement", command("placement")),)
            path = report_studies(records, out, name, command, first)
        else:
            path = report_studies(records, out / name, name, command)
    say(console, f"Report: {path}")
    return [record for kept in records.values() for record in kept]


def _expect_a_study(context: typer.Context, name: str) -> None:
    """One that there is, and no flag of another one."""
    if name not in ("placement", *STUDIES, "all"):
        raise typer.BadParameter(f"expected placement, {', '.join(STUDIES)} or all, got {name!r}", param_hint="NAME")
    if name == "placement":
        return
    for parameter in context.params:
        given = context.get_parameter_source(parameter)
        if parameter not in _OF_EVERY_STUDY and given is not None and given.name == "COMMANDLINE":
            flag = f"--{parameter}"
            raise typer.BadParameter(
                f"expected no {flag} with {name}, it is placement's; {name} has a grid of its own", param_hint=flag
            )


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
    say(console, f"Report: {path}")


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


@contextmanager
def _interruptible(console: Console, kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command with what is kept and how to go on."""
    try:
        with _terminate_as_interrupt():
            yield
    except KeyboardInterrupt as interrupt:
        again = _command([argument for argument in sys.argv[1:] if argument != "--fresh"])
        say(console, f"Stopped; {kept()}. Go on with:\n  {again}")
        raise typer.Exit(143 if isinstance(interrupt, _Terminated) else 130) from None


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


if __name__ == "__main__":
    app(prog_name="normkit")
