"""A run that is killed anywhere and resumed ends with the weights of one that was not, bit for bit."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from algorithms import EACH, chosen, small

from training import checkpoint, engine
from training.algorithms.base import Algorithm
from training.config import UserError


class Killed(BaseException):
    """Stands for SIGKILL within a process: nothing catches it."""


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    engine.run(tiny(), folder)
    return folder


def metrics_without_times(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def run_until(monkeypatch, config, folder, attribute, calls, resume=False):
    """Run, and kill at the given call of `attribute` (object, name); whether it came so far."""
    target, name = attribute
    original = getattr(target, name)
    left = [calls]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, counted)
        try:
            engine.run(config, folder, resume=resume)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("steps", [0, 3, 4, 5, 11, 23, 32])
def test_killed_between_steps(tiny, tmp_path, uninterrupted, monkeypatch, same_weights, steps):
    folder = tmp_path / "run"
    assert run_until(monkeypatch, tiny(), folder, (engine.Trainer, "_train_step"), steps)
    engine.run(tiny(), folder, resume=True)
    assert same_weights(folder, uninterrupted)
    assert metrics_without_times(folder) == metrics_without_times(uninterrupted)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 12])
def test_killed_while_writing(tiny, tmp_path, uninterrupted, monkeypatch, same_weights, call, count):
    folder = tmp_path / "run"
    assert run_until(monkeypatch, tiny(), folder, (checkpoint.os, call), count)
    engine.run(tiny(), folder, resume=True)
    assert same_weights(folder, uninterrupted)
    assert metrics_without_times(folder) == metrics_without_times(uninterrupted)
    assert not list(folder.glob("*.tmp"))


def test_killed_before_the_model_is_written(tiny, tmp_path, uninterrupted, monkeypatch, same_weights):
    folder = tmp_path / "run"
    assert run_until(monkeypatch, tiny(), folder, (engine.RunFolder, "write_model"), 0)
    assert metrics_without_times(folder)[-1]["kind"] == "final"
    engine.run(tiny(), folder, resume=True)
    assert same_weights(folder, uninterrupted)
    assert metrics_without_times(folder) == metrics_without_times(uninterrupted)


def test_killed_again_and_again(tiny, tmp_path, uninterrupted, monkeypatch, same_weights):
    folder = tmp_path / "run"
    chance = random.Random(0)
    resume, kills = False, 0
    while run_until(monkeypatch, tiny(), folder, (engine.Trainer, "_train_step"), chance.randint(4, 9), resume):
        resume, kills = True, kills + 1
    assert kills >= 3
    assert same_weights(folder, uninterrupted)
    assert metrics_without_times(folder) == metrics_without_times(uninterrupted)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "leftover", "all"])
def test_damaged_checkpoints(tiny, tmp_path, uninterrupted, monkeypatch, same_weights, damage):
    folder = tmp_path / "run"
    assert run_until(monkeypatch, tiny(), folder, (engine.Trainer, "_train_step"), 20)
    newest, older = checkpoint.checkpoints(folder)
    content = newest.read_bytes()
    if damage in ("truncated", "all"):
        newest.write_bytes(content[: len(content) // 2])
    if damage == "flipped":
        newest.write_bytes(content[:-999] + bytes([content[-999] ^ 1]) + content[-998:])
    if damage == "empty":
        newest.write_bytes(b"")
    if damage == "leftover":
        (folder / (newest.name + ".tmp")).write_bytes(content[:100])
    if damage == "all":
        older.write_bytes(content[:10])
    engine.run(tiny(), folder, resume=True)
    assert same_weights(folder, uninterrupted)
    assert metrics_without_times(folder) == metrics_without_times(uninterrupted)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    checkpoint.save(tmp_path, 1, {"a": Evil()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.load_latest(tmp_path, print)


class Averaging(Algorithm):
    """Has state outside the model, uses random numbers in every hook, and changes the loss by them."""

    def __init__(self):
        self.average = torch.zeros(())

    def before_batch(self, model, step):
        self.noise = torch.rand(())

    def loss(self, model, inputs, targets, criterion):
        outputs = model(inputs + 0.01 * torch.randn_like(inputs))
        loss = criterion(outputs, targets) * (1 + 0.1 * self.average + 0.1 * self.noise)
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        return loss, outputs

    def after_epoch(self, model, epoch):
        self.average = self.average * random.random()

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = state["average"]


@pytest.mark.parametrize("steps", [6, 13])
def test_state_of_the_algorithm_is_resumed(tiny, tmp_path, monkeypatch, same_weights, steps):
    monkeypatch.setattr(engine, "build_algorithm", lambda name, options: Averaging())
    config = tiny(run={"epochs": 2}, optimizer={"name": "adam", "lr": 0.01})
    engine.run(config, tmp_path / "whole")
    assert run_until(monkeypatch, config, tmp_path / "parts", (engine.Trainer, "_train_step"), steps)
    engine.run(config, tmp_path / "parts", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture(scope="module")
def killed(request, tiny, tmp_path_factory, environment, python):
    """Folder of the runs of algorithms: NAME/whole, and NAME/parts, which was killed by SIGKILL and resumed."""
    folder = tmp_path_factory.mktemp("killed")
    runs = {name: small(tiny, name).to_tables() for name in chosen(request)}
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [python, str(Path(__file__).with_name("killed.py")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", EACH)
def test_every_algorithm_is_resumed_after_sigkill(killed, same_weights, name):
    """Clipping levels, bases, attention, omega, steps, teachers, an optimizer of the algorithm's own are all kept."""
    assert json.loads((killed / "exits.json").read_text())[name] == [0, -signal.SIGKILL, 0]
    whole, parts = killed / name / "whole", killed / name / "parts"
    assert same_weights(whole, parts)
    assert metrics_without_times(parts) == metrics_without_times(whole)


