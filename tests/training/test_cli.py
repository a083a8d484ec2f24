"""The command line: one sentence for each mistake, exit codes, no traceback."""

import signal
import subprocess
import time
from functools import partial

import pytest
from typer.testing import CliRunner

from training.cli import app

RECIPE = """# A tiny network on digits
[model]
name = "tiny_convnet"
width = 4
[data]
name = "digits"
batch_size = 128
[run]
epochs = 1
"""

SET = "--set"
RUN = ["run", "tiny.toml", SET]
TUNE = [*RUN, "algorithm.name=mixed_precision", SET]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QK_DATA_DIR", raising=False)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "bad.json").write_text('{"format": "quantkernels policy 1", "layers": {"fc9": [2, 2]}}')
    return "tiny.toml"


def call(*args):
    return CliRunner().invoke(app, list(args))


def test_run_and_resume(recipe, tmp_path):
    result = call("run", recipe, "--set", "run.seed=2", "--set", "optimizer.lr=0.05")
    assert result.exit_code == 0, result.output
    assert "the run in runs/tiny-seed2 is finished: test accuracy" in result.stdout
    assert "epoch 1/1  train_loss" in result.stderr
    assert (tmp_path / "runs/tiny-seed2/model.safetensors").exists()
    again = call("run", recipe, "--set", "run.seed=2", "--set", "optimizer.lr=0.05", "--resume")
    assert again.exit_code == 0 and "was already finished" in again.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "tiny"], "no recipe 'tiny'"),
        (["run", "tiny.toml", "--set", "run.epochs"], "--set takes table.key=value, got 'run.epochs'"),
        (["run", "tiny.toml", "--set", "run.epoch=2"], "unknown key run.epoch; did you mean 'epochs'"),
        (["run", "tiny.toml", "--set", "data.name=mnist"], "set data.root in the recipe, or the variable"),
        (["run", "tiny.toml", "--set", "data.name=imagenet"], "data.name = 'imagenet' is not known"),
        (["run", "tiny.toml", "--set", "model.name=vgg"], "model.name = 'vgg' is not known"),
        (["run", "tiny.toml", "--resume"], "there is no run in runs/tiny to resume"),
        (["run", "tiny.toml", "--out", "/proc/none"], "/proc/none"),
        (["report", "no-such-run"], "there is no run in no-such-run"),
        ([*RUN, "algorithm.name=coquant", SET, "algorithm.bits=[]"], "algorithm.bits must be a list of at least one"),
        ([*RUN, "algorithm.name=adabits", SET, "algorithm.bits=[8, 9]"], "integers from 1 to 8, got [8, 9]"),
        ([*RUN, "algorithm.name=lqnets", SET, "algorithm.weight_bits=0"], "an integer from 1 to 8, got 0"),
        ([*TUNE, "algorithm.policy=bad.json"], "the policy names the layer 'fc9', whose bits are not searched"),
        ([*TUNE, "algorithm.policy=none.json"], "there is no policy in none.json; `python -m training search"),
        (
            ["search", *TUNE[1:], 'algorithm.search={method="uniform", size_mb=1e-4}'],
            "raise it to that, or allow fewer",
        ),
        (["report", ".", "--out", "."], "--out must name a file, and . is a folder"),
        (["search", "tiny.toml", "--out", "."], "--out must name a file, and . is a folder"),
    ],
)
def test_mistakes_are_one_sentence(recipe, args, message):
    result = call(*args)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_run_that_exists(recipe, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/notes.txt").write_text("mine")
    result = call("run", recipe)
    assert result.exit_code == 1
    assert "runs/tiny exists; continue that run with --resume, choose another folder with --out" in result.stderr
    assert list((tmp_path / "runs/tiny").iterdir()) == [tmp_path / "runs/tiny/notes.txt"]


def test_list():
    result = call("list")
    assert result.exit_code == 0
    assert "digits\n" in result.stdout and "float" in result.stdout


def test_unknown_option_of_the_command():
    assert call("run", "tiny.toml", "--resum").exit_code == 2


def test_interrupt_says_how_to_go_on(recipe, tmp_path, environment, python):
    command = [python, "-m", "training", "run", recipe, "--set", "run.epochs=1000"]
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    pipe = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": heeded}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipe)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("runs/tiny/checkpoint-*")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == (
        "error: interrupted; the same command with --resume continues the run in runs/tiny"
    )
    assert "Traceback" not in errors
