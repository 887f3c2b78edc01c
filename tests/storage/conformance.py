"""The contract of storage/base.py as tests: every kind of storage subclasses `StorageConformance`.

A subclass says how to make the storage, and how to look at files by other means than the code under test.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.storage.base import ConflictError, Reader, Storage, Upload
from storage.claimed import claimed

# What a view's memory may be like: page-aligned, off by one, or not writable (so that not even its address is had).
VIEWS = ("aligned", "unaligned", "readonly")
SIZES: dict[str, Callable[[int], int]] = {
    "0": lambda piece: 0,
    "1": lambda piece: 1,
    "4095": lambda piece: 4095,
    "4096": lambda piece: 4096,
    "4097": lambda piece: 4097,
    "100,001": lambda piece: 100_001,
    "piece - 1": lambda piece: piece - 1,
    "piece": lambda piece: piece,
    "piece + 1": lambda piece: piece + 1,
    "2 pieces + 4097": lambda piece: 2 * piece + 4097,
}


def make_content(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def as_view(content: bytes, kind: str) -> memoryview:
    if kind == "readonly":
        return memoryview(content)
    shift = 1 if kind == "unaligned" else 0
    pages = mmap.mmap(-1, len(content) + 4096)
    view = memoryview(pages)[shift : shift + len(content)]
    view[:] = content
    assert not content or ctypes.addressof(ctypes.c_char.from_buffer(view)) % 4096 == shift
    return view


def write_in_pieces(upload: Upload, view: memoryview, piece_bytes: int, *, num_threads: int = 1) -> None:
    """Write pieces in random order, each byte once."""
    offsets = list(range(0, len(view), piece_bytes))
    random.Random(len(view)).shuffle(offsets)
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(lambda offset: upload.write(offset, view[offset : offset + piece_bytes]), offsets))


def put_by_upload(storage: Storage, path: str, content: bytes) -> None:
    upload = storage.begin(path, len(content))
    write_in_pieces(upload, as_view(content, "aligned"), upload.piece_bytes)
    upload.sync()
    upload.commit()
    upload.close()


class StorageConformance(ABC):
    """The inherited tests. `place` is an empty directory (or prefix) that exists."""

    storage_class: str  # "module:name", so that another process can make the same storage
    options: Mapping[str, Any]
    has_directories = True  # that may be empty, or missing
    keeps_what_is_read = True  # also when it has been replaced or deleted
    shows_what_is_not_committed = True
    sees_who_lives = True  # of those who are uploading
    refused = frozenset[str]()  # names that it does not take
    dead_upload_bytes = 8192

    @pytest.fixture
    def storage(self) -> Storage:
        module, name = self.storage_class.split(":")
        storage: Storage = getattr(importlib.import_module(module), name)(**self.options)
        return storage

    @pytest.fixture
    @abstractmethod
    def place(self) -> Any: ...

    @abstractmethod
    def put(self, path: str, content: bytes) -> None:
        """Make a file by other means."""

    @abstractmethod
    def get(self, path: str) -> bytes | None:
        """A file's content by other means; None when there is none."""

    @abstractmethod
    def list_names(self, directory: str) -> set[str]:
        """Everything in a directory, half-written files included, by other means."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file by other means."""

    @contextmanager
    def uploading_process(self, path: str, *, is_claimed: bool = False) -> Iterator[subprocess.Popen[str]]:
        """Another process with a half-written upload to `path`; killed at the end, if it still runs."""
        script = Path(__file__).with_name("uploader.py")
        command = [sys.executable, str(script), self.storage_class, json.dumps(dict(self.options)), path]
        command += [str(self.dead_upload_bytes), "claimed" if is_claimed else ""]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment()) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "holding\n"
                yield process
            finally:
                process.kill()

    @contextmanager
    def locking_process(
        self, directory: str, holder: str = "the other", child: str = "none"
    ) -> Iterator[tuple[subprocess.Popen[str], int]]:
        """Another process that holds a directory's lock, and the id of its child; both have ended at the end."""
        script = Path(__file__).with_name("locker.py")
        command = [sys.executable, str(script), self.storage_class, json.dumps(dict(self.options)), directory, holder]
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, child], stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None
            try:
                yield process, int(process.stdout.readline())
            finally:
                process.kill()

    def leave_dead_upload(self, path: str) -> None:
        """What a writer that was SIGKILLed leaves."""
        with self.uploading_process(path, is_claimed=True):
            pass

    # --- writing ---

    @pytest.mark.parametrize("view_kind", VIEWS)
    @pytest.mark.parametrize("size", SIZES)
    def test_what_is_written_is_there(self, storage: Storage, place: str, size: str, view_kind: str) -> None:
        """Files of any size, from memory of any kind, come out as they went in."""
        probe = storage.begin(f"{place}/probe", 0)
        probe.abort()
        content = make_content(SIZES[size](probe.piece_bytes))
        upload = storage.begin(f"{place}/file", len(content))
        write_in_pieces(upload, as_view(content, view_kind), upload.piece_bytes, num_threads=2)
        upload.sync()
        upload.commit()
        upload.close()
        assert self.get(f"{place}/file") == content
        assert self.list_names(place) == {"file"}

    def test_it_says_how_it_likes_to_be_written(self, storage: Storage, place: str) -> None:
        """Pieces are whole pages, and at least one thread is useful."""
        upload = storage.begin(f"{place}/file", 1)
        upload.abort()
        assert upload.piece_bytes > 0
        assert upload.piece_bytes % 4096 == 0
        assert upload.num_threads >= 1

    def test_missing_directories_are_made(self, storage: Storage, place: str) -> None:
        """A path may lie any number of missing levels deep."""
        put_by_upload(storage, f"{place}/a/b/c/file", b"deep")
        assert self.get(f"{place}/a/b/c/file") == b"deep"

    # --- commit and abort ---

    def test_nothing_is_visible_before_commit(self, storage: Storage, place: str) -> None:
        """Neither begin nor write nor sync show a file, or touch the old one."""
        for old in (None, b"old"):
            if old is not None:
                self.put(f"{place}/file", old)
            upload = storage.begin(f"{place}/file", 3)
            assert self.get(f"{place}/file") == old
            upload.write(0, memoryview(b"new"))
            assert self.get(f"{place}/file") == old
            upload.sync()
            assert self.get(f"{place}/file") == old
            upload.abort()
            assert self.get(f"{place}/file") == old

    def test_replaced_in_one_act(self, storage: Storage, place: str) -> None:
        """Whoever opens the path while it is replaced finds one whole file every time, never two halves or none."""
        path = f"{place}/file"
        self.put(path, bytes([0]) * 50_000)
        done = threading.Event()

        def look() -> set[int]:
            seen: set[int] = set()
            while not done.is_set() or not seen:
                with storage.open(path) as reader:
                    view = memoryview(bytearray(reader.num_bytes))
                    try:
                        reader.read_into(0, view)
                    except OSError:
                        if self.keeps_what_is_read:
                            raise
                        continue
                numbers = set(view)
                assert len(numbers) == 1
                assert reader.num_bytes == 50_000 + max(numbers)
                seen |= numbers
            return seen

        with ThreadPoolExecutor(1) as thread:
            looking = thread.submit(look)
            try:
                for number in range(1, 40):
                    put_by_upload(storage, path, bytes([number]) * (50_000 + number))
            finally:
                done.set()
            assert looking.result(60)

    @pytest.mark.parametrize("progress", ["begun", "half written", "written", "synced"])
    @pytest.mark.parametrize("old", [None, b"old"])
    def test_abort_leaves_the_old_file_and_nothing_else(
        self, storage: Storage, place: str, progress: str, old: bytes | None
    ) -> None:
        """However far an upload got, abort removes every trace of it; a second abort changes nothing."""
        if old is not None:
            self.put(f"{place}/file", old)
        upload = storage.begin(f"{place}/file", 10_000)
        if progress != "begun":
            upload.write(0, memoryview(bytearray(5000)))
        if progress in ("written", "synced"):
            upload.write(5000, memoryview(bytearray(5000)))
        if progress == "synced":
            upload.sync()
        upload.abort()
        upload.abort()
        assert self.get(f"{place}/file") == old
        assert self.list_names(place) == ({"file"} if old is not None else set())

    def test_abort_after_commit_is_harmless(self, storage: Storage, place: str) -> None:
        """Not even a file committed to the same path by another upload meanwhile is touched."""
        first = storage.begin(f"{place}/file", 5)
        first.write(0, memoryview(b"first"))
        first.sync()
        first.commit()
        first.abort()
        assert self.get(f"{place}/file") == b"first"
        put_by_upload(storage, f"{place}/file", b"second")
        first.abort()
        assert self.get(f"{place}/file") == b"second"
        assert self.list_names(place) == {"file"}

    def test_uploads_to_one_path_do_not_meet(self, storage: Storage, place: str) -> None:
        """Two uploads to one path at a time: the last commit wins, whole."""
        uploads = [storage.begin(f"{place}/file", 6) for _ in range(2)]
        for upload, content in zip(uploads, (b"first.", b"second"), strict=True):
            upload.write(0, memoryview(content))
            upload.sync()
        uploads[1].commit()
        uploads[0].commit()
        assert self.get(f"{place}/file") == b"first."
        assert self.list_names(place) == {"file"}

    # --- reading ---

    def test_reads_back_before_commit(self, storage: Storage, place: str) -> None:
        """What was written can be checked before anyone sees it."""
        content = make_content(20_000)
        upload = storage.begin(f"{place}/file", len(content))
        write_in_pieces(upload, as_view(content, "aligned"), upload.piece_bytes)
        upload.sync()
        reader = upload.reader()
        assert (reader is not None) == self.shows_what_is_not_committed
        if reader is not None:
            with reader:
                view = memoryview(bytearray(reader.num_bytes))
                reader.read_into(0, view)
            assert bytes(view) == content
        upload.commit()
        upload.close()
        assert self.get(f"{place}/file") == content

    def test_reads_any_range(self, storage: Storage, place: str) -> None:
        """Ranges of any offset and length, also from several threads at once."""
        content = make_content(100_000)
        self.put(f"{place}/file", content)
        with storage.open(f"{place}/file") as reader, ThreadPoolExecutor(4) as threads:
            assert reader.num_bytes == len(content)

            def read(offset: int, num_bytes: int) -> bytes:
                view = memoryview(bytearray(num_bytes))
                reader.read_into(offset, view)
                return bytes(view)

            ranges = [(0, 0), (0, 1), (4095, 2), (99_999, 1), (100_000, 0), (0, 100_000), (12_345, 54_321)] * 5
            for (offset, num_bytes), found in zip(ranges, threads.map(lambda args: read(*args), ranges), strict=True):
                assert found == content[offset : offset + num_bytes]

    @pytest.mark.parametrize(("offset", "num_bytes"), [(0, 101), (100, 1), (99, 2), (1000, 1)])
    def test_past_the_end_is_an_error(self, storage: Storage, place: str, offset: int, num_bytes: int) -> None:
        """A file that is shorter than expected never reads as zeros."""
        self.put(f"{place}/file", make_content(100))
        with storage.open(f"{place}/file") as reader, pytest.raises(EOFError):
            reader.read_into(offset, memoryview(bytearray(num_bytes)))

    def test_a_reader_stays_with_its_file(self, storage: Storage, place: str) -> None:
        """Replacing and removing what is at the path does not disturb who has it open."""
        self.put(f"{place}/file", b"old content")
        with storage.open(f"{place}/file") as reader:
            put_by_upload(storage, f"{place}/file", b"new")
            self.assert_still(reader, 0, b"old content")
            self.remove(f"{place}/file")
            self.assert_still(reader, 4, b"content")

    def assert_still(self, reader: Reader, offset: int, content: bytes) -> None:
        """What was there when it was opened, or an error; never what has taken its place."""
        view = memoryview(bytearray(len(content)))
        if self.keeps_what_is_read:
            reader.read_into(offset, view)
            assert bytes(view) == content
        else:
            with pytest.raises(OSError, match="replaced or deleted") as caught:
                reader.read_into(offset, view)
            assert caught.value.errno == errno.ESTALE

    @pytest.mark.parametrize("name", ["missing", "missing/too"])
    def test_opening_nothing(self, storage: Storage, place: str, name: str) -> None:
        """A missing file, or directory, is FileNotFoundError."""
        with pytest.raises(FileNotFoundError):
            storage.open(f"{place}/{name}")

    # --- small files ---

    @pytest.mark.parametrize("num_bytes", [0, 1, 100_000])
    def test_reads_small_files(self, storage: Storage, place: str, num_bytes: int) -> None:
        """All of them, up to exactly as many bytes as are allowed."""
        content = make_content(num_bytes)
        self.put(f"{place}/file", content)
        assert storage.read(f"{place}/file", num_bytes) == content
        assert storage.read(f"{place}/file", num_bytes + 1) == content

    def test_reads_no_large_ones(self, storage: Storage, place: str) -> None:
        """One byte too many is an OSError that says how many are allowed."""
        self.put(f"{place}/file", make_content(1001))
        with pytest.raises(OSError, match="larger than 1,000 bytes"):
            storage.read(f"{place}/file", 1000)

    def test_a_small_file_cut_short(self, storage: Storage, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody truncates it while it is read: an OSError like any other, not what happened to be left."""
        self.put(f"{place}/file", b"12345")
        open_whole = storage.open

        def open_before_truncation(path: str, *, follow_links: bool = True) -> Reader:
            reader = open_whole(path, follow_links=follow_links)
            reader.num_bytes += 1
            return reader

        monkeypatch.setattr(storage, "open", open_before_truncation)
        with pytest.raises(OSError, match="ends at byte 5"):
            storage.read(f"{place}/file", 1000)

    def test_a_small_file_that_is_replaced_while_it_is_read(
        self, storage: Storage, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is one of the two, whole: a registry is read while somebody writes it."""
        path = f"{place}/file"
        storage.replace(path, b"old content")
        open_file, num_opened = storage.open, 0

        def open_and_replace(path: str, *, follow_links: bool = True) -> Reader:
            nonlocal num_opened
            num_opened += 1
            reader = open_file(path, follow_links=follow_links)
            if num_opened == 1:
                storage.replace(path, b"new")
            return reader

        monkeypatch.setattr(storage, "open", open_and_replace)
        assert storage.read(path, 1000) == (b"old content" if self.keeps_what_is_read else b"new")

    @pytest.mark.parametrize("name", ["missing", "missing/too"])
    def test_reading_nothing(self, storage: Storage, place: str, name: str) -> None:
        """As opening nothing."""
        with pytest.raises(FileNotFoundError):
            storage.read(f"{place}/{name}", 1000)

    def test_what_fails_keeps_nobody(self, storage: Storage, place: str) -> None:
        """Who has asked is gone at once, not only when Python looks for circles."""

        class Asker:
            def ask(self) -> None:
                with suppress(FileNotFoundError):
                    storage.read(f"{place}/missing", 1000)

        gc.disable()
        try:
            asker = Asker()
            asker.ask()
            known = weakref.ref(asker)
            del asker
            assert known() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("content", [b"", b"1", make_content(100_001)], ids=len)
    @pytest.mark.parametrize("old", [None, b"old"])
    @pytest.mark.parametrize("directory", ["", "/a/b"])
    def test_replaces(self, storage: Storage, place: str, directory: str, old: bytes | None, content: bytes) -> None:
        """A file, or none, in a directory that may be missing; nothing else is left."""
        if old is not None:
            storage.replace(f"{place}{directory}/file", old)
        storage.replace(f"{place}{directory}/file", content)
        assert self.get(f"{place}{directory}/file") == content
        assert self.list_names(f"{place}{directory}") == {"file"}

    @pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=["error", "interrupt"])
    @pytest.mark.parametrize("step", ["write", "sync", "commit"])
    def test_what_cannot_replace_leaves_nothing(
        self, storage: Storage, place: str, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
    ) -> None:
        """Whichever step fails, the old file stays, alone."""
        self.put(f"{place}/file", b"old")
        begin = storage.begin

        def fail(*_: object) -> None:
            raise error

        def begin_what_fails(path: str, num_bytes: int, *, expected: str | None = None) -> Upload:
            upload = begin(path, num_bytes, expected=expected)
            setattr(upload, step, fail)
            return upload

        monkeypatch.setattr(storage, "begin", begin_what_fails)
        with pytest.raises(type(error)):
            storage.replace(f"{place}/file", b"new")
        assert self.get(f"{place}/file") == b"old"
        assert self.list_names(place) == {"file"}

    # --- versions ---

    def test_what_is_not_as_expected_is_not_replaced(self, storage: Storage, place: str) -> None:
        """Where files have versions: a writer that comes too late changes nothing, and is told."""
        path = f"{place}/file"
        if not storage.has_versions(place):
            assert storage.replace(path, b"1", expected="") == storage.version(path) == ""
            return
        assert storage.version(path) == ""
        first = storage.replace(path, b"1", expected="")
        assert storage.version(path) == first
        with storage.open(path) as reader:
            assert reader.version == first
        for expected in ("", '"0123"'):
            with pytest.raises(ConflictError):
                storage.replace(path, b"2", expected=expected)
        second = storage.replace(path, b"2", expected=first)
        assert second != first
        with pytest.raises(ConflictError):
            storage.replace(path, b"3", expected=first)
        assert self.get(path) == b"2"
        storage.replace(path, b"4")
        assert self.get(path) == b"4"

    # --- names ---

    def test_lists_names(self, storage: Storage, place: str) -> None:
        """All of a directory, sorted, and not what is deeper."""
        assert storage.list_names(place) == []
        for name in ("b", "a", ".hidden", "sub/deep"):
            storage.replace(f"{place}/{name}", b"")
        assert storage.list_names(place) == [".hidden", "a", "b", "sub"]
        assert storage.list_names(f"{place}/sub") == ["deep"]

    def test_listing_nothing(self, storage: Storage, place: str) -> None:
        """A missing directory is FileNotFoundError, not an empty one, where there are directories."""
        if self.has_directories:
            with pytest.raises(FileNotFoundError):
                storage.list_names(f"{place}/missing")
        else:
            assert storage.list_names(f"{place}/missing") == []

    @pytest.mark.parametrize(
        "name", ["a?b", "a?versionid=1", "a#1", "a#", "a*", "[a]", "a%20b", "a b", "a\tb", "ä&b=c"]
    )
    def test_names_that_mean_something_elsewhere(self, storage: Storage, place: str, name: str) -> None:
        """To shells, to URLs: here they are names, or refused before anything is written; never cut off."""
        storage.replace(f"{place}/a", b"old")
        if name in self.refused:
            for act in (
                lambda: storage.replace(f"{place}/{name}", b"new"),
                lambda: storage.list_names(f"{place}/{name}"),
            ):
                with pytest.raises(OSError, match="takes no such name"):
                    act()
            assert self.list_names(place) == {"a"}
        else:
            for path in (f"{place}/{name}", f"{place}/in{name}/{name}"):
                storage.replace(path, b"new")
                assert self.get(path) == storage.read(path, 3) == b"new"
            storage.link(f"{place}/{name}", f"{place}/in{name}/b{name}")
            assert storage.list_names(place) == sorted(["a", name, f"in{name}"])
            assert storage.list_names(f"{place}/in{name}") == sorted([name, f"b{name}"])
            storage.delete([f"{place}/{name}"])
            assert storage.list_names(place) == ["a", f"in{name}"]
        assert self.get(f"{place}/a") == b"old"

    # --- deleting ---

    @pytest.mark.parametrize("doomed", [[], ["a"], ["a", "b"], ["b", "missing", "a"], ["missing"], ["a", "a"]])
    def test_deletes(self, storage: Storage, place: str, doomed: list[str]) -> None:
        """These files and no others; what is gone already, or named twice, does not matter."""
        for name in ("a", "b", "c"):
            self.put(f"{place}/{name}", b"1")
        storage.delete([f"{place}/{name}" for name in doomed])
        assert self.list_names(place) == {"a", "b", "c"} - set(doomed)

    def test_deleting_in_a_directory_that_is_gone(self, storage: Storage, place: str) -> None:
        """Its files are gone too."""
        storage.delete([f"{place}/missing/a", f"{place}/missing/b"])
        assert self.list_names(place) == set()

    # --- linking ---

    @pytest.mark.parametrize("size", ["0", "1", "100,001", "piece", "2 pieces + 4097"])
    @pytest.mark.parametrize("old", [None, b"old"])
    def test_links(self, storage: Storage, place: str, old: bytes | None, size: str) -> None:
        """Both hold the same, whatever was there; nothing else is left. Done again it changes nothing."""
        probe = storage.begin(f"{place}/probe", 0)
        probe.abort()
        content = make_content(SIZES[size](probe.piece_bytes))
        self.put(f"{place}/source", content)
        if old is not None:
            self.put(f"{place}/destination", old)
        for _ in range(2):
            storage.link(f"{place}/source", f"{place}/destination")
            assert self.get(f"{place}/source") == self.get(f"{place}/destination") == content
            assert self.list_names(place) == {"source", "destination"}

    def test_links_between_directories(self, storage: Storage, place: str) -> None:
        """The two need not lie side by side."""
        for name in ("a/source", "b/other"):
            storage.replace(f"{place}/{name}", b"1")
        storage.link(f"{place}/a/source", f"{place}/b/destination")
        assert self.get(f"{place}/b/destination") == b"1"
        assert self.list_names(f"{place}/a") == {"source"}
        assert self.list_names(f"{place}/b") == {"other", "destination"}

    def test_links_to_itself(self, storage: Storage, place: str) -> None:
        """Nothing to do, and nothing is lost."""
        self.put(f"{place}/file", b"1")
        storage.link(f"{place}/file", f"{place}/file")
        assert self.get(f"{place}/file") == b"1"
        assert self.list_names(place) == {"file"}

    def test_linked_files_go_their_own_ways(self, storage: Storage, place: str) -> None:
        """Replacing or deleting one leaves the other as it was."""
        self.put(f"{place}/source", b"old")
        storage.link(f"{place}/source", f"{place}/first")
        storage.link(f"{place}/source", f"{place}/second")
        put_by_upload(storage, f"{place}/source", b"new")
        assert self.get(f"{place}/first") == self.get(f"{place}/second") == b"old"
        storage.delete([f"{place}/first"])
        storage.replace(f"{place}/second", b"2nd")
        assert self.get(f"{place}/source") == b"new"
        assert self.list_names(place) == {"source", "second"}

    def test_a_reader_stays_with_its_file_when_a_link_replaces_it(self, storage: Storage, place: str) -> None:
        """As with every other replacement."""
        self.put(f"{place}/source", b"new")
        self.put(f"{place}/destination", b"old")
        with storage.open(f"{place}/destination") as reader:
            storage.link(f"{place}/source", f"{place}/destination")
            self.assert_still(reader, 0, b"old")

    @pytest.mark.parametrize(
        ("source", "destination"), [("missing", "old"), ("missing/too", "old"), ("source", "missing/destination")]
    )
    def test_linking_nothing(self, storage: Storage, place: str, source: str, destination: str) -> None:
        """No source, or no directory to link in: FileNotFoundError, and all is as it was."""
        if not self.has_directories and source == "source":
            return
        self.put(f"{place}/source", b"1")
        self.put(f"{place}/old", b"old")
        with pytest.raises(FileNotFoundError):
            storage.link(f"{place}/{source}", f"{place}/{destination}")
        assert self.get(f"{place}/old") == b"old"
        assert self.list_names(place) == {"source", "old"}

    # --- locking ---

    def assert_locked_by(self, storage: Storage, directory: str, holder: str) -> None:
        with pytest.raises(BlockingIOError) as refused:
            storage.lock(directory, "somebody else")
        assert refused.value.strerror == holder

    def test_locks_one_at_a_time(self, storage: Storage, place: str) -> None:
        """Also within one process; who is refused learns of the holder, and the next one may have it."""
        first = storage.lock(place, "the first")
        self.assert_locked_by(storage, place, "the first")
        assert first.is_intact()
        first.release()
        assert not first.is_intact()
        second = storage.lock(place, "the 2nd")
        self.assert_locked_by(storage, place, "the 2nd")
        second.release()

    def test_everybody_may_ask_who_has_the_lock(self, storage: Storage, place: str) -> None:
        """And whether he lives; nobody has it before, and after."""
        assert (storage.holder(place), storage.is_locked(place)) == ("", False)
        lock = storage.lock(place, "the first")
        assert (storage.holder(place), storage.is_locked(place)) == ("the first", True)
        lock.describe("the first, still")
        assert storage.holder(place) == "the first, still"
        lock.release()
        assert (storage.holder(place), storage.is_locked(place)) == ("", False)

    def test_a_dead_holder_is_still_named(self, storage: Storage, place: str) -> None:
        """But has no lock."""
        with self.locking_process(place, "the other") as (process, _):
            assert storage.is_locked(place)
            process.kill()
            process.wait()
            assert (storage.holder(place), storage.is_locked(place)) == ("the other", False)

    def test_releasing_twice(self, storage: Storage, place: str) -> None:
        """It is the next one's by then, and stays so."""
        first = storage.lock(place, "the first")
        first.release()
        second = storage.lock(place, "the second")
        first.release()
        assert second.is_intact()
        self.assert_locked_by(storage, place, "the second")
        second.release()

    def test_directories_have_locks_of_their_own(self, storage: Storage, place: str) -> None:
        """Missing ones are made, at any depth."""
        locks = [storage.lock(directory, directory) for directory in (place, f"{place}/a", f"{place}/b/c")]
        assert [lock.is_intact() for lock in locks] == [True] * 3
        for lock in locks:
            lock.release()

    def test_a_lock_keeps_nobody_from_writing(self, storage: Storage, place: str) -> None:
        """It is for those who ask; and a sweep leaves it alone."""
        lock = storage.lock(place, "me")
        put_by_upload(storage, f"{place}/file", b"1")
        assert storage.sweep(place) == []
        assert lock.is_intact()
        self.assert_locked_by(storage, place, "me")
        lock.release()

    def test_another_process_has_the_lock(self, storage: Storage, place: str) -> None:
        """It is refused and told by whom; once that one is killed by SIGKILL the lock can be had."""
        with self.locking_process(place, "the other") as (process, _):
            self.assert_locked_by(storage, place, "the other")
            process.kill()
            process.wait()
            lock = storage.lock(place, "me")
            assert lock.is_intact()
            self.assert_locked_by(storage, place, "me")
            lock.release()

    def test_another_process_wants_the_lock(self, storage: Storage, place: str) -> None:
        """Refused while we have it, and told by whom."""
        lock = storage.lock(place, "this one")
        script = Path(__file__).with_name("locker.py")
        command = [sys.executable, str(script), self.storage_class, json.dumps(dict(self.options)), place, "it", "none"]
        refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert refused.stderr.splitlines()[-1].startswith("BlockingIOError")
        assert "this one" in refused.stderr.splitlines()[-1]
        lock.release()
        had = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert (had.returncode, had.stdout, had.stderr) == (0, "0\n", "")  # it ended without a release, quietly

    @pytest.mark.parametrize("child", ["forked", "executed"])
    def test_a_child_does_not_keep_the_lock(self, storage: Storage, place: str, child: str) -> None:
        """A DataLoader worker, or another program, that outlives the killed holder."""
        with self.locking_process(place, "the other", child) as (process, child_pid):
            self.assert_locked_by(storage, place, "the other")
            process.kill()
            process.wait()
            os.kill(child_pid, 0)  # it lives
            storage.lock(place, "me").release()

    def test_a_forked_child_leaves_the_lock_alone(self, storage: Storage, place: str) -> None:
        """It does not have the lock, and releasing it there, or exiting, takes nothing from the parent."""
        lock = storage.lock(place, "the parent")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads may be running
            pid = os.fork()
        if pid == 0:
            had = lock.is_intact()
            lock.release()
            os._exit(1 if had else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert lock.is_intact()
        self.assert_locked_by(storage, place, "the parent")
        lock.release()

    # --- sweeping ---

    def sweep(self, storage: Storage, directory: str) -> list[str]:
        """As who has the directory's lock."""
        return storage.sweep(directory, has_lock=True)

    def test_sweeps_what_a_killed_writer_left(self, storage: Storage, place: str) -> None:
        """Its temporary file goes, its destination and other files stay; a second sweep finds nothing."""
        self.put(f"{place}/file", b"old")
        self.put(f"{place}/other", b"other")
        self.leave_dead_upload(f"{place}/file")
        left = self.list_names(place) - {"file", "other"}
        assert left, "the killed writer should have left something"
        assert self.sweep(storage, place) == [f"{place}/{name}" for name in left]
        assert self.list_names(place) == {"file", "other"}
        assert self.get(f"{place}/file") == b"old"
        assert self.sweep(storage, place) == []

    def test_never_sweeps_the_living(self, storage: Storage, place: str) -> None:
        """Uploads under way in this process and in another one go on to their commits."""
        if not self.sees_who_lives:
            self.assert_sweeps_by_lock(storage, place)
            return
        mine = storage.begin(f"{place}/mine", 4)
        with self.uploading_process(f"{place}/theirs") as process:
            assert self.sweep(storage, place) == []
            mine.write(0, memoryview(b"mine"))
            mine.sync()
            assert self.sweep(storage, place) == []
            mine.commit()
            process.communicate("go on\n")
        assert self.list_names(place) == {"mine", "theirs"}
        assert self.get(f"{place}/mine") == b"mine"
        assert self.sweep(storage, place) == []

    def assert_sweeps_by_lock(self, storage: Storage, place: str) -> None:
        """Without the directory's lock nothing of other processes is touched; with it, nothing of this one, and nothing
        of who never had the lock."""
        with claimed(place):
            mine = storage.begin(f"{place}/mine", self.dead_upload_bytes)
        with self.uploading_process(f"{place}/theirs", is_claimed=True) as process:
            assert storage.sweep(place) == []
            process.communicate("go on\n")
        with self.uploading_process(f"{place}/theirs") as process:
            assert self.sweep(storage, place) == []
            process.communicate("go on\n")
        write_in_pieces(mine, memoryview(bytes(self.dead_upload_bytes)), mine.piece_bytes)
        mine.sync()
        mine.commit()
        mine.close()
        assert self.list_names(place) == {"mine", "theirs"}

    def test_sweeps_only_that_directory(self, storage: Storage, place: str) -> None:
        """Not its subdirectories: they have writers of their own."""
        self.leave_dead_upload(f"{place}/sub/file")
        assert self.sweep(storage, place) == []
        assert len(self.sweep(storage, f"{place}/sub")) == 1

    def test_never_sweeps_other_names(self, storage: Storage, place: str) -> None:
        """A file that only looks similar is somebody else's."""
        token = "0123456789abcdef"
        names = {
            f".asyncckpt-{token}-file",
            f".asyncckpt-{token}.tmp",
            f".asyncckpt-{token[:-1]}-file.tmp",
            f".asyncckpt-{token.upper()}-file.tmp",
            f"asyncckpt-{token}-file.tmp",
            ".asyncckpt-notes.tmp",
            "file.tmp",
            ".tmp",
        }
        for name in names:
            self.put(f"{place}/{name}", b"theirs")
        assert self.sweep(storage, place) == []
        assert self.list_names(place) == names

    def test_sweeping_nothing(self, storage: Storage, place: str) -> None:
        """A directory that is empty, missing, or a file is swept at once."""
        self.put(f"{place}/file", b"")
        assert [self.sweep(storage, path) for path in (place, f"{place}/missing", f"{place}/file")] == [[], [], []]


def environment() -> dict[str, str]:
    """For a process that imports what the tests have."""
    tests = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), tests])}
