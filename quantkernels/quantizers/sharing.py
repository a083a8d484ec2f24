"""Statistics of weights, computed once for all the forwards of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# (id and version of a tensor, what is computed of it) -> (the tensor, so that its id stays its own; the result)
_results: ContextVar[dict[Hashable, tuple[Tensor, Any]] | None] = ContextVar("results", default=None)


@contextmanager
def shared_statistics() -> Iterator[None]:
    """Within it quantizers keep what they compute of a weight, for as long as the weight does not change.

    For steps with several forwards, one for each bit-width: statistics that do not depend on the bit-width (tanh,
    the largest magnitude, minimum and maximum) are then computed once. Results and gradients are the same with and
    without it. A change is noticed by the tensor's version, which every in-place operation raises but those on
    `.data`: make none of those inside. Everything kept is let go at the end.
    """
    if _results.get() is not None:
        yield
        return
    token = _results.set({})
    try:
        yield
    finally:
        _results.reset(token)


def sharing() -> bool:
    """Whether this runs inside `shared_statistics`."""
    return not torch.compiler.is_compiling() and _results.get() is not None


def once(x: Tensor, name: Hashable, compute: Callable[[], Any]) -> Any:
    """compute(), or inside `shared_statistics` what it gave before for the same unchanged x and name."""
    if torch.compiler.is_compiling():
        return compute()
    results = _results.get()
    if results is None or x.is_inference():
        return compute()
    key = (id(x), x._version, name)
    if key not in results:
        results[key] = (x, compute())
    return results[key][1]
