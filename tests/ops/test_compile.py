"""torch.compile(fullgraph=True) through the public functions, on every backend; one case by inductor, which is slow."""

from __future__ import annotations

import pytest
import torch

from quantkernels import ops
from quantkernels.ops import Kind, Ste
from quantkernels.testing import assert_bit_equal

pytestmark = pytest.mark.ops("fake_quantize", "attention_quantize", "channel_stats", "learned_basis_quantize")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def minmax(x: torch.Tensor) -> torch.Tensor:
    """Statistics, grid and quantizer, as a layer does them."""
    low, high, _, _ = ops.channel_stats(x, 0).unbind(1)
    grid = torch.stack((low, (high - low) / 7, torch.zeros_like(low)), 1)
    return ops.fake_quantize(x, grid, Kind.UNIFORM, 7, axis=0) * 2


def learned(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return ops.fake_quantize(x, grid, Kind.UNIFORM, 15, Ste.FULL).square()


def clipped(x: torch.Tensor) -> torch.Tensor:
    grid = torch.tensor([[-1.0, 0.2, 0.0]], device=x.device)
    return ops.fake_quantize(x, grid, Kind.UNIFORM, 7, Ste.CLIP).square()


def mixture(x: torch.Tensor, logits: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    kinds, levels, stes = [Kind.UNIFORM, Kind.BINARY], [3, 1], [Ste.CLIP, Ste.IDENTITY]
    return ops.attention_quantize(x, logits.softmax(0), grids, kinds, levels, stes, None).sin()


def learned_basis(x: torch.Tensor) -> torch.Tensor:
    basis = torch.tensor([[0.3, 0.7]], device=x.device)
    q, gram, product = ops.learned_basis_quantize(x, basis, 1, Ste.CLIP)
    return q * gram.sum() / product.sum()


def inputs_of(function, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    one = torch.tensor([[-1.0, 0.2, 0.0]])
    inputs = {
        minmax: [torch.randn(6, 20)],
        learned: [torch.randn(5, 9), one],
        learned_basis: [torch.randn(5, 9)],
        clipped: [torch.randn(3, 50)],
        mixture: [torch.randn(4, 7), torch.tensor([0.3, -0.2]), torch.stack((one, 2 * one))],
    }[function]
    return [t.to(device).requires_grad_() for t in inputs]


def check(function, device: str, **options) -> None:
    inputs = inputs_of(function, device)
    compiled = torch.compile(function, fullgraph=True, **options)
    expected, actual = function(*inputs), compiled(*inputs)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected)
    for got, want in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("function", [minmax, learned, learned_basis, clipped, mixture])
def test_whole_graph(backend, function):
    with backend.chosen():
        check(function, backend.device, backend="aot_eager")


def test_inductor(backend):
    if backend.emulated:
        pytest.skip("inductor is run on the native kernels; the graph is the same")
    check(mixture, backend.device)


def test_shapes_may_be_dynamic(backend):
    with backend.chosen():
        compiled = torch.compile(minmax, fullgraph=True, dynamic=True, backend="aot_eager")
        for shape in ((3, 5), (7, 11), (2, 40)):
            x = torch.randn(shape, device=backend.device)
            assert_bit_equal(compiled(x), minmax(x))


def test_changing_the_backend_compiles_anew(backend):
    x, grid = inputs_of(learned, backend.device)
    compiled = torch.compile(learned, fullgraph=True, backend="aot_eager")
    before = compiled(x, grid)
    with backend.chosen():
        after = compiled(x, grid)
    assert_bit_equal(after, before)
