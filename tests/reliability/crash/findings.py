"""What the next process finds after a crash: as a reader, who changes nothing, and as a writer, who puts things in
order. Faults that need no knowledge of what had been promised are found here too."""

from __future__ import annotations

import json
import os
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from asyncckpt import CheckpointError, CheckpointInfo, KeepLast
from asyncckpt.image.verify import verify_reader
from asyncckpt.naming import BEST_NAME, LOCK_NAME, REGISTRY_NAME
from asyncckpt.registry.directory import CheckpointDirectory
from asyncckpt.registry.recovery import Survey
from asyncckpt.storage.local import LocalStorage


@dataclass(frozen=True)
class Content:
    """A checkpoint file's: which state is in it (None: not one whole state), and what the file says of itself."""

    number: int | None
    problem: str = ""
    sequence: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Findings:
    """`checkpoints` is what can be loaded, newest last, by name; `recorded` the sequence numbers that the registry as
    the crash left it names, None if there is none; `link` what `best_model.pt` held before anybody opened the directory
    for writing; `best` which of the checkpoints was the best afterwards.
    """

    checkpoints: Mapping[str, Content] = field(default_factory=dict)
    recorded: frozenset[int | None] | None = None
    link: Content | None = None
    best: Content | None = None
    faults: tuple[str, ...] = ()

    @property
    def newest(self) -> Content | None:
        """What a reader resumes from."""
        return next(reversed(list(self.checkpoints.values())), None)


def look_at_directory(path: Path, num_kept: int | None) -> Findings:
    """A manager's directory; it is opened for writing, twice."""
    faults: list[str] = []
    before = _signature(path)
    try:
        found = _directory(path, num_kept).read()
    except (CheckpointError, OSError) as error:
        return Findings(faults=(f"it can't be read: {error!r}",))
    faults += [f"reading changed it: {name}" for name in _differences(before, _signature(path))]
    faults += _doubts(found)
    checkpoints = {str(info.filepath): content_at(path / info.filepath) for info in found.registry.checkpoints}
    link = content_at(path / BEST_NAME) if (path / BEST_NAME).exists() else None
    faults += [f"{name} is listed: {content.problem}" for name, content in checkpoints.items() if content.problem]
    for info in found.registry.checkpoints:
        # A name that was committed again, and not recorded: readers see the new file under the old entry.
        if (checkpoints[str(info.filepath)].sequence or 0) < (info.sequence or 0):
            faults.append(f"{info.filepath} is listed with sequence number {info.sequence}, and is older")
    faults += _faults_of_opening(path, num_kept, checkpoints)
    best = content_at(path / BEST_NAME) if (path / BEST_NAME).exists() else None
    recorded = None if found.recorded is None else frozenset(_sequences(found.recorded.checkpoints))
    return Findings(checkpoints, recorded, link, best, tuple(faults))


def look_at_files(path: Path, names: list[str]) -> Findings:
    """A directory where savers write to explicit paths: swept, twice."""
    faults: list[str] = []
    checkpoints = {name: content_at(path / name) for name in names if (path / name).exists()}
    faults += [f"{name} is there: {content.problem}" for name, content in checkpoints.items() if content.problem]
    LocalStorage().sweep(str(path))
    left = {entry.name for entry in path.iterdir()} if path.exists() else set()
    faults += [f"left over: {name}" for name in sorted(left - set(checkpoints))]
    faults += [f"swept though it is no temporary file: {name}" for name in sorted(set(checkpoints) - left)]
    return Findings(checkpoints, faults=tuple(faults))


def _directory(path: Path, num_kept: int | None) -> CheckpointDirectory:
    retention = None if num_kept is None else KeepLast(num_kept)
    return CheckpointDirectory(str(path), LocalStorage(), retention=retention, metric="val_loss", lock_timeout_secs=0)


def _doubts(found: Survey) -> Iterator[str]:
    """What no crash may bring about, because the registry never says more than is durable, and never less for long."""
    if found.damage:
        yield f"the registry is damaged: {found.damage}"
    yield from (f"the registry names {info.filepath}, which is gone" for info in found.gone)
    yield from (f"the registry names {info.filepath}, which only the best link still has" for info in found.restorable)
    yield from (f"{name} is nobody's file" for name in found.strangers)


