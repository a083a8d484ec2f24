"""One registration of fake kernels and gradients for every namespace that has the op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpRules:
    """What torch must know of an op beside its kernels.

    ``backward(ops, ctx, *grads)`` is given the namespace that the forward ran in: a backend chosen later does not
    split a forward pass from its backward pass.
    """

    fake: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None


RULES: dict[str, OpRules] = {}

_EAGER: dict[tuple[str, str], Callable[..., Any]] = {}
_KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context without gradients and without looking for them, for :func:`kernel`."""


def rules(op: str, rule: OpRules) -> None:
    """Record an op's rules and register them for the native namespace."""
    RULES[op] = rule
    register(op, "quantkernels")


def register(op: str, namespace: str) -> None:
    """Register the fake kernel and the gradient of ``op`` under ``namespace``."""
    rule = RULES[op]
    torch.library.register_fake(f"{namespace}::{op}", rule.fake)
    if rule.backward is not None:
        backward = partial(rule.backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=rule.setup_context)


def eager(op: str, namespace: str) -> Callable[..., Any]:
    """``op`` of ``namespace`` for eager mode, with the same gradient as the registered one at half its fixed cost.

    torch.library's autograd enters Python through the dispatcher twice a call; an ``autograd.Function`` around the
    kernel enters it once. A layer's weight is quantized in a few hundred microseconds, so this shows.
    Raises NotImplementedError where the namespace has no such op.
    """
    key = (op, namespace)
    if key not in _EAGER:
        _EAGER[key] = _make_eager(op, namespace)
    return _EAGER[key]


def kernel(op: str, namespace: str) -> Callable[..., Any]:
    """``op`` of ``namespace`` for use :data:`below_autograd`, as in the forward pass of an ``autograd.Function``.

    Raises NotImplementedError where the namespace has no such op.
    """
    key = (op, namespace)
    if key not in _KERNELS:
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is None:
            raise NotImplementedError(f"{namespace}::{op}")
        _KERNELS[key] = packet.default._op  # what calling the overload calls
    return _KERNELS[key]


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its look for functorch's transforms: its caller has looked (:func:`traced`)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _make_eager(op: str, namespace: str) -> Callable[..., Any]:
    rule, run_kernel = RULES[op], kernel(op, namespace)

    def without_gradient(*args: Any) -> Any:
        with below_autograd():
            return run_kernel(*args)

    if rule.backward is None or rule.setup_context is None:
        return without_gradient
    setup_context, gradient = rule.setup_context, partial(rule.backward, getattr(torch.ops, namespace))

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = without_gradient(*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(gradient)

    apply = apply_of(Op)

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return apply(*args)
        return without_gradient(*args)

    return run
