"""channel_stats, minmax_grids, conditional_abs_mean and range_errors on every backend, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from quantkernels import reference
from quantkernels.ops import Kind
from quantkernels.testing import Problem, assert_bit_equal, assert_sums_close, lay_out, problems

pytestmark = pytest.mark.ops("channel_stats", "minmax_grids", "conditional_abs_mean", "range_errors")
NAN, INF = float("nan"), float("inf")
UNIFORM = [(Kind.UNIFORM, 7)]
FINITE = problems(quantizers=UNIFORM, stes=[0], special=[False])


def candidates_for(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    """float32 [C, 5]: ranges from nothing to twice the largest value."""
    stats = reference.channel_stats(x.cpu(), axis)
    largest = stats[:, :2].abs().amax(1, keepdim=True)
    return largest * torch.tensor([0.0, 1e-3, 0.37, 1.0, 2.0])


@pytest.mark.parametrize("problem", problems(quantizers=UNIFORM, stes=[0]), ids=str)
def test_channel_stats(backend, problem):
    x = problem.x(backend.device)
    stats = backend.ops.channel_stats(x, problem.axis)
    expected = reference.channel_stats(x.cpu(), problem.axis)
    assert_bit_equal(stats[:, :2], expected[:, :2])
    assert_sums_close(stats[:, 2:], expected[:, 2:], expected[:, 2:], problem.per_channel)


@pytest.mark.parametrize("problem", problems(quantizers=UNIFORM, stes=[0]), ids=str)
def test_minmax_grids_are_bit_equal(backend, problem):
    x = problem.x(backend.device)
    grids = backend.ops.minmax_grids(x, [3, 15, 255], problem.axis)
    assert_bit_equal(grids, reference.minmax_grids(x.cpu(), [3, 15, 255], problem.axis))


@pytest.mark.parametrize("problem", FINITE, ids=str)
def test_conditional_abs_mean(backend, problem):
    x = problem.x(backend.device)
    stats = reference.channel_stats(x.cpu(), problem.axis)
    # Thresholds: TWN's, one that some |x| equals (strictly greater counts), all of them, none of them.
    for threshold in (0.7 * stats[:, 2] / max(problem.per_channel, 1), stats[:, 0].abs(), -1 - stats[:, 1].abs(), INF):
        threshold = torch.as_tensor(threshold).expand(problem.channels).clone()
        mean = backend.ops.conditional_abs_mean(x, threshold.to(backend.device), problem.axis)
        expected = reference.conditional_abs_mean(x.cpu(), threshold, problem.axis)
        ordinary = expected * problem.per_channel < 1e38  # the sum itself is a float32
        assert_sums_close(mean.cpu()[ordinary], expected[ordinary], expected[ordinary], problem.per_channel)


@pytest.mark.parametrize("problem", FINITE, ids=str)
def test_range_errors(backend, problem):
    x = problem.x(backend.device)
    candidates = candidates_for(x, problem.axis)
    for levels in (1, 3, 255):
        errors = backend.ops.range_errors(x, candidates.to(backend.device), levels, problem.axis)
        expected = reference.range_errors(x.cpu(), candidates, levels, problem.axis)
        assert_sums_close(errors, expected, expected, problem.per_channel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("signs", ["both", "positive", "negative", "one positive", "one negative", "zeros"])
@pytest.mark.parametrize("shape", [(70, 96), (20, 1312)], ids=["70x96", "20x1312"])
def test_extremes_of_half_types(backend, dtype, shape, signs):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if signs == "zeros":
        x = torch.zeros_like(x).copysign(x)
    elif signs != "both":
        x = x.abs() + 0.1 if signs in ("positive", "one negative") else -x.abs() - 0.1
    if signs.startswith("one"):
        x[-2, 37] *= -1
    for special in (None, NAN, -NAN, INF, -INF):
        if special is not None:
            x[-1, 38] = special
        half = x.to(dtype)
        for axis in (None, 0, 1):
            stats, expected = (
                backend.ops.channel_stats(half.to(backend.device), axis),
                reference.channel_stats(half, axis),
            )
            assert_bit_equal(stats[:, :2], expected[:, :2])
            assert_sums_close(stats[:, 2:], expected[:, 2:], expected[:, 2:], x.numel() // len(expected))
            grids = backend.ops.minmax_grids(half.to(backend.device), [3, 255], axis)
            assert_bit_equal(grids, reference.minmax_grids(half, [3, 255], axis))


def test_a_nan_makes_its_channel_nan_and_no_other(backend):
    x = torch.tensor([[1.0, NAN, 2.0], [-3.0, INF, 4.0]], device=backend.device)
    stats = backend.ops.channel_stats(x, 0)
    assert stats[0].isnan().all()
    assert stats[1].tolist() == [-3.0, INF, INF, INF]


def test_a_nan_exceeds_no_threshold(backend):
    x = torch.tensor([1.0, NAN, -3.0], device=backend.device)
    mean = backend.ops.conditional_abs_mean(x, torch.zeros(1, device=backend.device), None)
    assert mean.tolist() == [2.0]


@pytest.mark.parametrize("axis, layout", [(None, "contiguous"), (1, "contiguous"), (1, "channels_last")])
def test_results_have_the_same_bits_on_every_run(backend, axis, layout):
    shape = (3, 48, 10, 11) if backend.emulated else (4, 48, 80, 81)
    x = Problem(shape, layout=layout, axis=axis).x(backend.device)
    candidates = candidates_for(x, axis).to(backend.device)

    def run() -> list[torch.Tensor]:
        ops = backend.ops
        mean = ops.conditional_abs_mean(x, candidates[:, 2].contiguous(), axis)
        return [ops.channel_stats(x, axis), mean, ops.range_errors(x, candidates, 3, axis)]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for before, again in zip(first, run(), strict=True):
                assert_bit_equal(again, before)
    finally:
        torch.set_num_threads(threads)


def test_statistics_have_no_gradient(backend):
    x = torch.randn(4, 5, device=backend.device, requires_grad=True)
    assert not backend.ops.channel_stats(x, 0).requires_grad
    assert not backend.ops.minmax_grids(x, [3], 0).requires_grad
    assert not backend.ops.conditional_abs_mean(x, torch.zeros(4, device=backend.device), 0).requires_grad
    assert not backend.ops.range_errors(x, torch.ones(4, 2, device=backend.device), 3, 0).requires_grad


@pytest.mark.parametrize("shape, layout, axis", [((3, 5, 4), "transposed", 1), ((0, 3), "contiguous", 1)])
def test_opcheck(backend, shape, layout, axis):
    x = lay_out(torch.randn(shape, device=backend.device), layout)
    candidates = candidates_for(x, axis).to(backend.device)
    opcheck(backend.ops.channel_stats.default, (x, axis))
    opcheck(backend.ops.minmax_grids.default, (x, [1, 255], axis))
    opcheck(backend.ops.conditional_abs_mean.default, (x, candidates[:, 2].contiguous(), axis))
    opcheck(backend.ops.range_errors.default, (x, candidates, 3, axis))


def test_complaints_name_op_argument_expected_and_got(backend):
    ops, x, vector = backend.ops, torch.zeros(2, 3, device=backend.device), torch.zeros(3, device=backend.device)
    with pytest.raises(RuntimeError, match=r"^channel_stats: x must be float32, float16 or bfloat16, got Int"):
        ops.channel_stats(x.int(), None)
    with pytest.raises(RuntimeError, match=r"^channel_stats: axis must be None or in \[-2, 1\] .*, got -3"):
        ops.channel_stats(x, -3)
    with pytest.raises(RuntimeError, match=r"^minmax_grids: levels must be of 1 to 8 widths, got 0"):
        ops.minmax_grids(x, [], None)
    with pytest.raises(RuntimeError, match=r"^minmax_grids: levels must be 2\^n - 1 with n from 1 to 8 .*, got 4"):
        ops.minmax_grids(x, [3, 4], None)
    with pytest.raises(RuntimeError, match=r"^conditional_abs_mean: threshold must be of shape \[1\], got \[3\]"):
        ops.conditional_abs_mean(x, vector, None)
    with pytest.raises(RuntimeError, match=r"^range_errors: candidates must be of shape \[channels, J\], got \[3\]"):
        ops.range_errors(x, vector, 3, 1)
    with pytest.raises(RuntimeError, match=r"^range_errors: levels must be 2\^n - 1 with n from 1 to 8 .*, got 5"):
        ops.range_errors(x, x.t().contiguous(), 5, 1)
