"""`--storage-option`: what the storage of a URL is opened with. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_TEXTS = frozenset({"key", "secret", "token", "username", "password"})  # also where they look like numbers


def storage_options(given: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` by `KEY=VALUE`; a value that is JSON means that, any other is text.

    Raises ValueError for what is none, which is not repeated: it may be a secret.
    """
    options: dict[str, Any] = {}
    for number, option in enumerate(given, 1):
        name, separator, text = option.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"--storage-option takes KEY=VALUE, as s3fs has them; number {number} is none")
        options[name] = text if name in _TEXTS else _value(text)
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
