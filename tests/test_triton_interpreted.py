"""Every Triton kernel without a GPU: test_triton.py under Triton's interpreter, in a process of its own.

It takes minutes of one core, so conftest.py begins it with the session where this test is chosen.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

import pytest

HERE = Path(__file__).parent


class Begun(NamedTuple):
    process: subprocess.Popen[str]
    output: IO[str]


BEGUN: pytest.StashKey[Begun] = pytest.StashKey()


def begin() -> Begun:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "test_triton.py")]
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open until the test has read it)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT, text=True
    )
    return Begun(process, output)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
def test_the_interpreter_finds_every_kernel_right(request: pytest.FixtureRequest) -> None:
    begun = request.config.stash.get(BEGUN, None) or begin()
    code = begun.process.wait()
    begun.output.seek(0)
    said = begun.output.read()
    begun.output.close()
    assert code == 0, said[-6000:]
    assert " passed" in said, said[-2000:]
