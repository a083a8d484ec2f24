"""Two processes over gloo on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from training import engine

# every process runs this: a whole run, and one that is killed in the second epoch and resumed
WORKER = """
import json, os, sys, torch
from training import engine
from training.config import from_tables

def config(batch_norm, **algorithm):
    tables = json.load(open(f"{sys.argv[1]}/tables.json"))
    tables["model"]["batch_norm"] = batch_norm
    tables["algorithm"] |= algorithm
    return from_tables(tables)

def save(name, result):
    torch.save(result.model.state_dict(), f"{sys.argv[1]}/{name}-rank{os.environ['RANK']}.pt")

save("plain", engine.run(config(False), f"{sys.argv[1]}/plain"))
save("norm", engine.run(config(True), f"{sys.argv[1]}/norm"))

weight, activation = {"kind": "MinMax", "bits": 4}, {"kind": "MinMax", "bits": 4}
quantized = config(True, name="vanilla", weight=weight, activation=activation)
save("quantized", engine.run(quantized, f"{sys.argv[1]}/quantized"))

for name, algorithm in json.load(open(f"{sys.argv[1]}/algorithms.json")).items():
    save(name, engine.run(config(False, **algorithm), f"{sys.argv[1]}/{name}"))

class Killed(BaseException):
    pass

original = engine.Trainer._train_step
def until_step_30(self, *args):
    if self.step == 30:
        raise Killed
    original(self, *args)

engine.Trainer._train_step = until_step_30
try:
    engine.run(config(True), f"{sys.argv[1]}/resumed")
except Killed:
    pass
engine.Trainer._train_step = original
save("resumed", engine.run(config(True), f"{sys.argv[1]}/resumed", resume=True))
torch.distributed.destroy_process_group()
"""


# algorithms of which two processes must compute what one does
ALGORITHMS = {
    "limpq": {"name": "limpq", "bits": [4, 2]},
    "mixed_precision": {"name": "mixed_precision", "policy": {"layers": {"2": [3, 4], "4": [2, 3]}}},
    "diffq": {"name": "diffq", "penalty": 100.0, "bits_lr": 0.05},
}


@pytest.fixture(scope="module")
def two_processes(tiny, tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    (folder / "tables.json").write_text(json.dumps(tiny(data={"batch_size": 64}).to_tables()))
    (folder / "algorithms.json").write_text(json.dumps(ALGORITHMS))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(folder / "worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["plain", "norm", "quantized", "resumed", *ALGORITHMS])
def test_both_processes_have_the_same_network(two_processes, name):
    """Running statistics of batch-norm and activations too: those of the main process are everyone's."""
    one, other = (torch.load(two_processes / f"{name}-rank{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resumed_run_is_the_whole_run(two_processes, same_weights):
    assert same_weights(two_processes / "norm", two_processes / "resumed")


def test_two_processes_compute_what_one_computes(two_processes, tiny, tmp_path):
    """Without batch-norm, whose statistics are those of each process's own half of the batch."""
    config = tiny(model={"batch_norm": False}, data={"batch_size": 64})
    one = engine.run(config, tmp_path / "one")
    lines = [json.loads(line) for line in (two_processes / "plain/metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, one.metrics, strict=True):
        for key in ("train_loss", "eval_loss"):
            assert line.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-4)
    about = json.loads((two_processes / "plain/config.json").read_text())
    assert about["processes"] == 2
    assert about["recipe"] == config.to_tables()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_processes_train_an_algorithm_as_one_does(two_processes, tiny, tmp_path, name):
    """Until sums in another order have moved enough values across a rounding tie: 11 steps and what they lead to."""
    config = tiny(model={"batch_norm": False}, data={"batch_size": 64}, algorithm=ALGORITHMS[name])
    one = engine.run(config, tmp_path / "one")
    first = json.loads((two_processes / f"{name}/metrics.jsonl").read_text().splitlines()[0])
    for key in ("train_loss", "eval_loss"):
        assert first[key] == pytest.approx(one.metrics[0][key], rel=1e-3), key


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
