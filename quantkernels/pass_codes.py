"""Packed layers that give their codes to the next, so that nothing between them floats."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from .convert import swap
from .nn import PackedConv2d, PackedLayer
from .nn.packed import ReluOfValues
from .ops import Kind
from .tracing import Part, only_input, traced_parts

CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
RELUS = (nn.ReLU, ReluOfValues, torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_")
# What makes the codes of its output of the codes of its input.
SHAPING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, torch.flatten, "flatten", "contiguous")


class Clamp(NamedTuple):
    """To [lower, upper], by `modules` that nothing else uses."""

    lower: float
    upper: float
    modules: tuple[nn.Module, ...] = ()

    def then(self, module: nn.Module) -> Clamp:
        """And by that one after them."""
        low, high = bounds_of(module)
        lower, upper = min(max(self.lower, low), high), min(max(self.upper, low), high)
        return Clamp(lower, upper, (*self.modules, module))


class Path(NamedTuple):
    """From a packed layer on.

    first: what clamps its output before anything else happens to it. taker: the packed layer that alone reads it in the
    end, None where anything else does; clamp: by all modules on the way there; relu: whether ReLUs are on the way that
    cannot be taken away; relus: those that are modules.
    """

    first: Clamp
    taker: PackedLayer | None
    clamp: Clamp
    relu: bool
    relus: list[nn.Module]


def pass_codes(model: nn.Module) -> nn.Module:
    """Let packed layers give uint8 codes to the packed layers that follow them, in place; returns the model.

    A layer does so where its output goes to one packed layer alone, with nothing but ReLU, ReLU6, Hardtanh, flattening
    and dropout between them. Activations that are modules of their own become part of the layer, also where it goes on
    giving values; a ReLU that is a function or called several times stays, and the levels of the next layer must begin
    at 0 or above. In float32
    the logits stay the same to the bit, fewer bytes move, and nothing is encoded twice; in half types, which are
    rounded between layers, values are passed as before.

    What follows what is read from a torch.fx trace, as `convert` does; batch-norms must be folded. Hooks, and calls
    of a layer of the network alone, then meet codes; layers that have hooks already stay as they are, and so do inputs
    that are padded by other modes than zeros. `print(model)` tells which layers give codes. Files hold nothing of it:
    call it after `load`, too.

    Raises ValueError where the model has no packed layers.
    """
    if not any(isinstance(m, PackedLayer) for m in model.modules()):
        raise ValueError(f"pass_codes: {type(model).__name__} has no packed layers; call convert() first")
    swaps: dict[int, nn.Module] = {}
    for part in traced_parts(model, PackedLayer):
        for node in part.graph.nodes:
            giver = part.called_once(node)
            if not isinstance(giver, PackedLayer):
                continue
            path = path_from(part, node, giver)
            if path is None:
                continue
            taker, clamp = (path.taker, path.clamp) if takes_codes(path) else (None, path.first)
            giver.give_codes(taker, clamp.lower, clamp.upper)
            swaps |= {id(module): nn.Identity() for module in clamp.modules}
            if taker is not None:
                swaps |= {id(relu): ReluOfValues() for relu in path.relus}
    return swap(model, swaps)


def path_from(part: Part, node: fx.Node, giver: PackedLayer) -> Path | None:
    """The way of a layer's output; None where its input floats, as it has no epilogue then."""
    if giver.activation is None:
        return None
    first = clamp = Clamp(giver.clamp.lower, giver.clamp.upper)
    directly, relu = True, False
    relus: list[nn.Module] = []
    while len(node.users) == 1:
        (node,) = node.users
        module = part.called(node)
        what = type(module) if node.op == "call_module" else node.target
        if isinstance(module, PackedLayer):
            alone = part.called_once(node) is module and only_input(node) is not None
            return Path(first, module if alone else None, clamp, relu, relus)
        if module is not None and what in CLAMPS and part.called_once(node):
            clamp = clamp.then(module)
            first = clamp if directly else first
            continue
        directly = directly and what is nn.Identity
        relu = relu or what in RELUS
        relus += [module] if type(module) is nn.ReLU else []
        if what not in (*RELUS, *SHAPING):
            break
    return Path(first, None, clamp, relu, relus)


def bounds_of(module: nn.Module) -> tuple[float, float]:
    """Between what a ReLU, ReLU6 or Hardtanh clamps."""
    return (module.min_val, module.max_val) if isinstance(module, nn.Hardtanh) else (0.0, math.inf)


def takes_codes(path: Path) -> bool:
    """Whether the layer at its end can have codes for its input, those of values behind a ReLU that stays as if it were
    not there."""
    layer = path.taker
    grid = None if layer is None else layer.activation_grid
    if layer is None or grid is None or (isinstance(layer, PackedConv2d) and layer.geometry.padding_mode != "zeros"):
        return False
    return not path.relu or (layer.activation_kind == Kind.UNIFORM and bool((grid[..., 0] >= 0).all()))
