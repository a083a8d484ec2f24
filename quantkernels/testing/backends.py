"""The backends that the op tests run on. One entry in BACKENDS makes a new one take part in every test."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ops._dispatch import NAMESPACES, backend


def _cpu() -> str | None:
    return None


def _emulator() -> str | None:
    try:
        importlib.import_module("quantkernels.emu")
    except ImportError as error:
        return str(error)
    return None


def _triton() -> str | None:
    try:
        module = importlib.import_module("quantkernels.triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if torch.cuda.is_available() or module.INTERPRETED:
        return None
    return "there is no GPU, and TRITON_INTERPRET=1 was not set before triton was imported"


def _cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return None if torch.cuda.is_available() else "there is no GPU"


@dataclass(frozen=True)
class Backend:
    """A set of kernels: the namespace of its ops, and the device of the tensors it runs on."""

    name: str
    choice: str  # for quantkernels.backend(...)
    on_gpu: Callable[[], bool]
    why_not: Callable[[], str | None]

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def missing(self) -> str | None:
        """Why this backend cannot run here, or None if it can."""
        return self.why_not()

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu() else "cpu"

    @property
    def emulated(self) -> bool:
        """Whether GPU kernels run on the CPU here: thousands of times slower, so tests take less."""
        return self.name != "cpu" and not self.on_gpu()

    @property
    def ops(self) -> Any:
        """The ops themselves: ``backend.ops.fake_quantize(...)`` takes the arguments of the schema."""
        return getattr(torch.ops, NAMESPACES[self.choice])

    def has(self, *ops: str) -> bool:
        """Whether each op has a kernel for this backend's tensors."""
        key = "CUDA" if self.on_gpu() else "CPU"
        name = f"{NAMESPACES[self.choice]}::"
        return all(
            hasattr(self.ops, op) and torch._C._dispatch_has_kernel_for_dispatch_key(name + op, key) for op in ops
        )

    def chosen(self) -> Any:
        """Context manager: ``quantkernels.ops`` run on this backend."""
        return backend(self.choice)


BACKENDS = (
    Backend("cpu", "native", lambda: False, _cpu),
    Backend("emu", "emu", lambda: False, _emulator),
    Backend("triton", "triton", torch.cuda.is_available, _triton),
    Backend("cuda", "native", lambda: True, _cuda),
)
