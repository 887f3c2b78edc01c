"""Warnings that point at the user's line, however deep in the package the reason is found. No torch."""

from __future__ import annotations

import sys
import warnings

_PACKAGE = __name__.partition(".")[0]


def warn(text: str) -> None:
    """A `UserWarning` at the first line, outwards from here, that is not in this package."""
    frame = sys._getframe(1)
    level = 2
    while frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE and frame.f_back is not None:
        frame = frame.f_back
        level += 1
    warnings.warn(text, stacklevel=level)
