"""Loads the native libraries and says what is in them."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import torch

LIBRARIES = Path(__file__).parent / "_lib"
_CPU = LIBRARIES / "quantkernels_cpu.so"
_REBUILD = "rebuild with: pip install --no-build-isolation ."


def _load() -> tuple[bool, str]:
    """Register the native ops with torch. Returns whether the CUDA library was loaded, and why if not."""
    if not _CPU.exists():
        raise ImportError(f"quantkernels: the native CPU library {_CPU} is missing; {_REBUILD}")
    torch.ops.load_library(str(_CPU))
    cuda = LIBRARIES / "quantkernels_cuda.so"
    if not cuda.exists():
        return False, "not built"
    if torch.version.cuda is None:
        return False, "built, not loaded: this torch has no CUDA"
    torch.ops.load_library(str(cuda))
    return True, "loaded"


CUDA_LOADED, _CUDA_STATE = _load()

from ._lib import _host  # type: ignore[attr-defined]  # noqa: E402


def build_info() -> dict[str, Any]:
    """What was built, and what of it runs here.

    Returns a dict of plain values: ``version``, ``torch`` (the one running), ``torch_target`` (the oldest one
    served), ``compiler``, ``cpu_isa`` (``"avx512"``, ``"zen4"``, ``"avx2"`` or ``"portable"``; the
    environment variable QK_CPU_ISA asks for another one), ``cuda`` (state of the CUDA library in words),
    ``cuda_archs`` (its targets), ``cuda_build`` (what the build decided), ``python`` and ``machine``.
    """
    return {
        "version": _host.version,
        "torch": torch.__version__,
        "torch_target": _host.torch_target,
        "compiler": _host.compiler,
        "cpu_isa": _host.cpu_isa(),
        "cuda": _CUDA_STATE,
        "cuda_archs": [a for a in _host.cuda_archs.split(",") if a],
        "cuda_build": _host.cuda_reason,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def empty_cache() -> int:
    """Give back to the system the memory that results of CPU ops have left. Returns its bytes.

    A result of 256 KiB or more lies in a block of its own, which is kept when the result is dropped, for the next one
    of that size: at most 256 MiB together, or as many as the environment variable QK_CPU_CACHE_MB says when the library
    is loaded; 0 keeps none, and leaves all memory to torch. Such results cannot be resized in place to more bytes.
    With torch before 2.11 all memory is torch's.
    """
    release = ctypes.CDLL(str(_CPU)).qk_empty_cache
    release.restype = ctypes.c_size_t
    return int(release())
