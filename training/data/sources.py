"""Where data files are, and what is said when they are not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from training.config import UserError


class DataError(UserError):
    """Data files that are missing or damaged."""


def data_root(root: str) -> Path:
    """The folder of the recipe's data.root, else of the environment's QK_DATA_DIR. Raises DataError."""
    place = root or os.environ.get("QK_DATA_DIR", "")
    if not place:
        raise DataError("no data folder is given: set data.root in the recipe, or the variable QK_DATA_DIR")
    path = Path(place).expanduser()
    if not path.is_dir():
        raise DataError(f"the data folder {path} ({'data.root' if root else 'QK_DATA_DIR'}) does not exist")
    return path


def find(root: Path, folders: Sequence[str], names: Sequence[str], origin: str) -> Path:
    """The first root/folder/name there is. Raises DataError that names it and `origin`, where to get it."""
    for folder in folders:
        for name in names:
            if (root / folder / name).exists():
                return root / folder / name
    raise DataError(f"{root / folders[0] / names[0]} is missing; get it from {origin}")
