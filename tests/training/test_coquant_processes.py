"""Joint training on two processes over gloo: one network on both, and what one process computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# every process runs this
WORKER = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[2])
import residual
from training import engine
from training.config import from_tables

for name, tables in json.load(open(f"{sys.argv[1]}/runs.json")).items():
    result = engine.run(from_tables(tables), f"{sys.argv[1]}/{name}")
    torch.save(result.model.state_dict(), f"{sys.argv[1]}/{name}-rank{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""

COQUANT = {"name": "coquant", "bits": [8, 4, 2], "zero_shot": [3], "calibration_batches": 2, "p1": 0.3}
RUNS = {
    "norm": ({"batch_norm": True}, COQUANT),
    "plain": ({"batch_norm": False}, COQUANT | {"distance": 0.0}),
    "adabits": ({"batch_norm": False}, {"name": "adabits", "bits": [8, 2]}),
}


@pytest.fixture(scope="module")
def configs(tiny):
    changes = {"data": {"batch_size": 300}, "run": {"epochs": 2}}
    import residual  # noqa: F401 (makes the network known)

    return {
        name: tiny(model={"name": "tiny_residual", **model}, algorithm=algorithm, **changes)
        for name, (model, algorithm) in RUNS.items()
    }


@pytest.fixture(scope="module")
def folder(configs, tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    (folder / "runs.json").write_text(json.dumps({name: config.to_tables() for name, config in configs.items()}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(folder / "worker.py"), str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_have_the_same_network(folder, name):
    one, other = (torch.load(folder / f"{name}-rank{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["plain", "adabits"])
def test_two_processes_compute_what_one_computes(folder, configs, tmp_path, name):
    """Losses, teachers and swaps; without batch-norm, whose statistics are those of each process's half."""
    from training import engine

    one = engine.run(configs[name], tmp_path / "one")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((folder / name / "config.json").read_text())["processes"] == 2
    for line, expected in zip(lines, one.metrics, strict=True):
        assert line["algorithm"] == expected["algorithm"]
        for key in ("train_loss", "eval_loss"):
            assert line.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-3)
