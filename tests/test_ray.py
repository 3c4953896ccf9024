"""Studies on a real Ray that is started here: the numbers of local workers, failures kept, nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from normkit.cli import app
from normkit.studies import STUDIES
from normkit.studies.run import run_study
from normkit.study.cluster import Cluster
from normkit.study.processes import Failed, Processes
from test_cli import CELLS, TINY, numbers_by_key, records_of
from test_studies import small_cell

pytest.importorskip("ray", reason="no Ray here: pip install 'normkit[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("local") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "text"
    path.write_bytes(b"".join(b"row %d has %d seats, " % (n % 9, n % 7) for n in range(2000)))
    return path


def command(text: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "normkit.cli", *TINY.split(), "--text", str(text), "--out", str(out), *more]


def test_ray_gives_the_numbers_of_local_workers_and_a_report(text: Path, tmp_path: Path) -> None:
    here = subprocess.run(command(text, tmp_path / "here"), capture_output=True, text=True, timeout=120)
    assert (here.returncode, here.stderr) == (0, "")
    there = subprocess.run(
        command(text, tmp_path / "there", "--ray", "local"), capture_output=True, text=True, timeout=120
    )
    assert there.returncode == 0, there.stderr
    assert len(records_of(tmp_path / "there")) == CELLS
    assert numbers_by_key(tmp_path / "there") == numbers_by_key(tmp_path / "here")
    assert all(record["seconds_per_step"] > 0.0 for record in records_of(tmp_path / "there"))
    assert (tmp_path / "there" / "report.html").stat().st_size > 10_000
    study = json.loads((tmp_path / "there" / "study.json").read_text())
    assert study["machine"]["platform"] == "Ray cluster of 1 node"
    again = subprocess.run(command(text, tmp_path / "there"), capture_output=True, text=True, timeout=120)
    assert f"{CELLS} cells, {CELLS} of them already done" in again.stdout


def test_ctrl_c_keeps_what_is_done_and_ends_ray(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    long = [word if word != "60" else "4000" for word in command(text, out, "--ray", "local")]
    # a suite that a shell runs in the background was told to ignore interrupts, and its children with it
    hears = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(long, **pipes, start_new_session=True, preexec_fn=hears)
    deadline = time.monotonic() + 120
    while not records_of(out) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, (stdout, stderr)
    assert f"of {CELLS} cells are kept in {out}. Go on with:" in stdout
    assert "Traceback" not in stderr
    assert 1 <= len(records_of(out)) < CELLS


def test_a_cell_that_raises_is_failed_with_its_reason_and_the_others_are_measured(
    cluster: Cluster, tmp_path: Path
) -> None:
    cells = [{**small_cell("saturation"), "activation": activation} for activation in ("relu", "tanh")]
    study = replace(STUDIES["saturation"], cells=lambda thorough: cells)
    options: dict[str, Any] = {"thorough": False, "jobs": 2, "fresh": False, "say": lambda line: None}
    failed, done = run_study(study, tmp_path / "there", cluster, **options)
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("ValueError: saturation_threshold: activation must be")
    assert done["status"] == "ok"
    with Processes() as local:
        here = run_study(study, tmp_path / "here", local, **options)[1]
    assert done["measured"] == here["measured"]


# a task is sent as it is here only if it is no function of a module, which the workers would import
double = lambda number: 2 * number  # noqa: E731
double.__module__ = "__main__"


def test_a_process_that_dies_fails_its_call_alone(cluster: Cluster) -> None:
    ((_, died),) = cluster.results(lambda code: os._exit(code), [(3,)], jobs=1, threads=1)
    assert isinstance(died, Failed)
    assert "The worker died unexpectedly" in died.reason
    assert dict(cluster.results(double, [(1,), (2,), (3,)], jobs=2, threads=1)) == {0: 2, 1: 4, 2: 6}


def test_no_more_calls_run_at_a_time_than_asked_for(cluster: Cluster) -> None:
    order: list[str] = []
    calls = [(number,) for number in range(4)]
    for index, _ in cluster.results(double, calls, jobs=1, threads=1, started=lambda at: order.append(f"start {at}")):
        order.append(f"end {index}")
    assert order == [word for number in range(4) for word in (f"start {number}", f"end {number}")]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "expected a Ray cluster at '127.0.0.1:9', nothing answers there"),
        ("somewhere", "expected 'local', 'auto' or 'host:port', got 'somewhere'"),
        ("host:port", "expected 'local', 'auto' or 'host:port', got 'host:port'"),
        ("127.0.0.1:99999", "nothing answers there"),
    ],
)
def test_a_wrong_address_is_refused_in_a_sentence_and_at_once(address: str, said: str, tmp_path: Path) -> None:
    began = time.monotonic()
    ran = CliRunner().invoke(app, ["study", "cost", "--ray", address, "--out", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "Invalid value for '--ray'" in ran.output
    assert "".join(said.split()) in "".join(ran.output.split())
    assert time.monotonic() - began < 30
    assert not (tmp_path / "out").exists()


def test_without_ray_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = CliRunner().invoke(app, ["study", "cost", "--ray", "local", "--out", str(tmp_path)])
    assert ran.exit_code == 2
    assert "pip install 'normkit[ray]'" in ran.output
