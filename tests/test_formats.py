"""The worked example of docs/formats.md."""

from __future__ import annotations

import torch

import quantkernels as qk


def test_worked_example():
    planes = qk.MinMax(2).encode(torch.tensor([[0.9, -1.0, 0.1, 0.3]]))
    assert planes.codes().tolist() == [[3, 0, 2, 2]]
    assert planes.planes.tolist() == [[[13]], [[1]]]
    torch.testing.assert_close(planes.decode(), torch.tensor([[0.9, -1.0, 0.26667, 0.26667]]), rtol=1e-4, atol=1e-5)


def test_three_sigma_of_the_guide():
    from quantkernels.ops import Kind, Ste
    from quantkernels.quantizers.base import Quantizer, channel_size, uniform_levels

    class ThreeSigma(Quantizer):
        needs_statistics = True

        def __init__(self, bits, axis=None):
            super().__init__(bits, Kind.UNIFORM, uniform_levels("ThreeSigma", bits), Ste.IDENTITY, axis)

        def batch_grid(self, x, stats):
            a = 3 * (stats[:, 3] / channel_size(x, self.axis)).sqrt()
            return torch.stack((-a, 2 * a / self.levels, torch.zeros_like(a)), 1)

    x = torch.randn(4, 50)
    quantizer = ThreeSigma(3, axis=0)
    assert torch.equal(quantizer.encode(x).decode(), quantizer(x))
    mixture = qk.Attention([ThreeSigma(2, axis=0), ThreeSigma(4, axis=0)])
    assert mixture(x).shape == x.shape
