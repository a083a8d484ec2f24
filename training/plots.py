"""Figures of the papers and learning curves. Every function returns a `matplotlib.figure.Figure`.

No function touches pyplot's global state, so they may be called from threads and from tests, with no display.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import quantkernels as qk

# Okabe and Ito's palette: distinguishable with every common colour-vision deficiency.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
# Li et al. move along directions of weight tensors only; biases and batch-norm (at most 1-D) stay.
SMALLEST_WEIGHT_RANK = 2
FLOAT_BITS = 32
TICKS = (-1, -0.5, 0, 0.5, 1)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _tidy(axes, x_label: str, y_label: str, title: str | None = None) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(axes, columns: int) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend(frameon=False, fontsize="small", ncols=columns, **place)


# Figure 2: quantization error against temperature


def mixture_error(mixture: qk.Attention, logits: Sequence[float], temperatures: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of `mixture` on x at each temperature, for fixed `logits` (DQA eq. 2 to 4).

    x: float32, any shape. temperatures: float32 [P]. Returns float32 [P].
    """
    errors = []
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor(logits, dtype=torch.float32))
        for temperature in temperatures:
            mixture.temperature.fill_(float(temperature))
            errors.append((mixture(x) - x).abs().mean())
    return torch.stack(errors)


def figure_quantization_error(x: Tensor | None = None, points: int = 80) -> Figure:
    """Figure 2 of the DQA paper: error of Binary-Relax (2 bits and float32) and of DQA (2, 4 and 8 bits).

    The soft attention is the one of the paper's text, [3/4, 1/4] and [4/7, 2/4, 1/7]; x defaults to
    100,000 values of a standard normal distribution, so errors are in standard deviations of the weights.
    """
    if x is None:
        x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    temperatures = torch.logspace(2, -2.3, points)
    relax = qk.Attention([qk.MinMax(2), qk.Identity()])
    dqa = qk.Attention([qk.MinMax(2), qk.MinMax(4), qk.MinMax(8)])
    curves = {
        "Binary-Relax: 2 bits and float32": (relax, [3 / 4, 1 / 4]),
        "DQA: 2, 4 and 8 bits": (dqa, [4 / 7, 2 / 4, 1 / 7]),
    }
    low_bit_error = float((qk.MinMax(2)(x) - x).abs().mean())
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    axes.axhline(low_bit_error, color="0.5", linestyle=":", label="2-bit min-max alone")
    for color, (name, (mixture, logits)) in zip(COLORS, curves.items(), strict=False):
        axes.plot(temperatures, mixture_error(mixture, logits, temperatures, x), color=color, label=name)
    axes.set_xscale("log")
    axes.invert_xaxis()  # training goes from hot to cold
    axes.set_ylim(bottom=0)
    _tidy(axes, "temperature T (cooling to the right)", "mean $|q - w|$ (standard deviations of w)")
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


# Figure 3: attention and the quantization function over training


def figure_attention(
    epochs: Sequence[float],
    attention: Sequence[Sequence[float]],
    names: Sequence[str],
    quantizers: Sequence[nn.Module] | None = None,
    layer: str = "",
) -> Figure:
    """Figure 3 of the DQA paper: attention of one layer over training, and the function that it makes.

    epochs: [E]. attention: [E, K], one row an epoch. names: [K], how the quantizers are called in the legend.
    quantizers: the K quantizers; without them the second panel is left out.
    """
    values = np.asarray(attention, dtype=np.float64)
    if values.ndim != 2 or values.shape != (len(epochs), len(names)):
        expected = f"[{len(epochs)}, {len(names)}] (epochs, quantizers)"
        raise ValueError(f"attention must be {expected}, got {list(values.shape)}")
    figure = _figure(9.6 if quantizers else 5.6, 4.0)
    left, *rest = figure.subplots(1, 2 if quantizers else 1, squeeze=False)[0]
    for k, name in enumerate(names):
        left.plot(epochs, values[:, k], color=COLORS[k % len(COLORS)], label=name, marker="o", markersize=2.5)
    left.set_ylim(-0.03, 1.03)
    _tidy(left, "epoch", "attention $a_k$", f"attention, layer {layer}" if layer else "attention")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(left, min(4, len(names)))
    if quantizers and len(epochs):
        _draw_quantization_functions(rest[0], epochs, values, quantizers)
    return figure


