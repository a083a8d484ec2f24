"""Which backend an op runs on, and the one sentence that says why it cannot."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import _library
from ._register import eager

# "native" is the kernels compiled for the tensor's device: csrc/cpu or csrc/cuda. The others have a namespace of their
# own with the same schemas, so that one program can hold all of them against each other.
NAMESPACES = {"native": "quantkernels", "triton": "quantkernels_triton", "emu": "quantkernels_emu"}

# For a namespace that is not always there: the module that registers it, and what it needs.
_MODULES = {
    "triton": ("quantkernels.triton", "the package triton"),
    "emu": ("quantkernels.emu", "the emulator of the CUDA kernels"),
}

_current = "native"


def _require(name: str) -> None:
    if name not in NAMESPACES:
        raise ValueError(f"quantkernels.backend: name must be one of {', '.join(NAMESPACES)}, got {name!r}")
    if name in _MODULES:
        module, need = _MODULES[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise RuntimeError(f"quantkernels.backend: the {name} backend needs {need}: {error}") from error


class _Choice(contextlib.AbstractContextManager[str]):
    """The choice is made at once; leaving a ``with`` block takes it back."""

    def __init__(self, name: str) -> None:
        global _current
        self._name, self._before, _current = name, _current, name

    def __enter__(self) -> str:
        return self._name

    def __exit__(self, *exc: object) -> None:
        global _current
        _current = self._before


def backend(name: str | None = None) -> Any:
    """Tell or choose the backend of all ops.

    Without an argument returns the current name. With ``"native"`` (kernels compiled for the tensor's device),
    ``"triton"``, or ``"emu"`` (the CUDA kernels emulated on CPU tensors, for tests) chooses it from now on; as a
    context manager, for the block alone::

        with quantkernels.backend("triton"):
            q = quantizer(x)

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot run here.
    """
    if name is None:
        return _current
    _require(name)
    return _Choice(name)


def backends() -> Iterator[str]:
    """Names of the namespaces' backends."""
    return iter(NAMESPACES)


def current_namespace() -> str:
    """The namespace of torch.ops that ``call`` runs ops of."""
    return NAMESPACES[_current]


def traced() -> bool:
    """Whether tracers or functorch's transforms look on, for which the dispatcher must see each op whole."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def call(op: str, *args: Any) -> Any:
    """Run op of the current backend's namespace; a kernel that is not there is one clear sentence."""
    namespace = NAMESPACES[_current]
    if traced():
        return getattr(getattr(torch.ops, namespace), op).default(*args)
    try:
        return eager(op, namespace)(*args)
    except NotImplementedError as error:
        explain(error, args)
        raise


def call_without_gradient(op: str, *args: Any) -> Any:
    """As ``call``, of an op that has no gradient: what requires one is taken for a constant."""
    if not traced():
        return call(op, *args)  # below autograd
    with torch.no_grad():
        return call(op, *args)


def explain(error: NotImplementedError, args: Sequence[Any]) -> None:
    """Raises NotImplementedError with one clear sentence where the error is that the current backend has no kernel."""
    found = re.search(NAMESPACES[_current] + r"::(\w+)", str(error))
    if found:
        raise NotImplementedError(_missing(found[1], args)) from error


def _missing(op: str, args: Sequence[Any]) -> str:
    if not hasattr(getattr(torch.ops, NAMESPACES[_current]), op):
        return (
            f"quantkernels.{op}: the {_current} backend does not have this op; choose another with "
            "quantkernels.backend(...)"
        )
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "this")
    return f"quantkernels.{op}: the {_current} backend has no kernel for {device} tensors here{_remedy()}"


def _remedy() -> str:
    if _current == "triton":
        return (
            "; it runs on CUDA tensors, and on CPU tensors with TRITON_INTERPRET=1 in the environment before "
            "the first import (slow: for tests)"
        )
    info = _library.build_info()
    return (
        f" (CPU kernels: {info['cpu_isa']}; CUDA library: {info['cuda']}, {info['cuda_build']}); rebuild with "
        "QK_CUDA=1 pip install --no-build-isolation ."
    )
