"""How much memory of large results the compiled core keeps for the next ones.

Here: the limit, its default and how to set it. The blocks themselves are in csrc/memory.cpp.
May import: normkit._core.
Read next: csrc/memory.h.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

try:
    from normkit import _core
except ImportError:  # cpu.py says why
    _off = True
else:
    _off = False

_MOST_KEPT_BYTES = 1 << 30  # what (4096, 4096) float32 in training uses four times over


def default_kept_bytes() -> int:
    """NORMKIT_KEPT_BYTES, or else a sixteenth of this machine's (or container's) memory, at most 1 GiB."""
    given = os.environ.get("NORMKIT_KEPT_BYTES", "")
    if given:
        if given.isdecimal():
            return int(given)
        warnings.warn(
            f"NORMKIT_KEPT_BYTES: expected a number of bytes, got {given!r}; taking the default", stacklevel=2
        )
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        group = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        memory = min(memory, int(group)) if group.isdecimal() else memory
    except (AttributeError, OSError, ValueError):  # Windows; no control groups
        memory = 0 if os.name != "posix" else memory
    return min(memory // 16, _MOST_KEPT_BYTES)


def set_kept_bytes(limit: int) -> int:
    """Keep at most `limit` bytes of large results' memory for the next ones; returns the limit before.

    Freed results of 4 MiB and more are kept up to the limit, since the first touch of fresh memory takes longer than
    the normalization: (4096, 4096) float32 took 2 to 3 times as long without. What is kept and does not fit the next
    result is given back before new memory is taken. 0 keeps nothing, gives everything back and leaves allocation to
    torch; a result in kept memory has a storage that cannot be resized.

    Args:
        limit: bytes, zero or positive; at first a sixteenth of the machine's (or container's) memory, at most 1 GiB,
            or the environment variable NORMKIT_KEPT_BYTES.

    Raises:
        ValueError: the limit is negative.

    Example:
        >>> import normkit
        >>> before = normkit.set_kept_bytes(0)
        >>> normkit.set_kept_bytes(before)
        0
    """
    if limit < 0:
        raise ValueError(f"set_kept_bytes: limit must be zero or positive, got {limit}; 0 keeps nothing")
    return 0 if _off else _core.set_block_limit(min(limit, 2**63 - 1))


set_kept_bytes(default_kept_bytes())
