"""A training step never waits for the device: no value of a tensor is read on the host."""

import random

import pytest
import torch
from algorithms import ALGORITHMS
from residual import tiny_residual
from torch.nn import functional as F

from training.algorithms.base import build_algorithm

READS = ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__")
# Adam counts its steps in tensors that stay on the host, where CoQuant's swaps are drawn too; which kernels follow the
# choice of a teacher depends on it, so that is read (tests/training/test_coquant.py counts how often).
MAY_READ = {"DiffQ": {"item"}, "CoQuant": {"tolist", "__int__"}}


def step_of(name, device, **options):
    """A function that makes a training step, as the engine does."""
    torch.manual_seed(0)
    random.seed(0)
    table = ALGORITHMS[name] | options
    algorithm = build_algorithm(table["name"], {key: value for key, value in table.items() if key != "name"})
    model = algorithm.prepare(tiny_residual(10, 1)).to(device).train()
    inputs = torch.randn(16, 1, 8, 8, device=device)
    targets = torch.randint(0, 10, (16,), device=device)
    groups = algorithm.parameter_groups(model, {"lr": 0.01, "weight_decay": 1e-4})
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    algorithm.start(model, 100, 10, 10)
    wrapped = algorithm.wrap(model)

    def step(number):
        algorithm.before_batch(model, number)
        for index in range(algorithm.passes):
            algorithm.before_pass(model, index)
            algorithm.loss(wrapped, inputs, targets, F.cross_entropy)[0].backward()
        algorithm.before_step(model)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_step_reads_no_value(name, monkeypatch):
    step = step_of(name, "cpu")
    step(0)  # Adam and SGD make their state, observers their first statistics
    read = []
    for method in READS:
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(torch.Tensor, method, lambda x, *a, m=method, f=original: read.append(m) or f(x, *a))
    step(1)
    monkeypatch.undo()
    assert set(read) <= MAY_READ.get(name, set()), read


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_step_does_not_wait_for_the_device(name):
    step = step_of(name, "cuda", **({"swap": "none"} if name == "CoQuant" else {}))
    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
