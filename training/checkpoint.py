"""Checkpoints that a kill at any moment cannot spoil.

A file is a mark, the SHA-256 of what follows, and what `torch.save` wrote. It appears under its name whole
or not at all (temporary file, fsync, rename), and the one before it stays until the next. Reading goes
from the newest backwards to the first whose digest is right. Only tensors and plain values are read: no
arbitrary unpickling.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = b"qkcheck1"
KEEP = 2
TEMPORARY = ".tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, so that at any moment the old or the new file is there, complete."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a power failure can undo the rename
    finally:
        os.close(folder)


def clean(folder: Path) -> None:
    """Remove temporary files that a killed run left."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files in `folder`, the newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of `step` (tensors and plain values) and remove all but the newest `KEEP`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).digest()
    write_atomically(folder / f"checkpoint-{step:010d}.pt", MARK + digest + payload)
    for path in checkpoints(folder)[KEEP:]:
        path.unlink()


def read(path: Path) -> dict[str, Any] | None:
    """The state in one checkpoint file, on the CPU; None where the file is damaged."""
    content = path.read_bytes()
    start = len(MARK) + hashlib.sha256().digest_size
    payload = content[start:]
    if not content.startswith(MARK) or hashlib.sha256(payload).digest() != content[len(MARK) : start]:
        return None
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def load_latest(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest undamaged checkpoint in `folder`, or None; `warn` is told of each damaged one."""
    for path in checkpoints(folder):
        state = read(path)
        if state is not None:
            return state
        warn(f"{path} is damaged and left out")
    return None
