"""Which layer follows which: a model as torch.fx traces it down to its layers."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from torch import fx, nn

from .nn import PackedLayer, QuantizedLayer, SwitchableBatchNorm2d
from .nn.packed import ReluOfValues
from .quantizers import Quantizer

Places = collections.Counter[int]
"""id of a module -> how often the whole model has it."""


class LayerTracer(fx.Tracer):
    """Traces a model down to its layers; quantized layers are not looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether m is one node of the graph."""
        opaque = (QuantizedLayer, PackedLayer, Quantizer, SwitchableBatchNorm2d, ReluOfValues)
        return isinstance(m, opaque) or super().is_leaf_module(m, module_qualified_name)


class Part:
    """A model that could be traced, or a child of one that could not.

    module, graph: it and its trace. prefix: what precedes the names of its modules in the whole model.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, prefix: str, places: Places) -> None:
        self.module, self.graph, self.prefix = module, graph, prefix
        self._places = places
        self._calls = collections.Counter(node.target for node in graph.nodes if node.op == "call_module")
        self._touched = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it has no hooks; else None."""
        if node.op != "call_module":
            return None
        module = self.module.get_submodule(str(node.target))
        return None if module._forward_hooks or module._forward_pre_hooks else module

    def called_once(self, node: fx.Node) -> nn.Module | None:
        """The same, if nothing else in the model calls that module or looks into it."""
        module, name = self.called(node), str(node.target)
        alone = self._calls[name] == 1 and self._places[id(module)] == 1 and name not in self._touched
        return module if alone else None


def only_input(node: fx.Node) -> fx.Node | None:
    """The argument of a node that has no other."""
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def traced_parts(model: nn.Module, wanted: type | tuple[type, ...]) -> Iterator[Part]:
    """The model as one part; where it cannot be traced (control flow that depends on data, say) its children, each on
    its own, on the assumption that they are called as modules and not taken apart by their parent.

    What has no module of the wanted types is left out.
    """
    places = collections.Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return _parts(model, wanted, "", places)


def _parts(module: nn.Module, wanted: type | tuple[type, ...], prefix: str, places: Places) -> Iterator[Part]:
    if not any(isinstance(m, wanted) for m in module.modules()):
        return
    try:
        graph = LayerTracer().trace(module)
    except Exception:  # whatever a forward does when it meets a proxy
        for name, child in module.named_children():
            yield from _parts(child, wanted, f"{prefix}{name}.", places)
        return
    yield Part(module, graph, prefix, places)
