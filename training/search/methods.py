"""What each method says of a layer at given bits: learned importance (LIMPQ), curvature (HAWQ)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

import quantkernels as qk


def without_outliers(steps: Mapping[int, float]) -> dict[int, float]:
    """Indicators by bits; infinite at b - 1 bits where s[b-1] < s[b]: fewer bits cannot matter less (LIMPQ's code)."""
    bits = sorted(steps)
    clean = dict(steps)
    for fewer, more in itertools.pairwise(bits):
        if steps[fewer] < steps[more]:
            clean[fewer] = float("inf")
    return clean


def limpq_costs(
    weight: Mapping[str, Mapping[int, float]],
    activation: Mapping[str, Mapping[int, float]] | None,
    pairs: np.ndarray,
    alpha: float,
) -> dict[str, np.ndarray]:
    """s_a + alpha * s_w of every option (LIMPQ, eq. 4). weight, activation: layer -> bits -> step.

    activation None: weights only.
    """
    costs = {}
    for name, steps in weight.items():
        s_w = without_outliers(steps)
        s_a = dict.fromkeys(pairs[:, 1].tolist(), 0.0) if activation is None else without_outliers(activation[name])
        costs[name] = np.array([s_a[int(a)] + alpha * s_w[int(w)] for w, a in pairs])
    return costs


def hutchinson_traces(
    model: nn.Module, loss: torch.Tensor, names: Sequence[str], probes: int, generator: torch.Generator
) -> dict[str, float]:
    """Trace of the Hessian of `loss` by each layer's weight: mean of v^T H v over random signs v.

    loss: a scalar with its graph. The probes of all layers are drawn together: the blocks between two layers
    have mean 0. One backward a probe.
    """
    weights = [model.get_submodule(name).weight for name in names]
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    sums = torch.zeros(len(names), dtype=torch.float64)
    for _ in range(probes):
        signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
        products = torch.autograd.grad(gradients, weights, signs, retain_graph=True)
        sums += torch.stack([(v * p).sum().double().cpu() for v, p in zip(signs, products, strict=True)])
    return dict(zip(names, (sums / probes).tolist(), strict=True))


@torch.no_grad()
def hawq_costs(model: nn.Module, traces: Mapping[str, float], pairs: np.ndarray) -> dict[str, np.ndarray]:
    """trace / numel * ||Q_w(W) - W||^2 of every option, Q min-max (HAWQ-V2, Dong et al. 2020).

    A trace below 0, which an estimate at a point that is not a minimum can be, counts as 0.
    """
    costs = {}
    for name, trace in traces.items():
        weight = model.get_submodule(name).weight
        errors = {b: float((qk.MinMax(b)(weight) - weight).square().sum()) for b in set(pairs[:, 0].tolist())}
        costs[name] = np.array([max(trace, 0.0) / weight.numel() * errors[int(w)] for w, _ in pairs])
    return costs
