"""lowbit_linear and lowbit_conv2d with learned bases: sums of products of planes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from quantkernels import ops
from quantkernels.ops import Encoding, Kind
from quantkernels.ops.planes import decode, to_rows

INF = float("inf")
# Sums of products of these are exact in float32, whatever their order.
DYADIC = (-0.75, 0.25, 0.5, 1.0, 1.5, 2.0, 3.5)


def dyadic_grid(channels: int, bits: int, encoding: int, generator: torch.Generator) -> torch.Tensor:
    picks = torch.randint(len(DYADIC), (channels, bits), generator=generator)
    return ops.grid_of_basis(torch.tensor(DYADIC)[picks], encoding)


def operand(kind: Kind, bits: int, channels: int, encoding: int, generator: torch.Generator):
    """(grid, kind, levels) of a quantizer with dyadic values."""
    if kind == Kind.LEARNED:
        return dyadic_grid(channels, bits, encoding, generator), kind, 2**bits - 1
    return torch.tensor([[-0.5, 0.25, 0.0]]).repeat(channels, 1), kind, 2**bits - 1


CASES = [
    (Kind.LEARNED, 2, Kind.LEARNED, 1, 1),
    (Kind.LEARNED, 3, Kind.LEARNED, 3, 2),
    (Kind.LEARNED, 4, Kind.UNIFORM, 2, 1),
    (Kind.UNIFORM, 3, Kind.LEARNED, 2, 4),
]


@pytest.mark.parametrize("x_kind, x_bits, w_kind, w_bits, groups", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.ops("lowbit_conv2d", "learned_basis_encode", "encode", "pack_bitplanes")
def test_convolution(backend, x_kind, x_bits, w_kind, w_bits, groups, layout):
    generator = torch.Generator().manual_seed(groups)
    x_coding = operand(x_kind, x_bits, 1, Encoding.UNSIGNED, generator)
    w_coding = operand(w_kind, w_bits, 12, Encoding.SIGNED, generator)
    x = (torch.randn(2, 8, 5, 6, generator=generator) * 2).to(memory_format=layout).to(backend.device)
    weight = torch.randn(12, 8 // groups, 3, 3, generator=generator)
    x_coding, w_coding = ((grid.to(backend.device), *rest) for grid, *rest in (x_coding, w_coding))
    bias = torch.randint(-4, 5, (12,), generator=generator).float().to(backend.device)
    with backend.chosen():
        planes, _ = ops.quantize_pack(to_rows(weight.to(backend.device)), *w_coding, axis=0)
        y = ops.lowbit_conv2d(x, *x_coding, planes, *w_coding, 3, 2, (1, 2, 0, 1), 1, groups, bias, lower=-20.0)
        x_codes = ops.encode(x, *x_coding)
        w_codes = ops.encode(weight.to(backend.device), *w_coding, axis=0)
    values = decode(x_codes, x_coding[0], x_kind, None), decode(w_codes, w_coding[0], w_kind, 0)
    padded = functional.pad(values[0].double().cpu(), (0, 1, 1, 2))
    expected = functional.conv2d(padded, values[1].double().cpu(), bias.double().cpu(), 2, groups=groups).clamp(min=-20)
    assert torch.equal(y.cpu().double(), expected)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.ops("lowbit_linear", "learned_basis_encode")
def test_linear_with_everything_behind_it(backend):
    generator = torch.Generator().manual_seed(5)
    x_grid = dyadic_grid(1, 2, Encoding.UNSIGNED, generator).to(backend.device)
    w_grid = dyadic_grid(1, 3, Encoding.SIGNED, generator).to(backend.device)
    out_grid = torch.tensor([[0.0, 3.0, 7.0]], device=backend.device)
    x = torch.randn(5, 70, generator=generator).to(backend.device, torch.bfloat16)
    w_codes = torch.randint(8, (9, 70), generator=generator, dtype=torch.uint8).to(backend.device)
    scale, shift = torch.full((9,), 0.5), torch.arange(9.0)
    x_coding, w_coding = (x_grid, Kind.LEARNED, 3), (w_grid, Kind.LEARNED, 7)
    planes = ops.pack_bitplanes(w_codes, Kind.LEARNED, 7)
    after = {"scale": scale.to(backend.device), "shift": shift.to(backend.device)}
    with backend.chosen():
        y = ops.lowbit_linear(x, *x_coding, planes, *w_coding, **after)
        codes = ops.lowbit_linear(
            x, *x_coding, planes, *w_coding, **after, out_grid=out_grid, out_kind=Kind.LEARNED, out_levels=3
        )
        again = ops.lowbit_linear(ops.encode(x, *x_coding), *x_coding, planes, *w_coding, **after)
        values = decode(ops.encode(x, *x_coding), x_grid, Kind.LEARNED, None)
    product = values.double().cpu() @ decode(w_codes, w_grid, Kind.LEARNED, None).double().cpu().t()
    expected = (product * 0.5 + shift.double()).float()
    assert y.dtype == torch.bfloat16 and torch.equal(y.cpu(), expected.bfloat16())
    assert again.dtype == torch.float32 and torch.equal(again.cpu(), expected)
    assert torch.equal(codes.cpu(), ops.encode(expected, out_grid.cpu(), Kind.LEARNED, 3))


def test_planes_are_the_digits_and_their_ones_are_counted():
    x = torch.tensor([[0.0, 0.6, 1.9, 2.6], [2.6, 2.6, 0.0, 0.0]])
    grid = torch.tensor([[0.0, 2.0, 0.5]])  # levels 0, 0.5, 2, 2.5 have the codes 0, 2, 1, 3
    planes, ones = ops.quantize_pack(x, grid, Kind.LEARNED, 3)
    assert ops.unpack_bitplanes(planes, Kind.LEARNED, 4).tolist() == [[0, 2, 1, 3], [3, 3, 0, 0]]
    assert ones.tolist() == [[2, 2], [2, 2]]
