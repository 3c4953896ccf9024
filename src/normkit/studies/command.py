"""`normkit study NAME` for the studies beside `placement`.

Here: `other_studies`, which cli.py calls.
May import: typer, rich; its package's modules.
Read next: run.py.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer
from rich.console import Console

_TAKEN = ("context", "name", "thorough", "jobs", "out", "resume")


def other_studies(context: typer.Context, name: str, *, thorough: bool, jobs: int, out: Path, fresh: bool) -> None:
    """Run one study, or "all", and write the report; exit status 1 if a cell failed, 130 if it was interrupted."""
    from normkit.studies import STUDIES
    from normkit.studies.run import report_studies, run_study

    if name not in (*STUDIES, "all"):
        raise typer.BadParameter(f"expected placement, {', '.join(STUDIES)} or all, got {name!r}", param_hint="NAME")
    given = [
        parameter
        for parameter in context.params
        if parameter not in _TAKEN and context.get_parameter_source(parameter).name == "COMMANDLINE"  # type: ignore[union-attr]
    ]
    if given:
        flag = f"--{given[0]}"
        raise typer.BadParameter(
            f"expected no {flag} with {name}, it is placement's; {name} has a grid of its own", param_hint=flag
        )
    console = Console()
    names = list(STUDIES) if name == "all" else [name]
    records = {}

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        for each in names:
            folder = out / each
            records[each] = run_study(STUDIES[each], folder, thorough=thorough, jobs=jobs, fresh=fresh, say=say)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    except KeyboardInterrupt:
        command = shlex.join(["normkit", *[argument for argument in sys.argv[1:] if argument != "--fresh"]])
        say(f"Stopped; what is done is kept in {out}. Go on with:\n  {command}")
        raise typer.Exit(130) from None
    command = shlex.join(["normkit", "study", name, *(["--thorough"] if thorough else [])])
    path = report_studies(records, out if name == "all" else out / name, command)
    say(f"Report: {path}")
    failed = [record for kept in records.values() for record in kept if record["status"] == "failed"]
    if failed:
        say(f"{len(failed)} cells failed; the same command runs them again. The first:\n  {failed[0]['reason']}")
        raise typer.Exit(1)
