"""A small recipe that trains in a second, and helpers shared by the tests of the loop."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.config import from_tables

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tables():
    """Tables of a float run on digits: 3 epochs of 11 steps, a checkpoint every 4 steps."""
    return _tables()


def _tables():
    return {
        "model": {"name": "tiny_convnet", "width": 4},
        "data": {"name": "digits", "batch_size": 128},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "run": {"name": "tiny", "epochs": 3, "checkpoint_steps": 4},
    }


@pytest.fixture(scope="session")
def tiny():
    """`tiny(run={"epochs": 1}, ...)`: the config of `tables` with some keys changed."""

    def make(**changes):
        tables = _tables()
        for table, values in changes.items():
            tables.setdefault(table, {}).update(values)
        return from_tables(tables)

    return make


@pytest.fixture(scope="session")
def same_weights():
    """Whether two runs' folders hold models that are equal bit for bit."""

    def compare(one, other):
        a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return compare


@pytest.fixture(scope="session")
def environment():
    """The environment for a subprocess that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def python():
    return sys.executable
