"""learned_basis_quantize, its statistics and its gradient on every backend, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from quantkernels import ops, reference
from quantkernels.ops import Encoding, Ste
from quantkernels.testing import (
    LearnedBasisProblem,
    Problem,
    assert_bit_equal,
    assert_sums_close,
    learned_basis_problems,
)

pytestmark = pytest.mark.ops("learned_basis_quantize", "learned_basis_quantize_backward", "learned_basis_encode")
NAN, INF = float("nan"), float("inf")
FEW = [
    LearnedBasisProblem(Problem((37,), levels=7, ste=Ste.CLIP), Encoding.UNSIGNED),
    LearnedBasisProblem(Problem((2, 6, 5, 7), torch.bfloat16, "channels_last", 1, levels=15), Encoding.SIGNED),
    LearnedBasisProblem(Problem((3, 70, 4, 3), torch.float16, "sliced", 0, levels=3), Encoding.SIGNED),
    LearnedBasisProblem(Problem((4, 0, 3), axis=-1, levels=1), Encoding.UNSIGNED),
]


@pytest.mark.parametrize("problem", learned_basis_problems(), ids=str)
def test_forward_is_bit_equal_and_counts_are_exact(backend, problem):
    x, basis = problem.x(backend.device), problem.basis(backend.device)
    q, gram, product = backend.ops.learned_basis_quantize(x, basis, *problem.quantizer)
    expected = reference.learned_basis_quantize(x.cpu(), basis.cpu(), *problem.quantizer)
    assert_bit_equal(q, expected[0])
    assert q.stride() == torch.empty_like(x).stride()
    assert_bit_equal(gram, expected[1])
    if not problem.one.special:
        magnitude = reference.channel_stats(x.cpu(), problem.one.axis)[:, 2:3]
        assert_sums_close(product, expected[2], magnitude, problem.one.per_channel)


@pytest.mark.parametrize("least", [-99, -101, -126, -128, -133])
def test_small_bfloat16_levels(backend, least):
    """Bases as powers of two: levels are subnormal, next to that, or far from it; so are gradients."""
    basis = torch.tensor([[2.0**least, 2.5 * 2.0**least]])
    x = (torch.linspace(-1, 5, 1000) * 2.0**least).to(torch.bfloat16)
    x[:3] = torch.tensor([INF, -INF, NAN])
    on_device = x.to(backend.device), basis.to(backend.device)
    for encoding in (Encoding.SIGNED, Encoding.UNSIGNED):
        q = backend.ops.learned_basis_quantize(*on_device, int(encoding), 0, None)[0]
        assert_bit_equal(q, reference.learned_basis_quantize(x, basis, int(encoding), 0, None)[0])
        grad_x = backend.ops.learned_basis_quantize_backward(on_device[0], *on_device, int(encoding), None)
        assert_bit_equal(grad_x, reference.learned_basis_quantize_backward(x, x, basis, int(encoding), None))


@pytest.mark.parametrize("problem", learned_basis_problems([1, 3], special=[True]), ids=str)
def test_backward(backend, problem):
    grad, x, basis = (make(backend.device) for make in (problem.grad, problem.x, problem.basis))
    options = int(problem.encoding), problem.one.axis
    grad_x = backend.ops.learned_basis_quantize_backward(grad, x, basis, *options)
    assert_bit_equal(grad_x, reference.learned_basis_quantize_backward(grad.cpu(), x.cpu(), basis.cpu(), *options))


@pytest.mark.parametrize("problem", learned_basis_problems([2, 4, 8], special=[True]), ids=str)
def test_codes_are_exact_and_stand_for_q(backend, problem):
    x, axis = problem.x(backend.device), problem.one.axis
    grid = ops.grid_of_basis(problem.basis(), problem.encoding)
    codes = backend.ops.learned_basis_encode(x, grid.to(backend.device), axis)
    assert_bit_equal(codes, reference.learned_basis_encode(x.cpu(), grid, axis))
    assert codes.stride() == torch.empty_like(x).stride()
    values = ops.level_table(grid).to(x.dtype).reshape(-1)
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    first = (torch.arange(grid.shape[0]) << problem.bits).reshape(shape)
    q = backend.ops.learned_basis_quantize(x, problem.basis(backend.device), *problem.quantizer)[0]
    assert_bit_equal(values[first + codes.cpu()], q)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_the_level_is_the_nearest_and_a_tie_goes_down(backend, bits):
    # Sums of powers of two are exact, so that distances are.
    basis = 2.0 ** torch.arange(bits)[None] / 4
    x = torch.linspace(-1.0, 2.0**bits / 4 + 1, 997)
    levels = torch.arange(2**bits) / 4
    x[: 2**bits - 1] = (levels[:-1] + levels[1:])[:997] / 2
    q = backend.ops.learned_basis_quantize(x.to(backend.device), basis.to(backend.device), 1, 0, None)[0].cpu()
    distance = (x[:, None] - levels).abs()
    assert_bit_equal(q, levels[distance.argmin(1)])  # the first of two equal distances: the lower level


def test_a_basis_that_is_not_sorted(backend):
    """Levels 0, 0.5, 2, 2.5 whose codes are 0, 2, 1, 3."""
    x = torch.tensor([-3.0, 0.25, 0.26, 1.25, 1.26, 2.25, 2.26, INF, NAN], device=backend.device)
    basis = torch.tensor([[2.0, 0.5]], device=backend.device)
    q, gram, _ = backend.ops.learned_basis_quantize(x, basis, 1, 0, None)
    assert q.tolist() == [0.0, 0.0, 0.5, 0.5, 2.0, 2.0, 2.5, 2.5, 0.0]
    assert gram.tolist() == [[[4.0, 2.0], [2.0, 4.0]]]


def test_the_statistics_give_the_least_squares_basis(backend):
    torch.manual_seed(0)
    x = torch.randn(4, 301)
    basis = torch.tensor([0.3, 0.7, 1.1]).expand(4, 3).contiguous()
    arguments = x.to(backend.device), basis.to(backend.device), 0, 0, 0
    q, gram, product = (t.cpu() for t in backend.ops.learned_basis_quantize(*arguments))
    fitted = torch.linalg.solve(gram, product[..., None])[..., 0]
    codes = backend.ops.learned_basis_encode(x.to(backend.device), ops.grid_of_basis(basis, 0).to(backend.device), 0)
    digits = reference.learned_basis.digits(codes.cpu(), 3, 0)
    expected = torch.linalg.lstsq(digits, x[..., None]).solution[..., 0]
    torch.testing.assert_close(fitted, expected, rtol=1e-4, atol=1e-5)
    assert ((digits @ fitted[..., None])[..., 0] - x).square().sum() < (q - x).square().sum()


def test_without_statistics(backend):
    problem = FEW[1]
    x, basis = problem.x(backend.device), problem.basis(backend.device)
    q, gram, product = backend.ops.learned_basis_quantize(x, basis, *problem.quantizer, False)
    assert_bit_equal(q, backend.ops.learned_basis_quantize(x, basis, *problem.quantizer)[0])
    assert list(gram.shape) == [0, 4, 4] and list(product.shape) == [0, 4]


@pytest.mark.parametrize("axis, layout", [(None, "contiguous"), (1, "contiguous"), (1, "channels_last")])
def test_results_have_the_same_bits_on_every_run(backend, axis, layout):
    shape = (3, 24, 10, 11) if backend.emulated else (4, 48, 80, 81)
    problem = LearnedBasisProblem(Problem(shape, layout=layout, axis=axis, levels=7), Encoding.SIGNED)
    x, basis = problem.x(backend.device), problem.basis(backend.device)
    first, threads = backend.ops.learned_basis_quantize(x, basis, 0, 0, axis), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for before, again in zip(first, backend.ops.learned_basis_quantize(x, basis, 0, 0, axis), strict=True):
                assert_bit_equal(again, before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("ste", [Ste.IDENTITY, Ste.CLIP])
@pytest.mark.parametrize("axis", [None, 1])
def test_autograd_agrees_with_the_reference(backend, ste, axis):
    torch.manual_seed(0)
    x, channels = torch.randn(3, 5, 4), 1 if axis is None else 5
    basis = torch.rand(channels, 2) * 0.5 + 0.1
    upstream = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    expected = reference.differentiable_learned_basis_quantize(leaf, basis, 1, ste, axis)
    expected.backward(upstream)
    own = x.to(backend.device).requires_grad_()
    with backend.chosen():
        q, gram, product = ops.learned_basis_quantize(own, basis.to(backend.device), 1, ste, axis)
    q.backward(upstream.to(backend.device))
    assert not gram.requires_grad and not product.requires_grad
    assert_bit_equal(q, expected)
    assert_bit_equal(own.grad, leaf.grad)
    assert (own.grad == 0).any() == (ste == Ste.CLIP)


@pytest.mark.parametrize("problem", FEW, ids=str)
def test_opcheck(backend, problem):
    x, basis = problem.x(backend.device), problem.basis(backend.device)
    opcheck(backend.ops.learned_basis_quantize.default, (x.detach().requires_grad_(), basis, *problem.quantizer))
    opcheck(backend.ops.learned_basis_quantize.default, (x, basis, *problem.quantizer, False))
    arguments = problem.grad(backend.device), x, basis, int(problem.encoding), problem.one.axis
    opcheck(backend.ops.learned_basis_quantize_backward.default, arguments)
    grid = ops.grid_of_basis(basis, problem.encoding)
    opcheck(backend.ops.learned_basis_encode.default, (x, grid, problem.one.axis))


def test_complaints_name_op_argument_expected_and_got(backend):
    quantize, x = backend.ops.learned_basis_quantize, torch.zeros(2, 3, device=backend.device)
    basis = torch.ones(1, 2, device=backend.device)
    with pytest.raises(RuntimeError, match=r"^learned_basis_quantize: x must be float32, .*, got Int"):
        quantize(x.int(), basis, 0, 0, None)
    with pytest.raises(RuntimeError, match=r"basis must be of shape \[channels, n\] with n from 1 to 8, got \[1, 9\]"):
        quantize(x, basis.new_ones(1, 9), 0, 0, None)
    with pytest.raises(RuntimeError, match=r"basis must be of shape \[2, 2\], got \[1, 2\]"):
        quantize(x, basis, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"basis must be Float, got Double"):
        quantize(x, basis.double(), 0, 0, None)
    with pytest.raises(RuntimeError, match=r"encoding must be 0 \(\{-1, \+1\}\) or 1 \(\{0, 1\}\), got 2"):
        quantize(x, basis, 2, 0, None)
    with pytest.raises(RuntimeError, match=r"ste must be 0 \(identity\) or 1 \(clip\), got 2"):
        quantize(x, basis, 0, 2, None)
    with pytest.raises(RuntimeError, match=r"^learned_basis_quantize_backward: grad must be of x's shape \[2, 3\]"):
        backend.ops.learned_basis_quantize_backward(x[:, :2], x, basis, 0, None)
    with pytest.raises(RuntimeError, match=r"^learned_basis_encode: grid must be of shape \[channels, 1 \+ n\]"):
        backend.ops.learned_basis_encode(x, basis[:, :1], None)
