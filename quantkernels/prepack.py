"""Packed networks whose weights are arranged for the kernels once, before the first call."""

from __future__ import annotations

from torch import nn

from .nn import PackedLayer


def prepack(model: nn.Module) -> nn.Module:
    """Keep every packed weight a second time, as the kernels of its device read it, in place; returns the model.

    Without it, a call on a CPU begins with putting the weight's codes together from their planes, which takes a good
    part of its time where there are few rows or small images. With it, weights take about twice the memory. Results are
    the same to the bit. `set_bits` and `load_state_dict` arrange anew; whoever writes to `planes` by hand calls this
    again. Files hold nothing of it: call it after `load`, too. Where a device has no use for it (GPUs, processors
    without AVX-512, learned bases, depthwise convolutions) nothing is kept.

    Raises ValueError where the model has no packed layers.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLayer)]
    if not layers:
        raise ValueError(f"prepack: {type(model).__name__} has no packed layers; call convert() first")
    for layer in layers:
        layer.prepack()
    return model
