"""The oracle against worked examples, against autograd, and against float convolutions of the decoded
values."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional

from quantkernels import reference
from quantkernels.reference.matmul import fused_multiply_add
from quantkernels.testing import assert_bit_equal

INF = float("inf")


def grid_of(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_uniform_rounds_ties_to_even_and_clamps():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.5, 2.5, 2.6, 3.0, 9.0, INF, -INF])
    q = reference.fake_quantize(x, grid_of((0.0, 1.0, 0.0)), 0, 3)
    assert q.tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 3, 0]


def test_nan_stays_nan_and_encodes_to_zero():
    grid = grid_of((0.0, 1.0, 0.0))
    x = torch.tensor([float("nan")])
    assert reference.fake_quantize(x, grid, 0, 3).isnan().all()
    assert reference.encode(x, grid, 0, 3).tolist() == [0]


def test_degenerate_step_returns_the_offset():
    x = torch.tensor([0.7, 0.7])
    assert torch.equal(reference.fake_quantize(x, grid_of((0.7, 0.0, 0.0)), 0, 255), x)


def test_binary_and_ternary():
    x = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.5, 2.0])
    assert reference.fake_quantize(x, grid_of((-3.0, 6.0, 0.0)), 1, 1).tolist() == [-3, -3, 3, 3, 3, 3]
    assert reference.fake_quantize(x, grid_of((-3.0, 3.0, 0.5)), 2, 2).tolist() == [-3, -3, 0, 0, 0, 3]


def test_clip_and_full_sums_by_hand():
    x = torch.tensor([-1.0, 0.25, 1.6, 3.0, 4.0])
    g = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    grid = grid_of((0.0, 1.0, 0.0))
    grad_x, sums = reference.fake_quantize_backward(g, x, grid, 0, 3, 2)
    assert grad_x.tolist() == [0, 10, 100, 1000, 0]
    below, above, inside = sums[0].tolist()
    assert (below, above) == (1, 11000)
    assert inside == pytest.approx(10 * (0 - 0.25) + 100 * (2 - 1.6), rel=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("ste", [0, 1, 2])
def test_explicit_backward_agrees_with_autograd(ste, axis):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, requires_grad=True)
    channels = 1 if axis is None else x.shape[axis]
    rows = torch.stack([-torch.rand(channels), torch.rand(channels) * 0.5 + 0.1, torch.zeros(channels)], 1)
    grid = rows.requires_grad_()
    g = torch.randn_like(x)
    reference.differentiable_fake_quantize(x, grid, 0, 7, ste, axis).backward(g)
    grad_x, sums = reference.fake_quantize_backward(g, x.detach(), grid.detach(), 0, 7, ste, axis)
    assert torch.allclose(x.grad, grad_x, atol=1e-6)
    if ste == 0:
        assert grid.grad is None
        return
    below, above, inside = sums.unbind(1)
    assert torch.allclose(grid.grad[:, 0], below + above, atol=1e-4)
    assert torch.allclose(grid.grad[:, 1], 7 * above + (inside if ste == 2 else 0), atol=1e-4)


def test_attention_one_hot_is_the_member_and_gradients_agree_with_autograd():
    torch.manual_seed(1)
    x = torch.randn(3, 40, requires_grad=True)
    grids = torch.tensor([[[-1.0, 0.66, 0]], [[-0.8, 1.6, 0]], [[-1.1, 1.1, 0.4]], [[0, 0, 0]]]).requires_grad_()
    kinds, levels, stes = [0, 1, 2, 3], [3, 1, 2, 0], [2, 0, 0, 0]
    for k in range(3):
        one_hot = torch.zeros(4)
        one_hot[k] = 1.0
        q = reference.attention_quantize(x.detach(), one_hot, grids.detach(), kinds, levels, stes)
        assert torch.equal(q, reference.fake_quantize(x.detach(), grids[k].detach(), kinds[k], levels[k]))
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1], requires_grad=True)
    g = torch.randn_like(x)
    q = reference.differentiable_attention_quantize(x, attention, grids, kinds, levels, stes)
    q.backward(g)
    arguments = (attention.detach(), grids.detach(), kinds, levels, stes)
    assert torch.allclose(q, reference.attention_quantize(x.detach(), *arguments), atol=1e-6)
    grad_x, grad_attention, sums = reference.attention_quantize_backward(g, x.detach(), *arguments)
    assert torch.allclose(grad_x, x.grad, atol=1e-6)
    assert torch.allclose(grad_attention, attention.grad, atol=1e-4)
    below, above, inside = sums[0, 0].tolist()
    expected = torch.tensor([below + above, inside + 3 * above, 0]) * attention.detach()[0]
    assert torch.allclose(grids.grad[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize(("kind", "levels"), [(0, 2**b - 1) for b in range(1, 9)] + [(1, 1), (2, 2)])
def test_pack_round_trip(kind, levels, n):
    codes = torch.randint(0, levels + 1, (3, n), dtype=torch.uint8)
    planes = reference.pack_bitplanes(codes, kind, levels)
    assert planes.shape == (reference.plane_count(kind, levels), 3, (n + 31) // 32)
    assert torch.equal(reference.unpack_bitplanes(planes, kind, n), codes)


def test_pack_by_hand():
    codes = torch.zeros(1, 33, dtype=torch.uint8)
    codes[0, 0], codes[0, 31], codes[0, 32] = 1, 2, 3
    planes = reference.pack_bitplanes(codes, 0, 3)
    assert planes[0].tolist() == [[-(2**31), 1]]  # the high bits: elements 31 and 32
    assert planes[1].tolist() == [[1, 1]]  # the low bits: elements 0 and 32


GRIDS = {
    0: (grid_of((-0.3, 0.25, 0.0)), 7),
    1: (grid_of((-0.6, 1.2, 0.0)), 1),
    2: (grid_of((-0.6, 0.6, 0.4)), 2),
}


@pytest.mark.parametrize(("x_kind", "w_kind"), list(itertools.product(range(3), repeat=2)))
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 1, "padding": 1, "dilation": 1, "groups": 1},
        {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2), "groups": 2},
        {"stride": 3, "padding": 2, "dilation": 1, "groups": 4},
    ],
)
def test_conv_equals_the_convolution_of_decoded_values_with_zero_padding(x_kind, w_kind, geometry):
    torch.manual_seed(2)
    x, weight = torch.randn(2, 4, 9, 8), torch.randn(8, 4 // geometry["groups"], 3, 3)
    (x_grid, x_levels), (w_grid, w_levels) = GRIDS[x_kind], GRIDS[w_kind]
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    planes, _ = reference.quantize_pack(rows, w_grid, w_kind, w_levels)
    y = reference.lowbit_conv2d(x, x_grid, x_kind, x_levels, planes, w_grid, w_kind, w_levels, 3, **geometry)
    expected = functional.conv2d(
        reference.fake_quantize(x, x_grid, x_kind, x_levels),
        reference.fake_quantize(weight, w_grid, w_kind, w_levels),
        None,
        **geometry,
    )
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, atol=1e-5)


def test_linear_epilogue_in_order():
    x = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    planes = reference.pack_bitplanes(torch.tensor([[3, 2, 1], [0, 0, 3]], dtype=torch.uint8), 0, 3)
    w_grid = grid_of((-1.5, 1.0, 0), (0.0, 0.5, 0))
    x_grid = grid_of((0.25, 0.5, 0))
    y = reference.lowbit_linear(
        x, x_grid, 0, 3, planes, w_grid, 0, 3,
        bias=torch.tensor([1.0, -20.0]), scale=torch.tensor([2.0, 1.0]), shift=torch.tensor([0.5, 0.0]),
        lower=0.0,
    )  # fmt: skip
    # channel 0: weights 1.5 .5 -.5, values .25 .75 1.25 -> .375 + .375 - .625 = .125; (.125 + 1)*2 + .5
    assert y.tolist() == [[2.75, 0.0]]
    codes = reference.lowbit_linear(
        x, x_grid, 0, 3, planes, w_grid, 0, 3, out_grid=grid_of((0, 0.125, 0)), out_levels=1
    )
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[1, 1]]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_stats(axis):
    x = torch.randn(3, 5, 7)
    rows = x.flatten()[None] if axis is None else x.movedim(axis, 0).flatten(1)
    expected = torch.stack([rows.amin(1), rows.amax(1), rows.abs().sum(1), rows.square().sum(1)], 1)
    assert torch.allclose(reference.channel_stats(x, axis), expected)
    threshold = 0.7 * rows.abs().mean(1)
    means = reference.conditional_abs_mean(x, threshold, axis)
    for row, limit, mean in zip(rows.abs(), threshold, means, strict=True):
        assert torch.allclose(row[row > limit].mean(), mean)
    assert reference.conditional_abs_mean(x, threshold * 1000, axis).eq(0).all()
    candidates = rows.abs().amax(1, keepdim=True) * torch.tensor([[0.5, 1.0]])
    errors = reference.range_errors(x, candidates, 3, axis)
    for channel, j in itertools.product(range(rows.shape[0]), range(2)):
        a = candidates[channel, j]
        q = reference.fake_quantize(rows[channel], torch.stack([-a, (a + a) / 3, a * 0])[None], 0, 3)
        assert torch.allclose((q - rows[channel]).square().sum(), errors[channel, j])


def rounded(value: Fraction) -> float:
    """The float32 nearest to an exact number, ties to even."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - 23, -149)
    while abs(value) / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while exponent > -149 and abs(value) / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    return float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_a_fused_multiply_add_rounds_once():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 4000, generator=generator)
    a[:2000] = (a[:2000] * 4096).round() / 4096 + 2.0**-12  # products that are ties between float32, or nearly
    b[:2000] = (b[:2000] * 2048).round() / 2048
    c *= 2.0 ** torch.randint(-80, 20, (4000,), generator=generator)
    c[::7] = 0.0
    fused = fused_multiply_add(a, b, c)
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert fused.tolist() == [rounded(value) for value in exact]
    twice = (a.double() * b.double() + c.double()).float()
    assert (fused != twice).any()


def test_a_fused_multiply_add_of_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([inf, 1.0, nan, 3e38, 0.0, -0.0, inf])
    b = torch.tensor([1.0, 2.0, 1.0, 3e38, 5.0, 1.0, 1.0])
    c = torch.tensor([1.0, -inf, 0.0, 1.0, -0.0, -0.0, -inf])
    assert_bit_equal(fused_multiply_add(a, b, c), torch.tensor([inf, -inf, nan, inf, 0.0, -0.0, nan]))
