"""The checks, and one run of them all. No torch; nothing is left behind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from asyncckpt.doctor import destination, file_system, machine, process, speed
from asyncckpt.doctor.finding import PROBLEM, WARNING, Finding, Place, reason
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError
from asyncckpt.naming import is_temporary_name
from asyncckpt.storage import system_calls
from asyncckpt.storage.files import remove_quietly


class Check(NamedTuple):
    name: str
    run: Callable[[Place], Finding]
    writes: bool = False  # not tried where no file can be written


CHECKS = (
    Check("writing", destination.check_writing),
    Check("file system", file_system.check_file_system),
    Check("space", destination.check_space),
    Check("fsync", destination.check_fsync, writes=True),
    Check("directory fsync", destination.check_directory_fsync, writes=True),
    Check("commit", destination.check_commit, writes=True),
    Check("locks", destination.check_locks, writes=True),
    Check("O_DIRECT", destination.check_direct_writing, writes=True),
    Check("second names", destination.check_links, writes=True),
    Check("write speed", speed.check_writing_speed, writes=True),
    Check("memory speed", speed.check_memory_speed),
    Check("memory", machine.check_memory),
    Check("memfd", machine.check_memfd),
    Check("cores", machine.check_cores),
    Check("kernel", machine.check_kernel),
    Check("limits", machine.check_limits),
    Check("packages", machine.check_packages),
    Check("writer process", process.check_writer),
    Check("container", process.check_container),
    Check("grace period", process.check_grace),
    Check("OOM killer", process.check_oom),
)


@dataclass(frozen=True)
class Examination:
    """`ok` when nothing makes checkpoints unsafe. `tested_in` is `path`, or the nearest directory above that exists."""

    path: str
    tested_in: str
    ok: bool
    findings: Sequence[Finding]


def examine(path: str, tell: Callable[[str], object] = lambda name: None) -> Examination:
    """Run all checks on a directory; `tell` hears the name of each before it begins. Blocks, for some seconds.

    A directory that does not exist is not made: the nearest one above is examined. Files that are tried are gone again
    afterwards, also after an error or an interrupt. Raises `CheckpointError` for a URL and for what is no directory.
    """
    if "://" in path:
        raise CheckpointError(f"{path}: this version examines local directories only")
    directory = _nearest_directory(os.path.abspath(path))
    token = f"doctor-{secrets.token_hex(8)}"
    place = Place(directory, os.path.join(directory, token))
    findings: list[Finding] = []
    try:
        for check in CHECKS:
            if check.writes and findings[0].status == PROBLEM:
                continue
            tell(check.name)
            findings.append(replace(_run(check, place), name=check.name))
    finally:
        _clear(directory, token)
    return Examination(path, directory, all(finding.status != PROBLEM for finding in findings), findings)


def _run(check: Check, place: Place) -> Finding:
    try:
        return check.run(place)
    except OSError as error:
        return Finding(WARNING, f"could not be checked: {reason(error)}")


def _nearest_directory(path: str) -> str:
    while True:
        try:
            system_calls.list_directory(path)
            return path
        except FileNotFoundError:
            path = os.path.dirname(path)
        except NotADirectoryError as error:
            raise CheckpointNotFoundError(f"{path} is not a directory") from error


def _clear(directory: str, token: str) -> None:
    """What an interrupt at the wrong moment has left."""
    try:
        names = list(system_calls.list_directory(directory))
    except OSError:
        return
    for name in names:
        if token in name and is_temporary_name(name):
            remove_quietly(os.path.join(directory, name))
