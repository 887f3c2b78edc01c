"""The checks, and one run of them all. No torch; nothing is left behind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from asyncckpt.doctor import destination, file_system, machine, process, speed, store
from asyncckpt.doctor.finding import PROBLEM, WARNING, Finding, Place, reason
from asyncckpt.errors import CheckpointNotFoundError
from asyncckpt.naming import is_temporary_name
from asyncckpt.paths import scheme_of
from asyncckpt.storage import system_calls
from asyncckpt.storage.base import Storage
from asyncckpt.storage.files import remove_quietly
from asyncckpt.storage.places import Places, full_path


class Check(NamedTuple):
    name: str
    run: Callable[[Place], Finding]
    writes: bool = False  # not tried where no file can be written


_MACHINE = (
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
    *_MACHINE,
)
STORE_CHECKS = (
    Check("reaching", store.check_reaching),
    Check("client", store.check_client),
    Check("writing", store.check_writing, writes=True),
    Check("conditions", store.check_conditions, writes=True),
    Check("copying", store.check_copying, writes=True),
    Check("parts", store.check_parts, writes=True),
    Check("speed", store.check_speed, writes=True),
    Check("left", store.check_left, writes=True),
    Check("versions", store.check_versions, writes=True),
    *_MACHINE,
)


@dataclass(frozen=True)
class Examination:
    """`ok` when nothing makes checkpoints unsafe. `tested_in` is `path`, or the nearest directory above that exists."""

    path: str
    tested_in: str
    ok: bool
    findings: Sequence[Finding]


def examine(
    path: str, tell: Callable[[str], object] = lambda name: None, *, storage: Storage | None = None
) -> Examination:
    """Run all checks on a directory, or a URL in `storage`; `tell` hears the name of each before it begins.

    Blocks, for some seconds. A directory that does not exist is not made: the nearest one above is examined. Files that
    are tried are gone again afterwards, also after an error or an interrupt. Raises `CheckpointError` for a URL that
    can't be used, and for what is no directory.
    """
    token = f"doctor-{secrets.token_hex(8)}"
    findings: list[Finding] = []
    if scheme_of(path):
        directory = full_path(path)
        place = Place(directory, f"{directory}/asyncckpt-{token}", storage=storage or Places())
        findings += _run_all(STORE_CHECKS, place, tell)
    else:
        directory = _nearest_directory(os.path.abspath(path))
        try:
            findings += _run_all(CHECKS, Place(directory, os.path.join(directory, token)), tell)
        finally:
            _clear(directory, token)
    return Examination(path, directory, all(finding.status != PROBLEM for finding in findings), findings)


def _run_all(checks: Sequence[Check], place: Place, tell: Callable[[str], object]) -> list[Finding]:
    findings: list[Finding] = []
    for check in checks:
        if check.writes and findings[0].status == PROBLEM:
            continue
        tell(check.name)
        findings.append(replace(_run(check, place), name=check.name))
    return findings


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
