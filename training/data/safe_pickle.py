"""Read pickles of arrays, bytes and numbers, and nothing else.

A pickle is a program. This reader lets it build containers, bytes, text, numbers and numpy arrays; arrays
are made here, of their type and bytes, not by numpy's own hooks. Any other global is refused by name, before
it is imported.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any

import numpy as np


class _DType:
    """Stands for numpy.dtype while a pickle is read: plain numbers only."""

    def __init__(self, code: str | bytes, align: object = False, copy: object = True) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        if not re.fullmatch(r"[<>|=]?[biuf][1248]", self.code):
            raise pickle.UnpicklingError(f"array type {self.code!r} is not allowed, only numbers")
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.order = "=" if order == "|" else order

    def numpy(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


class _NDArray:
    """Stands for the class numpy.ndarray where a pickle names it."""


class _Array:
    """Stands for an array while a pickle is read; `value` is the array once its state is known."""

    def __init__(self) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: bytes | str, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
        kind = dtype.numpy()
        if isinstance(content, str):  # protocol 2 of python 2, where bytes are text
            content = content.encode("latin-1")
        if math.prod(shape) * kind.itemsize != len(content) or min(shape, default=0) < 0:
            raise pickle.UnpicklingError(f"an array of shape {shape} does not have {len(content)} bytes")
        self.value = np.frombuffer(content, kind).reshape(shape, order="F" if order == "F" else "C")
        return self


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(content: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    return _Array().fill(content, dtype, shape, order)


def _scalar(dtype: _DType, content: bytes) -> int | float:
    return np.frombuffer(content, dtype.numpy(), count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoding {encoding!r} is not allowed")
    return text.encode("latin-1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _NDArray,
    ("_codecs", "encode"): _encode,  # how protocol 2 of python 3 writes bytes
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer  # protocol 5


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


def _unwrap(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {_unwrap(key): _unwrap(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unwrap(item) for item in value)
    return value


def loads(content: bytes) -> Any:
    """The object that a pickle of containers, bytes, text, numbers and numeric arrays holds.

    Text of python 2 is read as bytes. Raises pickle.UnpicklingError for all else, damaged files included.
    """
    try:
        return _unwrap(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
