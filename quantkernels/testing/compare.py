"""Equality to the bit for element-wise results, and the one tolerance there is: that of floating-point sums."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding error of one float32 operation.
UNIT = 2.0**-24
# The longest chain of additions of any kernel before it starts a new partial sum (csrc/cpu/traverse.h: kMaxBlockRows).
LONGEST_CHAIN = 4096
# Roundings of a term before it is added, of the tree over the partial sums, and of the result.
FIXED_ROUNDINGS = 40


def assert_bit_equal(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and values; NaN equals NaN, and -0 equals 0. AssertionError with the first differences."""
    assert actual.dtype == expected.dtype, f"dtype must be {expected.dtype}, got {actual.dtype}"
    assert actual.shape == expected.shape, f"shape must be {list(expected.shape)}, got {list(actual.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if same.all():
        return
    where = (~same).nonzero()
    first = [
        f"{index.tolist()}: {actual[tuple(index)].item()!r}, not {expected[tuple(index)].item()!r}"
        for index in where[:5]
    ]
    raise AssertionError(f"{len(where)} of {same.numel()} elements differ; {'; '.join(first)}")


def sum_tolerance(magnitude: Tensor, count: int) -> Tensor:
    """The most by which a float32 sum of ``count`` terms may differ from the exact one; ``magnitude`` = sum |terms|.

    A term takes part in d additions, each with a relative rounding error of at most u = 2^-24. The error is then at
    most d * u * sum |terms| (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and at most
    8 * sqrt(d) * u * sum |terms| with a probability of all but 1e-13 * d if the roundings are independent (Higham and
    Mary, A new approach to probabilistic rounding error analysis, 2019): a bound that one term left out still exceeds.
    Underflow of a term adds less than 2^-149.
    """
    depth = min(count, LONGEST_CHAIN)
    roundings = min(depth, 8 * depth**0.5) + FIXED_ROUNDINGS
    return roundings * UNIT * magnitude.double() + (count + 1) * 2.0**-149


def assert_sums_close(actual: Tensor, expected: Tensor, magnitude: Tensor, count: int) -> None:
    """Sums of ``count`` terms each within :func:`sum_tolerance`; NaN equals NaN and infinities equal themselves."""
    assert actual.dtype == torch.float32 and actual.shape == expected.shape, (actual, expected)
    got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
    tolerance = sum_tolerance(magnitude.cpu(), count).expand(want.shape)
    close = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= tolerance)
    assert close.all(), f"got {got[~close].tolist()}, not {want[~close].tolist()} +- {tolerance[~close].tolist()}"
