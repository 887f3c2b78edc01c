"""What kind of file system the directory is on, and what that means. Knows by name what no trial can show."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, Place

MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_LOCAL = frozenset({"ext4", "ext3", "xfs", "btrfs", "zfs", "f2fs", "bcachefs"})
_ONE_WRITER = "let only one machine write to a directory, if several mount it"

# By type: status, what it means, what to do.
_MEANINGS = {
    "overlay": (
        WARNING,
        "a container's own layer: lost with the container",
        "mount a volume, and save there",
    ),
    "nfs": (NOTE, "durable once the server has it, unless it is exported `async`", f"export it `sync`; {_ONE_WRITER}"),
    "cifs": (NOTE, "what the server makes of fsync is its own business", _ONE_WRITER),
    "9p": (NOTE, "a host's directory: fsync is the host's business", "ask how the host caches writes"),
    "virtiofs": (NOTE, "a host's directory: fsync is the host's business", "ask how the host caches writes"),
    "lustre": (NOTE, "parallel storage; locks need the mount option `flock`", f"mount with `flock`; {_ONE_WRITER}"),
    "fuse": (NOTE, "a program's: fsync and rename are what it makes of them", "ask whether its fsync is durable"),
}
_SAME = {"nfs4": "nfs", "smb3": "cifs", "fuseblk": "fuse"}


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: str
    kind: str
    options: frozenset[str]


def find_mount(place: Place) -> Mount | None:
    """The mount that the directory is on; None where that can't be known."""
    target = os.path.realpath(place.directory)
    found = None
    try:
        lines = place.read("proc/self/mountinfo").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        _, _, _, _, point, options, *_ = before.split()
        kind, _, more_options = after.split(" ", 2)
        point = _unescape(point)
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and (found is None or len(point) >= len(found.point)):  # a later one lies over an earlier one
            found = Mount(point, kind, frozenset(f"{options},{more_options}".split(",")))
    return found


def check_file_system(place: Place) -> Finding:
    """The type, and mount options that take away what fsync promises."""
    mount = find_mount(place)
    if mount is None:
        return Finding(NOTE, "unknown: there is no /proc/self/mountinfo")
    found = f"{mount.kind} at {mount.point}"
    if mount.kind in MEMORY:
        return Finding(PROBLEM, f"{found}: memory; nothing survives a reboot", "", "save to a disk")
    if "volatile" in mount.options:
        return Finding(PROBLEM, f"{found}, `volatile`: fsync does nothing", "", "mount a volume, and save there")
    if unsafe := mount.options & {"nobarrier", "barrier=0"}:
        advice = "mount without it, unless the disk's cache survives a power cut"
        return Finding(WARNING, f"{found}, `{min(unsafe)}`: fsync stops at the disk's cache", "", advice)
    if local := [option for option in mount.options if option in ("nolock", "localflock", "local_lock=all")]:
        found += f", `{local[0]}`: locks exclude processes of this machine only"
        return Finding(WARNING, found, "", _ONE_WRITER)
    if mount.kind in _LOCAL:
        return Finding(OK, found)
    kind = _SAME.get(mount.kind, mount.kind.split(".")[0])
    unknown = (NOTE, "we know nothing about it", "ask whether its fsync is durable")
    status, meaning, advice = _MEANINGS.get(kind, unknown)
    return Finding(status, f"{found}: {meaning}", "", advice)


def _unescape(text: str) -> str:
    """mountinfo writes blanks and the like as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