def _faults_of_opening(path: Path, num_kept: int | None, found: Mapping[str, Content]) -> Iterator[str]:
    directory = _directory(path, num_kept)
    try:
        directory.open_for_writing()
    except (CheckpointError, OSError) as error:
        yield f"it can't be opened for writing: {error!r}"
        return
    listed = directory.registry.checkpoints
    directory.close()
    opened = {str(info.filepath): content_at(path / info.filepath) for info in listed}
    if opened != found:
        yield f"opening it changed what is listed from {found} to {opened}"
    if [content.sequence for content in opened.values()] != sorted(_sequences(listed), key=lambda n: n or 0):
        yield f"the sequence numbers {_sequences(listed)} are listed, and the files are {opened}"
    yield from _disorder(path, {str(info.filepath) for info in listed})
    before = _signature(path)
    directory = _directory(path, num_kept)
    directory.open_for_writing()
    directory.close()
    yield from (f"a second opening changed it: {name}" for name in _differences(before, _signature(path)))


def _disorder(path: Path, listed: set[str]) -> Iterator[str]:
    """Of an opened directory: what is there is listed, what is listed is there, and the best is the best."""
    names = {entry.name for entry in path.iterdir()}
    if not listed and REGISTRY_NAME not in names:
        yield from (f"left over: {name}" for name in sorted(names - {LOCK_NAME}))
        return
    if REGISTRY_NAME not in names:
        yield "there is no registry"
        return
    entries = json.loads((path / REGISTRY_NAME).read_bytes())["checkpoints"]
    best = [entry["filepath"] for entry in entries if entry["is_best"]]
    expected = {*listed, REGISTRY_NAME, LOCK_NAME, *([BEST_NAME] if best else [])}
    yield from (f"left over: {name}" for name in sorted(names - expected))
    yield from (f"missing: {name}" for name in sorted(expected - names))
    if {entry["filepath"] for entry in entries} != listed:
        yield "the registry is not what is listed"
    if best and best != [_best_of(entries)]:
        yield f"{best} is marked best, not {_best_of(entries)}"
    if best and {BEST_NAME, *best} <= names and (path / BEST_NAME).read_bytes() != (path / best[0]).read_bytes():
        yield f"{BEST_NAME} is not {best[0]}, which is marked best"


def _best_of(entries: list[dict[str, float]]) -> object:
    compared = [entry for entry in entries if isinstance(entry["val_loss"], float | int)]
    return min(compared, key=lambda entry: (entry["val_loss"], entry["sequence"]), default={}).get("filepath")


def _sequences(checkpoints: Iterable[CheckpointInfo]) -> list[int | None]:
    return [info.sequence for info in checkpoints]


# --- single files ---

_contents: dict[bytes, Content] = {}


def content_at(path: Path) -> Content:
    """Remembered: most crash states hold the same files."""
    data = path.read_bytes() if path.is_file() else b""
    if data not in _contents:
        if len(_contents) > 2000:
            _contents.clear()
        _contents[data] = _read_content(path, data)
    return _contents[data]


def _read_content(path: Path, data: bytes) -> Content:
    if not path.is_file():
        return Content(None, "there is no file")
    with LocalStorage().open(str(path)) as reader:
        report = verify_reader(reader, str(path))
    if report.problems or report.metadata is None:
        return Content(None, report.problems[0] if report.problems else "it is not ours")
    with zipfile.ZipFile(BytesIO(data)) as archive:
        numbers = {number for record in _payloads(archive) for number in array("f", archive.read(record))}
    if len(numbers) != 1:
        return Content(None, f"it holds the states {sorted(numbers)}")
    metadata = report.metadata["metadata"]
    sequence = metadata.get("sequence") if isinstance(metadata, dict) else None
    return Content(int(numbers.pop()), "", sequence, str(report.metadata["name"]))


def _payloads(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.startswith("archive/data/")]


# --- before and after ---


def _signature(path: Path) -> dict[str, tuple[int, ...]]:
    """Tells any change but to the lock: in memory every write has a time of its own."""
    if not path.exists():
        return {}
    entries = [entry for entry in os.scandir(path) if entry.name != LOCK_NAME]
    return {entry.name: _stat_signature(entry.stat(follow_symlinks=False)) for entry in entries}


def _stat_signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink


def _differences(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
