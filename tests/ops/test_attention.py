"""attention_quantize and its gradients on every backend, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from quantkernels import ops, reference
from quantkernels.ops import Kind, Ste
from quantkernels.testing import (
    AttentionProblem,
    Problem,
    assert_bit_equal,
    assert_sums_close,
    attention_problems,
    lay_out,
    problems,
)

pytestmark = pytest.mark.ops(
    "attention_quantize", "attention_quantize_backward", "attention_gradient", "minmax_attention_quantize"
)
INF = float("inf")


def arguments(problem: AttentionProblem, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return problem.x(device), problem.attention(device), problem.grids(device)


def on_cpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().cpu() for t in tensors]


@pytest.mark.parametrize("problem", attention_problems(), ids=str)
def test_forward_is_bit_equal(backend, problem):
    x, attention, grids = arguments(problem, backend.device)
    q = backend.ops.attention_quantize(x, attention, grids, *problem.quantizers)
    assert_bit_equal(q, reference.attention_quantize(*on_cpu(x, attention, grids), *problem.quantizers))
    assert q.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("low, high", [(-1.3, 2.1), (0.0, 1e-38), (-3e38, 3e38), (0.7, 0.7)])
def test_members_on_one_range_clamp_alike(backend, low, high, axis):
    """They may share one clamp: each code must still be its own, also at ties, at the ends and beyond them."""
    span = torch.linspace(-0.3, 1.3, 2 * 255 * 5 + 1).double()
    x = torch.cat((low + span * (high - low), torch.tensor([INF, -INF, float("nan"), low, high]))).float().view(4, -1)
    channels = 1 if axis is None else x.shape[axis]
    for second in (high, high * 1.0001, high * 1.5):  # the range of the second member: the same, nearly, another
        rows = [[low, (end - low) / n, 0.0] for end, n in ((high, 255), (second, 15), (high, 3))]
        grids = torch.tensor(rows)[:, None].repeat(1, channels, 1)
        options = torch.tensor([0.5, 0.3, 0.2]), grids, [0, 0, 0], [255, 15, 3], [0, 0, 0], axis
        q = backend.ops.attention_quantize(*(t.to(backend.device) for t in (x, *options[:2])), *options[2:])
        assert_bit_equal(q, reference.attention_quantize(x, *options))


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [(2, 4, 8), (1, 3), (1, 2, 5, 6)], ids=str)
def test_a_range_that_covers_x_needs_no_clamp(backend, bits, dtype, axis):
    """Grids from x itself, also of a constant channel and of one with an infinity: with the promise the same bits."""
    x = torch.randn(4, 16, 37, generator=torch.Generator().manual_seed(len(bits)))
    x[0], x[:, 1], x[2, 2, 3] = 1e-3 * x[0], 0.7, INF if axis else 3.0
    x = x.to(dtype).to(backend.device)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    levels, zeros = [2**n - 1 for n in bits], [0] * len(bits)
    attention = torch.softmax(torch.arange(len(bits), device=x.device).float(), 0)
    grids = backend.ops.minmax_grids(x, levels, axis)
    results = []
    for covered in (False, True):
        q = backend.ops.attention_quantize(x, attention, grids, zeros, levels, zeros, axis, True, covered)
        along = backend.ops.attention_gradient(grad, x, attention, grids, zeros, levels, axis, covered)
        results.append((q, along))
    for plain, promised in zip(*results, strict=True):
        assert_bit_equal(promised, plain)
    assert_bit_equal(q, reference.attention_quantize(*on_cpu(x, attention, grids), zeros, levels, zeros, axis))


@pytest.mark.parametrize("problem", problems(quantizers=[(Kind.UNIFORM, 255)], stes=[Ste.IDENTITY]), ids=str)
def test_minmax_mixture_is_made_of_its_parts(backend, problem):
    """Grids of x itself and the mixture on them, in one op: any shape, layout and type."""
    x, attention = problem.x(backend.device), torch.tensor([0.25, 0.5, 0.125], device=backend.device)
    q, grids = backend.ops.minmax_attention_quantize(x, attention, [3, 15, 255], problem.axis)
    assert_bit_equal(grids, backend.ops.minmax_grids(x, [3, 15, 255], problem.axis))
    zeros = [0] * 3
    parts = *on_cpu(x, attention, grids), zeros, [3, 15, 255], zeros, problem.axis
    assert_bit_equal(q, reference.attention_quantize(*parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [(2, 4, 8), (8, 1), (2, 3, 4), (6, 3, 2, 1)], ids=str)
def test_every_number_of_a_half_type_in_a_covering_range(backend, bits, dtype):
    """Where codes follow from those of the finest member they may be looked up: also next to the boundaries of codes,
    and near 0, where numbers are so close together that some codes do not follow."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    levels, zeros = [2**n - 1 for n in bits], [0] * len(bits)
    random = torch.Generator().manual_seed(len(bits))
    attention = torch.softmax(torch.randn(len(bits), generator=random), 0)
    ranges = [(-2.0, 2.0), (0.0, 1.0), (-1e-5, 3e-5), (-1e-6, 6e4), *(3 * torch.randn(6, 2, generator=random)).tolist()]
    many = 20_000 if backend.name == "cpu" else 2_000
    for low, high in map(sorted, ranges):
        x = numbers[(numbers >= low) & (numbers <= high)]
        x = x[torch.randperm(len(x), generator=random)[:many]].to(backend.device)
        grids = backend.ops.minmax_grids(x, levels, None)
        q = backend.ops.attention_quantize(x, attention.to(x.device), grids, zeros, levels, zeros, None, True, True)
        assert_bit_equal(q, reference.attention_quantize(*on_cpu(x, attention, grids), zeros, levels, zeros, None))


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_runs_of_half_types(backend, dtype, axis):
    """Long enough for whatever is prepared for a run, with an end of it left over."""
    x = torch.randn(2, 3, 2500, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[1, 2, 7] = INF if axis else 0.0
    x, levels = x.to(backend.device), [3, 15, 255]
    attention = torch.tensor([0.2, 0.3, 0.5], device=x.device)
    grids = backend.ops.minmax_grids(x, levels, axis)
    q = backend.ops.attention_quantize(x, attention, grids, [0] * 3, levels, [0] * 3, axis, True, True)
    assert_bit_equal(q, reference.attention_quantize(*on_cpu(x, attention, grids), [0] * 3, levels, [0] * 3, axis))


@pytest.mark.parametrize("spread", [0, 126], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [64, 80, 101], ids=str)
def test_channels_side_by_side(backend, channels, dtype, spread):
    """Whole strips of channels and what is left of a row, of one magnitude and of all that the type has."""
    random = torch.Generator().manual_seed(channels)
    x = torch.randn(150, channels, generator=random) * 2.0 ** torch.linspace(-spread, spread / 2, channels)
    x[:, 3], x[40, 4], x[41, 5] = 0.5, INF if spread else 2.0, float("nan") if spread else 2.0
    x, grad = x.to(dtype).to(backend.device), torch.randn(x.shape, generator=random).to(dtype).to(backend.device)
    attention, levels, zeros = torch.tensor([0.2, 0.3, 0.5], device=x.device), [3, 15, 255], [0] * 3
    grids = backend.ops.minmax_grids(x, levels, 1)
    for covered in (False, True):
        options = grids, zeros, levels
        q = backend.ops.attention_quantize(x, attention, *options, zeros, 1, True, covered)
        along = backend.ops.attention_gradient(grad, x, attention, *options, 1, covered)
        quantized = [t.cpu() for t in (x, attention, grids)]
        assert_bit_equal(q, reference.attention_quantize(*quantized, zeros, levels, zeros, 1))
        expected = reference.attention_quantize_backward(grad.cpu(), *quantized, zeros, levels, zeros, 1)[1]
        if not spread:
            bound = (grad.cpu().float().abs() * x.cpu().float().abs().amax(0)).sum().expand(3)
            assert_sums_close(along, expected, bound, x.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [(0, 0, 0), (0, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("channels", [512, 509])
def test_the_gradient_over_many_channels_of_a_large_tensor(channels, kinds, dtype):
    """The native kernels of the CPU ask for what they will read next, from 8 MiB on. Here every sum is exact."""
    random = torch.Generator().manual_seed(channels)
    shape = (8 << 20) // (channels * dtype.itemsize) + 5, channels
    x = (torch.randint(-256, 257, shape, generator=random) / 32).to(dtype)
    grad = torch.randint(-2, 3, shape, generator=random).to(dtype)
    assert x.nbytes >= 8 << 20
    levels = [2 if kind == Kind.TERNARY else 1 if kind else 15 for kind in kinds]
    grids = torch.randint(-8, 8, (len(kinds), channels, 3), generator=random) / 2
    grids[..., 1] = 2.0 ** torch.randint(-3, 1, (len(kinds), channels), generator=random)
    inputs = grad, x, torch.ones(len(kinds)), grids, kinds, levels, 1
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            along = ops.attention_gradient(*inputs)
            for k, kind in enumerate(kinds):
                q = x.float()
                if kind != Kind.IDENTITY:
                    q = reference.fake_quantize(q, grids[k], kind, levels[k], Ste.IDENTITY, 1)
                assert along[k] == (grad.double() * q.double()).sum(), (k, kind)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("offset, step", [(0, -99), (-99, -99), (-101, -99), (0, -101), (-126, -127), (-140, -133)])
def test_small_bfloat16_mixtures(backend, offset, step):
    """Steps and offsets as powers of two: results are subnormal, next to that, or far from it."""
    grids = torch.tensor([[[-(2.0**offset), 2.0**step, 0.0]], [[3 * 2.0**offset, 2.0 ** (step + 1), 0.0]]])
    attention = torch.tensor([0.7, 0.3])
    x = (grids[0, 0, 0] + torch.linspace(-2, 18, 2000) * grids[0, 0, 1]).to(torch.bfloat16)
    x[:3] = torch.tensor([INF, -INF, float("nan")])
    quantizers = [0, 0], [15, 7], [0, 0], None
    q = backend.ops.attention_quantize(*(t.to(backend.device) for t in (x, attention, grids)), *quantizers)
    assert_bit_equal(q, reference.attention_quantize(x, attention, grids, *quantizers))


@pytest.mark.parametrize("problem", attention_problems(), ids=str)
def test_backward(backend, problem):
    x, attention, grids = arguments(problem, backend.device)
    grad = problem.grad(backend.device)
    grad_x, grad_attention, sums = backend.ops.attention_quantize_backward(
        grad, x, attention, grids, *problem.quantizers
    )
    expected = reference.attention_quantize_backward(*on_cpu(grad, x, attention, grids), *problem.quantizers)
    assert_bit_equal(grad_x, expected[0])
    total = reference.channel_stats(grad.cpu(), problem.first.axis)[:, 2:3]  # sum |g| of each channel
    assert_sums_close(sums, expected[2], total, problem.first.per_channel)
    magnitude = attention_magnitude(problem, x.cpu(), grad.cpu(), grids.cpu(), total)
    # Where terms come near the end of float32, or are not finite, a sum's value depends on its order.
    ordinary = magnitude < 1e30
    assert_sums_close(grad_attention.cpu()[ordinary], expected[1][ordinary], magnitude[ordinary], max(x.numel(), 1))
    kinds, levels, _, axis = problem.quantizers
    alone = backend.ops.attention_gradient(grad, x, attention, grids, kinds, levels, axis)
    assert_sums_close(alone.cpu()[ordinary], expected[1][ordinary], magnitude[ordinary], max(x.numel(), 1))


def attention_magnitude(
    problem: AttentionProblem, x: torch.Tensor, grad: torch.Tensor, grids: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """[K]: a bound of the sum of the terms |g Q_k(x)|."""
    kinds, levels, _, _ = problem.quantizers
    if not x.isfinite().all():
        return torch.full((len(kinds),), INF)
    parts = []
    for k, kind in enumerate(kinds):
        if kind == Kind.IDENTITY:
            parts.append((grad.double() * x.double()).abs().sum())
        else:
            largest = grids[k, :, 0].abs() + grids[k, :, 1].abs() * levels[k]
            parts.append((largest * total[:, 0]).double().sum())
    return torch.stack(parts)


@pytest.mark.parametrize("k", range(3))
def test_all_attention_on_one_member_is_that_member(backend, k):
    members = ((Kind.UNIFORM, 3), (Kind.UNIFORM, 255), (Kind.TERNARY, 2))
    problem = AttentionProblem(tuple(Problem((4, 33), axis=0, kind=kind, levels=n) for kind, n in members))
    x, _, grids = arguments(problem, backend.device)
    attention = torch.eye(3, device=backend.device)[k]
    q = backend.ops.attention_quantize(x, attention, grids, *problem.quantizers)
    alone = backend.ops.fake_quantize(x, grids[k], *problem.members[k].quantizer)
    assert_bit_equal(q, alone)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("stes", [(0, 0, 0), (1, 0, 2)])
def test_autograd_agrees_with_the_reference(backend, stes, axis):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6)
    channels = 1 if axis is None else 4
    one = torch.stack((-torch.rand(channels), torch.rand(channels) * 0.5 + 0.1, torch.zeros(channels)), 1)
    grids, attention = torch.stack((one, one * 0.5, one * 1.2)), torch.tensor([0.5, 0.3, 0.2])
    upstream = torch.randn_like(x)
    results = []
    for run, device in (
        (reference.differentiable_attention_quantize, "cpu"),
        (ops.attention_quantize, backend.device),
    ):
        leaves = [t.clone().to(device).requires_grad_() for t in (x, attention, grids)]
        with backend.chosen():
            q = run(*leaves, [Kind.UNIFORM] * 3, [3, 7, 15], stes, axis)
        grads = torch.autograd.grad(q, leaves, upstream.to(device), allow_unused=True)
        results.append([q, *(torch.zeros(()) if g is None else g for g in grads)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stes", [(0, 0), (1, 0)])
def test_a_convex_mixture_hands_the_gradient_on(backend, stes):
    """Up to the rounding of the sum of its attention, the gradients are those without the promise."""
    problem = AttentionProblem((Problem((6, 10), axis=0, levels=3), Problem((6, 10), axis=0, levels=15)))
    x, _, grids = arguments(problem, backend.device)
    attention, upstream = torch.tensor([0.3, 0.7], device=backend.device), problem.grad(backend.device)
    kinds, levels, _, axis = problem.quantizers
    grads = []
    for convex in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, attention)]
        with backend.chosen():
            q = ops.attention_quantize(*leaves, grids, kinds, levels, stes, axis, convex)
        grads.append(torch.autograd.grad(q, leaves, upstream))
    for plain, convex in zip(*grads, strict=True):
        torch.testing.assert_close(convex, plain)
    if not any(stes):
        assert_bit_equal(grads[1][0], upstream)


def test_gradcheck_in_the_attention(backend):
    """q is linear in the attention, so its numeric derivative is exact up to rounding."""
    problem = AttentionProblem(
        (Problem((12,), levels=3), Problem((12,), kind=Kind.BINARY, levels=1), Problem((12,), kind=Kind.IDENTITY))
    )
    x, attention, _ = arguments(problem, backend.device)
    grids = torch.tensor([[[-1.0, 0.5, 0.0]], [[-0.7, 1.4, 0.0]], [[0.0, 0.0, 0.0]]], device=backend.device)

    def mixture(a: torch.Tensor) -> torch.Tensor:
        return ops.attention_quantize(x.clamp(-2, 2), a, grids, *problem.quantizers)

    with backend.chosen(), pytest.warns(UserWarning, match="double precision"):
        torch.autograd.gradcheck(mixture, (attention.requires_grad_(),), eps=2**-3, atol=1e-4)


@pytest.mark.parametrize("axis, layout", [(None, "contiguous"), (1, "contiguous"), (1, "channels_last")])
def test_sums_have_the_same_bits_on_every_run(backend, axis, layout):
    shape = (3, 24, 10, 11) if backend.emulated else (4, 48, 40, 41)
    stes = (Ste.FULL, Ste.CLIP, Ste.IDENTITY)
    members = tuple(Problem(shape, layout=layout, axis=axis, levels=15, ste=ste) for ste in stes)
    problem = AttentionProblem(members)
    inputs = (problem.grad(backend.device), *arguments(problem, backend.device), *problem.quantizers)
    first, threads = backend.ops.attention_quantize_backward(*inputs), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            again = backend.ops.attention_quantize_backward(*inputs)
            for one, other in zip(first, again, strict=True):
                assert_bit_equal(other, one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("problem", attention_problems(shapes=[(2, 3, 4, 5)], special=[False])[:3], ids=str)
def test_opcheck(backend, problem):
    x, attention, grids = arguments(problem, backend.device)
    # opcheck takes equal NaNs for a difference, so everything stays finite here.
    x = lay_out(torch.randn(x.shape).to(x), problem.first.layout)
    grids = torch.tensor([-1.0, 0.3, 0.4], device=backend.device).expand(grids.shape).contiguous()
    leaves = [t.requires_grad_() for t in (x, attention, grids)]
    opcheck(backend.ops.attention_quantize.default, (*leaves, *problem.quantizers))
    plain = [t.detach() for t in leaves]
    inputs = (problem.grad(backend.device), *plain, *problem.quantizers)
    opcheck(backend.ops.attention_quantize_backward.default, inputs)
    kinds, levels, stes, axis = problem.quantizers
    opcheck(backend.ops.attention_quantize.default, (*leaves, kinds, levels, [0] * len(stes), axis, True))
    opcheck(backend.ops.attention_gradient.default, (inputs[0], *plain, kinds, levels, axis))
    opcheck(backend.ops.attention_quantize.default, (*leaves, kinds, levels, [0] * len(stes), axis, True, True))
    opcheck(backend.ops.minmax_attention_quantize.default, (plain[0], torch.ones(2).to(attention), [3, 255], axis))


COMPLAINTS = {
    "x": ({"x": torch.zeros(2, 3).int()}, "x must be float32, float16 or bfloat16, got Int"),
    "attention": ({"attention": torch.ones(3)}, r"attention must be of shape \[2\], got \[3\]"),
    "grids": ({"grids": torch.zeros(2, 2, 3)}, r"grids must be of shape \[2, 1, 3\], got \[2, 2, 3\]"),
    "none": ({"kinds": []}, "kinds must be of 1 to 8 quantizers, got 0"),
    "nine": ({"kinds": [0] * 9}, "kinds must be of 1 to 8 quantizers, got 9"),
    "kinds": ({"kinds": [0, 4]}, "kinds must be 0 .*, got 4"),
    "levels": ({"levels": [3]}, "levels must be one for each of the 2 kinds, got 1"),
    "levels-value": ({"levels": [3, 6]}, r"levels must be 2\^n - 1 .*, got 6"),
    "stes": ({"stes": [0, 0, 0]}, "stes must be one for each of the 2 kinds, got 3"),
    "stes-value": ({"kinds": [0, 3], "stes": [0, 1]}, "stes must be 0 .* not uniform, got 1"),
    "axis": ({"axis": 5}, r"axis must be None or in \[-2, 1\] .*, got 5"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_complaints_name_op_argument_expected_and_got(backend, name):
    changes, message = COMPLAINTS[name]
    inputs = {
        "x": torch.zeros(2, 3),
        "attention": torch.ones(2),
        "grids": torch.zeros(2, 1, 3),
        "kinds": [0, 0],
        "levels": [3, 3],
        "stes": [0, 0],
        "axis": None,
    } | changes
    values = [v.to(backend.device) if isinstance(v, torch.Tensor) else v for v in inputs.values()]
    with pytest.raises(RuntimeError, match=f"^attention_quantize: {message}"):
        backend.ops.attention_quantize(*values)