def _draw_quantization_functions(axes, epochs, values: np.ndarray, quantizers: Sequence[nn.Module]) -> None:
    """The mixture q(w) at up to five moments of the training, bright to dark."""
    x = torch.linspace(-1, 1, 2001)
    with torch.no_grad():
        outputs = torch.stack([quantizer(x) for quantizer in quantizers])
    moments = np.unique(np.linspace(0, len(epochs) - 1, min(5, len(epochs))).round().astype(int))
    shades = colormaps["viridis_r"]
    axes.plot(x, x, color="0.6", linestyle=":", label="float")
    for i, moment in enumerate(moments):
        mixed = torch.tensor(values[moment], dtype=torch.float32) @ outputs
        color = shades((i + 0.5) / len(moments))
        axes.plot(x, mixed, color=color, label=f"epoch {epochs[moment]:g}", linewidth=1.4)
    axes.set_xticks(TICKS)
    axes.set_yticks(TICKS)
    _tidy(axes, "weight w", "q(w)", "quantization function on $[-1, 1]$")
    _legend_below(axes, 3)


# Figure 4: loss surface along two random directions


def filter_normalised_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A random direction in the weights, each filter scaled to the norm of the one it moves (Li et al. 2017).

    Returns {parameter name: tensor of the parameter's shape} for the parameters of two dimensions and more;
    the others (biases, batch-norm, quantizer parameters) stay fixed and are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < SMALLEST_WEIGHT_RANK:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        weight = parameter.detach().cpu().float().flatten(1)
        scale = weight.norm(dim=1) / noise.flatten(1).norm(dim=1).clamp_min(1e-12)
        direction[name] = noise * scale.view(-1, *[1] * (parameter.dim() - 1))
    return direction


def loss_surface(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> np.ndarray:
    """Loss on one batch at `points` x `points` places around the weights, float64 [points, points].

    Quantized layers quantize the moved weights. Batch-norm uses the statistics of the batch, as in training:
    the running ones of an untrained network mean nothing. Works on a copy; `model` is not changed.
    """
    model = copy.deepcopy(model).train()
    parameters = dict(model.named_parameters())
    first, second = (filter_normalised_direction(model, 2 * seed + i) for i in range(2))
    start = {name: parameters[name].detach().clone() for name in first}
    steps = np.linspace(-span, span, points)
    surface = np.empty((points, points))
    with torch.no_grad():
        for i, along_first in enumerate(steps):
            for j, along_second in enumerate(steps):
                for name, origin in start.items():
                    step = along_first * first[name] + along_second * second[name]
                    parameters[name].copy_(origin + step.to(origin))
                surface[i, j] = float(loss(model(inputs), targets))
    return surface


def roughness(surface: np.ndarray) -> float:
    """How far a surface is from smooth: RMS of its second differences over its standard deviation.

    Without a unit; 0 for a plane. Puts a number beside figure 4, where the paper has only the picture.
    """
    second = [np.diff(surface, n=2, axis=axis) for axis in (0, 1)]
    curvature = np.sqrt(np.mean(np.concatenate([part.ravel() for part in second]) ** 2))
    spread = surface.std()
    return float(curvature / spread) if spread > 0 else 0.0


def figure_loss_surface(surfaces: Mapping[str, np.ndarray], span: float = 1.0) -> Figure:
    """Figure 4 of the DQA paper: one panel a network, name -> loss [points, points], all on one loss axis."""
    if not surfaces:
        raise ValueError("surfaces must hold at least one network, got none")
    figure = _figure(4.2 * len(surfaces), 4.0)
    finite = np.concatenate([surface[np.isfinite(surface)] for surface in surfaces.values()])
    low, high = float(finite.min()), float(finite.max())
    for i, (name, surface) in enumerate(surfaces.items()):
        axes = figure.add_subplot(1, len(surfaces), i + 1, projection="3d")
        steps = np.linspace(-span, span, len(surface))
        grid = np.meshgrid(steps, steps, indexing="ij")
        drawn = {"rcount": len(surface), "ccount": len(surface), "vmin": low, "vmax": high}
        axes.plot_surface(*grid, surface, cmap="viridis", **drawn)
        axes.set_zlim(low, high)
        axes.set_xlabel("direction 1")
        axes.set_ylabel("direction 2")
        axes.set_zlabel("cross-entropy")
        axes.set_xticks(np.linspace(-span, span, 5))
        axes.set_yticks(np.linspace(-span, span, 5))
        axes.tick_params(labelsize="x-small")
        axes.set_box_aspect(None, zoom=0.85)
        axes.set_title(f"{name}\nroughness {roughness(surface):.2f}", fontsize="medium")
    return figure


# Bits of every layer


def figure_bits(bits: Mapping[str, tuple[float, float]]) -> Figure:
    """Figure 1 of the LIMPQ supplement: the bits of every layer's weight and activation, in the network's order.

    bits: layer -> (weight bits, activation bits); 32 stands for float and is left out.
    """
    figure = _figure(max(5.6, 0.26 * len(bits) + 1.6), 4.2)
    axes = figure.add_subplot()
    places = np.arange(len(bits))
    for k, (name, shift) in enumerate((("weights", -0.2), ("activations", 0.2))):
        values = [pair[k] if pair[k] < FLOAT_BITS else np.nan for pair in bits.values()]
        axes.bar(places + shift, values, 0.4, color=COLORS[k], label=name)
    _tidy(axes, "", "bits")
    axes.set_xticks(places, list(bits), rotation=90, fontsize="x-small")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


# Figure I of LQ-Nets: values and levels


def figure_levels(layers: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """Figure I of the LQ-Nets paper: a row a tensor, left its values, right how they are spread over the levels.

    layers: layer -> {"weight": h, "activation": h} as `training.algorithms.lqnets.histograms` makes them. The levels
    are marked by diamonds on the left.
    """
    tensors = [(f"{layer}, {role}", h) for layer, roles in layers.items() for role, h in roles.items()]
    if not tensors:
        raise ValueError("layers must hold at least one histogram, got none")
    figure = _figure(8.4, 2.3 * len(tensors))
    panels = figure.subplots(len(tensors), 2, squeeze=False)
    for (before, after), (name, h) in zip(panels, tensors, strict=True):
        edges = np.linspace(h["low"], h["high"], len(h["counts"]) + 1)
        shares = np.asarray(h["counts"]) / max(sum(h["counts"]), 1)
        before.stairs(shares, edges, fill=True, color=COLORS[0], alpha=0.6)
        before.plot(h["levels"], np.zeros(len(h["levels"])), "D", color=COLORS[4], clip_on=False, markersize=5)
        _tidy(before, "value", "share", f"{name}: before")
        gaps = np.diff(h["levels"])
        width = 0.6 * float(gaps.min()) if len(gaps) else 1.0
        after.bar(h["levels"], h["shares"], width=width, color=COLORS[0], alpha=0.6)
        after.plot(h["levels"], np.zeros(len(h["levels"])), "D", color=COLORS[4], clip_on=False, markersize=5)
        _tidy(after, "level", "share", "quantized")
    return figure


# Learning curves


def figure_learning_curves(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    y_label: str,
    percent: bool = False,
) -> Figure:
    """One line a method: the mean over its runs (seeds), with a band from the lowest to the highest.

    curves: name -> runs, each (epochs [E], values [E]). Runs of different length count where they are.
    """
    figure = _figure(6.4, 4.2 + 0.16 * max(0, len(curves) - 4))
    axes = figure.add_subplot()
    for i, (name, runs) in enumerate(curves.items()):
        color, style = COLORS[i % len(COLORS)], "-" if i < len(COLORS) else "--"
        by_epoch: dict[float, list[float]] = {}
        for epochs, values in runs:
            for epoch, value in zip(epochs, values, strict=True):
                by_epoch.setdefault(epoch, []).append(100 * value if percent else value)
        x = sorted(by_epoch)
        mean = [float(np.mean(by_epoch[epoch])) for epoch in x]
        label = f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name
        axes.plot(x, mean, style, color=color, label=label, marker="o" if len(x) == 1 else None)
        if len(runs) > 1:
            low, high = ([pick(by_epoch[epoch]) for epoch in x] for pick in (min, max))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    _tidy(axes, "epoch", y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves:
        _legend_below(axes, 2)
    return figure
