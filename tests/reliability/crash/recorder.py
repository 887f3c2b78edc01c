"""Records a run on the package's own seam to the file system: every change with its data, every sync, and every
acknowledgement, in one order."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from storage.seam import FUNCTIONS

from asyncckpt import CheckpointInfo, SaveHandle
from asyncckpt.naming import LOCK_NAME
from asyncckpt.storage import system_calls
from reliability.crash.disk import Change, Disk, Enter, Grow, Move, Remove, Resize, Sync, Write
from reliability.crash.facts import Acknowledged, Fact, Failed, Submitted
from reliability.crash.states import Step


class Recorder:
    """As a context manager: while open, what happens to the directory `base` is noted in `steps`.

    Calls that change something happen one at a time, in the order of their notes. `initial` is the disk before the
    first, `live` the disk as it is now. What the lock's file says of its holder is left out: it is for people.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.initial = Disk.read(base)
        self.live = self.initial.copy()
        self.steps: list[Step] = []
        self._lock = threading.Lock()  # taken last of all, and given back before anything else is waited for
        self._open: dict[int, int] = {}  # descriptor → inode
        self._mute: set[int] = set()  # inodes of locks
        self._submitting = threading.local()
        self._patches = ExitStack()
        self._next_inode = 1 + max([*self.live.files, *self.live.directories])

    def __enter__(self) -> Recorder:
        for name in FUNCTIONS:
            if hasattr(self, f"_note_{name}"):
                tapped = self._tap(name, getattr(system_calls, name))
                self._patches.enter_context(mock.patch.object(system_calls, name, tapped))
        self._tap_handles()
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    @property
    def facts(self) -> list[Fact]:
        return [step for step in self.steps if isinstance(step, Fact)]

    def note(self, fact: Fact) -> None:
        with self._lock:
            self.steps.append(fact)

    def submit(self, number: int, loss: float | None, save: Callable[[], SaveHandle | None]) -> SaveHandle:
        """Call `save`, for the state of that number."""
        self.note(Submitted(number, loss))
        self._submitting.number = number
        try:
            handle = save()
        except Exception:
            self.note(Failed(number))
            raise
        finally:
            self._submitting.number = None
        assert handle is not None
        return handle

    # --- taps ---

    def _tap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        note = getattr(self, f"_note_{name}")

        def tapped(*args: Any) -> Any:
            with self._lock:
                try:
                    result = function(*args)
                except OSError:
                    if name == "fsync" and args[0] in self._open:
                        self.steps.append(Sync(self._open[args[0]], succeeded=False))
                    raise
                note(result, *args)
                return result

        return tapped

    def _tap_handles(self) -> None:
        """Each handle gets the number of its state when it is made, and its outcome is noted before anybody can know
        of it."""
        make, settle = SaveHandle.__init__, SaveHandle.settle
        numbers: weakref.WeakKeyDictionary[SaveHandle, int | None] = weakref.WeakKeyDictionary()

        def made(handle: SaveHandle, *args: Any) -> None:
            make(handle, *args)
            numbers[handle] = getattr(self._submitting, "number", None)

        def settled(handle: SaveHandle, info: CheckpointInfo | None, error: BaseException | None) -> None:
            number = numbers.get(handle)
            if number is not None and error is not None:
                self.note(Failed(number))
            elif number is not None and info is not None:
                self.note(Acknowledged(number, os.path.relpath(info.filepath, self.base), info.sequence))
            settle(handle, info, error)

        self._patches.enter_context(mock.patch.object(SaveHandle, "__init__", made))
        self._patches.enter_context(mock.patch.object(SaveHandle, "settle", settled))

    # --- what each call did ---

    def _note_open_file(self, fd: int, path: str, flags: int, mode: int = 0o666) -> None:
        place = self._place(path)
        if place is None:
            return
        directory, name = place
        inode = self.live.directories[directory].get(name) if name else directory
        if inode is None:
            assert flags & os.O_CREAT
            inode = self._new_inode()
            if name == LOCK_NAME:
                self._mute.add(inode)
            self._change(Enter(directory, name, inode))
        elif flags & os.O_TRUNC:
            self._change(Resize(inode, 0))
        if name == LOCK_NAME:
            self._mute.add(inode)
        self._open[fd] = inode

    def _note_close(self, _: None, fd: int) -> None:
        self._open.pop(fd, None)

    def _note_pwrite(self, count: int, fd: int, view: memoryview, offset: int) -> None:
        self._change_data(fd, lambda inode: Write(inode, offset, bytes(view[:count])))

    def _note_allocate(self, _: None, fd: int, num_bytes: int) -> None:
        if os.fstat(fd).st_size >= num_bytes:  # where it is unsupported, it does nothing
            self._change_data(fd, lambda inode: Grow(inode, num_bytes))

    def _note_truncate(self, _: None, fd: int, num_bytes: int) -> None:
        self._change_data(fd, lambda inode: Resize(inode, num_bytes))

    def _note_clone(self, _: None, source: int, destination: int) -> None:
        content = self.live.files[self._open[source]]
        self._change_data(destination, lambda inode: Write(inode, 0, content))

    def _note_fsync(self, _: None, fd: int) -> None:
        if fd in self._open:
            self.steps.append(Sync(self._open[fd]))

    def _note_make_directory(self, _: None, path: str, mode: int = 0o777) -> None:
        self._enter(path, self._new_inode(), is_directory=True)

    def _note_link(self, _: None, source: str, destination: str) -> None:
        if self._place(destination) is not None:
            self._enter(destination, self._inode_at(source), is_directory=False)

    def _note_unlink(self, _: None, path: str) -> None:
        place = self._place(path)
        if place is not None:
            self._change(Remove(*place, self._inode_at(path)))

    def _note_rename(self, _: None, source: str, destination: str) -> None:
        before, after = self._place(source), self._place(destination)
        if before is None and after is None:
            return
        assert before is not None
        assert after is not None
        inode = self._inode_at(source)
        if self.live.directories[after[0]].get(after[1]) != inode:  # onto a link of the same file it does nothing
            self._change(Move(*before, *after, inode))

    # --- the model ---

    def _change(self, change: Change) -> None:
        self.steps.append(change)
        self.live.apply(change)

    def _change_data(self, fd: int, change: Callable[[int], Change]) -> None:
        if fd in self._open and self._open[fd] not in self._mute:
            self._change(change(self._open[fd]))

    def _enter(self, path: str, inode: int, *, is_directory: bool) -> None:
        place = self._place(path)
        if place is not None:
            self._change(Enter(*place, inode, is_directory))

    def _new_inode(self) -> int:
        self._next_inode += 1
        return self._next_inode - 1

    def _inode_at(self, path: str) -> int:
        place = self._place(path)
        assert place is not None, f"{path} is not in {self.base}"
        return self.live.directories[place[0]][place[1]]

    def _place(self, path: str) -> tuple[int, str] | None:
        """The directory's inode and the name; None outside. The base itself is ("", in itself)."""
        relative = os.path.relpath(path, self.base)
        if relative == ".":
            return 0, ""
        *above, name = relative.split(os.sep)
        if above[:1] == [".."] or name == "..":
            return None
        directory = 0
        for part in above:
            directory = self.live.directories[directory][part]
        return directory, name


@contextmanager
def recording(base: Path) -> Iterator[Recorder]:
    """A recorder whose notes agree, in the end, with what really is in `base`."""
    recorder = Recorder(base)
    with recorder:
        yield recorder
    noted, real = recorder.live.tree(), Disk.read(base).tree()
    without_locks = [
        [(path, content) for path, _, content in tree.files if os.path.basename(path) != LOCK_NAME]
        for tree in (noted, real)
    ]
    assert without_locks[0] == without_locks[1], "a change went past the recorder"
    assert noted.directories == real.directories
