"""Which batch-norm directly follows which quantized convolution, and what it amounts to."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor, fx, nn

from .nn import PackedLayer, QConv2d, QuantizedLayer, SwitchableBatchNorm2d
from .quantizers import Quantizer

FoldPlan = dict[str, str]
"""Name of a convolution -> name of the batch-norm to fold into it."""

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class LayerTracer(fx.Tracer):
    """Traces a model down to its layers; quantized layers are not looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether m is one node of the graph."""
        opaque = (QuantizedLayer, PackedLayer, Quantizer, SwitchableBatchNorm2d)
        return isinstance(m, opaque) or super().is_leaf_module(m, module_qualified_name)


def plan_folds(model: nn.Module) -> FoldPlan:
    """All batch-norms of a model in eval that can be folded.

    Where the whole model cannot be traced (control flow that depends on data, say) its children are, each on its own,
    on the assumption that they are called as modules and not taken apart by their parent.
    """
    uses = collections.Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    plan: FoldPlan = {}
    _plan(model, "", uses, plan)
    return plan


def _plan(module: nn.Module, prefix: str, uses: collections.Counter[int], plan: FoldPlan) -> None:
    if not any(isinstance(m, BATCH_NORMS) for m in module.modules()):
        return
    try:
        graph = LayerTracer().trace(module)
    except Exception:  # whatever a forward does when it meets a proxy
        for name, child in module.named_children():
            _plan(child, f"{prefix}{name}.", uses, plan)
        return
    for conv, norm in _pairs(module, graph):
        if uses[id(module.get_submodule(conv))] == 1 and uses[id(module.get_submodule(norm))] == 1:
            plan[prefix + conv] = prefix + norm


def _pairs(module: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    calls = collections.Counter(node.target for node in graph.nodes if node.op == "call_module")
    touched = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = []
    for node in graph.nodes:
        source = _only_input(node)
        if node.op != "call_module" or source is None or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = str(source.target), str(node.target)
        once = calls[conv] == 1 and calls[norm] == 1 and not touched & {conv, norm}
        if once and foldable(module.get_submodule(conv), module.get_submodule(norm)):
            pairs.append((conv, norm))
    return pairs


def _only_input(node: fx.Node) -> fx.Node | None:
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the second module is a plain or switchable batch-norm of the first one's channels, with statistics, and
    neither has hooks."""
    return (
        isinstance(conv, QConv2d)
        and conv.weight_quantizer is not None
        and all(type(plain) in BATCH_NORMS and plain.running_mean is not None for plain in plain_norms(norm))
        and bool(norm.num_features == conv.out_channels)
        and not _hooked(conv)
        and not _hooked(norm)
    )


def plain_norms(norm: nn.Module) -> list[Any]:
    """The batch-norms that a switchable one consists of, highest bits first; of another module itself."""
    return list(norm.norms.values()) if isinstance(norm, SwitchableBatchNorm2d) else [norm]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
