"""The local file system: the contract, with and without O_DIRECT, and what only a file system can do to us."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from asyncckpt.naming import temporary_name
from asyncckpt.storage import files, system_calls
from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalStorage, LocalUpload
from storage.conformance import StorageConformance, as_view, make_content, put_by_upload, write_in_pieces
from storage.mounts import remount, small_file_system
from storage.observe import forked_child, names, no_descriptor_leaks, open_in_forked_child, temporaries
from storage.seam import FUNCTIONS, Seam, assert_durable, describe_commit, raising

MEBIBYTE = 1 << 20
SHARED_MEMORY = Path("/dev/shm")


class LocalConformance(StorageConformance):
    storage_class = "asyncckpt.storage.local:LocalStorage"

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path)

    def put(self, path: str, content: bytes) -> None:
        Path(path).write_bytes(content)

    def get(self, path: str) -> bytes | None:
        return Path(path).read_bytes() if Path(path).exists() else None

    def list_names(self, directory: str) -> set[str]:
        return set(os.listdir(directory))

    def remove(self, path: str) -> None:
        os.unlink(path)

    @pytest.mark.parametrize("piece_bytes", [1000, 4096, 12345, 65536])
    def test_pieces_in_any_order_from_several_threads(self, storage: Storage, place: str, piece_bytes: int) -> None:
        """More than the contract asks: pieces may be written at any offset, aligned or not, in any order, at once."""
        content = make_content(300_001)
        upload = storage.begin(f"{place}/file", len(content))
        write_in_pieces(upload, as_view(content, "aligned"), piece_bytes, num_threads=8)
        upload.sync()
        upload.commit()
        assert self.get(f"{place}/file") == content


class TestDirect(LocalConformance):
    options = MappingProxyType({"direct": True})


class TestBuffered(LocalConformance):
    options = MappingProxyType({"direct": False})


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="NOT CHECKED: there is no tmpfs here")
class TestTmpfs(LocalConformance):
    options = MappingProxyType({"direct": True})

    @pytest.fixture
    def place(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as directory:
            yield directory


def begin(path: Path, num_bytes: int = 4, *, direct: bool = True) -> LocalUpload:
    return LocalStorage(direct=direct).begin(str(path), num_bytes)


def put(path: Path, content: bytes) -> None:
    put_by_upload(LocalStorage(), str(path), content)


# --- what durable means: the order of the calls ---


COMMIT = ["create TEMPORARY", "pwrite TEMPORARY", "fsync TEMPORARY", "rename TEMPORARY to {0}/file", "fsync {0}"]


@pytest.mark.parametrize("direct", [True, False])
def test_every_step_is_durable_before_the_next(tmp_path: Path, direct: bool) -> None:
    """Into a directory two missing levels deep: each level, then the file's data, then its name."""
    with Seam() as seam:
        upload = begin(tmp_path / "a/b/file", 3 * MEBIBYTE + 5, direct=direct)
        write_in_pieces(upload, as_view(make_content(3 * MEBIBYTE + 5), "aligned"), MEBIBYTE)
        upload.sync()
        upload.commit()
    assert describe_commit(seam.calls, tmp_path) == [
        "fsync ..",  # what is there already may be young
        "make_directory a",
        "fsync .",
        "make_directory a/b",
        "fsync a",
        *(line.format("a/b") for line in COMMIT),
    ]
    assert_durable(seam.calls, str(tmp_path / "a/b/file"))


def test_replacing_a_file_takes_the_same_steps(tmp_path: Path) -> None:
    """No unlink of the old file, no window without one."""
    put(tmp_path / "d/file", b"old")
    with Seam() as seam:
        put(tmp_path / "d/file", b"new")
    assert describe_commit(seam.calls, tmp_path) == ["fsync .", *(line.format("d") for line in COMMIT)]


