"""`storage_options`: what of them is ours to say, and what is wrong with those that can't be used. No torch.

No message holds a value: any of them may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from asyncckpt.errors import CheckpointError

# How a client is kept, and what it remembers of listings, is decided here: whatever was said of it changes nothing.
_DROPPED = frozenset({"skip_instance_cache", "use_listings_cache", "listings_expiry_time", "max_paths"})
_S3_TEXTS = ("key", "secret", "token", "username", "password", "profile", "endpoint_url")
_S3_MAPPINGS = ("client_kwargs", "config_kwargs", "s3_additional_kwargs")
_ARGUMENT = re.compile(r"argument '(\w+)'")


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without those that make no difference. Raises `CheckpointError` for a client that nobody here can use."""
    for name in ("asynchronous", "loop"):
        if options.get(name):
            raise CheckpointError(
                f"storage_options: {name} can't be chosen, requests run on a loop of their own; leave it out"
            )
    return {name: value for name, value in options.items() if name not in _DROPPED | {"asynchronous", "loop"}}


def s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """As `own_options`, for s3fs. Raises `CheckpointError` for a value of another kind than s3fs takes."""
    own = own_options(options)
    for name in _S3_TEXTS:
        if not isinstance(own.get(name), str | None):
            raise CheckpointError(f"storage_options: {name} is a str, not {type(own[name]).__name__}")
    for name in _S3_MAPPINGS:
        if own.get(name, {}) is None:
            del own[name]
        elif not isinstance(own.get(name, {}), Mapping):
            raise CheckpointError(f"storage_options: {name} is a dict, not {type(own[name]).__name__}")
    if not isinstance(own.get("s3_additional_kwargs", {}).get("Metadata", {}), Mapping):
        raise CheckpointError("storage_options: Metadata in s3_additional_kwargs is a dict")
    return own


def unusable(error: BaseException, options: Mapping[str, Any]) -> CheckpointError:
    """What is to be said when s3fs, or botocore, can't be set up with these options."""
    kind = type(error).__name__
    if kind == "ProfileNotFound":
        return CheckpointError(
            "storage_options: AWS's configuration has no such profile; check profile, or AWS_PROFILE"
        )
    if isinstance(error, ValueError) and "endpoint" in str(error):
        return CheckpointError("storage_options: endpoint_url is no URL of a server, as http://127.0.0.1:9000 is")
    named = _ARGUMENT.search(str(error)) if isinstance(error, TypeError) else None
    if named is not None:
        places = [name for name in _S3_MAPPINGS if named[1] in options.get(name, {})]
        return CheckpointError(
            f"storage_options: {' or '.join(places) or 's3fs'} can't have {named[1]!r}; leave it out"
        )
    given = ", ".join(sorted(options)) or "AWS's environment variables"
    return CheckpointError(f"storage_options can't be used ({kind}); check {given}")
