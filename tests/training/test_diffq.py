"""DiffQ: the size in the loss, the bits' own optimizer, more penalty means fewer bits."""

import pytest
import torch
from torch.nn import functional as F

from training import engine
from training.algorithms.base import build_algorithm
from training.config import ConfigError
from training.models import build_model


def network(algorithm):
    torch.manual_seed(0)
    return algorithm.prepare(build_model("tiny_convnet", 10, in_channels=1, width=4))


@pytest.mark.parametrize("groups", ["layer", "channel"])
def test_the_loss_has_the_size(groups):
    algorithm = build_algorithm("diffq", {"penalty": 3.0, "groups": groups})
    model = network(algorithm)
    algorithm.before_batch(model, 0)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    loss, outputs = algorithm.loss(model, x, y, F.cross_entropy)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    added = float((loss - F.cross_entropy(outputs, y)).detach())
    assert added == pytest.approx(3.0 * weights / 2**20, rel=1e-3), "8 bits are a byte"
    loss.backward()
    assert all(p.grad is not None for p in algorithm.own_parameters())


def test_bits_have_their_own_optimizer():
    algorithm = build_algorithm("diffq", {"bits_lr": 0.5})
    model = network(algorithm)
    (group,) = algorithm.parameter_groups(model, {"lr": 0.1, "weight_decay": 0.1})
    own = {id(p) for p in algorithm.own_parameters()}
    assert len(own) == 4 and not own & {id(p) for p in group["params"]}
    algorithm.start(model, 10, 10, 1)
    before = algorithm.own_parameters()[0].detach().clone()
    for p in algorithm.own_parameters():
        p.grad = torch.ones_like(p)
    algorithm.before_step(model)
    torch.testing.assert_close(algorithm.own_parameters()[0], before - 0.5)
    assert all(p.grad is None for p in algorithm.own_parameters())


def test_more_penalty_means_fewer_bits(tiny, tmp_path):
    sizes = []
    for penalty, least in ((0.0, 0.8), (500.0, 0.4)):
        algorithm = {"name": "diffq", "penalty": penalty, "bits_lr": 0.1}
        config = tiny(model={"width": 8}, data={"batch_size": 64}, run={"epochs": 5}, algorithm=algorithm)
        result = engine.run(config, tmp_path / f"{penalty}")
        assert result.accuracy > least
        final = result.metrics[-1]
        sizes.append(final["results"]["size MB"])
        bits = [b for b, _ in final["algorithm"]["bits"].values()]
        assert len(bits) == 4 and all(b == round(b) for b in bits)
        _, loaded = engine.load_run(tmp_path / f"{penalty}")
        inputs, _ = loaded.data.test.eval_batch(torch.arange(20))
        with torch.no_grad():
            assert torch.equal(loaded.model(inputs), result.model(inputs))
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_bits": 0}, r"min_bits and max_bits must be rising integers from 2 to 15, got \(0, 15\)"),
        ({"max_bits": 2}, "must be rising integers"),
        ({"penalty": -1.0}, "penalty must be 0 or positive"),
        ({"groups": "pixel"}, "algorithm.groups = 'pixel' is not known"),
        ({"bits_lr": 0.0}, "bits_lr must be positive"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithm("diffq", options)
