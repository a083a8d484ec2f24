"""What a layer keeps for its backward: its input, and not its quantized input beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def requantized(x: Tensor, q: Tensor, again: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    """Within it, autograd keeps x where it would keep q, and computes q = again(x) when the backward asks for it.

    x is mostly kept already, by the ReLU whose result it is, or by the quantizer's own backward. So a network with
    quantized activations takes the memory of the float one, for one more pass over x a layer. Other hooks for saved
    tensors, such as those of gradient checkpointing, get x in place of q.

    Under torch.compile, whose partitioner decides what is kept, and for inference tensors nothing changes.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_inference():
        return nullcontext()
    outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_hold, _held)
    alias = x.detach()  # with the graph of x there would be more alive than x

    def pack(tensor: Tensor) -> Any:
        # A linear layer flattens all dimensions but the last.
        flattened = tensor._base is q and tensor.is_contiguous() and q.is_contiguous()
        if tensor is q or flattened:
            return tensor.size(), outer_pack(alias)
        return None, outer_pack(tensor)

    def unpack(packed: Any) -> Tensor:
        size, held = packed
        tensor = outer_unpack(held)
        return tensor if size is None else again(tensor).reshape(size)

    return saved_tensors_hooks(pack, unpack)


def _hold(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _held(packed: tuple[Tensor, int]) -> Tensor:
    """The tensor, checked as autograd checks what it keeps without hooks. Raises RuntimeError."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "the input or the weight of a quantized layer was changed in place between its forward and its backward: "
            "change a copy of it"
        )
    return tensor
