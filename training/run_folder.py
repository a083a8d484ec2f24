"""The folder of a run: what it was started with, its metrics, its checkpoints and its final model.

config.json          recipe with every default filled in, versions, number of processes
metrics.jsonl        one JSON object a line (see `training.engine`)
checkpoint-*.pt      the newest two (see `training.checkpoint`)
model.safetensors    the trained model's state dict; written last, so a run that has it is finished
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import nn

from training import checkpoint
from training.config import Config, UserError

# keys that may change between the parts of a run, like those of [paper]: they do not touch what is computed
FREE_KEYS = {"data.root", "data.workers", "run.checkpoint_steps", "run.checkpoint_epochs", "run.name"}


def versions() -> dict[str, str]:
    """Versions of python and of the packages that decide results."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for package in ("accelerate", "quantkernels"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return found


def flatten(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one dictionary with dotted keys."""
    flat = {}
    for key, value in tables.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class RunFolder:
    """Reads and writes the files of one run. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self._lock: int | None = None

    def open(self, config: Config, processes: int, resume: bool) -> list[str]:
        """Make the folder ready and return what the user should know. Raises UserError, with the remedy."""
        if resume:
            if not self.path.is_dir():
                raise UserError(f"there is no run in {self.path} to resume; start it without --resume")
            self._take_lock()
            return self._reopen(config, processes)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(
                f"{self.path} exists; continue that run with --resume, choose another folder with --out, or remove it"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._create(config, processes)
        return []

    def close(self) -> None:
        """Let another process work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Be the only process that works in the folder, until `close` or the end of the process."""
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {self.path}") from error

    def _create(self, config: Config, processes: int) -> None:
        about = {"recipe": config.to_tables(), "versions": versions(), "processes": processes}
        checkpoint.write_atomically(self.config, json.dumps(about, indent=2).encode())

    def _reopen(self, config: Config, processes: int) -> list[str]:
        checkpoint.clean(self.path)
        if not self.config.exists() and not any(self.path.iterdir()):
            self._create(config, processes)  # it was killed before it had written anything
            return []
        about = self.require_same(config)
        before, now = (
            {**about["versions"], "processes": about["processes"]},
            {**versions(), "processes": processes},
        )
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        if changed:
            return [f"results may differ from an uninterrupted run: {', '.join(changed)}"]
        return []

    def require_same(self, config: Config) -> dict[str, Any]:
        """What config.json says. Raises UserError where the run was started with other settings than `config`."""
        about = self.about()
        old, new = flatten(about["recipe"]), flatten(config.to_tables())
        for key in sorted(old.keys() | new.keys()):
            if key not in FREE_KEYS and not key.startswith("paper.") and old.get(key) != new.get(key):
                raise UserError(
                    f"the run in {self.path} was started with {key} = {old.get(key)!r}, now it is "
                    f"{new.get(key)!r}; resume it with the same recipe, or start another run with --out"
                )
        return about

    def about(self) -> dict[str, Any]:
        """What config.json says. Raises UserError where it cannot be read."""
        try:
            about = json.loads(self.config.read_text())
            return {key: about[key] for key in ("recipe", "versions", "processes")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config} cannot be read ({error}); {self.path} is not a run") from error

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self.model.exists()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. Raises UserError where it cannot be read."""
        try:
            return [json.loads(line) for line in self.metrics.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.metrics} cannot be read: {error}") from error

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line, and wait until it is on disk: a checkpoint written next counts on it."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Drop the lines written after the checkpoint that the run continues from."""
        if self.metrics_size() < size:
            raise UserError(f"{self.metrics} is shorter than it was at the last checkpoint; it cannot be resumed")
        if self.metrics.exists():
            os.truncate(self.metrics, size)

    def write_model(self, model: nn.Module) -> None:
        """The state dict as safetensors; entries that share memory are stored each."""
        state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        checkpoint.write_atomically(self.model, serialise(state))


def load_state(model: nn.Module, path: Path) -> None:
    """Load a state dict from a safetensors file, or from a .pth file of torch (of which tensors alone are read).

    Raises UserError for a damaged file or another network's.
    """
    pickled = path.suffix in (".pth", ".pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        kind = "PyTorch" if pickled else "safetensors"
        raise UserError(f"{path} cannot be read as a {kind} file: {' '.join(str(error).split())}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ")
        raise UserError(f"{path} does not fit the network: {reason[:300]}") from error
