"""The loop: it learns, it is deterministic, it writes what it says, and it refuses what cannot work."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from training import engine
from training.algorithms.base import Algorithm
from training.config import ConfigError, UserError


def test_float_training_on_digits(tiny, tmp_path):
    config = tiny(model={"width": 8}, data={"batch_size": 64}, run={"epochs": 6})
    result = engine.run(config, tmp_path / "run")
    assert result.accuracy > 0.9
    assert not result.model.training
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert [line["kind"] for line in lines] == ["epoch"] * 6 + ["final"]
    assert [line.get("epoch") for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert lines[-1]["eval_accuracy"] == lines[-2]["eval_accuracy"]
    assert lines[0]["train_loss"] > lines[4]["train_loss"]
    assert lines[0]["step"] == 1437 // 64
    about = json.loads((tmp_path / "run/config.json").read_text())
    assert about["recipe"] == config.to_tables()
    assert about["versions"]["torch"] == torch.__version__
    assert about["processes"] == 1
    assert load_file(tmp_path / "run/model.safetensors").keys() == result.model.state_dict().keys()


def test_same_seed_same_weights_other_seed_others(tiny, tmp_path, same_weights):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # the state of the global generator has no influence
        engine.run(tiny(run={"seed": seed, "epochs": 1}), tmp_path / name)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_load_run_gives_the_trained_network(tiny, tmp_path):
    trained = engine.run(tiny(run={"epochs": 1}), tmp_path / "run")
    config, loaded = engine.load_run(tmp_path / "run")
    assert config == tiny(run={"epochs": 1})
    inputs, _ = loaded.data.test.eval_batch(torch.arange(10))
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs), trained.model(inputs))
    assert loaded.metrics == trained.metrics


def test_load_run_of_no_run(tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read .* is not a run"):
        engine.load_run(tmp_path)


def test_start_from_a_float_model(tiny, tmp_path):
    first = engine.run(tiny(run={"epochs": 2}), tmp_path / "float")
    start = str(tmp_path / "float/model.safetensors")
    second = engine.run(tiny(model={"init": start}, run={"epochs": 1}, optimizer={"lr": 1e-6}), tmp_path / "next")
    assert second.metrics[0]["eval_loss"] == pytest.approx(first.metrics[-1]["eval_loss"], rel=0.1)
    with pytest.raises(UserError, match=r"does not fit the network: .*size mismatch"):
        engine.run(tiny(model={"init": start, "width": 8}), tmp_path / "wrong")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be read as a safetensors file"):
        engine.run(tiny(model={"init": str(tmp_path / "broken.safetensors")}), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_optimizers_and_precision(tiny, tmp_path):
    for name in ("adam", "adamw"):
        config = tiny(optimizer={"name": name, "lr": 0.01}, run={"epochs": 1, "label_smoothing": 0.1})
        assert math.isfinite(engine.run(config, tmp_path / name).metrics[-1]["eval_loss"])
    half = engine.run(tiny(run={"epochs": 1, "mixed_precision": "bf16"}), tmp_path / "bf16")
    full = engine.run(tiny(run={"epochs": 1}), tmp_path / "float32")
    assert half.metrics[-1]["eval_loss"] != full.metrics[-1]["eval_loss"]
    assert half.metrics[-1]["eval_loss"] == pytest.approx(full.metrics[-1]["eval_loss"], rel=0.05)
    assert all(value.dtype != torch.bfloat16 for value in half.model.state_dict().values())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="'fp16' needs a GPU"):
        engine.run(tiny(run={"mixed_precision": "fp16"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_larger_than_the_data(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batch_size = 5000 is more than the 1437 training images"):
        engine.run(tiny(data={"batch_size": 5000}), tmp_path / "run")


def test_divergence_is_said(tiny, tmp_path):
    with pytest.raises(UserError, match=r"diverged in epoch 1: the loss is nan; lower optimizer\.lr"):
        engine.run(tiny(optimizer={"lr": 1e12}, schedule={"warmup_epochs": 0.0}), tmp_path / "run")


def test_evaluation_and_checkpoints_every_few_epochs(tiny, tmp_path):
    config = tiny(run={"epochs": 5, "eval_epochs": 2, "checkpoint_epochs": 2, "checkpoint_steps": 0})
    result = engine.run(config, tmp_path / "run")
    assert ["eval_loss" in line for line in result.metrics] == [False, True, False, True, True, True]
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-0000000044.pt", "checkpoint-0000000055.pt"]


class Recorder(Algorithm):
    """Writes down the order of the calls."""

    def __init__(self):
        self.calls = []

    def start(self, model, total_steps, steps_per_epoch, epochs):
        self.calls.append(("start", total_steps, steps_per_epoch, epochs))

    def before_batch(self, model, step):
        self.calls.append(("before_batch", step))

    def before_pass(self, model, index):
        assert self.passes == 1 and index == 0
        self.calls.append(("before_pass",))

    def before_step(self, model):
        assert all(p.grad is not None for p in model.parameters())
        self.calls.append(("before_step",))

    def after_epoch(self, model, epoch):
        self.calls.append(("after_epoch", epoch))

    def finish(self, model):
        self.calls.append(("finish",))

    def metrics(self, model):
        return {"calls": len(self.calls)}


def test_hooks_of_an_algorithm(tiny, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(engine, "build_algorithm", lambda name, options: recorder)
    config = tiny(data={"batch_size": 700}, run={"epochs": 2})
    result = engine.run(config, tmp_path / "run")
    batches = [[("before_batch", step), ("before_pass",), ("before_step",)] for step in range(4)]
    assert recorder.calls == [
        ("start", 4, 2, 2),
        *batches[0],
        *batches[1],
        ("after_epoch", 0),
        *batches[2],
        *batches[3],
        ("after_epoch", 1),
        ("finish",),
    ]
    assert [line["algorithm"]["calls"] for line in result.metrics] == [8, 15, 16]


class Shares(Algorithm):
    """The cross-entropy in three passes, of a sixth, a third and a half of it."""

    passes = 3

    def before_pass(self, model, index):
        self.share = (index + 1) / 6

    def loss(self, model, inputs, targets, criterion):
        loss, outputs = super().loss(model, inputs, targets, criterion)
        return loss * self.share, outputs


def test_gradients_of_the_passes_add_up(tiny, tmp_path, monkeypatch):
    config = tiny(run={"epochs": 1}, model={"batch_norm": False})
    whole = engine.run(config, tmp_path / "whole")
    monkeypatch.setattr(engine, "build_algorithm", lambda name, options: Shares())
    parts = engine.run(config, tmp_path / "parts")
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert parts.metrics[0]["train_loss"] == pytest.approx(whole.metrics[0]["train_loss"])
    assert parts.metrics[0]["train_accuracy"] == whole.metrics[0]["train_accuracy"]


class Twice(torch.nn.Module):
    """The mean of two forwards of a network, as one forward."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return (self.network(x) + self.network(x)) / 2


class Wrapped(Algorithm):
    calibration_batches = 3

    def wrap(self, model):
        return Twice(model)

    def calibrate(self, model, batches):
        self.seen = [list(batches()), list(batches())]
        with torch.no_grad():
            next(model.parameters()).add_(1)


def test_a_network_can_be_wrapped_and_calibrated(tiny, tmp_path, monkeypatch):
    algorithm = Wrapped()
    config = tiny(run={"epochs": 1}, model={"batch_norm": False})
    plain = engine.run(config, tmp_path / "plain")
    monkeypatch.setattr(engine, "build_algorithm", lambda name, options: algorithm)
    result = engine.run(config, tmp_path / "run")
    expected = plain.model.state_dict()
    assert result.model.state_dict().keys() == expected.keys(), "the network itself is what is saved"
    first, *rest = [(value - expected[key]).abs().max() for key, value in result.model.state_dict().items()]
    assert first == pytest.approx(1, abs=1e-4) and max(rest) < 1e-4
    one, other = algorithm.seen
    assert [x.shape for x in one] == [(128, 1, 8, 8)] * 3
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
