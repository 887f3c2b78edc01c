"""A tap on the seam to the file system: records every call through `system_calls`, and may fail or kill at any."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
        self._tapped = {name: getattr(system_calls, name) for name in FUNCTIONS}  # a test may have put in its own
        for name, function in self._tapped.items():
            setattr(system_calls, name, self._tap(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._tapped.items():
            setattr(system_calls, name, function)

    def named(self, *names: str) -> list[Call]:
        return [call for call in self.calls if call.name in names]

    def _tap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def tapped(*args: Any) -> Any:
            with self._lock:
                subject = args[1] if name == "clone" else args[0]  # the file that is changed
                path = self._paths.get(subject, "?") if isinstance(subject, int) else str(subject)
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
        self._number, self.error_number, self._sticky = number, error_number, sticky

    def __call__(self, call: Call) -> None:
        if self.hit is None and call.number == self._number:
            self.hit = call
        elif self.hit is None or not self._sticky or call.name != self.hit.name:
            return
        raise OSError(self.error_number, os.strerror(self.error_number))


def assert_durable(calls: list[Call], path: str) -> None:
    """The file at `path` was synced after its last byte, never on a descriptor whose sync had failed, then renamed, and
    its directory was synced after that: what acknowledging a save takes. Of a hard link only the latter."""
    renames = [call for call in calls if call.name == "rename" and call.args[1] == path and call.succeeded]
    assert renames, f"nothing was renamed to {path}"
    rename = renames[-1]
    on_file = [call for call in calls if call.path == rename.path and call.number < rename.number]
    syncs = [call for call in on_file if call.name == "fsync"]
    assert all(call.succeeded for call in syncs), "renamed after a failed fsync of that file"
    if not any(call.name == "link" and call.args[1] == rename.path for call in calls):
        last_write = max(call.number for call in on_file if call.name in ("pwrite", "allocate", "clone"))
        assert any(call.number > last_write for call in syncs), "renamed before the file was synced"
    assert_directory_synced(calls, rename, os.path.dirname(path))


def assert_directory_synced(calls: list[Call], change: Call, directory: str) -> None:
    """After the change of one of its entries."""
    assert any(
        call.name == "fsync" and call.succeeded and call.number > change.number and call.path == directory
        for call in calls
    ), "acknowledged before the directory was synced"


def describe_commit(calls: list[Call], base: Path) -> list[str]:
    """The calls that made for durability, with paths relative to `base`; a run of writes is one line."""
    lines: list[str] = []
    for call in (call for call in calls if call.succeeded):
        place = "TEMPORARY" if call.is_on_temporary else os.path.relpath(call.path, base)
        if call.name in ("make_directory", "pwrite", "fsync", "unlink", "clone", "link"):
            line = f"{call.name} {place}"
        elif call.name == "rename":
            line = f"rename {place} to {os.path.relpath(call.args[1], base)}"
        elif call.name == "open_file" and call.args[1] & os.O_CREAT:
            line = f"create {place}"
        else:
            continue
        if lines[-1:] != [line]:
            lines.append(line)
    return lines


def raising(error: int, *, when: Callable[[int], bool] = lambda call: True, name: str = "fsync") -> Callable[..., Any]:
    """The real call, except that the calls for whose number (from 1) `when` says so raise `error`."""
    num_calls = 0

    def call(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if when(num_calls):
            raise OSError(error, os.strerror(error))
        return FUNCTIONS[name](*args)

    return call
