"""Call a function with the options of a recipe table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.config import ConfigError, reject_unknown, require

MAX_BITS = 8


def call_with_options(function: Callable[..., Any], options: Mapping[str, Any], where: str, *args: Any) -> Any:
    """function(*args, **options) after a check of the option names against its other parameters.

    `where` is the recipe table in error messages. Raises ConfigError for an unknown or a missing option.
    """
    parameters = list(inspect.signature(function).parameters.values())[len(args) :]
    reject_unknown(options, [p.name for p in parameters], where)
    for p in parameters:
        if p.default is inspect.Parameter.empty and p.name not in options:
            raise ConfigError(f"the recipe must give {where}.{p.name}")
    return function(*args, **options)


def bit_set(value: Any, where: str, lowest: int = 2) -> list[int]:
    """A set of bit-widths as a list, the highest first. Raises ConfigError for an empty one, or bits out of range."""
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    require(listed, where, "a list of at least one bit-width", value)
    for bits in value:
        valid = type(bits) is int and lowest <= bits <= MAX_BITS
        require(valid, where, f"a list of integers from {lowest} to {MAX_BITS}", value)
    require(len(set(value)) == len(value), where, "a list of different bit-widths", value)
    return sorted(value, reverse=True)
