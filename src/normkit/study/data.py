"""Real bytes for a byte-level language model: the Python standard library's sources, or one's own file.

Here: Corpus with its two sources, batches, and the loss of guessing.
May import: torch.
Read next: models.py, which predicts these bytes.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
Batch = tuple[Tensor, Tensor]  # inputs and targets, both (B, T) int64; targets are the inputs one byte later

# Tests, other people's packages, and generated tables (encodings, the help texts of pydoc_data).
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
_LIBRARY_LIMIT_BYTES = 4_000_000
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes that share no file (or, of a single file, no position)."""

    name: str
    train: bytes
    held_out: bytes
    files_train: int
    files_held_out: int

    @cached_property
    def digest(self) -> str:
        """Identifies the bytes and their split; part of every cell's key."""
        both = hashlib.sha256(self.train).digest() + hashlib.sha256(self.held_out).digest()
        return hashlib.sha256(both).hexdigest()[:16]


def standard_library(limit_bytes: int = _LIBRARY_LIMIT_BYTES) -> Corpus:
    """The standard library's sources, about `limit_bytes` of them, a tenth of the files held out.

    Which files are taken, and which of them are held out, follows from a hash of each file's path inside the
    library: the same on every machine with this Python, and no alphabetical stretch is favoured.

    Raises:
        ValueError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    ranked = sorted((hashlib.sha256(name.encode()).digest(), name) for name in _source_names(root))
    parts: dict[bool, dict[str, bytes]] = {True: {}, False: {}}
    total = 0
    for rank, name in ranked:
        if total >= limit_bytes:
            break
        content = (root / name).read_bytes()
        # the rank's last bytes decide the split: its first ones already decided what is taken at all
        parts[int.from_bytes(rank[-4:], "big") < _HELD_OUT_SHARE * 2**32][name] = content
        total += len(content)
    train, held_out = parts[False], parts[True]
    if not train or not held_out:
        raise ValueError(
            f"text: expected the Python standard library's sources, found {len(ranked)} of its .py files; "
            "give a file of your own with --text FILE"
        )
    return Corpus(
        f"Python {platform.python_version()} standard library",
        b"".join(train[name] for name in sorted(train)),
        b"".join(held_out[name] for name in sorted(held_out)),
        len(train),
        len(held_out),
    )


def _source_names(root: Path) -> list[str]:
    names = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # _sysconfigdata* holds the paths and compiler flags of the machine that built Python
        if _SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and not parts[-1].startswith("_sysconfigdata"):
            names.append("/".join(parts))
    return names


def text_file(path: Path) -> Corpus:
    """One file of any bytes; its last tenth is held out.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"text: expected a file, found nothing at {path}") from None
    except OSError as error:
        raise ValueError(f"text: expected a readable file, {path} cannot be read: {error.strerror}") from None
    cut = len(content) - int(len(content) * _HELD_OUT_SHARE)
    return Corpus(path.name, content[:cut], content[cut:], 1, 1)


def check_length(corpus: Corpus, seq: int) -> None:
    """Refuse a corpus in which a sequence and its next byte do not fit.

    Raises:
        ValueError: one of the two parts is too short.
    """
    shortest = min(len(corpus.train), len(corpus.held_out))
    if shortest < seq + 1:
        raise ValueError(
            f"text: expected at least {seq + 1} bytes (one sequence and its next byte) to train on and to hold out, "
            f"got {len(corpus.train)} and {len(corpus.held_out)} from {corpus.name}; use more text or a smaller seq"
        )


def batches(content: bytes, batch: int, seq: int, seed: int) -> Iterator[Batch]:
    """Endless batches of random windows; the same seed gives the same windows, whatever the model."""
    data = _tensor(content)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - seq, (batch,), generator=generator)
        yield _windows(data, starts, seq)


def spaced_batches(content: bytes, batch: int, seq: int, count: int) -> list[Batch]:
    """`count` batches of windows at even distances, each batch spread over the whole content; no randomness."""
    data = _tensor(content)
    starts = torch.linspace(0, len(data) - seq - 1, batch * count, dtype=torch.float64).long()
    return [_windows(data, starts[first::count], seq) for first in range(count)]


def guess_loss(train: bytes, scored: list[Batch]) -> float:
    """Nats per byte of guessing by the frequency of bytes in `train`, each counted once more than it occurs.

    What is scored are the targets of `scored`, so that a model on the same batches is compared on the same bytes.
    """
    counts = torch.bincount(_tensor(train).long(), minlength=VOCABULARY).double() + 1.0
    log_frequency = torch.log(counts / counts.sum())
    return -torch.cat([log_frequency[targets].flatten() for _, targets in scored]).mean().item()


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)  # a copy: torch warns about read-only memory


def _windows(data: Tensor, starts: Tensor, seq: int) -> Batch:
    windows = data[starts[:, None] + torch.arange(seq + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
