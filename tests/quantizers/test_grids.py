"""Each quantizer's grid against its formula, written out with torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

import quantkernels as qk
from quantkernels import reference
from quantkernels.quantizers.base import channel_size
from quantkernels.quantizers.sawb import CANDIDATES

AXES = [None, 0, 1]


def rows(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    return (x.flatten()[None] if axis is None else x.movedim(axis, 0).flatten(1)).double()


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(4, 6, 5) * torch.tensor([0.3, 1.0, 2.0, 5.0])[:, None, None]


@pytest.mark.parametrize(("bits", "axis"), list(itertools.product([1, 2, 5, 8], AXES)))
def test_minmax(x, bits, axis):
    grid = qk.MinMax(bits, axis).grid(x)
    values = rows(x, axis)
    low, high = values.amin(1), values.amax(1)
    assert grid.dtype == torch.float32
    assert torch.equal(grid[:, 0], low.float())
    torch.testing.assert_close(grid[:, 1], ((high - low) / (2**bits - 1)).float())


@pytest.mark.parametrize(("bits", "axis"), list(itertools.product([2, 3, 4], AXES)))
def test_sawb_fit(x, bits, axis):
    c1, c2 = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80)}[bits]
    values = rows(x, axis)
    a = c1 * values.square().mean(1).sqrt() + c2 * values.abs().mean(1)
    assert (a > 0).all()
    grid = qk.SAWB(bits, axis).grid(x)
    torch.testing.assert_close(grid[:, 0], -a.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grid[:, 1], (2 * a / (2**bits - 1)).float(), rtol=1e-5, atol=0)


def test_sawb_with_one_bit_is_the_optimal_binary_scale(x):
    torch.testing.assert_close(qk.SAWB(1).grid(x)[:, 0], -x.abs().mean()[None])


@pytest.mark.parametrize(("bits", "axis"), list(itertools.product([5, 6, 8], [None, 0])))
def test_sawb_search_is_near_the_optimum(bits, axis):
    """Against 400 ranges in [0.2, 1.1] max|x|: the error of the chosen one is within 3 % of the least."""
    torch.manual_seed(4)
    x = torch.randn(3, 20000)
    x[1] = x[1].sign() * x[1].abs() ** 1.5
    quantizer = qk.SAWB(bits, axis)
    levels = 2**bits - 1
    largest = x.abs().amax()[None] if axis is None else x.abs().amax(1)
    dense = largest[:, None] * torch.linspace(0.2, 1.1, 400)
    least = reference.range_errors(x, dense, levels, axis).amin(1)
    chosen = reference.range_errors(x, -quantizer.grid(x)[:, :1], levels, axis)[:, 0]
    assert (chosen <= 1.03 * least).all(), chosen / least


def test_sawb_searches_where_the_fit_is_not_positive():
    x = torch.tensor([1.0, -1.0] * 50)  # all magnitudes equal: 12.68 - 12.80 < 0
    grid = qk.SAWB(4).grid(x)
    torch.testing.assert_close(grid[:, 0], torch.tensor([-1.0]))
    torch.testing.assert_close(qk.SAWB(4)(x), x)
    mixed = torch.stack([x, torch.randn(100)])
    per_channel = qk.SAWB(4, axis=0).grid(mixed)
    torch.testing.assert_close(per_channel[0], grid[0])
    torch.testing.assert_close(per_channel[1], qk.SAWB(4).grid(mixed[1])[0])


def test_sawb_candidates_span_root_mean_square_to_maximum(monkeypatch):
    seen = []
    original = qk.ops.range_errors
    monkeypatch.setattr(qk.ops, "range_errors", lambda *a: seen.append(a[1]) or original(*a))
    x = torch.randn(1000)
    qk.SAWB(8)(x)
    assert seen[0].shape == (1, CANDIDATES)
    torch.testing.assert_close(seen[0][0, 0], x.abs().max())
    torch.testing.assert_close(seen[0][0, -1], x.square().mean().sqrt())


@pytest.mark.parametrize("axis", AXES)
def test_bwn(x, axis):
    beta = rows(x, axis).abs().mean(1).float()
    grid = qk.BWN(axis).grid(x)
    torch.testing.assert_close(grid[:, 0], -beta)
    assert torch.equal(grid[:, 1], -2 * grid[:, 0])
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = -1
    expected = torch.where(x >= 0, 1.0, -1.0) * -grid[:, 0].reshape(shape)
    assert torch.equal(qk.BWN(axis)(x), expected)


@pytest.mark.parametrize("axis", AXES)
def test_twn_uses_the_conditional_mean(x, axis):
    values = rows(x, axis).abs()
    delta = 0.7 * values.mean(1)
    beta = torch.stack([row[row > limit].mean() for row, limit in zip(values, delta, strict=True)])
    torch.testing.assert_close(qk.TWN(axis).grid(x), torch.stack([-beta, beta, delta], 1).float())
    assert qk.TWN(axis)(x).unique().numel() == 2 * channel_count(x, axis) + 1


def channel_count(x: torch.Tensor, axis: int | None) -> int:
    return x.numel() // channel_size(x, axis)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pact_is_the_paper_formula(bits):
    torch.manual_seed(5)
    x, alpha, n = torch.randn(500) * 4, 3.7, 2**bits - 1
    q = qk.PACT(bits, alpha=alpha)(x)
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)  # equation 1
    expected = torch.round(y.double() * n / alpha) * alpha / n
    torch.testing.assert_close(q.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantizer", [qk.MinMax, qk.SAWB, qk.PACT])
@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "2"])
def test_bits_are_checked(quantizer, bits):
    with pytest.raises(ValueError, match="bits must be an int from 1 to 8, got"):
        quantizer(bits)


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match=r'ste must be "clip" or "identity", got .full.'):
        qk.SAWB(2, ste="full")
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must be at least"):
            qk.PACT(2, alpha=alpha)


CONSTANT_SAFE = [qk.MinMax(1), qk.MinMax(8), qk.MinMax(3, axis=0), qk.BWN(), qk.TWN(axis=0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e-6])
@pytest.mark.parametrize("quantizer", [*CONSTANT_SAFE, qk.SAWB(2), qk.SAWB(4), qk.SAWB(8), qk.PACT(2)], ids=repr)
def test_constant_tensors_give_no_nan(quantizer, value, dtype):
    x = torch.full((3, 7), value, dtype=dtype, requires_grad=True)
    q = quantizer(x)
    assert q.isfinite().all()
    if isinstance(quantizer, qk.MinMax):
        assert torch.equal(q, x)
    elif quantizer in CONSTANT_SAFE:
        torch.testing.assert_close(q, x)
    q.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("quantizer", [*CONSTANT_SAFE, qk.SAWB(2), qk.SAWB(8), qk.PACT(2)], ids=repr)
def test_empty_tensors(quantizer):
    x = torch.empty(3, 0, requires_grad=True)
    q = quantizer(x)
    assert q.shape == x.shape
    q.sum().backward()
    assert quantizer.encode(x).decode().shape == x.shape
