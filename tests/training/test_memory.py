"""What a step keeps between forward and backward: little more than the float network's, for each graph that is held."""

import random

import pytest
import torch
from algorithms import ALGORITHMS
from torch.nn import functional as F

from training.algorithms.base import build_algorithm
from training.algorithms.limpq import layers_of
from training.models import build_model

GRAPHS = {"switchable BN": 2, "AdaBits": 2, "CoQuant": 3}  # a forward for each bit-width before the backward


def kept_bytes(name, network):
    """Bytes of distinct memory that autograd keeps after the forward of a step, without parameters and the batch."""
    torch.manual_seed(0)
    random.seed(0)
    table = dict(ALGORITHMS[name])
    float_network = build_model(network, 10, in_channels=3, width=0.5)
    if "policy" in table:
        table["policy"] = {"layers": {key: [3, 4] for key in layers_of(float_network)[1:-1]}}
    algorithm = build_algorithm(table.pop("name"), table)
    model = algorithm.prepare(float_network).train()
    algorithm.parameter_groups(model, {"lr": 0.01, "weight_decay": 1e-4})
    algorithm.start(model, 100, 10, 10)
    batch = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    algorithm.before_batch(model, 0)
    algorithm.before_pass(model, 0)
    there = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *batch)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage  # alive, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        algorithm.loss(algorithm.wrap(model), *batch, F.cross_entropy)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("network", ["resnet20", "preact_resnet20"])
def test_memory_of_a_step(network):
    """At most 1.1 times the float step's; with the quantized inputs kept beside the inputs it was 1.5 times."""
    single = kept_bytes("float", network)
    ratios = {name: kept_bytes(name, network) / single / GRAPHS.get(name, 1) for name in ALGORITHMS}
    assert all(ratio <= 1.1 for ratio in ratios.values()), ratios
