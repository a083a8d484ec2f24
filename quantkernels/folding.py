"""Which batch-norm directly follows which quantized convolution, and what it amounts to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .nn import QConv2d, SwitchableBatchNorm2d
from .tracing import only_input, traced_parts

FoldPlan = dict[str, str]
"""Name of a convolution -> name of the batch-norm to fold into it."""

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def plan_folds(model: nn.Module) -> FoldPlan:
    """All batch-norms of a model in eval that can be folded."""
    plan: FoldPlan = {}
    for part in traced_parts(model, BATCH_NORMS):
        for node in part.graph.nodes:
            source, norm = only_input(node), part.called_once(node)
            conv = None if source is None or len(source.users) != 1 else part.called_once(source)
            if source is not None and conv is not None and norm is not None and foldable(conv, norm):
                plan[f"{part.prefix}{source.target}"] = f"{part.prefix}{node.target}"
    return plan


def foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the second module is a plain or switchable batch-norm of the first one's channels, with statistics."""
    return (
        isinstance(conv, QConv2d)
        and conv.weight_quantizer is not None
        and all(type(plain) in BATCH_NORMS and plain.running_mean is not None for plain in plain_norms(norm))
        and bool(norm.num_features == conv.out_channels)
    )


def plain_norms(norm: nn.Module) -> list[Any]:
    """The batch-norms that a switchable one consists of, highest bits first; of another module itself."""
    return list(norm.norms.values()) if isinstance(norm, SwitchableBatchNorm2d) else [norm]


def batch_norm_scale_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """float32 [C] scale = gamma/sqrt(var + eps) and shift = beta - mean*scale; of a switchable one [bit-widths, C].

    Both are rounded where torch's own batch-norm on the CPU rounds them (shift by a fused multiply-add, for which
    float64 stands in), so that there the folded layer gives the same bits.
    """
    if isinstance(norm, SwitchableBatchNorm2d):
        scales, shifts = zip(*map(batch_norm_scale_shift, plain_norms(norm)), strict=True)
        return torch.stack(scales), torch.stack(shifts)
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.float() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.float()
        shift = -norm.running_mean.double() * scale.double()
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        return scale, shift.float()
