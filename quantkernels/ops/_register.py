"""One registration of fake kernels and gradients for every namespace that has the op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


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
