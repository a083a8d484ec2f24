"""Under autocast the ops keep the type of their tensor: statistics and grids stay float32, and the convolution or
matrix product that follows casts what it takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from quantkernels import ops
from quantkernels.ops import Kind, Ste
from quantkernels.testing import Problem, assert_bit_equal

pytestmark = pytest.mark.ops("channel_stats", "fake_quantize", "attention_quantize", "encode", "learned_basis_quantize")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_change(backend, dtype):
    problem = Problem((6, 20), dtype, axis=0, levels=7)
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    attention, grids = torch.full((2,), 0.5, device=backend.device), torch.stack((grid, grid))

    def results() -> list[torch.Tensor]:
        return [
            ops.channel_stats(x, 0),
            ops.fake_quantize(x, grid, Kind.UNIFORM, 7, axis=0),
            ops.attention_quantize(x, attention, grids, [0, 1], [7, 1], [0, 0], 0),
            ops.encode(x, grid, Kind.UNIFORM, 7, 0),
            *ops.learned_basis_quantize(x, grid.abs(), 0, axis=0),
        ]

    with backend.chosen():
        outside = results()
        with torch.autocast(backend.device, torch.bfloat16):
            inside = results()
    for a, b in zip(inside, outside, strict=True):
        assert_bit_equal(a, b)


def test_gradients_arrive_in_the_type_of_the_leaf(backend):
    problem = Problem((6, 20), axis=0, levels=7, ste=Ste.FULL)
    weight, grid = problem.x(backend.device).requires_grad_(), problem.grid(backend.device).requires_grad_()
    x = torch.randn(3, 20, device=backend.device)
    with backend.chosen(), torch.autocast(backend.device, torch.bfloat16):
        y = functional.linear(x, ops.fake_quantize(weight, grid, Kind.UNIFORM, 7, Ste.FULL, 0))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert weight.grad.dtype == grid.grad.dtype == torch.float32
    assert weight.grad.shape == weight.shape and grid.grad.shape == grid.shape