@pytest.mark.parametrize("made_by", ["another rank", "an attempt whose sync failed"])
def test_a_directory_that_somebody_just_made_is_synced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_by: str
) -> None:
    """An existing directory may be so young that its own name is not durable yet."""
    if made_by == "another rank":
        (tmp_path / "young").mkdir()
    else:
        monkeypatch.setattr(system_calls, "fsync", raising(errno.EIO, when=lambda call: call == 2))
        with pytest.raises(OSError, match="Input/output"):
            begin(tmp_path / "young/file")
        monkeypatch.undo()
    assert names(tmp_path) == {"young"}
    with Seam() as seam:
        put(tmp_path / "young/file", b"1")
    lines = describe_commit(seam.calls, tmp_path)
    assert lines.index("fsync .") < lines.index("create TEMPORARY")


def test_ranks_may_make_one_directory_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All find it missing, one makes it, nobody fails, and each has it durable before its own file."""
    num_ranks = 8
    barrier = threading.Barrier(num_ranks)
    make_directory = system_calls.make_directory

    def make_together(path: str) -> None:
        barrier.wait(60)
        make_directory(path)

    monkeypatch.setattr(system_calls, "make_directory", make_together)
    with ThreadPoolExecutor(num_ranks) as ranks:
        list(ranks.map(lambda rank: put(tmp_path / "shared" / f"rank{rank}", b"1"), range(num_ranks)))
    assert names(tmp_path / "shared") == {f"rank{rank}" for rank in range(num_ranks)}


def test_a_parent_that_may_not_be_read_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/home is often closed to listing: what it holds was not made by us, so syncing it is not needed."""
    monkeypatch.setattr(system_calls, "open_file", raising(errno.EACCES, when=lambda call: call == 1, name="open_file"))
    put(tmp_path / "file", b"1")
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_systems_that_cannot_sync_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Some network file systems say so by EINVAL: that is their nature, not a failure."""

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error, os.strerror(error))
        os.fsync(fd)

    monkeypatch.setattr(system_calls, "fsync", fsync)
    put(tmp_path / "d/file", b"1")
    assert names(tmp_path / "d") == {"file"}


def test_full_fsync_where_the_platform_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS: F_FULLFSYNC; where a network file system refuses that, fsync."""
    done: list[str] = []

    def control(fd: int, command: int) -> int:
        done.append("full")
        if done.count("full") == 2:
            raise OSError(errno.ENOTSUP, "refused")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("fsync"))
    system_calls.fsync(0)
    system_calls.fsync(0)
    assert done == ["full", "full", "fsync"]


# --- deleting ---


def test_a_deletion_is_durable(tmp_path: Path) -> None:
    """The names go first, then their directory is synced, once."""
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with Seam() as seam:
        LocalStorage().delete([str(tmp_path / name) for name in ("a", "missing", "b")])
    assert describe_commit(seam.calls, tmp_path) == ["unlink a", "unlink b", "fsync ."]


@pytest.mark.parametrize("filled", [True, False])
def test_a_directory_is_not_deleted(tmp_path: Path, filled: bool) -> None:
    """Neither it nor what is in it: an OSError."""
    make_directory_with_file(tmp_path / "d") if filled else (tmp_path / "d").mkdir()
    with no_descriptor_leaks(), pytest.raises(IsADirectoryError):
        LocalStorage().delete([str(tmp_path / "d")])
    assert names(tmp_path) == {"d"}
    assert names(tmp_path / "d") == ({"inside"} if filled else set())


@pytest.mark.parametrize("target", ["file", "directory", "missing"])
def test_a_symlink_is_deleted_not_followed(tmp_path: Path, target: str) -> None:
    """Its target stays."""
    (tmp_path / "file").touch()
    make_directory_with_file(tmp_path / "directory")
    (tmp_path / "link").symlink_to(tmp_path / target)
    LocalStorage().delete([str(tmp_path / "link")])
    assert names(tmp_path) == {"file", "directory"}
    assert names(tmp_path / "directory") == {"inside"}


def test_deletes_by_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name lies in the current directory, which is synced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with Seam() as seam:
        LocalStorage().delete(["file"])
    assert describe_commit(seam.calls, tmp_path) == ["unlink file", "fsync ."]


def test_what_cannot_be_deleted_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no descriptor leaks."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(system_calls, "unlink", raising(errno.EPERM, name="unlink"))
    with no_descriptor_leaks(), pytest.raises(PermissionError):
        LocalStorage().delete([str(tmp_path / "file")])
    assert names(tmp_path) == {"file"}


