"""What handing a small CUDA norm over to torch costs the host, measured without a GPU.

    .venv/bin/python benchmarks/handover.py    # microseconds a call, printed; ten seconds

CPU tensors of (2, 64) stand for those of a device: the compiled core declines, and torch's own CPU kernel is what is
called in the end, so that ours less torch's is the host's time of the questions before it. At once: the short way of
`handover.row_norm_now` and `batch_norm_now`; in general: the way through every check, which a call with autocast or a
profiler takes. BatchNorm is the layer, in eval and in training without the guard against NaN, which on a device adds
two copies and a launch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import normkit
import normkit.functional as NF
from normkit import backends
from normkit.functional import handover

ROUNDS, CALLS = 40, 500  # medians of 40 rounds, variants in turn


def on_a_device(*tensors: Any) -> Any:
    """`backends.select` for tensors of a device, with the questions that it asks of them."""
    assert backends.transformed() is None
    assert not backends.is_forced()
    assert all(tensor is None or backends.exact(tensor) for tensor in tensors)
    return backends.TRITON


def in_general(call: Callable[[], Any]) -> Callable[[], Any]:
    def without() -> Any:
        at_once = handover.row_norm_now, handover.batch_norm_now
        handover.row_norm_now = handover.batch_norm_now = lambda *arguments: None
        try:
            return call()
        finally:
            handover.row_norm_now, handover.batch_norm_now = at_once

    return without


def main() -> None:
    torch.set_num_threads(1)
    backends.norm_now = backends.batch_norm_now = lambda *arguments: None
    backends.has_kernels = lambda device: True
    backends.interpreted = lambda: True
    backends.select = on_a_device
    x, weight, bias = torch.randn(2, 64), torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.zeros(64))
    F = torch.nn.functional
    trained = torch.nn.BatchNorm1d(64), normkit.BatchNorm1d(64, nonfinite="allow")
    fixed = torch.nn.BatchNorm1d(64).eval(), normkit.BatchNorm1d(64).eval()
    for name, torchs, ours in (
        ("layer_norm", lambda: F.layer_norm(x, (64,), weight, bias), lambda: NF.layer_norm(x, (64,), weight, bias)),
        ("rms_norm", lambda: F.rms_norm(x, (64,), weight, 1e-6), lambda: NF.rms_norm(x, (64,), weight, 1e-6)),
        ("BatchNorm1d in training", lambda: trained[0](x), lambda: trained[1](x)),
        ("BatchNorm1d in eval", lambda: fixed[0](x), lambda: fixed[1](x)),
    ):
        calls = {"torch": torchs, "ours at once": ours, "ours in general": in_general(ours)}
        samples: dict[str, list[float]] = {kind: [] for kind in calls}
        for _ in range(ROUNDS):
            for kind, call in calls.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[kind].append(1e6 * (time.perf_counter() - begin) / CALLS)
        print(name, ", ".join(f"{kind} {statistics.median(found):.1f} us" for kind, found in samples.items()))


if __name__ == "__main__":
    main()
