"""Quantizers as modules: running statistics, checkpointing, state dicts, copies, casts, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantkernels as qk

EVERY = {
    "minmax": lambda: qk.MinMax(3),
    "minmax per channel": lambda: qk.MinMax(3, axis=0),
    "sawb": lambda: qk.SAWB(2),
    "sawb search": lambda: qk.SAWB(6),
    "pact": lambda: qk.PACT(2, alpha=1.0),
    "lsq": lambda: qk.LSQ(3),
    "learned basis": lambda: qk.LearnedBasis(2),
    "learned basis per channel": lambda: qk.LearnedBasis(3, axis=0),
    "hwgq": lambda: qk.HWGQ(2),
    "dorefa": lambda: qk.DoReFa(3),
    "modified": lambda: qk.ModifiedDoReFa(3),
    "centred": lambda: qk.CentredDoReFa(3),
    "bwn": lambda: qk.BWN(),
    "twn": lambda: qk.TWN(),
    "identity": lambda: qk.Identity(),
    "attention": lambda: qk.Attention([qk.MinMax(2), qk.SAWB(4), qk.Identity()]),
    "relax": lambda: qk.BinaryRelax([qk.MinMax(2)]),
}


@pytest.fixture(params=sorted(EVERY))
def quantizer(request):
    return EVERY[request.param]()


def test_running_average():
    quantizer = qk.MinMax(2).track(momentum=0.25)
    batches = [torch.randn(30) for _ in range(4)]
    expected = None
    for x in batches:
        quantizer(x)
        grid = qk.MinMax(2).grid(x)
        expected = grid if expected is None else expected + 0.25 * (grid - expected)
        torch.testing.assert_close(quantizer.running_grid, expected)
    quantizer.eval()
    x = torch.randn(30) * 10
    quantizer(x)
    torch.testing.assert_close(quantizer.running_grid, expected)
    assert quantizer(x).max() <= expected[0, 0] + 3.001 * expected[0, 1]


@pytest.mark.parametrize("make", [lambda: qk.MinMax(2), lambda: qk.SAWB(4), lambda: qk.TWN(), lambda: qk.BWN()])
def test_eval_before_training_is_an_error_that_says_what_to_do(make):
    quantizer = make().track().eval()
    with pytest.raises(RuntimeError, match="run at least one forward in training mode"):
        quantizer(torch.randn(4))


def test_an_empty_batch_changes_nothing():
    quantizer = qk.MinMax(2).track()
    quantizer(torch.empty(0))
    assert not quantizer.calibrated
    quantizer(torch.randn(9))
    before = quantizer.running_grid.clone()
    quantizer(torch.empty(0))
    assert torch.equal(quantizer.running_grid, before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [lambda: qk.MinMax(2), lambda: qk.Attention([qk.MinMax(2), qk.SAWB(4)])])
def test_recomputation_under_checkpointing_updates_once(make, reentrant):
    torch.manual_seed(8)
    plain, checked = make().track(), make().track()
    inputs = [torch.randn(40) for _ in range(3)]
    for x in inputs:
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(mine * 2).square().sum().backward()
        checkpoint(lambda t: checked(t * 2).square(), theirs, use_reentrant=reentrant).sum().backward()
        assert torch.equal(mine.grad, theirs.grad)
    for a, b in zip(plain.buffers(), checked.buffers(), strict=True):
        assert torch.equal(a, b)


def test_two_forwards_before_one_backward():
    quantizer = nn.Sequential(qk.SAWB(2).track())
    a, b = torch.randn(20, requires_grad=True), torch.randn(20, requires_grad=True)
    (quantizer(a).sum() + quantizer(b).sum()).backward()
    assert a.grad is not None and b.grad is not None


def test_tracking_is_per_tensor():
    with pytest.raises(ValueError, match="per tensor, got axis=0"):
        qk.MinMax(2, axis=0).track()
    with pytest.raises(ValueError, match="momentum must be in"):
        qk.MinMax(2).track(momentum=0.0)


def test_state_dict_round_trip_and_deepcopy(quantizer):
    quantizer = quantizer if quantizer.axis == 0 else quantizer.track()
    x = torch.randn(4, 6)
    quantizer(x)
    twin = copy.deepcopy(quantizer)
    fresh = copy.deepcopy(quantizer)
    with torch.no_grad():
        for value in fresh.state_dict().values():
            value.fill_(0)
    fresh.load_state_dict(quantizer.state_dict())
    for other in (twin, fresh):
        assert torch.equal(other.eval()(x), quantizer.eval()(x))
    twin.train()(torch.randn(4, 6) * 50)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


def test_running_statistics_come_back_from_a_state_dict():
    trained = qk.MinMax(2).track()
    trained(torch.randn(20))
    loaded = qk.MinMax(2).track()
    loaded.load_state_dict(trained.state_dict())
    x = torch.randn(20)
    assert torch.equal(loaded.eval()(x), trained.eval()(x))
    never = qk.MinMax(2).track()
    loaded.load_state_dict(never.state_dict())
    with pytest.raises(RuntimeError, match="none yet"):
        loaded(x)


def test_parameters_and_buffers_stay_float32(quantizer):
    for cast in ("half", "bfloat16", "double"):
        module = getattr(nn.Sequential(copy.deepcopy(quantizer)), cast)()
        for value in (*module.parameters(), *module.buffers()):
            assert not value.is_floating_point() or value.dtype == torch.float32
    x = torch.randn(4, 6)
    quantizer(x)
    before = quantizer.eval()(x)
    assert torch.equal(quantizer.half()(x), before)


def test_repr_can_be_read(quantizer):
    assert type(quantizer).__name__ in repr(quantizer)
    assert repr(qk.PACT(2)) == "PACT(bits=2, alpha=8)"
    assert repr(qk.SAWB(3, axis=0, ste="identity")) == 'SAWB(bits=3, axis=0, ste="identity")'


def test_set_bits():
    x = torch.randn(100)
    for make in (qk.MinMax, qk.SAWB, qk.PACT):
        quantizer = make(8)
        quantizer.set_bits(3)
        assert torch.equal(quantizer(x), make(3)(x))
        with pytest.raises(ValueError, match="from 1 to 8"):
            quantizer.set_bits(9)
    tracked = qk.MinMax(8).track()
    tracked(x)
    tracked.set_bits(2)
    torch.testing.assert_close(tracked.eval()(x), qk.MinMax(2)(x))
    with pytest.raises(ValueError, match="TWN has 2 bits and cannot have 4"):
        qk.TWN().set_bits(4)
    mixture = qk.Attention([qk.MinMax(2), qk.MinMax(8)])
    mixture.set_bits(8)
    assert torch.equal(mixture(x), qk.MinMax(8)(x))
    with pytest.raises(ValueError, match=r"of \[2, 8\] bits, not of 4"):
        mixture.set_bits(4)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"identity"}))
def test_compiles_without_a_graph_break(name):
    quantizer = EVERY[name]()
    x = torch.randn(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(quantizer), fullgraph=True, backend="aot_eager")
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = compiled(mine)
    expected = quantizer(theirs)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(mine.grad, theirs.grad)


def test_tracking_compiles_without_a_graph_break():
    torch._dynamo.reset()
    quantizer, twin = qk.MinMax(2).track(), qk.MinMax(2).track()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(30)
        assert torch.equal(compiled(x), twin(x))
    assert torch.equal(quantizer.running_grid, twin.running_grid)
