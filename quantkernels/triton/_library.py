"""The torch library ``quantkernels_triton``: native schemas, Triton kernels."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch

from ..ops._register import RULES, register
from ._tiles import INTERPRETED

NAMESPACE = "quantkernels_triton"
OPS: list[str] = []

_library = torch.library.Library(NAMESPACE, "DEF")


def _quiet(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter computes with numpy, which warns where a GPU silently gives inf or NaN."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        with numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return kernel(*args)

    return run


def define(op: str, kernel: Callable[..., Any]) -> None:
    """Define ``op`` with the schema of the native op of that name, and register its kernel and rules."""
    schema = str(getattr(torch.ops.quantkernels, op).default._schema)
    _library.define(schema.removeprefix("quantkernels::"))
    _library.impl(op, kernel, "CUDA")
    if INTERPRETED:
        _library.impl(op, _quiet(kernel), "CPU")
    if op in RULES:
        register(op, NAMESPACE)
    OPS.append(op)