# --- destinations ---


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_honours_the_umask(tmp_path: Path, umask: int) -> None:
    """Files and directories are as open as the user's umask lets them be, temporary ones too."""
    before = os.umask(umask)
    try:
        upload = begin(tmp_path / "d/file")
        (temporary,) = temporaries(tmp_path / "d")
        temporary_mode = stat.S_IMODE(temporary.stat().st_mode)
        upload.write(0, memoryview(b"1234"))
        upload.sync()
        upload.commit()
    finally:
        os.umask(before)
    assert temporary_mode == stat.S_IMODE((tmp_path / "d/file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("target", ["target", "missing", "directory"])
def test_a_symlink_is_replaced_not_followed(tmp_path: Path, target: str) -> None:
    """Whatever it points to stays as it was."""
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").symlink_to(tmp_path / target)
    put(tmp_path / "file", b"new")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "target").read_bytes() == b"target"
    assert names(tmp_path) == {"target", "directory", "file"}


def test_a_symlinked_directory_is_followed(tmp_path: Path) -> None:
    """Runs often live on another disk behind a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    put(tmp_path / "link/file", b"1")
    assert (tmp_path / "real/file").read_bytes() == b"1"


def test_hard_links_keep_the_old_content(tmp_path: Path) -> None:
    """A new file takes the name; a link to the old one is a copy that nothing disturbs."""
    (tmp_path / "file").write_bytes(b"old")
    os.link(tmp_path / "file", tmp_path / "best")
    put(tmp_path / "file", b"new")
    assert (tmp_path / "best").read_bytes() == b"old"


@pytest.mark.parametrize("filled", [True, False])
def test_a_directory_at_the_destination(tmp_path: Path, filled: bool) -> None:
    """It is never replaced, and nothing is left beside it."""
    (tmp_path / "file").mkdir()
    if filled:
        (tmp_path / "file/inside").touch()
    with pytest.raises(IsADirectoryError):
        put_or_abort(tmp_path / "file")
    assert names(tmp_path) == {"file"}


def put_or_abort(path: Path) -> None:
    """As the worker does: abort after any error."""
    upload = begin(path)
    try:
        upload.write(0, memoryview(b"1234"))
        upload.sync()
        upload.commit()
    except OSError:
        upload.abort()
        raise


@pytest.mark.parametrize("path", ["file/inside", "file/inside/deeper"])
def test_a_file_where_a_directory_should_be(tmp_path: Path, path: str) -> None:
    """NotADirectoryError, and the file stays."""
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(NotADirectoryError):
        begin(tmp_path / path)
    assert names(tmp_path) == {"file"}


def test_a_dangling_directory_link(tmp_path: Path) -> None:
    """It can't be made into a directory: an error, not a loop."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        begin(tmp_path / "link/file")
    assert names(tmp_path) == {"link"}


@pytest.mark.parametrize("path", ["file", "a/b/file", "./file", "a/../file"])
def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """They mean the current directory at `begin`, even if it changes before the commit."""
    monkeypatch.chdir(tmp_path)
    upload = LocalStorage().begin(path, 1)
    os.chdir("/")
    upload.write(0, memoryview(b"1"))
    upload.sync()
    upload.commit()
    assert (tmp_path / os.path.normpath(path)).read_bytes() == b"1"


@pytest.mark.parametrize(
    "name", ["a" * 255, "é" * 127, "模" * 85, "with space\tand\nline", "-rf", "naïve.pt", "x\udcff.pt", ".tmp", "..."]
)
def test_any_name(tmp_path: Path, name: str) -> None:
    """Whatever the file system takes, up to its full 255 bytes."""
    put(tmp_path / name, b"1")
    assert os.listdir(tmp_path) == [name]


def test_a_name_too_long(tmp_path: Path) -> None:
    """ENAMETOOLONG, and nothing left."""
    with pytest.raises(OSError, match="too long"):
        put_or_abort(tmp_path / ("a" * 256))
    assert names(tmp_path) == set()


def test_a_read_only_file_system(tmp_path: Path) -> None:
    """Refused at once with EROFS; reading and sweeping go on."""
    with small_file_system(tmp_path / "mount", "size=1m") as mount:
        put(mount / "file", b"1")
        (mount / temporary_name("0" * 16, "dead")).touch()
        remount(mount, "ro")
        for path in (mount / "file", mount / "new/file"):
            with pytest.raises(OSError, match="Read-only") as raised:
                begin(path)
            assert raised.value.errno == errno.EROFS
        assert LocalStorage().sweep(str(mount)) == []
        with LocalStorage().open(str(mount / "file")) as reader:
            assert reader.num_bytes == 1


def test_opening_what_is_no_file(tmp_path: Path) -> None:
    """A directory is an error at once, and a pipe does not make the opener wait for a writer."""
    with pytest.raises(IsADirectoryError):
        LocalStorage().open(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        LocalStorage().open(str(tmp_path / "pipe"))


@pytest.mark.parametrize("target", ["file", "missing", "directory"])
def test_opening_without_following_links(tmp_path: Path, target: str) -> None:
    """A symbolic link is an OSError then, wherever it leads; a file, also behind a linked directory, is opened."""
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    for opening in (
        lambda: LocalStorage().open(str(tmp_path / "link"), follow_links=False),
        lambda: LocalStorage().read(str(tmp_path / "link"), 1000),
    ):
        with no_descriptor_leaks(), pytest.raises(OSError, match="symbolic links") as raised:
            opening()
        assert raised.value.errno == errno.ELOOP
    (tmp_path / "linked").symlink_to(tmp_path)
    with LocalStorage().open(str(tmp_path / "linked/file"), follow_links=False) as reader:
        assert reader.num_bytes == 4


def test_reading_what_is_no_file(tmp_path: Path) -> None:
    """Neither a directory nor a pipe, which has nothing to say, is a small file; no descriptor leaks."""
    os.mkfifo(tmp_path / "pipe")
    with no_descriptor_leaks():
        with pytest.raises(IsADirectoryError):
            LocalStorage().read(str(tmp_path), 1000)
        with pytest.raises(OSError, match="not a regular file"):
            LocalStorage().read(str(tmp_path / "pipe"), 1000)


# --- file systems that can do less: injected through the seam ---


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_direct_refused_at_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """The file is written through the page cache then."""

    def open_file(path: str, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_DIRECT:
            raise OSError(error, os.strerror(error))
        return FUNCTIONS["open_file"](path, flags, mode)  # type: ignore[no-any-return]

    monkeypatch.setattr(system_calls, "open_file", open_file)
    content = make_content(100_000)
    with no_descriptor_leaks():
        put(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("first_refused", [1, 3])
def test_direct_refused_by_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, first_refused: int
) -> None:
    """Also in mid-file, by several threads at once: the rest is buffered, all bytes arrive, no descriptor leaks."""
    num_pieces = 16
    refused = threading.Barrier(num_threads) if first_refused == 1 else None
    waited = threading.local()
    num_direct = 0

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        nonlocal num_direct
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            num_direct += 1
            if num_direct >= first_refused:
                if refused is not None and not hasattr(waited, "once"):
                    waited.once = True
                    refused.wait(60)  # all threads are inside when the first one is refused
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return FUNCTIONS["pwrite"](fd, view, offset)  # type: ignore[no-any-return]

    monkeypatch.setattr(system_calls, "pwrite", pwrite)
    content = make_content(num_pieces * 8192 + 77)
    view = as_view(content, "aligned")
    with no_descriptor_leaks():
        upload = begin(tmp_path / "file", len(content))
        next_piece = iter(range(0, len(content), 8192))
        pulling = threading.Lock()

        def write() -> None:
            while True:
                with pulling:
                    offset = next(next_piece, None)
                if offset is None:
                    return
                upload.write(offset, view[offset : offset + 8192])

        with ThreadPoolExecutor(num_threads) as threads:
            for writing in [threads.submit(write) for _ in range(num_threads)]:
                writing.result(60)
        upload.sync()
        upload.commit()
    assert (tmp_path / "file").read_bytes() == content
    assert num_direct < num_pieces


def test_other_direct_errors_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only EINVAL means "not this way": a disk error must not be retried through the cache."""
    monkeypatch.setattr(system_calls, "pwrite", raising(errno.EIO, when=lambda call: call == 1, name="pwrite"))
    upload = begin(tmp_path / "file", 8192)
    with pytest.raises(OSError, match="Input/output"):
        upload.write(0, as_view(bytes(8192), "aligned"))
    upload.abort()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("most", [1000, 4096, 5000])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, direct: bool) -> None:
    """A call may write less than asked for, whole pages or not."""
    monkeypatch.setattr(system_calls, "pwrite", lambda fd, view, offset: FUNCTIONS["pwrite"](fd, view[:most], offset))
    content = make_content(70_001)
    put_by_upload(LocalStorage(direct=direct), str(tmp_path / "file"), content)
    assert (tmp_path / "file").read_bytes() == content


def test_a_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an endless loop."""
    monkeypatch.setattr(system_calls, "pwrite", lambda fd, view, offset: 0)
    upload = begin(tmp_path / "file")
    with pytest.raises(OSError, match="wrote nothing"):
        upload.write(0, memoryview(b"1234"))
    upload.abort()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("most", [1, 1000])
def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Reading is not done until all is there."""
    content = make_content(3001)
    put(tmp_path / "file", content)
    monkeypatch.setattr(
        system_calls, "pread_into", lambda fd, view, offset: FUNCTIONS["pread_into"](fd, view[:most], offset)
    )
    view = memoryview(bytearray(3001))
    with LocalStorage().open(str(tmp_path / "file")) as reader:
        reader.read_into(0, view)
    assert bytes(view) == content


@pytest.mark.parametrize("when", ["written", "synced"])
def test_a_file_changed_from_outside_is_not_committed(tmp_path: Path, when: str) -> None:
    """A temporary file that somebody truncated is an error, and the old file stays."""
    (tmp_path / "file").write_bytes(b"old")
    upload = begin(tmp_path / "file")
    upload.write(0, memoryview(b"1234"))
    if when == "synced":
        upload.sync()
    (temporary,) = temporaries(tmp_path)
    os.truncate(temporary, 3)
    with pytest.raises(OSError, match="changed size"):
        upload.commit()
    upload.abort()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks can't be reserved the writes themselves make the file grow, in any order."""
    monkeypatch.setattr(system_calls, "allocate", lambda fd, num_bytes: None)
    content = make_content(100_001)
    upload = begin(tmp_path / "file", len(content))
    write_in_pieces(upload, as_view(content, "aligned"), 4096, num_threads=4)
    upload.sync()
    upload.commit()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (errno.EOPNOTSUPP, False),
        (errno.ENOSYS, False),
        (errno.EINVAL, False),
        (errno.EPERM, False),
        (errno.ENOSPC, True),
        (errno.EDQUOT, True),
        (errno.EFBIG, True),
        (errno.EIO, True),
    ],
)
def test_what_fallocate_may_answer(monkeypatch: pytest.MonkeyPatch, error: int, raised: bool) -> None:
    """ "Can't do that here" is no failure, "no room" is."""

    class Libc:
        @staticmethod
        def fallocate64(*_: object) -> int:
            return -1

    monkeypatch.setattr(system_calls, "_libc", Libc)
    monkeypatch.setattr("ctypes.get_errno", lambda: error)
    if raised:
        with pytest.raises(OSError, match=os.strerror(error)):
            system_calls.allocate(0, 1)
    else:
        system_calls.allocate(0, 1)


def test_allocation_reserves_the_room(tmp_path: Path) -> None:
    """So that a full disk is found before anything is written."""
    upload = begin(tmp_path / "file", MEBIBYTE)
    (temporary,) = temporaries(tmp_path)
    assert temporary.stat().st_size == MEBIBYTE
    assert temporary.stat().st_blocks * 512 >= MEBIBYTE
    upload.abort()


# --- the lock: who is alive ---


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    """Saving works; nothing can be known of who is alive, so nothing is swept, and the log says so once."""
    monkeypatch.setattr(system_calls, "try_lock", raising(error, name="try_lock"))
    files._say_that_there_are_no_locks.cache_clear()
    (tmp_path / temporary_name("0" * 16, "dead?")).touch()
    LocalStorage().lock(str(tmp_path / "other"), "me").release()
    upload = begin(tmp_path / "file")
    upload.write(0, memoryview(b"1234"))
    upload.sync()
    assert LocalStorage().sweep(str(tmp_path)) == []
    upload.commit()
    assert (tmp_path / "file").read_bytes() == b"1234"
    (said,) = [record for record in caplog.records if record.name == "asyncckpt"]
    assert "no file locks" in said.getMessage()


def test_other_lock_errors_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while locking is raised, with the new file removed again."""
    monkeypatch.setattr(system_calls, "try_lock", raising(errno.EIO, name="try_lock"))
    with no_descriptor_leaks(), pytest.raises(OSError, match="Input/output"):
        begin(tmp_path / "file")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("sweeper", ["has opened", "has locked", "has removed"])
def test_a_sweeper_may_meet_a_file_before_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweeper: str
) -> None:
    """Between create and lock a sweeper finds the file unlocked: whoever locks first decides, and nothing is lost."""
    met: list[Path] = []
    swept: list[bool] = []

    def try_lock(fd: int) -> bool:
        if met:
            return FUNCTIONS["try_lock"](fd)  # type: ignore[no-any-return]
        met.extend(temporaries(tmp_path))
        other = os.open(met[0], os.O_RDWR)
        try:
            if sweeper != "has opened":
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if sweeper == "has removed":
                os.unlink(met[0])
                fcntl.flock(other, fcntl.LOCK_UN)
            locked: bool = FUNCTIONS["try_lock"](fd)
            if sweeper == "has opened":
                swept.append(FUNCTIONS["try_lock"](other))
        finally:
            os.close(other)
        return locked

    monkeypatch.setattr(system_calls, "try_lock", try_lock)
    upload = begin(tmp_path / "file")
    (mine,) = temporaries(tmp_path)
    assert (mine == met[0]) == (sweeper == "has opened")
    assert not any(swept)
    assert LocalStorage().sweep(str(tmp_path)) == []
    upload.write(0, memoryview(b"1234"))
    upload.sync()
    upload.commit()
    assert names(tmp_path) == {"file"}


def test_a_file_system_that_never_locks_is_no_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving up is an error, and leaves nothing."""
    monkeypatch.setattr(system_calls, "try_lock", lambda fd: False)
    with no_descriptor_leaks(), pytest.raises(BlockingIOError):
        begin(tmp_path / "file")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("meanwhile", ["committed", "committed, and the name taken again"])
def test_a_sweeper_may_meet_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str) -> None:
    """The writer commits and lets go between the sweeper's open and its lock: the sweeper must see that."""
    upload = begin(tmp_path / "file")
    upload.write(0, memoryview(b"1234"))
    upload.sync()
    (temporary,) = temporaries(tmp_path)

    def try_lock(fd: int) -> bool:
        upload.commit()
        if meanwhile != "committed":
            temporary.write_bytes(b"another")
        return FUNCTIONS["try_lock"](fd)  # type: ignore[no-any-return]

    monkeypatch.setattr(system_calls, "try_lock", try_lock)
    assert LocalStorage().sweep(str(tmp_path)) == []
    assert (tmp_path / "file").read_bytes() == b"1234"
    assert temporary.exists() == (meanwhile != "committed")


