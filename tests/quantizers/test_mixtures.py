"""Attention and Binary-Relax."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import quantkernels as qk
from quantkernels import reference
from quantkernels.quantizers import Mixture


def members(kind: str):
    return {
        "minmax": [qk.MinMax(2), qk.MinMax(4), qk.MinMax(8)],
        "sawb": [qk.SAWB(2), qk.SAWB(4), qk.SAWB(8)],
        "per channel": [qk.MinMax(2, axis=0), qk.SAWB(4, axis=0), qk.TWN(axis=0)],
        "binary ternary float": [qk.BWN(), qk.TWN(), qk.Identity()],
        "binary ternary minmax": [qk.BWN(), qk.TWN(), qk.MinMax(8)],
        "pact": [qk.PACT(2, alpha=1.0), qk.PACT(4, alpha=1.0), qk.PACT(8, alpha=1.0)],
        "pact plus and minmax": [qk.PACT(2, 1.0, plus=True), qk.MinMax(4), qk.Identity()],
        "one": [qk.SAWB(2)],
    }[kind]


KINDS = [
    "minmax", "sawb", "per channel", "binary ternary float", "binary ternary minmax", "pact",
    "pact plus and minmax", "one",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_weighted_sum_with_its_gradients(kind):
    torch.manual_seed(7)
    mixture = qk.Attention(members(kind), temperature=0.7)
    x, g = torch.randn(4, 9, 3), torch.randn(4, 9, 3)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    mixture(mine).backward(g)
    expected = torch.zeros_like(theirs)
    twin = copy.deepcopy(mixture)
    twin.zero_grad()
    attention = torch.softmax(twin.logits / 0.7, 0)
    for a, q in zip(attention, twin.members, strict=True):
        if isinstance(q, qk.Identity):
            expected = expected + a * theirs
        else:
            grid = q.grid(x)
            expected = expected + a * reference.differentiable_fake_quantize(
                theirs, grid, q.kind, q.levels, q.ste, q.axis
            )
    expected.backward(g)
    torch.testing.assert_close(mixture(x), expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(mixture.logits.grad, twin.logits.grad, rtol=1e-4, atol=1e-4)
    if "pact" in kind:
        mine_alpha, their_alpha = mixture.members[0].alpha.grad, twin.members[0].alpha.grad
        torch.testing.assert_close(mine_alpha, their_alpha, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_full_attention_on_one_member_is_that_member(kind):
    mixture = qk.Attention(members(kind), temperature=1.0)
    x = torch.randn(5, 8)
    for k, q in enumerate(mixture.members):
        with torch.no_grad():
            mixture.logits.fill_(-1000.0)
            mixture.logits[k] = 1000.0
        assert torch.equal(mixture(x), q(x))
        assert torch.equal(mixture.select(k)(x), q(x))
        mixture.select(-1)


def test_initial_logits():
    mixture = qk.Attention([qk.MinMax(8), qk.MinMax(2), qk.MinMax(4)])
    assert [q.bits for q in mixture.members] == [2, 4, 8]
    torch.testing.assert_close(mixture.logits.detach(), torch.tensor([12 / 14, 10 / 14, 6 / 14]))
    torch.testing.assert_close(mixture.attention(), torch.softmax(mixture.logits / 100, 0))
    assert mixture.temperature.dtype == torch.float32


def test_normalise():
    mixture = qk.Attention(members("minmax"))
    expected = mixture.logits.detach() / mixture.logits.detach().std(correction=0)
    mixture.normalise_()
    torch.testing.assert_close(mixture.logits.detach(), expected)
    equal = qk.Attention([qk.MinMax(2), qk.SAWB(2)])
    equal.normalise_()
    assert equal.logits.tolist() == [0.5, 0.5]
    single = qk.Attention([qk.MinMax(2)])
    single.normalise_()
    assert single.logits.tolist() == [0.0]


def test_statistics_are_read_once_for_all_members(monkeypatch):
    calls = []

    def count(name):
        original = getattr(qk.ops, name)
        monkeypatch.setattr(qk.ops, name, lambda *a: calls.append(name) or original(*a))

    count("channel_stats")
    count("minmax_grids")
    count("minmax_mixture")
    for kind, expected in (("minmax", 1), ("sawb", 1), ("binary ternary minmax", 1), ("pact", 0)):
        calls.clear()
        qk.Attention(members(kind))(torch.randn(30))
        assert len(calls) == expected


def test_pact_members_share_alpha_through_copies_and_state_dicts():
    mixture = copy.deepcopy(qk.Attention(members("pact")))
    assert len({id(q.alpha) for q in mixture.members}) == 1
    assert len(list(mixture.parameters())) == 2
    with torch.no_grad():
        mixture.members[0].alpha.fill_(3.0)
    other = qk.Attention(members("pact"))
    other.load_state_dict(mixture.state_dict())
    assert [q.alpha.item() for q in other.members] == [3.0] * 3
    other.to(torch.float16)
    assert len({id(q.alpha) for q in other.members}) == 1
    with pytest.raises(ValueError, match="share one alpha"):
        qk.Attention([qk.PACT(2, alpha=1.0), qk.PACT(4, alpha=2.0)])


def test_selection():
    mixture = qk.Attention([qk.MinMax(2), qk.TWN(), qk.MinMax(8)])
    x = torch.randn(40)
    for k, q in enumerate(mixture.members):
        mixture.select(k)
        assert (mixture.bits, mixture.kind, mixture.levels) == (q.bits, q.kind, q.levels)
        assert torch.equal(mixture(x), q(x))
        assert mixture.selected.item() == k
        loaded = qk.Attention([qk.MinMax(2), qk.TWN(), qk.MinMax(8)])
        loaded.load_state_dict(mixture.state_dict())
        assert loaded.current is loaded.members[k]
        assert torch.equal(loaded(x), q(x))
    for index in (3, -2):
        with pytest.raises(IndexError, match="select: index must be"):
            mixture.select(index)


def test_what_a_mixture_refuses():
    with pytest.raises(ValueError, match="1 to 8 quantizers, got 0"):
        qk.Attention([])
    with pytest.raises(ValueError, match="1 to 8 quantizers, got 9"):
        qk.Attention([qk.MinMax(2) for _ in range(9)])
    with pytest.raises(ValueError, match="same axis"):
        qk.Attention([qk.MinMax(2), qk.MinMax(4, axis=0)])
    with pytest.raises(TypeError, match="plain quantizers, got Attention"):
        qk.Attention([qk.Attention([qk.MinMax(2)])])
    with pytest.raises(TypeError, match="got int"):
        qk.Attention([2, 4])
    with pytest.raises(ValueError, match="temperature must be positive"):
        qk.Attention([qk.MinMax(2)], temperature=0.0)
    with pytest.raises(ValueError, match="one quantizer or three, got 2"):
        qk.BinaryRelax([qk.MinMax(2), qk.MinMax(4)])


@pytest.mark.parametrize("count", [1, 3])
def test_binary_relax(count):
    quantizers = [qk.MinMax(2), qk.MinMax(4), qk.MinMax(8)][:count]
    relax = qk.BinaryRelax(quantizers)
    x = torch.randn(60)
    for epoch in range(4):
        omega = 1.02**epoch
        parts = [q(x) for q in quantizers] + ([x] if count == 1 else [])
        expected = (omega * parts[0] + sum(parts[1:])) / (omega + len(parts) - 1)
        torch.testing.assert_close(relax(x), expected)
        relax.step_epoch()
    assert math.isclose(relax.omega.item(), 1.02**4, rel_tol=1e-6)
    copied = qk.BinaryRelax(quantizers)
    copied.load_state_dict(relax.state_dict())
    assert torch.equal(copied(x), relax(x))
    assert torch.equal(relax.select()(x), quantizers[0](x))


def test_tracking_mixture_uses_running_grids_in_eval():
    mixture = qk.Attention([qk.MinMax(2), qk.PACT(4)]).track()
    for _ in range(3):
        mixture(torch.randn(50))
    mixture.eval()
    x = torch.randn(50) * 100
    grid = mixture.members[0].running_grid.clone()
    mixture(x)
    assert torch.equal(mixture.members[0].running_grid, grid)
    assert torch.equal(mixture.grids(x)[0], grid)
    assert isinstance(mixture, Mixture)
