"""lowbit_linear on every backend: against the reference to the bit, and against a float64 product of the values."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from properties import given, settings, st
from torch.library import opcheck

from quantkernels import build_info, ops, reference
from quantkernels.ops import Kind
from quantkernels.testing import LowbitProblem, assert_bit_equal, pairwise

pytestmark = pytest.mark.ops("lowbit_linear")
NAN, INF = float("nan"), float("inf")
KINDS = [(Kind.UNIFORM, 255), (Kind.UNIFORM, 1), (Kind.BINARY, 1), (Kind.TERNARY, 2)]
BITS = [(Kind.UNIFORM, 2**bits - 1) for bits in range(1, 9)]
UNIT = torch.tensor([[0.0, 1.0, 0.0]])  # q = code
ONE = torch.tensor([[1.0, 0.0, 0.0]])  # q = 1

VARIED = [
    LowbitProblem(**row)
    for row in pairwise(
        shape=[(1, 1), (7,), (5, 64), (2, 3, 33), (13, 200), (0, 5), (4, 0)],
        out_channels=[1, 16, 67, 130],
        x_quantizer=[*KINDS, *BITS[1:7]],
        w_quantizer=[*KINDS, *BITS[1:7]],
        dtype=[torch.float32, torch.float16, torch.bfloat16, torch.uint8],
        layout=["contiguous", "transposed", "sliced"],
        per_channel=[True, False],
        extras=["", "b", "bs", "bsc", "co", "bsco"],
    )
]


def linear_sums(arguments) -> list[torch.Tensor]:
    """D, SA, SW and K by four calls with grids that leave one sum each: exact in float32 while below 2^24."""
    x, _, x_kind, x_levels, planes, _, w_kind, w_levels = arguments
    return [
        ops.lowbit_linear(x, x_grid, x_kind, x_levels, planes, w_grid, w_kind, w_levels)
        for x_grid, w_grid in ((UNIT, UNIT), (UNIT, ONE), (ONE, UNIT), (ONE, ONE))
    ]


@pytest.mark.parametrize("problem", VARIED, ids=str)
def test_is_bit_equal_to_the_reference(backend, problem):
    y = backend.ops.lowbit_linear(*problem.arguments(backend.device))
    assert_bit_equal(y, reference.lowbit_linear(*problem.arguments()))
    assert y.is_contiguous()


def test_a_scale_and_shift_that_round_once(backend):
    # Some of these products are ties between float32, which the shift breaks: rounded to float64 first they stay ties.
    quantizers = {"x_quantizer": (Kind.UNIFORM, 7), "w_quantizer": (Kind.BINARY, 1)}
    problem = LowbitProblem((49, 3), 3, **quantizers, dtype=torch.uint8, extras="bs")
    y = backend.ops.lowbit_linear(*problem.arguments(backend.device))
    assert_bit_equal(y, reference.lowbit_linear(*problem.arguments()))


@pytest.mark.parametrize("w_quantizer", KINDS, ids=str)
@pytest.mark.parametrize("x_quantizer", KINDS, ids=str)
def test_every_pair_of_kinds(backend, x_quantizer, w_quantizer):
    problem = LowbitProblem((9, 45), 19, x_quantizer=x_quantizer, w_quantizer=w_quantizer, extras="b")
    y = backend.ops.lowbit_linear(*problem.arguments(backend.device))
    assert_bit_equal(y, reference.lowbit_linear(*problem.arguments()))


@pytest.mark.parametrize("w_quantizer", [*BITS, (Kind.BINARY, 1), (Kind.TERNARY, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 13, 50])
def test_any_number_of_rows(rows, w_quantizer):
    # Few of them take other ways through the CPU's kernels than many, and few pairs of bits others than many.
    for features, x_quantizer in ((2600, (Kind.UNIFORM, 255)), (515, (Kind.UNIFORM, 7)), (1030, (Kind.TERNARY, 2))):
        problem = LowbitProblem((rows, features), 22, x_quantizer=x_quantizer, w_quantizer=w_quantizer, extras="b")
        assert_bit_equal(ops.lowbit_linear(*problem.arguments()), reference.lowbit_linear(*problem.arguments()))


@pytest.mark.parametrize("w_quantizer", [(Kind.UNIFORM, 1), (Kind.UNIFORM, 3), (Kind.TERNARY, 2)], ids=str)
@pytest.mark.parametrize("x_quantizer", [(Kind.UNIFORM, 1), (Kind.UNIFORM, 3), (Kind.TERNARY, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 70, 520])
def test_one_or_two_bits_by_any_number_of_rows(rows, x_quantizer, w_quantizer):
    problem = LowbitProblem((rows, 1100), 18, x_quantizer=x_quantizer, w_quantizer=w_quantizer, dtype=torch.uint8)
    assert_bit_equal(ops.lowbit_linear(*problem.arguments()), reference.lowbit_linear(*problem.arguments()))


@pytest.mark.parametrize("w_quantizer", [*BITS, (Kind.BINARY, 1), (Kind.TERNARY, 2)], ids=str)
def test_many_rows_by_many_channels(w_quantizer):
    # Where there are enough of both, the CPU's threads arrange weights each for themselves.
    for features, channels, extras in ((545, 1024, "b"), (100, 1030, "bsc"), (64, 1500, "bo")):
        problem = LowbitProblem((77, features), channels, w_quantizer=w_quantizer, extras=extras)
        assert_bit_equal(ops.lowbit_linear(*problem.arguments()), reference.lowbit_linear(*problem.arguments()))


@pytest.mark.parametrize("w_quantizer", BITS, ids=str)
@pytest.mark.parametrize("x_quantizer", BITS, ids=str)
def test_every_pair_of_bit_widths(x_quantizer, w_quantizer):
    problem = LowbitProblem((7, 70), 21, x_quantizer=x_quantizer, w_quantizer=w_quantizer, dtype=torch.uint8)
    x, w = problem.x().long(), problem.w_codes().long()
    dot, activations, weights, count = linear_sums(problem.arguments()[:8])
    assert torch.equal(dot.long(), x @ w.t())
    assert torch.equal(activations.long(), x.sum(1, keepdim=True).expand(7, 21))
    assert torch.equal(weights.long(), w.sum(1).expand(7, 21))
    assert count.unique().tolist() == [70]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    features=st.integers(0, 300),
    out_features=st.integers(1, 140),
    x_quantizer=st.sampled_from(KINDS + BITS),
    w_quantizer=st.sampled_from(KINDS + BITS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8]),
)
def test_agrees_with_the_float_product_of_the_values(rows, features, out_features, x_quantizer, w_quantizer, dtype):
    problem = LowbitProblem(
        (rows, features), out_features, x_quantizer=x_quantizer, w_quantizer=w_quantizer, dtype=dtype
    )
    x, x_kind, x_levels = problem.x(), *x_quantizer
    x_grid = torch.tensor([[-0.3, 0.6 / x_levels, 0.2]])
    generator = problem.generator("grid")
    w_grid = torch.stack([torch.randn(out_features, generator=generator) for _ in range(3)], 1)
    y = ops.lowbit_linear(x, x_grid, x_kind, x_levels, problem.planes(), w_grid, *w_quantizer, out_dtype=torch.float32)
    codes = x if dtype == torch.uint8 else reference.encode(x, x_grid, x_kind, x_levels)
    a = x_grid[0, 0].double() + x_grid[0, 1].double() * codes
    w = w_grid[:, :1].double() + w_grid[:, 1:2].double() * problem.w_codes()
    # Seven roundings of terms whose absolute values sum to at most this.
    magnitude = (0.3 + x_grid[0, 1] * codes).double() @ (
        w_grid[:, :1].abs() + w_grid[:, 1:2].abs() * problem.w_codes()
    ).double().t()
    assert ((y.double() - a @ w.t()).abs() <= 8 * 2.0**-24 * magnitude).all()


def test_sums_that_int32_cannot_hold(backend):
    unit = UNIT.to(backend.device)
    rest = (None, None, None, -INF, INF, None, 0, 0, None)
    for features in (33026,) if backend.emulated else (33026, 66000, 140000):
        x = torch.full((3, features), 255, dtype=torch.uint8)
        x[1, ::2] = 0
        codes = torch.full((17, features), 255, dtype=torch.uint8)
        codes[::3, 1::2] = 1
        planes = reference.pack_bitplanes(codes, 0, 255).to(backend.device)
        y = backend.ops.lowbit_linear(x.to(backend.device), unit, 0, 255, planes, unit, 0, 255, *rest)
        expected = (x.long() @ codes.long().t()).double().float()  # rounded to float32 once
        assert expected.max() >= 2**31
        assert_bit_equal(y, expected)


def test_nan_is_code_zero(backend):
    x = torch.tensor([[NAN, 3.0, INF, -INF]], device=backend.device)
    planes = reference.pack_bitplanes(torch.tensor([[1, 2, 4, 8]], dtype=torch.uint8), 0, 15).to(backend.device)
    unit = UNIT.to(backend.device)
    with backend.chosen():
        y = ops.lowbit_linear(x, unit, 0, 7, planes, unit, 0, 15)
    assert y.item() == 3 * 2 + 7 * 4


def test_an_output_of_nan_is_code_zero():
    planes = reference.pack_bitplanes(torch.ones(2, 1, dtype=torch.uint8), 0, 1)
    bias = torch.tensor([NAN, 2.0])
    y = ops.lowbit_linear(torch.ones(1, 1), UNIT, 0, 1, planes, UNIT, 0, 1, bias, out_grid=UNIT, out_levels=15)
    assert y.tolist() == [[0, 3]]
    y = ops.lowbit_linear(torch.ones(1, 1), UNIT, 0, 1, planes, UNIT, 0, 1, bias, lower=0.0, upper=2.5)
    assert y[0, 0].isnan() and y[0, 1] == 2.5


@pytest.mark.parametrize("out_kind, out_levels", [(0, 255), (0, 1), (1, 1), (2, 2)])
def test_codes_of_every_kind_come_out(backend, out_kind, out_levels):
    problem = LowbitProblem((6, 40), 35, extras="bs")
    arguments = problem.arguments()
    arguments[-4:] = [torch.tensor([[-0.7, 0.05, 0.4]]), out_kind, out_levels, None]
    expected = reference.lowbit_linear(*arguments)
    actual = backend.ops.lowbit_linear(*(a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in arguments))
    assert_bit_equal(actual, expected)


def test_codes_out_are_the_encoding_of_the_floats_out():
    problem = LowbitProblem((6, 40), 35, extras="bs")
    floats = torch.ops.quantkernels.lowbit_linear(*problem.arguments())
    grid = torch.tensor([[-0.7, 0.05, 0.4]])
    codes = torch.ops.quantkernels.lowbit_linear(*problem.arguments()[:-4], grid, 0, 15, None)
    assert torch.equal(codes, reference.encode(floats, grid, 0, 15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extras", ["", "bso"])
def test_opcheck(backend, dtype, extras):
    problem = LowbitProblem((2, 3, 35), 6, dtype=dtype, extras=extras, special=False)
    opcheck(backend.ops.lowbit_linear.default, problem.arguments(backend.device))


def test_compiles_without_graph_breaks():
    problem = LowbitProblem((5, 35), 6, extras="bs", special=False)
    arguments = problem.arguments()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.lowbit_linear(x * 2, *arguments[1:11]).relu()

    compiled = torch.compile(layer, fullgraph=True)
    for rows in (5, 1, 8):
        x = torch.randn(rows, 35)
        assert_bit_equal(compiled(x), layer(x))


def test_no_gradient_passes():
    problem = LowbitProblem((5, 35), 6)
    arguments = problem.arguments()[:8]
    for leaf in (0, 1, 5):
        arguments[leaf].requires_grad_()
    assert not ops.lowbit_linear(*arguments).requires_grad


def digest(op: str, problems: list[LowbitProblem]) -> str:
    """Of the outputs' bytes, NaN as one value."""
    total = hashlib.sha256()
    for problem in problems:
        y = getattr(torch.ops.quantkernels, op)(*problem.arguments()).contiguous()
        total.update(torch.nan_to_num(y.float(), nan=12345.0).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.skipif(build_info()["cpu_isa"] == "portable", reason="there is one instruction set here")
def test_every_instruction_set_gives_the_same_bits():
    script = "import test_matmul as t; print(t.digest('lowbit_linear', t.VARIED))"
    paths = [os.path.dirname(__file__), *sys.path]
    digests = set()
    for isa in ("portable", "avx2", build_info()["cpu_isa"]):
        environment = os.environ | {"QK_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout)
    assert len(digests) == 1


GRID = torch.tensor([[0.0, 1.0, 0.0]])
COMPLAINTS = {
    "x-type": (
        {"x": torch.zeros(2, 40, dtype=torch.int64)},
        "x must be float32, float16, bfloat16, or uint8 codes, got Long",
    ),
    "x-scalar": ({"x": torch.zeros(())}, r"x must be of shape \[..., in_features\], got \[\]"),
    "x_grid": ({"x_grid": GRID.repeat(2, 1)}, r"x_grid must be of shape \[1, 3\], got \[2, 3\]"),
    "x_kind": ({"x_kind": 3}, r"x_kind must be 0 \(uniform\), 1 \(binary\), 2 \(ternary\), 4 \(learned\), got 3"),
    "x_levels": ({"x_levels": 5}, r"x_levels must be 2\^n - 1 with n from 1 to 8 for a uniform quantizer, got 5"),
    "w_kind": ({"w_kind": -1}, r"w_kind must be 0 \(uniform\), 1 \(binary\), 2 \(ternary\), 4 \(learned\), got -1"),
    "w_levels": ({"w_kind": 2}, "w_levels must be 2 for a ternary quantizer, got 3"),
    "planes-type": ({"planes": torch.zeros(2, 4, 2)}, "planes must be Int, got Float"),
    "planes-dim": (
        {"planes": torch.zeros(4, 2, dtype=torch.int32)},
        r"planes must be of shape \[bits, out_channels, words\], got \[4, 2\]",
    ),
    "planes-count": (
        {"planes": torch.zeros(3, 4, 2, dtype=torch.int32)},
        r"planes must be of shape \[2, out_channels, 2\] for rows of 40 codes with w_levels 3, got \[3, 4, 2\]",
    ),
    "planes-words": (
        {"planes": torch.zeros(2, 4, 1, dtype=torch.int32)},
        r"planes must be of shape \[2, out_channels, 2\] for rows of 40 codes with w_levels 3, got \[2, 4, 1\]",
    ),
    "w_grid": ({"w_grid": GRID.repeat(3, 1)}, r"w_grid must be of shape \[4, 3\], got \[3, 3\]"),
    "bias-shape": ({"bias": torch.zeros(3)}, r"bias must be of shape \[4\], got \[3\]"),
    "bias-type": ({"bias": torch.zeros(4, dtype=torch.float16)}, "bias must be Float, got Half"),
    "scale-alone": ({"scale": torch.ones(4)}, "shift must be given exactly where scale is, got scale alone"),
    "shift-alone": ({"shift": torch.ones(4)}, "shift must be given exactly where scale is, got shift alone"),
    "clamp": ({"lower": 3.0, "upper": 2.0}, r"lower must be at most upper \(2\), got 3"),
    "clamp-nan": ({"lower": NAN}, r"lower must be at most upper \(inf\), got nan"),
    "out_grid": ({"out_grid": GRID[0], "out_levels": 3}, r"out_grid must be of shape \[1, 3\], got \[3\]"),
    "out_kind": ({"out_grid": GRID, "out_kind": 3, "out_levels": 3}, r"out_kind must be 0 .*, got 3"),
    "out_levels": ({"out_grid": GRID, "out_levels": 0}, r"out_levels must be 2\^n - 1 with n from 1 to 8 .*, got 0"),
    "out_dtype": (
        {"out_dtype": torch.int32},
        "out_dtype must be None, float32, float16 or bfloat16 without out_grid, got Int",
    ),
    "out_dtype-codes": (
        {"out_grid": GRID, "out_levels": 3, "out_dtype": torch.float32},
        "out_dtype must be None or uint8 where out_grid asks for codes, got Float",
    ),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_complaints_name_op_argument_expected_and_got(name):
    changes, message = COMPLAINTS[name]
    arguments = {
        "x": torch.zeros(2, 40),
        "x_grid": GRID,
        "x_kind": 0,
        "x_levels": 3,
        "planes": torch.zeros(2, 4, 2, dtype=torch.int32),
        "w_grid": GRID,
        "w_kind": 0,
        "w_levels": 3,
    }
    with pytest.raises(RuntimeError, match=f"^lowbit_linear: {message}"):
        ops.lowbit_linear(**(arguments | changes))
