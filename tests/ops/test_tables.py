"""Low-bit products whose weights have one or two bits, which the CPU looks up in tables of sums (csrc/cpu/tables.h):
against the reference to the bit, by planes and prepacked. Other instruction sets go other ways with the same."""

from __future__ import annotations

import pytest
import torch
from properties import given, settings, st

from quantkernels import ops, reference
from quantkernels.ops import Kind
from quantkernels.testing import LowbitProblem, assert_bit_equal

pytestmark = pytest.mark.ops("lowbit_conv2d")
WEIGHTS = [(Kind.UNIFORM, 1), (Kind.UNIFORM, 3), (Kind.BINARY, 1), (Kind.TERNARY, 2)]
ACTIVATIONS = [*((Kind.UNIFORM, 2**bits - 1) for bits in range(1, 9)), (Kind.BINARY, 1), (Kind.TERNARY, 2)]


def check(problem: LowbitProblem) -> None:
    op = "lowbit_linear" if problem.kernel is None else "lowbit_conv2d"
    arguments = problem.arguments()
    expected = getattr(reference, op)(*arguments)
    product = getattr(torch.ops.quantkernels, op)
    assert_bit_equal(product(*arguments), expected)
    assert_bit_equal(product(*arguments, problem.prepacked()), expected)


@pytest.mark.parametrize("w_quantizer", WEIGHTS, ids=str)
@pytest.mark.parametrize("x_quantizer", ACTIVATIONS, ids=str)
def test_any_pair_of_quantizers(x_quantizer, w_quantizer):
    quantizers = {"x_quantizer": x_quantizer, "w_quantizer": w_quantizer}
    check(LowbitProblem((50, 150), 200, **quantizers, extras="b"))
    check(LowbitProblem((2, 32, 9, 8), 130, (3, 3), padding=(1, 1, 1, 1), **quantizers, extras="bs"))


@pytest.mark.parametrize("w_quantizer", WEIGHTS, ids=str)
@pytest.mark.parametrize("features", [1, 4, 13, 16, 17, 31, 32, 47, 64, 656, 1000, 2603])
def test_depths_that_end_anywhere(features, w_quantizer):
    # Within a quarter of a table, a table, a word of a plane, and a piece of a panel that the first-level cache holds.
    for x_levels in (3, 255):
        quantizers = {"x_quantizer": (Kind.UNIFORM, x_levels), "w_quantizer": w_quantizer}
        check(LowbitProblem((57, features), 192, **quantizers, dtype=torch.uint8))


@pytest.mark.parametrize("channels", [65, 96, 127, 128, 129, 160, 177, 1030])
def test_channels_that_end_within_a_panel(channels):
    for w_quantizer in WEIGHTS:
        check(LowbitProblem((61, 96), channels, x_quantizer=(Kind.UNIFORM, 7), w_quantizer=w_quantizer))


@pytest.mark.parametrize("rows", [8, 9, 24, 25, 47, 49, 250, 600])
def test_any_number_of_rows(rows):
    for x_levels, w_quantizer in ((1, WEIGHTS[0]), (3, WEIGHTS[0]), (255, WEIGHTS[2]), (15, WEIGHTS[1])):
        quantizers = {"x_quantizer": (Kind.UNIFORM, x_levels), "w_quantizer": w_quantizer}
        check(LowbitProblem((rows, 180), 140, **quantizers, dtype=torch.uint8, extras="bo"))


@pytest.mark.parametrize(
    "window",
    [
        {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
        {"kernel": (3, 3), "padding": (1, 1, 1, 1), "stride": (2, 2)},
        {"kernel": (2, 5), "padding": (0, 1, 2, 3), "stride": (1, 3)},
        {"kernel": (5, 3), "dilation": (2, 1), "padding": (4, 4, 1, 1)},
        {"kernel": (3, 3), "dilation": (1, 2), "padding": (1, 1, 2, 2)},
        {"kernel": (1, 1), "stride": (2, 2)},
        {"kernel": (1, 7), "stride": (3, 1), "padding": (0, 0, 3, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 16, 24, 48, 112])
def test_windows_that_share_their_tables_and_others(channels, window):
    # Several images, and blocks of pixels that end within one.
    for x_levels, w_quantizer in ((3, WEIGHTS[1]), (255, WEIGHTS[0]), (7, WEIGHTS[3])):
        quantizers = {"x_quantizer": (Kind.UNIFORM, x_levels), "w_quantizer": w_quantizer}
        layout = "channels_last" if x_levels == 3 else "contiguous"
        check(LowbitProblem((3, channels, 14, 13), 132, **window, **quantizers, layout=layout, extras="b"))


def test_groups():
    for channels, w_quantizer in ((32, WEIGHTS[1]), (20, WEIGHTS[0])):
        window = {"kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": 2}
        quantizers = {"x_quantizer": (Kind.UNIFORM, 3), "w_quantizer": w_quantizer}
        check(LowbitProblem((2, 2 * channels, 9, 9), 200, **window, **quantizers, extras="bs"))


@pytest.mark.parametrize("w_quantizer", WEIGHTS, ids=str)
def test_bits_past_the_end_of_a_row_are_in_no_sum(w_quantizer):
    problem = LowbitProblem((40, 150), 130, x_quantizer=(Kind.UNIFORM, 3), w_quantizer=w_quantizer, dtype=torch.uint8)
    x, x_grid, x_kind, x_levels, planes, *rest = problem.arguments()
    filled = planes.clone()
    filled[..., -1] |= -1 << (150 % 32)
    expected = reference.lowbit_linear(x, x_grid, x_kind, x_levels, planes, *rest)
    assert_bit_equal(torch.ops.quantkernels.lowbit_linear(x, x_grid, x_kind, x_levels, filled, *rest), expected)


def test_it_is_the_same_with_any_number_of_threads():
    problem = LowbitProblem(
        (1, 64, 40, 40), 128, (3, 3), padding=(1, 1, 1, 1), x_quantizer=(Kind.UNIFORM, 3), w_quantizer=WEIGHTS[1]
    )
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check(problem)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(8, 120),
    features=st.integers(1, 300),
    channels=st.integers(20, 200),
    x_quantizer=st.sampled_from(ACTIVATIONS),
    w_quantizer=st.sampled_from(WEIGHTS),
)
def test_any_linear_layer(rows, features, channels, x_quantizer, w_quantizer):
    quantizers = {"x_quantizer": x_quantizer, "w_quantizer": w_quantizer}
    check(LowbitProblem((rows, features), channels, **quantizers, dtype=torch.uint8, extras="b"))


def test_codes_beyond_the_activations_levels_do_no_harm():
    # Products of such codes are undefined, but nothing is read or written outside.
    problem = LowbitProblem((64, 96), 128, x_quantizer=(Kind.UNIFORM, 3), w_quantizer=WEIGHTS[1], dtype=torch.uint8)
    _, *rest = problem.arguments()
    y = ops.lowbit_linear(torch.full((64, 96), 255, dtype=torch.uint8), *rest)
    assert y.shape == (64, 128)
