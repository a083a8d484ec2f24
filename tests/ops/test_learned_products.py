"""lowbit_linear and lowbit_conv2d with learned bases: exact products of planes, added up with their steps.

Every backend gives the reference's bits; the reference is held against a float64 product of the values.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from properties import given, settings, st
from test_conv import conv_problems
from torch.library import opcheck
from torch.nn import functional

from quantkernels import build_info, ops, reference
from quantkernels.ops import Encoding, Kind
from quantkernels.ops.planes import decode, to_rows
from quantkernels.testing import LowbitProblem, assert_bit_equal, pairwise

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


LEARNED = [(Kind.LEARNED, 2**bits - 1) for bits in (1, 2, 3, 8)]
KINDS = [*LEARNED, (Kind.UNIFORM, 255), (Kind.BINARY, 1), (Kind.TERNARY, 2)]
PAIRS = [(a, w) for a in KINDS for w in KINDS if Kind.LEARNED in (a[0], w[0])]
EXTRAS = ["", "b", "bsc", "bo", "l", "bsl"]

LINEAR = [
    LowbitProblem(**row)
    for row in pairwise(
        shape=[(1, 1), (7,), (5, 64), (2, 3, 33), (13, 200), (0, 5), (4, 0)],
        out_channels=[1, 16, 67],
        x_quantizer=KINDS,
        w_quantizer=KINDS,
        dtype=[torch.float32, torch.float16, torch.bfloat16, torch.uint8],
        per_channel=[True, False],
        extras=EXTRAS,
    )
    if (row["x_quantizer"], row["w_quantizer"]) in PAIRS
]
CONV = [
    LowbitProblem(**row | geometry)
    for row in pairwise(
        geometry=[
            {"shape": (2, 16, 5, 7), "out_channels": 24, "kernel": (3, 3), "padding": (1, 1, 1, 1)},
            {"shape": (1, 3, 13, 10), "out_channels": 17, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3)},
            {"shape": (2, 67, 3, 4), "out_channels": 70, "kernel": (1, 1)},
            {"shape": (1, 33, 5, 5), "out_channels": 20, "kernel": (1, 1), "stride": (2, 3), "padding": (1, 0, 0, 2)},
            {"shape": (2, 12, 5, 6), "out_channels": 6, "kernel": (3, 2), "groups": 3, "padding": (0, 2, 1, 0)},
            {"shape": (1, 35, 5, 4), "out_channels": 35, "kernel": (3, 3), "groups": 35, "padding": (1, 1, 1, 1)},
            {"shape": (1, 68, 4, 4), "out_channels": 68, "kernel": (3, 3), "groups": 68, "stride": (2, 1)},
            {"shape": (1, 6, 5, 5), "out_channels": 18, "kernel": (3, 3), "groups": 6, "padding": (1, 1, 1, 1)},
            {"shape": (1, 8, 7, 8), "out_channels": 9, "kernel": (3, 3), "dilation": (2, 3), "padding": (2, 2, 3, 3)},
            {"shape": (1, 2, 1, 3), "out_channels": 5, "kernel": (3, 3), "padding": (4, 4, 5, 3), "dilation": (2, 1)},
            {"shape": (0, 4, 5, 5), "out_channels": 8, "kernel": (3, 3)},
        ],
        x_quantizer=KINDS,
        w_quantizer=KINDS,
        dtype=[torch.float32, torch.float16, torch.bfloat16, torch.uint8],
        layout=["contiguous", "channels_last", "sliced"],
        per_channel=[True, False],
        extras=EXTRAS,
    )
    for geometry in [row.pop("geometry")]
    if (row["x_quantizer"], row["w_quantizer"]) in PAIRS
]


def run(problem: LowbitProblem, namespace, device: str = "cpu") -> torch.Tensor:
    op = "lowbit_linear" if problem.kernel is None else "lowbit_conv2d"
    return getattr(namespace, op)(*problem.arguments(device))


@pytest.mark.parametrize("problem", LINEAR, ids=str)
@pytest.mark.ops("lowbit_linear")
def test_linear_is_bit_equal_to_the_reference(backend, problem):
    assert_bit_equal(run(problem, backend.ops, backend.device), run(problem, reference))


@pytest.mark.parametrize("problem", CONV, ids=str)
@pytest.mark.ops("lowbit_conv2d")
def test_convolution_is_bit_equal_to_the_reference(backend, problem):
    arguments = problem.arguments(backend.device)
    y = backend.ops.lowbit_conv2d(*arguments)
    assert_bit_equal(y, run(problem, reference))
    last = not arguments[0].is_contiguous() and arguments[0].is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@settings(max_examples=60, deadline=None)
@given(problem=conv_problems(), pair=st.sampled_from(PAIRS))
def test_any_geometry(problem, pair):
    problem = replace(problem, x_quantizer=pair[0], w_quantizer=pair[1])
    assert_bit_equal(run(problem, torch.ops.quantkernels), run(problem, reference))


@pytest.mark.parametrize("pair", [(LEARNED[0], LEARNED[2]), ((Kind.UNIFORM, 255), LEARNED[1])], ids=str)
def test_long_rows(pair):
    problem = LowbitProblem((3, 70000), 5, x_quantizer=pair[0], w_quantizer=pair[1], dtype=torch.uint8)
    assert_bit_equal(run(problem, torch.ops.quantkernels), run(problem, reference))


def test_the_reference_is_the_product_of_the_values():
    for pair in PAIRS:
        problem = LowbitProblem((4, 60), 9, x_quantizer=pair[0], w_quantizer=pair[1], dtype=torch.uint8, special=False)
        x_grid, w_grid = problem.x_grid(), problem.w_grid()
        x = decode(problem.x(), x_grid, pair[0][0], None).double()
        w = decode(problem.w_codes(), w_grid, pair[1][0], 0).double()
        # Each value is at most |offset| + sum |step|, and each of up to 64 pairs rounds three times.
        tolerance = 256 * 2.0**-24 * 60 * x.abs().max() * w.abs().amax(1) + 1e-5
        assert ((run(problem, reference).double() - x @ w.t()).abs() <= tolerance).all()


@pytest.mark.ops("lowbit_linear", "lowbit_conv2d")
def test_opcheck(backend):
    learned = {"x_quantizer": (Kind.LEARNED, 3), "w_quantizer": (Kind.LEARNED, 7), "special": False}
    linear = LowbitProblem((2, 3, 35), 6, extras="bsl", **learned)
    conv = LowbitProblem((1, 4, 5, 5), 6, (3, 3), dtype=torch.float16, **learned)
    opcheck(backend.ops.lowbit_linear.default, linear.arguments(backend.device))
    opcheck(backend.ops.lowbit_conv2d.default, conv.arguments(backend.device))


def test_compiles_without_graph_breaks():
    problem = LowbitProblem((5, 35), 6, x_quantizer=LEARNED[1], w_quantizer=LEARNED[2], extras="bs", special=False)
    arguments = problem.arguments()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.lowbit_linear(x * 2, *arguments[1:11]).relu()

    x = torch.randn(5, 35)
    assert_bit_equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def digest() -> list[list[float]]:
    """Outputs, NaN as one number."""
    return [run(p, torch.ops.quantkernels).double().nan_to_num(nan=12345.0).flatten().tolist() for p in LINEAR + CONV]


@pytest.mark.skipif(build_info()["cpu_isa"] == "portable", reason="there is one instruction set here")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa):
    script = "import test_learned_products as t; import pickle, sys; sys.stdout.buffer.write(pickle.dumps(t.digest()))"
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), *sys.path]
    environment = os.environ | {"QK_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert pickle.loads(done.stdout) == digest()


COMPLAINTS = {
    "x_grid": ({"x_grid": torch.zeros(1, 3)}, r"x_grid must be of shape \[1, 4\], got \[1, 3\]"),
    "x_levels": ({"x_levels": 6}, r"x_levels must be 2\^n - 1 with n from 1 to 8 for a learned basis, got 6"),
    "w_grid": ({"w_grid": torch.zeros(6, 4)}, r"w_grid must be of shape \[6, 3\], got \[6, 4\]"),
    "out_grid": (
        {"out_grid": torch.zeros(1, 3), "out_kind": 4, "out_levels": 7},
        r"out_grid must be of shape \[1, 4\], got \[1, 3\]",
    ),
}


@pytest.mark.parametrize("change, message", COMPLAINTS.values(), ids=COMPLAINTS)
@pytest.mark.ops("lowbit_linear")
def test_complaints(backend, change, message):
    problem = LowbitProblem((2, 40), 6, x_quantizer=(Kind.LEARNED, 7), w_quantizer=(Kind.LEARNED, 3))
    names = ("x", "x_grid", "x_kind", "x_levels", "planes", "w_grid", "w_kind", "w_levels")
    arguments = dict(zip(names, problem.arguments(backend.device), strict=False)) | change
    if backend.choice == "triton":
        message = message.replace("x_levels", "levels")
    with backend.chosen(), pytest.raises(RuntimeError, match=message):
        ops.lowbit_linear(
            **{k: v.to(backend.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        )


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
