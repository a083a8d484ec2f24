"""hypothesis, or stand-ins that skip the property tests where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, assume, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Takes part in the making of strategies, which nothing then draws from."""

        def __getattr__(self, name: str) -> _Anything:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
            return self

    HealthCheck = assume = st = _Anything()  # type: ignore[assignment,misc]

    def given(**strategies: Any) -> Any:  # type: ignore[misc]
        """A skipped test that asks for none of what hypothesis would draw."""

        def replace(test: Any) -> Any:
            @pytest.mark.skip(reason="hypothesis is not installed")
            def skipped() -> None:
                pass

            skipped.__name__, skipped.__doc__ = test.__name__, test.__doc__
            return skipped

        return replace

    def settings(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        return lambda test: test


__all__ = ["HealthCheck", "assume", "given", "settings", "st"]
