"""Call a function with the options of a recipe table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from training.config import ConfigError, reject_unknown


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