def test_finished_run_is_left_alone(tiny, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}
    result = engine.run(tiny(), uninterrupted, resume=True)
    assert result.already_finished and result.accuracy == result.metrics[-1]["eval_accuracy"]
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}


def test_existing_run_without_resume(tiny, uninterrupted):
    with pytest.raises(UserError, match=r"exists; continue that run with --resume, choose another .*--out"):
        engine.run(tiny(), uninterrupted)


def test_resume_of_nothing(tiny, tmp_path):
    with pytest.raises(UserError, match=r"no run in .* to resume; start it without --resume"):
        engine.run(tiny(), tmp_path / "run", resume=True)


def test_one_process_at_a_time(tiny, uninterrupted):
    first = engine.RunFolder(uninterrupted)
    first.open(tiny(), 1, resume=True)
    with pytest.raises(UserError, match="another process is training in"):
        engine.run(tiny(), uninterrupted, resume=True)
    first.close()
    engine.run(tiny(), uninterrupted, resume=True)


def test_resume_with_another_recipe(tiny, uninterrupted):
    with pytest.raises(UserError, match=r"started with optimizer\.lr = 0\.1, now it is 0\.2"):
        engine.run(tiny(optimizer={"lr": 0.2}), uninterrupted, resume=True)
    with pytest.raises(UserError, match=r"started with model\.batch_norm = None, now it is True"):
        engine.run(tiny(model={"batch_norm": True}), uninterrupted, resume=True)
    engine.run(tiny(run={"checkpoint_steps": 1}), uninterrupted, resume=True)  # this one may change


def test_resume_where_files_were_changed(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert run_until(monkeypatch, tiny(), folder, (engine.Trainer, "_train_step"), 20)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than it was at the last checkpoint"):
        engine.run(tiny(), folder, resume=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        engine.run(tiny(), folder, resume=True)


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run does not come so far"
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def test_sigkill(tmp_path, same_weights, environment, python):
    """Real processes, really killed, each a random moment after it has written two checkpoints more."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        '[model]\nname = "tiny_convnet"\nwidth = 4\n[data]\nname = "digits"\nbatch_size = 32\n'
        "[run]\nepochs = 8\ncheckpoint_steps = 5\n"
    )
    command = [python, "-m", "training", "run", str(recipe), "--out"]
    subprocess.run([*command, "whole"], env=environment, cwd=tmp_path, check=True, capture_output=True)
    folder = tmp_path / "parts"
    chance = random.Random(1)
    kills = 0
    for attempt in range(3):
        resume = ["--resume"] if attempt else []
        process = subprocess.Popen(
            [*command, "parts", *resume], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        known = set(checkpoint.checkpoints(folder))
        if wait_for(lambda known=known: len(set(checkpoint.checkpoints(folder)) - known) >= 2, process):
            time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    subprocess.run([*command, "parts", "--resume"], env=environment, cwd=tmp_path, check=True)
    assert same_weights(folder, tmp_path / "whole")
    assert metrics_without_times(folder) == metrics_without_times(tmp_path / "whole")
