"""A tap on the seam to the file system: records every call through `system_calls`, and may fail or kill at any."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncckpt.naming import is_temporary_name
from asyncckpt.storage import system_calls

FUNCTIONS = {
    name: function
    for name, function in vars(system_calls).items()
    if inspect.isfunction(function) and function.__module__ == system_calls.__name__
}


@dataclass
class Call:
    """The `number`-th call: what was called, on which file (descriptors are traced back to the path they opened)."""

    number: int
    name: str
    path: str
    args: tuple[Any, ...]
    succeeded: bool = False

    @property
    def is_on_temporary(self) -> bool:
        return is_temporary_name(os.path.basename(self.path))


class Seam:
    """As a context manager: while open, calls are recorded in `calls`, each after `before(call)`, which may raise."""

    def __init__(self, before: Callable[[Call], None] = lambda call: None) -> None:
        self.calls: list[Call] = []
        self._before = before
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}

    def __enter__(self) -> Seam:
        for name, function in FUNCTIONS.items():
            setattr(system_calls, name, self._tap(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in FUNCTIONS.items():
            setattr(system_calls, name, function)

    def named(self, *names: str) -> list[Call]:
        return [call for call in self.calls if call.name in names]

    def _tap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def tapped(*args: Any) -> Any:
            with self._lock:
                path = self._paths.get(args[0], "?") if isinstance(args[0], int) else str(args[0])
                call = Call(len(self.calls), name, path, args)
                self.calls.append(call)
            try:
                self._before(call)
            except OSError:
                if name == "close":  # a close that fails has closed all the same
                    function(*args)
                raise
            result = function(*args)
            call.succeeded = True
            if name == "open_file":
                self._paths[result] = path
            return result

        return tapped


class Fault:
    """Raises `error_number` at the `number`-th call; if `sticky`, at every later call of the same name too."""

    def __init__(self, number: int, error_number: int, *, sticky: bool) -> None:
        self.hit: Call | None = None
        self._number, self._error_number, self._sticky = number, error_number, sticky

    def __call__(self, call: Call) -> None:
        if self.hit is None and call.number == self._number:
            self.hit = call
        elif self.hit is None or not self._sticky or call.name != self.hit.name:
            return
        raise OSError(self._error_number, os.strerror(self._error_number))


def assert_durable(calls: list[Call], path: str) -> None:
    """The file at `path` was synced after its last byte, never on a descriptor whose sync had failed, then renamed, and
    its directory was synced after that: what acknowledging a save takes."""
    renames = [call for call in calls if call.name == "rename" and call.args[1] == path and call.succeeded]
    assert renames, f"nothing was renamed to {path}"
    rename = renames[-1]
    on_file = [call for call in calls if call.path == rename.path and call.number < rename.number]
    syncs = [call for call in on_file if call.name == "fsync"]
    last_write = max(call.number for call in on_file if call.name in ("pwrite", "allocate"))
    assert all(call.succeeded for call in syncs), "renamed after a failed fsync of that file"
    assert any(call.number > last_write for call in syncs), "renamed before the file was synced"
    assert any(
        call.name == "fsync" and call.succeeded and call.number > rename.number and call.path == os.path.dirname(path)
        for call in calls
    ), "acknowledged before the directory was synced"