def make_directory_with_file(path: Path) -> None:
    path.mkdir()
    (path / "inside").touch()


FOREIGN: dict[str, Callable[[Path], object]] = {
    "directory": lambda path: path.mkdir(),
    "filled directory": make_directory_with_file,
    "link": lambda path: path.symlink_to(path.with_name("target")),
    "dangling link": lambda path: path.symlink_to(path.with_name("missing")),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_never_sweeps_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """We make only regular files: anything else of such a name is somebody else's, and a pipe does not make us wait."""
    (tmp_path / "target").touch()
    path = tmp_path / temporary_name("0" * 16, "file")
    FOREIGN[kind](path)
    before = names(tmp_path)
    with no_descriptor_leaks():
        assert LocalStorage().sweep(str(tmp_path)) == []
    assert names(tmp_path) == before


def test_a_sweep_that_cannot_remove_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file's error does not save the others, nor raise."""
    for token in range(3):
        (tmp_path / temporary_name(f"{token:016x}", "file")).touch()
    monkeypatch.setattr(system_calls, "unlink", raising(errno.EIO, when=lambda call: call == 2, name="unlink"))
    assert len(LocalStorage().sweep(str(tmp_path))) == 2
    assert len(LocalStorage().sweep(str(tmp_path))) == 1
    assert names(tmp_path) == set()


# --- fork in mid-upload (a DataLoader worker) ---


def test_a_forked_child_does_not_release_the_lock(tmp_path: Path) -> None:
    """It closes its copies; the parent's upload goes on, alive, when the child exits."""
    upload = begin(tmp_path / "file")
    with forked_child() as end:
        assert LocalStorage().sweep(str(tmp_path)) == []
        end()
        assert LocalStorage().sweep(str(tmp_path)) == []
    upload.write(0, memoryview(b"1234"))
    upload.sync()
    upload.commit()
    assert (tmp_path / "file").read_bytes() == b"1234"


@pytest.mark.parametrize("during", ["writing", "committing", "reading", "locked", "cloning", "linking", "sweeping"])
def test_a_forked_child_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    """Neither locks, nor the space of files that are deleted, whatever the parent was at."""
    held: list[list[str]] = []

    def fork_at(name: str) -> None:
        def call(*args: Any) -> Any:
            held.append(open_in_forked_child(tmp_path))
            return FUNCTIONS[name](*args)

        monkeypatch.setattr(system_calls, name, call)

    storage = LocalStorage()
    put(tmp_path / "file", b"old")
    if during == "writing":
        upload = begin(tmp_path / "file")
        held.append(open_in_forked_child(tmp_path))
        upload.abort()
    elif during == "committing":
        fork_at("rename")
        put(tmp_path / "file", b"new")
    elif during == "reading":
        with storage.open(str(tmp_path / "file")):
            held.append(open_in_forked_child(tmp_path))
    elif during == "locked":
        lock = storage.lock(str(tmp_path), "me")
        held.append(open_in_forked_child(tmp_path))
        lock.release()
    elif during == "sweeping":
        (tmp_path / temporary_name("0" * 16, "file")).touch()
        fork_at("unlink")
        assert len(storage.sweep(str(tmp_path))) == 1
    else:
        if during == "cloning":
            monkeypatch.setattr(system_calls, "clone", lambda source, destination: None)
        fork_at("rename")
        storage.link(str(tmp_path / "file"), str(tmp_path / "link"))
    assert held == [[]]


def test_a_forked_child_cannot_abort_the_upload(tmp_path: Path) -> None:
    """Unwinding there, it leaves the parent's file alone."""
    upload = begin(tmp_path / "file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads may be running
        pid = os.fork()
    if pid == 0:
        upload.abort()
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(temporaries(tmp_path)) == 1
    upload.abort()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("ending", ["committed", "aborted", "died"])
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path, ending: str) -> None:
    """Nor the file's space: once the parent is done with the file nobody holds it, though the child lives."""
    upload = begin(tmp_path / "file")
    with forked_child():
        if ending == "committed":
            upload.write(0, memoryview(b"1234"))
            upload.sync()
            upload.commit()
            with (tmp_path / "file").open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif ending == "aborted":
            upload.abort()
            assert names(tmp_path) == set()
        else:
            for descriptor in (upload._file, upload._direct_file):
                assert descriptor is not None
                descriptor.close()  # as the kernel does
            assert len(LocalStorage().sweep(str(tmp_path))) == 1


def test_subprocesses_inherit_nothing(tmp_path: Path) -> None:
    """Every descriptor is closed on exec."""
    upload = begin(tmp_path / "file")
    with upload.reader() as reader:
        inheritable = [
            fd
            for fd in map(int, os.listdir("/proc/self/fd"))
            if os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(tmp_path)) and os.get_inheritable(fd)
        ]
        assert reader.num_bytes == 4
    upload.abort()
    assert inheritable == []


def test_a_directory_that_vanishes(tmp_path: Path) -> None:
    """Removed under an upload: the commit fails, abort raises nothing, and the next upload makes it anew."""
    upload = begin(tmp_path / "d/file")
    upload.write(0, memoryview(b"1234"))
    upload.sync()
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(FileNotFoundError):
        upload.commit()
    upload.abort()
    put(tmp_path / "d/file", b"1")
    assert names(tmp_path / "d") == {"file"}
