"""fake_quantize and its gradient on every backend, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from quantkernels import ops, reference
from quantkernels.ops import Kind, Ste
from quantkernels.testing import Problem, assert_bit_equal, assert_sums_close, problems
from quantkernels.testing.inputs import LAYOUTS

pytestmark = pytest.mark.ops("fake_quantize", "fake_quantize_backward", "fake_quantize_masked", "apply_mask")
NAN, INF = float("nan"), float("inf")
FEW = [
    Problem((37,), levels=7, ste=Ste.FULL),
    Problem((2, 6, 5, 7), torch.bfloat16, "channels_last", 1, levels=255, ste=Ste.CLIP),
    Problem((3, 70, 4, 3), torch.float16, "sliced", 0, Kind.TERNARY, 2),
    Problem((4, 0, 3), axis=-1, kind=Kind.BINARY, levels=1),
]


@pytest.mark.parametrize("problem", problems(stes=[Ste.IDENTITY]), ids=str)
def test_forward_is_bit_equal(backend, problem):
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    q = backend.ops.fake_quantize(x, grid, *problem.quantizer)
    assert_bit_equal(q, reference.fake_quantize(x.cpu(), grid.cpu(), *problem.quantizer))
    assert q.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("problem", problems(quantizers=[(Kind.UNIFORM, 1), (Kind.UNIFORM, 255)]), ids=str)
def test_backward(backend, problem):
    grad, x, grid = (make(backend.device) for make in (problem.grad, problem.x, problem.grid))
    grad_x, sums = backend.ops.fake_quantize_backward(grad, x, grid, *problem.quantizer)
    expected = reference.fake_quantize_backward(grad.cpu(), x.cpu(), grid.cpu(), *problem.quantizer)
    assert_bit_equal(grad_x, expected[0])
    # Each term is at most |g|: |code - v| <= 1/2 inside.
    magnitude = reference.channel_stats(grad.cpu(), problem.axis)[:, 2:3]
    assert_sums_close(sums, expected[1], magnitude, problem.per_channel)
    alone, nothing = backend.ops.fake_quantize_backward(grad, x, grid, *problem.quantizer, False)
    assert_bit_equal(alone, grad_x)
    assert nothing.shape == (0, 3)


@pytest.mark.parametrize("problem", problems(quantizers=[(Kind.UNIFORM, 1), (Kind.UNIFORM, 15)]), ids=str)
def test_masked(backend, problem):
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    q, mask = backend.ops.fake_quantize_masked(x, grid, problem.levels, problem.axis)
    expected = reference.fake_quantize_masked(x.cpu(), grid.cpu(), problem.levels, problem.axis)
    assert_bit_equal(q, expected[0])
    assert_bit_equal(mask, expected[1])
    grad = torch.empty_like(q).copy_(problem.grad(backend.device))
    grad_x = backend.ops.apply_mask(grad, mask)
    assert_bit_equal(grad_x, reference.apply_mask(grad.cpu(), expected[1]))
    clip = problem.kind, problem.levels, Ste.CLIP, problem.axis
    assert_bit_equal(grad_x, backend.ops.fake_quantize_backward(grad, x, grid, *clip)[0])
    assert grad_x.stride() == q.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("offset", [0.0, -(2.0**-99), -(2.0**-101), -(2.0**-126), -(2.0**-140), 1.0, NAN, -INF])
@pytest.mark.parametrize("step", [2.0**-99, 2.0**-101, 1.7 * 2.0**-126, 2.0**-133, 2.0**-149, 0.0, NAN, INF])
def test_small_bfloat16_results(backend, offset, step, axis):
    """Results that are subnormal, next to that, or far from it, and what is not finite."""
    x = torch.linspace(-3, 19, 1000) * (step if 0 < step < INF else 1.0) + (offset if offset > -INF else 0.0)
    x[1:6] = torch.tensor([NAN, INF, -INF, 0.0, -0.0])
    x = torch.stack((x, x.flip(0))).to(torch.bfloat16)
    rows = [[offset, step, 0.0], [0.5, 0.25, 0.0]]
    grid = torch.tensor(rows if axis == 0 else rows[:1])
    on_device = x.to(backend.device), grid.to(backend.device)
    expected = reference.fake_quantize_masked(x, grid, 15, axis)
    q, mask = backend.ops.fake_quantize_masked(*on_device, 15, axis)
    assert_bit_equal(q, expected[0])
    assert_bit_equal(mask, expected[1])
    for kind, levels in ((Kind.UNIFORM, 15), (Kind.BINARY, 1), (Kind.TERNARY, 2)):
        q = backend.ops.fake_quantize(*on_device, kind, levels, Ste.IDENTITY, axis)
        assert_bit_equal(q, reference.fake_quantize(x, grid, kind, levels, Ste.IDENTITY, axis))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 1])
def test_a_constant_grid_keeps_one_bit_an_element(backend, layout, axis):
    problem = Problem((2, 8, 5, 6), layout=layout, axis=axis, levels=7, ste=Ste.CLIP)
    x, grid, grad = (make(backend.device) for make in (problem.x, problem.grid, problem.grad))
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with backend.chosen(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        q = ops.fake_quantize(x.requires_grad_(), grid, *problem.quantizer)
    expected = reference.fake_quantize_backward(grad.cpu(), x.detach().cpu(), grid.cpu(), *problem.quantizer)[0]
    for upstream in (grad, torch.empty_like(q).copy_(grad)):
        assert_bit_equal(torch.autograd.grad(q, x, upstream, retain_graph=True)[0], expected)
    ones = torch.autograd.grad(q.sum(), x, retain_graph=True)[0]  # an expanded gradient
    assert_bit_equal(ones, torch.autograd.grad(q, x, torch.ones_like(q))[0])
    # Where channels end inside a byte, x is quicker.
    if axis is None or layout == "channels_last":
        assert sum(t.nbytes for t in kept) == x.numel() // 8
    elif layout == "contiguous":
        assert sum(t.nbytes for t in kept) == x.nbytes + grid.nbytes


@pytest.mark.parametrize("ste", Ste)
def test_gradient_outside_the_range_is_dropped_even_if_it_is_not_finite(backend, ste):
    x = torch.tensor([-5.0, 0.3, 5.0, NAN], device=backend.device)
    grad = torch.tensor([INF, 1.0, NAN, 1.0], device=backend.device)
    grid = torch.tensor([[0.0, 1.0, 0.0]], device=backend.device)
    grad_x, _ = backend.ops.fake_quantize_backward(grad, x, grid, 0, 3, ste, None)
    expected = [INF, 1.0, NAN, 1.0] if ste == Ste.IDENTITY else [0.0, 1.0, 0.0, 0.0]
    assert_bit_equal(grad_x.cpu(), torch.tensor(expected))
    if ste == Ste.CLIP:
        mask = backend.ops.fake_quantize_masked(x, grid, 3, None)[1]
        assert_bit_equal(backend.ops.apply_mask(grad, mask).cpu(), torch.tensor(expected))


@pytest.mark.parametrize("ste", [Ste.CLIP, Ste.FULL])
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_autograd_agrees_with_the_reference(backend, ste, axis):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6)
    channels = 1 if axis is None else x.shape[axis]
    grid = torch.stack((-torch.rand(channels), torch.rand(channels) * 0.5 + 0.1, torch.zeros(channels)), 1)
    upstream = torch.randn_like(x)
    results = []
    for run, device in ((reference.differentiable_fake_quantize, "cpu"), (ops.fake_quantize, backend.device)):
        leaves = [t.clone().to(device).requires_grad_() for t in (x, grid)]
        with backend.chosen():
            q = run(*leaves, Kind.UNIFORM, 7, ste, axis)
        results.append((q, *torch.autograd.grad(q, leaves, upstream.to(device))))
    expected, actual = results
    assert_bit_equal(actual[0], expected[0])
    # Autograd multiplies by the step and by its inverse what the kernel passes as it is.
    torch.testing.assert_close(actual[1].cpu(), expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[2].cpu(), expected[2], rtol=1e-5, atol=1e-5)


def test_gradcheck_where_q_is_smooth(backend):
    """Outside the range q is linear in the grid, so its numeric derivative is exact up to rounding."""
    x = torch.tensor([-3.0, -2.0, 4.0, 9.0], device=backend.device)
    grid = torch.tensor([[-1.0, 0.5, 0.0]], device=backend.device, requires_grad=True)

    def ends(g: torch.Tensor) -> torch.Tensor:
        return ops.fake_quantize(x, g, Kind.UNIFORM, 7, Ste.CLIP)

    with backend.chosen(), pytest.warns(UserWarning, match="double precision"):
        torch.autograd.gradcheck(ends, (grid,), eps=2**-4, atol=1e-4)


@pytest.mark.parametrize("kind, levels", [(Kind.UNIFORM, 15), (Kind.BINARY, 1), (Kind.TERNARY, 2)])
def test_identity_ste_passes_the_gradient_and_gives_the_grid_none(backend, kind, levels):
    problem = Problem((5, 9), kind=kind, levels=levels)
    x, grid = problem.x(backend.device).requires_grad_(), problem.grid(backend.device).requires_grad_()
    grad = problem.grad(backend.device)
    with backend.chosen():
        q = ops.fake_quantize(x, grid, kind, levels)
    grad_x, grad_grid = torch.autograd.grad(q, (x, grid), grad, allow_unused=True)
    assert_bit_equal(grad_x, grad)
    assert grad_grid is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, columns, axis", [(4099, 513, None), (66, 1 << 15, 0), (4099, 512, 1), (4111, 511, 1)])
def test_results_past_the_cache_are_those_of_their_parts(dtype, rows, columns, axis):
    """The native kernels of the CPU write results of 8 MiB and more by other instructions."""
    rows = rows * 4 // dtype.itemsize
    problem = Problem((rows, columns), dtype, axis=axis, levels=15, ste=Ste.CLIP)
    kernels, grid, (grad, x) = torch.ops.quantkernels, problem.grid(), (problem.grad(), problem.x())
    grids = grid.chunk(4) if axis == 0 else (grid,) * 4
    assert x.nbytes >= 8 << 20
    q = kernels.fake_quantize(x, grid, *problem.quantizer)
    grad_x = kernels.fake_quantize_backward(grad, x, grid, *problem.quantizer)[0]
    for i, (part, own) in enumerate(zip(x.chunk(4), grids, strict=True)):
        assert_bit_equal(q.chunk(4)[i], kernels.fake_quantize(part, own, *problem.quantizer))
        alone = kernels.fake_quantize_backward(grad.chunk(4)[i], part, own, *problem.quantizer)[0]
        assert_bit_equal(grad_x.chunk(4)[i], alone)
    masked, mask = kernels.fake_quantize_masked(x, grid, problem.levels, axis)
    assert_bit_equal(masked, q)
    assert_bit_equal(kernels.apply_mask(grad, mask), grad_x)


@pytest.mark.parametrize("axis, layout", [(None, "contiguous"), (1, "contiguous"), (1, "channels_last")])
def test_sums_have_the_same_bits_on_every_run(backend, axis, layout):
    shape = (3, 48, 10, 11) if backend.emulated else (4, 48, 80, 81)
    problem = Problem(shape, layout=layout, axis=axis, levels=15, ste=Ste.FULL)
    grad, x, grid = (make(backend.device) for make in (problem.grad, problem.x, problem.grid))
    runs = [backend.ops.fake_quantize_backward(grad, x, grid, *problem.quantizer)[1]]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(backend.ops.fake_quantize_backward(grad, x, grid, *problem.quantizer)[1])
    finally:
        torch.set_num_threads(threads)
    assert_bit_equal(runs[1], runs[0])
    assert_bit_equal(runs[2], runs[0])


@pytest.mark.parametrize("problem", FEW, ids=str)
def test_opcheck(backend, problem):
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    leaves = (x.requires_grad_(), grid.requires_grad_())
    opcheck(backend.ops.fake_quantize.default, (*leaves, *problem.quantizer))
    arguments = (problem.grad(backend.device), x.detach(), grid.detach(), *problem.quantizer)
    opcheck(backend.ops.fake_quantize_backward.default, arguments)
    opcheck(backend.ops.fake_quantize_backward.default, (*arguments, False))
    if problem.kind == Kind.UNIFORM:
        masked = (leaves[0], grid.detach(), problem.levels, problem.axis)
        opcheck(backend.ops.fake_quantize_masked.default, masked)
        q, mask = backend.ops.fake_quantize_masked(*masked)
        opcheck(backend.ops.apply_mask.default, (torch.ones_like(q), mask))


GRID = torch.tensor([[0.0, 1.0, 0.0]])
COMPLAINTS = {
    "x-type": ({"x": torch.zeros(3, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got Long"),
    "grid-type": ({"grid": GRID.double()}, "grid must be Float, got Double"),
    "grid-shape": ({"grid": GRID.repeat(2, 1)}, r"grid must be of shape \[1, 3\], got \[2, 3\]"),
    "grid-dim": ({"grid": GRID[0]}, r"grid must be of shape \[1, 3\], got \[3\]"),
    "kind": ({"kind": 3}, r"kind must be 0 \(uniform\), 1 \(binary\), 2 \(ternary\), got 3"),
    "levels": ({"levels": 4}, r"levels must be 2\^n - 1 with n from 1 to 8 for a uniform quantizer, got 4"),
    "levels-511": ({"levels": 511}, r"levels must be 2\^n - 1 with n from 1 to 8 .*, got 511"),
    "levels-binary": ({"kind": 1, "levels": 3}, "levels must be 1 for a binary quantizer, got 3"),
    "levels-ternary": ({"kind": 2, "levels": 3}, "levels must be 2 for a ternary quantizer, got 3"),
    "ste": ({"ste": 3}, r"ste must be 0 \(identity\), 1 \(clip\) or 2 \(full\), got 3"),
    "ste-binary": (
        {"kind": 1, "levels": 1, "ste": 1},
        r"ste must be 0 \(identity\) for a quantizer that is not uniform, got 1",
    ),
    "axis": ({"axis": 2}, r"axis must be None or in \[-2, 1\] for x of shape \[2, 3\], got 2"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_complaints_name_op_argument_expected_and_got(backend, name):
    changes, message = COMPLAINTS[name]
    arguments = {"x": torch.zeros(2, 3), "grid": GRID, "kind": 0, "levels": 3, "ste": 0, "axis": None} | changes
    arguments = {k: v.to(backend.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"^fake_quantize: {message}"):
        backend.ops.fake_quantize(*arguments.values())


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(2, dtype=torch.int32), r"of shape \[1\], got \[2\]"),
        (torch.zeros(1, dtype=torch.uint8), "Int, got Byte"),
    ],
)
def test_a_mask_of_another_size_or_type_is_refused(backend, mask, message):
    with pytest.raises(RuntimeError, match=f"^apply_mask: mask must be {message}"):
        backend.ops.apply_mask(torch.zeros(5, 6, device=backend.device), mask.to(backend.device))


def test_a_gradient_of_another_shape_or_type_is_refused(backend):
    x, grid = torch.zeros(2, 3, device=backend.device), GRID.to(backend.device)
    backward = backend.ops.fake_quantize_backward
    with pytest.raises(RuntimeError, match=r"grad must be of x's shape \[2, 3\], got \[3, 2\]"):
        backward(x.reshape(3, 2), x, grid, 0, 3, 1, None)
    with pytest.raises(RuntimeError, match="fake_quantize_backward: grad must be Float, got Half"):
        backward(x.half(), x, grid, 0, 3, 1, None)
