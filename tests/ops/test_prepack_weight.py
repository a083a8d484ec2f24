"""prepack_weight, and the low-bit products with what it made: against the reference to the bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from properties import given, settings, st
from test_conv import VARIED as CONVOLUTIONS
from test_conv import conv_problems
from test_matmul import VARIED as LINEAR
from torch.library import opcheck

from quantkernels import build_info, ops, reference
from quantkernels.ops import Kind
from quantkernels.testing import LowbitProblem, assert_bit_equal

pytestmark = pytest.mark.ops("prepack_weight")
ARRANGES = build_info()["cpu_isa"] in ("avx512", "zen4")  # others have no use for it
UNIFORM = [(Kind.UNIFORM, 2**bits - 1) for bits in range(1, 9)]
CODED = [*UNIFORM, (Kind.BINARY, 1), (Kind.TERNARY, 2)]


def check(problem: LowbitProblem) -> None:
    op = "lowbit_linear" if problem.kernel is None else "lowbit_conv2d"
    arguments = problem.arguments()
    y = getattr(torch.ops.quantkernels, op)(*arguments, problem.prepacked())
    assert_bit_equal(y, getattr(reference, op)(*arguments))


@pytest.mark.parametrize("problem", [*LINEAR, *CONVOLUTIONS], ids=str)
def test_the_result_is_the_same(problem):
    check(problem)


@pytest.mark.parametrize("w_quantizer", CODED, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 13, 48, 49, 100])
def test_any_number_of_rows(rows, w_quantizer):
    # Depths that end within a step, and within the steps that share a byte; channels that end within a panel.
    for features, channels, x_levels in ((515, 22, 255), (1030, 70, 7), (64, 200, 255), (3, 130, 1), (37, 64, 3)):
        quantizers = {"x_quantizer": (Kind.UNIFORM, x_levels), "w_quantizer": w_quantizer}
        check(LowbitProblem((rows, features), channels, **quantizers, extras="b"))


@pytest.mark.parametrize("w_quantizer", CODED, ids=str)
def test_many_rows_by_many_channels(w_quantizer):
    for features, channels, extras in ((545, 1024, "b"), (100, 1030, "bsc"), (64, 1500, "bo")):
        check(LowbitProblem((77, features), channels, w_quantizer=w_quantizer, extras=extras))


@pytest.mark.parametrize("w_quantizer", CODED, ids=str)
@pytest.mark.parametrize("image", [4, 40])
def test_few_and_many_blocks_of_rows(image, w_quantizer):
    # Of few each task expands its panels, of many they are expanded before.
    for channels, groups in ((24, 1), (12, 2)):
        window = {"kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": groups}
        check(LowbitProblem((1, channels, image, image), 70, **window, w_quantizer=w_quantizer, extras="bs"))


def test_sums_beyond_int32():
    check(LowbitProblem((2, 33_000), 5, dtype=torch.uint8))
    check(LowbitProblem((1, 3_700, 4, 4), 3, (3, 3), w_quantizer=(Kind.UNIFORM, 15), dtype=torch.uint8))


@settings(max_examples=60, deadline=None)
@given(problem=conv_problems())
def test_any_convolution(problem):
    check(problem)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 60),
    features=st.integers(0, 150),
    channels=st.integers(0, 150),
    x_quantizer=st.sampled_from(CODED),
    w_quantizer=st.sampled_from(CODED),
)
def test_any_linear_layer(rows, features, channels, x_quantizer, w_quantizer):
    quantizers = {"x_quantizer": x_quantizer, "w_quantizer": w_quantizer}
    check(LowbitProblem((rows, features), channels, **quantizers, dtype=torch.uint8, extras="b"))


@pytest.mark.skipif(not ARRANGES, reason="needs AVX-512")
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_takes_little_more_than_the_codes(bits):
    planes = LowbitProblem((1, 4096), 256, w_quantizer=UNIFORM[bits - 1]).planes()
    width = {1: 1, 2: 2, 3: 4, 4: 4}.get(bits, 8)
    made = ops.prepack_weight(planes, 0, 2**bits - 1, 4096)
    assert made.dtype == torch.uint8 and made.dim() == 1
    assert 0 <= made.numel() - 256 * 4096 * width // 8 <= 256 * 8 + 64


def test_where_there_is_no_use_for_it(backend):
    depthwise = LowbitProblem((1, 64, 5, 5), 64, (3, 3), groups=64)
    learned = LowbitProblem((1, 64), 32, w_quantizer=(Kind.LEARNED, 3))
    linear = LowbitProblem((1, 64), 32)
    with backend.chosen():
        for problem in (depthwise, learned, *([] if backend.name == "cpu" and ARRANGES else [linear])):
            assert problem.prepacked(backend.device).shape == (0,)


@pytest.mark.ops("lowbit_linear")
def test_backends_without_use_go_by_the_planes(backend):
    problem = LowbitProblem((3, 64), 32, w_quantizer=(Kind.UNIFORM, 15))
    made = problem.prepacked().to(backend.device)
    y = backend.ops.lowbit_linear(*problem.arguments(backend.device), made)
    assert_bit_equal(y, reference.lowbit_linear(*problem.arguments()))


def test_a_learned_activation_goes_by_the_planes():
    problem = LowbitProblem((3, 64), 32, x_quantizer=(Kind.LEARNED, 3), w_quantizer=(Kind.UNIFORM, 15))
    check(problem)


def test_it_may_lie_anywhere():
    problem = LowbitProblem((3, 64), 32)
    made = problem.prepacked()
    for view in (torch.cat((torch.zeros(8, dtype=torch.uint8), made))[8:], made.repeat_interleave(2)[::2]):
        y = ops.lowbit_linear(*problem.arguments(), prepacked=view)
        assert_bit_equal(y, reference.lowbit_linear(*problem.arguments()))


def test_opcheck(backend):
    problem = LowbitProblem((3, 64), 32, w_quantizer=(Kind.UNIFORM, 15), special=False)
    planes = problem.planes().to(backend.device)
    opcheck(backend.ops.prepack_weight.default, (planes, 0, 15, 64, [1, 1], 1))
    arguments = (*problem.arguments(backend.device), problem.prepacked().to(backend.device))
    opcheck(backend.ops.lowbit_linear.default, arguments)


def test_under_compile():
    problem = LowbitProblem((3, 64), 32, w_quantizer=(Kind.UNIFORM, 15))
    arguments, made = problem.arguments(), problem.prepacked()

    @torch.compile(fullgraph=True)
    def layer(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        return ops.lowbit_linear(x * 2, *arguments[1:8], prepacked=made).relu()

    x = arguments[0]
    assert_bit_equal(layer(x, made), ops.lowbit_linear(x * 2, *arguments[1:8]).relu())


@pytest.mark.skipif(build_info()["cpu_isa"] == "portable", reason="there is one instruction set here")
def test_other_instruction_sets_make_nothing():
    script = (
        "import torch; from quantkernels import ops; "
        "print(len(ops.prepack_weight(torch.zeros(2, 8, 2, dtype=torch.int32), 0, 3, 64)))"
    )
    for isa in ("portable", "avx2"):
        environment = os.environ | {"QK_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "0"


COMPLAINTS = {
    "w_kind": ({"w_kind": 3}, r"w_kind must be 0 \(uniform\), 1 \(binary\), 2 \(ternary\), 4 \(learned\), got 3"),
    "w_levels": ({"w_levels": 4}, r"w_levels must be 2\^n - 1 with n from 1 to 8 for a uniform quantizer, got 4"),
    "planes-type": ({"planes": torch.zeros(2, 4, 2)}, "planes must be Int, got Float"),
    "planes-words": ({"channels": 65}, r"planes must be of shape \[2, out_channels, 3\] for rows of 65 codes .*"),
    "channels": ({"channels": -1}, "channels must be from 0 to 2147483647, got -1"),
    "groups": ({"groups": 3}, "groups must be a divisor of the 4 output channels, got 3"),
    "no groups": ({"groups": 0}, "groups must be a divisor of the 4 output channels, got 0"),
    "kernel": ({"kernel_size": 0}, r"kernel_size must be 2 numbers from 1 to 2147483647, got \[0, 0\]"),
    "large kernel": ({"kernel_size": 2**30}, "kernel_size must be of at most 2147483647 weights an output channel.*"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_complaints_name_op_argument_expected_and_got(name):
    changes, message = COMPLAINTS[name]
    arguments = {"planes": torch.zeros(2, 4, 2, dtype=torch.int32), "w_kind": 0, "w_levels": 3, "channels": 64}
    with pytest.raises(RuntimeError, match=f"^prepack_weight: {message}$"):
        ops.prepack_weight(**(arguments | changes))


def test_a_kernel_of_three_sizes():
    with pytest.raises(ValueError, match=r"^prepack_weight: kernel_size must be an int or 2 of them, got \(1, 2, 3\)$"):
        ops.prepack_weight(torch.zeros(2, 4, 2, dtype=torch.int32), 0, 3, 64, (1, 2, 3))


@pytest.mark.skipif(not ARRANGES, reason="needs AVX-512")
def test_what_other_planes_became_is_refused():
    problem = LowbitProblem((3, 64), 32, w_quantizer=(Kind.UNIFORM, 15))
    other = LowbitProblem((3, 64), 32, w_quantizer=(Kind.UNIFORM, 3)).prepacked()
    with pytest.raises(
        RuntimeError, match=r"prepacked must be what prepack_weight makes of these planes \(\d+ bytes\)"
    ):
        ops.lowbit_linear(*problem.arguments(), prepacked=other)
    ternary = LowbitProblem((3, 64), 32, w_quantizer=(Kind.TERNARY, 2))
    uniform = LowbitProblem((3, 64), 32, w_quantizer=(Kind.UNIFORM, 3))
    with pytest.raises(RuntimeError, match=r"prepacked must be what this version's .*, got that of another weight"):
        ops.lowbit_linear(*ternary.arguments(), prepacked=uniform.prepacked())
    older = ternary.prepacked()
    older[0] += 1
    with pytest.raises(RuntimeError, match=r"prepacked must be what this version's .*, got that of another weight"):
        ops.lowbit_linear(*ternary.arguments(), prepacked=older)
    with pytest.raises(RuntimeError, match="lowbit_linear: prepacked must be Byte, got Float"):
        ops.lowbit_linear(*problem.arguments(), prepacked=other.float())
