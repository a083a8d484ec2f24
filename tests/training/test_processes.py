"""Two processes over gloo on the CPU: one network on both, and what one process computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from algorithms import EACH, chosen, small

from training import engine

# every process runs this: whole runs, and one that is killed in the second epoch and resumed
WORKER = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[2])
import algorithms
from training import engine
from training.config import from_tables
from torch.nn.parallel import DistributedDataParallel

forward, shares = DistributedDataParallel.forward, []
def noting(self, *args, **kwargs):
    shares.append(self.require_backward_grad_sync)
    return forward(self, *args, **kwargs)

DistributedDataParallel.forward = noting

def save(name, result):
    torch.save(result.model.state_dict(), f"{sys.argv[1]}/{name}-rank{os.environ['RANK']}.pt")
    json.dump(shares, open(f"{sys.argv[1]}/{name}-rank{os.environ['RANK']}.json", "w"))
    shares.clear()

for name, tables in json.load(open(f"{sys.argv[1]}/runs.json")).items():
    save(name, engine.run(from_tables(tables), f"{sys.argv[1]}/{name}"))

class Killed(BaseException):
    pass

original = engine.Trainer._train_step
def until_step_6(self, *args):
    if self.step == 6:
        raise Killed
    original(self, *args)

config = from_tables(json.load(open(f"{sys.argv[1]}/norm.json")))
save("norm", engine.run(config, f"{sys.argv[1]}/norm"))
engine.Trainer._train_step = until_step_6
try:
    engine.run(config, f"{sys.argv[1]}/resumed")
except Killed:
    pass
engine.Trainer._train_step = original
save("resumed", engine.run(config, f"{sys.argv[1]}/resumed", resume=True))
torch.distributed.destroy_process_group()
"""

# with batch-norm and ranges of activations, whose statistics are those of each process's own half of the batch
NORM = {"name": "vanilla", "weight": {"kind": "MinMax", "bits": 4}, "activation": {"kind": "MinMax", "bits": 4}}


@pytest.fixture(scope="module")
def two_processes(request, tiny, tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    runs = {name: small(tiny, name, batch_norm=False).to_tables() for name in chosen(request)}
    (folder / "runs.json").write_text(json.dumps(runs))
    norm = small(tiny, "float").to_tables() | {"algorithm": NORM}
    (folder / "norm.json").write_text(json.dumps(norm))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(folder / "worker.py"), str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def of_both(folder, name):
    """The state dicts that the two processes ended with."""
    return [torch.load(folder / f"{name}-rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("run", ["norm", "resumed"])
def test_both_have_the_statistics_of_the_main_process(two_processes, run):
    one, other = of_both(two_processes, run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resumed_run_is_the_whole_run(two_processes, same_weights):
    assert same_weights(two_processes / "norm", two_processes / "resumed")


# Of a tensor's norm. Sums in another order move a few values across a rounding tie; a step of LSQ learns from the
# rounding errors themselves, most of all one of 8 bits, whose errors are the least alike.
TOLERANCE = {"LIMPQ": 5e-2, "mixed precision": 5e-2}


@pytest.mark.parametrize("name", EACH)
def test_two_processes_train_an_algorithm_as_one_does(two_processes, tiny, tmp_path, name):
    """The same network on both, and the losses, choices and network of one process with the same whole batches.

    Without batch-norm, whose statistics are those of each half.
    """
    config = small(tiny, name, batch_norm=False)
    ours, other = of_both(two_processes, name)
    assert all(torch.equal(ours[key], other[key]) for key in ours)
    about = json.loads((two_processes / name / "config.json").read_text())
    assert about["processes"] == 2 and about["recipe"] == config.to_tables()
    shares = json.loads((two_processes / f"{name}-rank0.json").read_text())
    passes = 4 if name == "LIMPQ" else 1
    assert shares == [index == passes - 1 for index in range(passes)] * 8, "gradients are shared once a step"
    one = engine.run(config, tmp_path / "one")
    lines = [json.loads(line) for line in (two_processes / name / "metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, one.metrics, strict=True):
        assert line["algorithm"].get("teachers") == expected["algorithm"].get("teachers")
        for key in ("train_loss", "eval_loss"):
            assert line.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-3), key
    tolerance = TOLERANCE.get(name, 2e-3)
    for key, expected in one.model.state_dict().items():
        assert (ours[key] - expected).double().norm() <= tolerance * expected.double().norm() + 1e-6, key


@pytest.mark.slow
def test_accelerate_launch(tmp_path, environment, python):
    """The command line under accelerate's launcher; what the main process finds wrong ends all processes."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        '[model]\nname = "tiny_convnet"\nwidth = 4\nbatch_norm = false\n[data]\nname = "digits"\n'
        'batch_size = 64\n[optimizer]\nlr = 0.1\n[schedule]\nname = "cosine"\nwarmup_epochs = 0.5\n'
        '[run]\nname = "tiny"\nepochs = 3\ncheckpoint_steps = 4\n'
    )
    # --multi_gpu is what makes it start processes with torch.distributed; --cpu would ask for mpirun
    launch = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "-m", "training", "run", str(recipe), "--out", "run", "--set", "run.device=cpu"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the run in run is finished") == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["processes"] == 2
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode != 0
    assert again.stderr.count("error: run exists; continue that run with --resume") == 1
    assert "error (process 1): run exists" in again.stderr
