"""The command line, run as a user runs it: whole studies, killed and resumed, wrong flags, a pipe and a terminal."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import normkit
from normkit.cli import app

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals as POSIX has them")

# 6 cells, long enough to be hit in the middle
TINY = (
    "study --norms none,layer --placements pre,post --depths 1 --seeds 0,1 --steps 60 --lr 0.01 --width 16 --heads 2 "
    "--jobs 1"
)
CELLS = 6


def command(arguments: str, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "normkit.cli",
        *arguments.split(),
        "--text",
        str(out.parent / "text"),
        "--out",
        str(out),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's studies live, with a text for them."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "text").write_bytes(b"".join(b"row %d has %d seats, " % (n % 9, n % 7) for n in range(2000)))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """A study that ran from start to end, its output in a pipe while colours are asked for."""
    return subprocess.run(
        command(TINY, folder / "uninterrupted"),
        env=os.environ | {"FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def records_of(out: Path) -> list[dict]:
    path = out / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers_by_key(out: Path) -> dict[str, dict]:
    """All that must not depend on how often a study was stopped: everything but the times."""
    times = ("key", "seconds", "seconds_per_step")
    return {one["key"]: {k: v for k, v in one.items() if k not in times} for one in records_of(out)}


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)


def hear_interrupts() -> None:
    """A suite that a shell runs in the background was told to ignore them, and its children with it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    """Whether the process is there; one that has ended and waits to be collected (Z) is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ----------------------------------------------------------------------------------------- whole studies


def test_a_study_ends_with_the_summary_table_and_the_reports_path(uninterrupted, folder):
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert uninterrupted.stderr == ""
    lines = uninterrupted.stdout.rstrip().splitlines()
    assert lines[0].startswith("6 cells: 60 steps of 16 x 64 bytes each, 1 at a time, on text (0.0 MB, ")
    assert lines[-1] == f"Report: {folder / 'uninterrupted' / 'report.html'}"
    assert (folder / "uninterrupted" / "report.html").stat().st_size > 1000
    assert sum(line.startswith("LayerNorm") for line in lines) >= 2, "the table"
    finished = [
        line for line in lines if re.match(r"\[\d/6\] (none|layer (pre|post)), depth 1, seed [01]: ok, loss", line)
    ]
    assert len(finished) == CELLS


def test_output_that_is_no_terminal_has_no_escape_sequences_even_if_colours_are_forced(uninterrupted):
    assert "\x1b" not in uninterrupted.stdout + uninterrupted.stderr
    assert "\r" not in uninterrupted.stdout


def test_the_folder_holds_one_record_a_cell_and_says_what_was_run(uninterrupted, folder):
    records = records_of(folder / "uninterrupted")
    study = json.loads((folder / "uninterrupted" / "study.json").read_text())
    assert sorted(study["keys"]) == sorted(record["key"] for record in records)
    assert len(set(study["keys"])) == CELLS
    assert all(record["status"] == "ok" and record["seconds_per_step"] > 0 for record in records)
    assert study["command"].startswith(f"normkit {TINY} --text ")
    assert study["settings"]["warmup"] == 6, "a tenth of the steps"
    assert study["data"]["name"] == "text"
    assert study["finished"] >= study["created"]
    assert study["seconds"] > 0
    assert set(study) == {
        "study", "command", "created", "finished", "settings", "data", "machine", "backend", "keys", "seconds",
        "unit_variance_skip_weight",
    }  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_study_that_is_killed_and_interrupted_resumes_to_the_records_of_one_that_was_not(uninterrupted, folder):
    out = folder / "stopped"
    # SIGKILL: nothing can be tidied up
    killed = subprocess.Popen(command(TINY, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: len(records_of(out)) >= 1)
    helpers = children(killed.pid)
    killed.kill()
    killed.communicate()
    kept = records_of(out)
    assert 1 <= len(kept) < CELLS
    wait_until(lambda: not any(map(running, helpers)), seconds=30)  # no orphans

    # Ctrl-C on a terminal: it goes to the whole process group
    ours, theirs = os.openpty()
    interrupted = subprocess.Popen(
        command(TINY, out), stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    os.close(theirs)
    wait_until(lambda: len(records_of(out)) > len(kept))
    helpers = children(interrupted.pid)
    started = time.monotonic()
    os.killpg(interrupted.pid, signal.SIGINT)
    shown = read_terminal(ours)
    stderr = interrupted.communicate()[1]
    assert time.monotonic() - started < 10
    assert (interrupted.returncode, stderr) == (130, ""), shown
    wait_until(lambda: not any(map(running, helpers)), seconds=10)
    assert records_of(out)[: len(kept)] == kept, "what was done is not done again"
    count = len(records_of(out))
    assert len(kept) < count < CELLS
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert plain != shown, "a terminal gets bars"
    assert f"6 cells, {len(kept)} of them already done: " in plain
    assert f"Stopped; {count} of 6 cells are kept in {out}. Go on with:" in plain
    assert re.search(r"\d+/60 steps", plain)

    # the command that was named, with --fresh gone and everything else as it was
    named = plain.split("Go on with:")[1].split()
    assert named == ["normkit", *command(TINY, out)[3:]]
    subprocess.run([sys.executable, "-m", "normkit.cli", *named[1:]], check=True, capture_output=True, timeout=120)
    assert numbers_by_key(out) == numbers_by_key(folder / "uninterrupted")
    assert json.loads((out / "study.json").read_text())["finished"] is not None


def read_terminal(descriptor: int) -> str:
    """All that is shown until the last process lets go of the terminal."""
    parts = []
    try:
        while part := os.read(descriptor, 65536):
            parts.append(part)
    except OSError:  # how Linux says end of file
        pass
    os.close(descriptor)
    return b"".join(parts).decode(errors="replace")


@pytest.fixture
def finished_study(uninterrupted, folder, tmp_path):
    """A copy of a whole study, and the command line that made it."""
    assert uninterrupted.returncode == 0
    shutil.copytree(folder / "uninterrupted", tmp_path / "study")
    return tmp_path / "study", [*TINY.split(), "--text", str(folder / "text"), "--out", str(tmp_path / "study")]


def test_a_finished_study_runs_nothing_again_and_keeps_its_times(finished_study, monkeypatch):
    out, arguments = finished_study
    before = (out / "records.jsonl").read_text(), (out / "study.json").read_text()
    (out / "report.html").unlink()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("6 cells, 6 of them already done: ")
    assert ((out / "records.jsonl").read_text(), (out / "study.json").read_text()) == before
    assert (out / "report.html").exists()


def test_report_writes_the_report_again_from_the_records(finished_study):
    out, _ = finished_study
    (out / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"Report: {out / 'report.html'}"
    assert "LayerNorm" in result.output
    assert (out / "report.html").exists()


def test_a_failed_cell_is_named_and_the_exit_code_says_so(finished_study, monkeypatch):
    out, arguments = finished_study
    records = records_of(out)
    records[0].update(status="failed", reason="The worker process was killed by SIGKILL.")
    (out / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    monkeypatch.setattr("normkit.study.plan.run_cells", lambda *args, **kwargs: None)  # and it fails again
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.output.endswith(
        "1 of 6 cells failed; the same command runs them again. The first:\n"
        "  The worker process was killed by SIGKILL.\n"
    )


def test_lines_that_are_no_records_are_named_and_kept(finished_study):
    out, arguments = finished_study
    with open(out / "records.jsonl", "a") as file:
        file.write('{"key": "torn')
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    path = out / "records.jsonl"
    assert result.stderr == (
        f"Warning: 1 of the lines in {path} are no records of a study; they are kept in unreadable.jsonl\n"
    )
    assert (out / "unreadable.jsonl").read_text() == '{"key": "torn\n'


# ------------------------------------------------------------------------------------------- wrong flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--norms layer,weight", "'--norms': expected one of none, batch, layer, rms, group, dyt, got 'weight'"),
        (
            "--placements mid",
            "'--placements': expected one of pre, post, sandwich, reordered, deepnorm, keel, mix, layernorm-scaling, "
            "layerscale, rezero, got 'mid'",
        ),
        ("--depths 2;12", "'--depths': expected whole numbers separated by commas, got '2;12'"),
        ("--depths 0", "'--depths': expected a whole number of at least 1, got 0"),
        ("--seeds 1,-1", "'--seeds': expected a whole number of at least 0, got -1"),
        ("--steps 0", "'--steps': expected a whole number of at least 1, got 0"),
        ("--steps many", "'--steps': expected a whole number, got 'many'"),
        ("--lr fast", "'--lr': expected a number, got 'fast'"),
        ("--lr -1", "'--lr': expected a positive number, got -1.0"),
        ("--lr nan", "'--lr': expected a positive number, got nan"),
        ("--width 10", "'--heads': expected a divisor of width 10, got 4"),
        ("--batch 0", "'--batch': expected a whole number of at least 1, got 0"),
        ("--warmup long", "'--warmup': expected a whole number, got 'long'"),
        ("--warmup -1", "'--warmup': expected a whole number of at least 0, got -1"),
        ("--init he", "'--init': expected one of xavier, torch, gpt2, got 'he'"),
        ("--jobs 0", "'--jobs': expected a whole number of at least 1, got 0"),
        ("--threads 0", "'--threads': expected a whole number of at least 1, got 0"),
        ("--text nothing.txt", "'--text': expected a file, found nothing at nothing.txt"),
        (
            "--text short.txt",
            "'--text': expected at least 65 bytes (one sequence and its next byte) to train on and to hold out, "
            "got 90 and 10 from short.txt; use more text or a smaller seq",
        ),
        ("--out short.txt", "'--out': expected a folder to write to, short.txt cannot be one: File exists"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_exit_code_2_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_bytes(b"x" * 100)
    result = CliRunner().invoke(app, ["study", *arguments.split()])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: Invalid value for {message}"
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"], "nothing was made"


def test_a_report_of_no_study_is_refused_in_one_sentence(tmp_path):
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: Invalid value for 'FOLDER': expected the folder of a study, found no records.jsonl in {tmp_path}; "
        "run normkit study first"
    )


# --------------------------------------------------------------------------------------------------- info


def test_version_is_the_packages():
    assert CliRunner().invoke(app, ["--version"]).output == f"normkit {normkit.__version__}\n"


def test_info_says_who_computes_and_why_the_others_do_not():
    from normkit.kernels import cpu

    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    values = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("off", "instruction")))
    (chosen,) = [reason.name for reason in normkit.reasons() if reason.chosen]
    assert values == {
        "normkit": normkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "backend": chosen,
        "openmp": "no" if cpu.unavailable() or not cpu.openmp() else "yes",
    }
    isa = "none (no compiled core)" if cpu.unavailable() else cpu.isa()
    assert f"instruction set  {isa}" in lines
    off = [f"off: {reason.name}: {reason.why}" for reason in normkit.reasons() if not reason.chosen]
    assert [line for line in lines if line.startswith("off")] == off


def test_help_shows_the_defaults_of_the_grid():
    result = CliRunner().invoke(app, ["study", "--help"], terminal_width=200)
    for default in (
        "none,batch,layer,rms",
        "pre,post",
        "2,12",
        "0.003",
        "xavier",
        "normkit-study",
        "a tenth of the steps",
    ):
        assert f"[default: {default}]" in re.sub(r"\s+", " ", result.output)


def test_the_command_line_loads_no_matplotlib_before_there_is_a_report():
    code = (
        "import sys, normkit.cli; print([n for n in ('matplotlib', 'triton', 'sklearn', 'jinja2') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
