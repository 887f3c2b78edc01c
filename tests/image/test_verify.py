"""Damage is found, named and never loaded; hostile files get a typed error, quickly, and run nothing."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import socket
import struct
import threading
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from mmap import MAP_PRIVATE, MAP_SHARED
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncckpt
import asyncckpt.image.load as load_module
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.image.layout import METADATA_RECORD, central_directory, local_header, plan_layout
from asyncckpt.image.verify import READ_BYTES, read_archive, verify_reader

from .compare import assert_same
from .images import BytesReader, image_of, payloads, torch_file

SMALL = {"weights": {str(i): torch.arange(i) for i in range(9)}, "step": 7, "name": "x" * 20}


@pytest.fixture(scope="module")
def small() -> bytes:
    return image_of(SMALL, {"epoch": 3, "metrics": {"loss": 0.5}})


@pytest.fixture(scope="module")
def large() -> bytes:
    """Records of one part, of several reads, and of several parts that are checked apart and joined."""
    sizes = (10, 9 << 20, 3 << 20, (64 << 20) + 12345, 100)
    return image_of([torch.frombuffer(bytearray(random.Random(n).randbytes(n)), dtype=torch.uint8) for n in sizes])


def problems_of(content: bytes | bytearray, num_threads: int = 1) -> tuple[str, ...]:
    return verify_reader(BytesReader(content), "x.pt", num_threads=num_threads).problems


def flipped(content: bytes, *offsets: int, mask: int = 0xFF) -> bytearray:
    damaged = bytearray(content)
    for offset in offsets:
        damaged[offset] ^= mask
    return damaged


def put(tmp_path: Path, content: bytes | bytearray, name: str = "file.pt") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def offsets_of(content: bytes) -> dict[str, tuple[int, int]]:
    """Where each record's payload starts and ends."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = {}
        for info in archive.infolist():
            name_bytes, extra_bytes = struct.unpack_from("<HH", content, info.header_offset + 26)
            start = info.header_offset + 30 + name_bytes + extra_bytes
            found[info.filename] = (start, start + info.file_size)
    return found


# --- whole files ---


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("which", ["small", "large"])
def test_whole_files_verify(which: str, num_threads: int, request: pytest.FixtureRequest) -> None:
    content = request.getfixturevalue(which)
    report = verify_reader(BytesReader(content), "x.pt", num_threads=num_threads)
    assert report.ok
    assert report.num_bytes == len(content)
    assert report.num_records == len(payloads(content))


def test_report_carries_the_metadata(small: bytes, tmp_path: Path) -> None:
    report = asyncckpt.verify(put(tmp_path, small))
    assert report.metadata is not None
    assert report.metadata["epoch"] == 3
    assert report.metadata["metrics"] == {"loss": 0.5}


@pytest.mark.parametrize("mmap", [True, False])
def test_files_of_torch_save_verify_and_load(mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "torch.pt"
    torch.save(SMALL, path)
    report = asyncckpt.verify(path)
    assert report.ok
    assert report.metadata is None
    assert_same(asyncckpt.load(path, mmap=mmap), SMALL)


# --- damage ---


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x80, 0xFF])
def test_flip_at_every_byte_is_detected(small: bytes, mask: int) -> None:
    """Payloads, headers, padding, directory, end record: our own files have no byte that may change."""
    missed = [offset for offset in range(len(small)) if not problems_of(flipped(small, offset, mask=mask))]
    assert missed == []


def test_flip_anywhere_stops_load(small: bytes, tmp_path: Path) -> None:
    for offset in random.Random(0).sample(range(len(small)), 150):
        with pytest.raises(CorruptCheckpointError, match=r"file\.pt is damaged: .*load an earlier checkpoint"):
            asyncckpt.load(put(tmp_path, flipped(small, offset)))


@pytest.mark.parametrize("which", ["small", "large", "torch"])
def test_every_flipped_record_is_named(which: str, request: pytest.FixtureRequest) -> None:
    content = torch_file(SMALL) if which == "torch" else request.getfixturevalue(which)
    rng = random.Random(1)
    for name, (start, stop) in offsets_of(content).items():
        if start < stop:
            problems = problems_of(flipped(content, rng.randrange(start, stop), mask=0x10))
            assert [name in problem for problem in problems] == [True], name


def test_several_flipped_records_are_all_named(small: bytes) -> None:
    names = ["archive/data/3", "archive/data/8", "archive/data.pkl"]
    problems = problems_of(flipped(small, *(offsets_of(small)[name][0] for name in names)))
    assert len(problems) == len(names)
    assert all(any(name in problem for problem in problems) for name in names)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_flips_in_large_records_are_detected(large: bytes, num_threads: int) -> None:
    rng = random.Random(num_threads)
    edges = [edge for start, stop in offsets_of(large).values() for edge in (start - 1, start, stop - 1, stop)]
    edges += [offsets_of(large)["archive/data/3"][0] + 16 * READ_BYTES + shift for shift in (-1, 0)]
    damaged = bytearray(large)
    for offset in edges[:: num_threads + 1] + [rng.randrange(len(large)) for _ in range(15)]:
        damaged[offset] ^= 1 << rng.randrange(8)
        assert problems_of(damaged, num_threads), offset
        damaged[:] = large


def test_truncation_at_every_length_is_detected(small: bytes) -> None:
    assert [n for n in range(len(small)) if not problems_of(small[:n])] == []


def test_truncation_of_large_files_is_detected(large: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, large)
    boundaries = sorted({edge for span in offsets_of(large).values() for edge in span} | {len(large) - 1, 0})
    for length in reversed(boundaries):
        os.truncate(path, length)
        assert not asyncckpt.verify(path).ok
        with pytest.raises(CorruptCheckpointError, match="empty" if length == 0 else "truncated|damaged"):
            asyncckpt.load(path)


@pytest.mark.parametrize("garbage", [b"\0", b"x" * 21, b"PK\x05\x06", b"\0" * 4096, b"z" * 200_000])
@pytest.mark.parametrize("end", ["front", "back"])
def test_added_garbage_is_detected(small: bytes, garbage: bytes, end: str) -> None:
    assert problems_of(garbage + small if end == "front" else small + garbage)


def test_swapped_records_are_detected() -> None:
    """Two whole, valid records in each other's place: only the directory and the layout tell."""
    content = image_of([torch.full((4,), 1), torch.full((4,), 2)])
    (first, first_end), (second, second_end) = (offsets_of(content)[f"archive/data/{i}"] for i in range(2))
    swapped = bytearray(content)
    swapped[first:first_end], swapped[second:second_end] = content[second:second_end], content[first:first_end]
    assert len(problems_of(swapped)) == 2


def test_payload_flips_in_files_of_torch_save_are_detected(tmp_path: Path) -> None:
    content = torch_file(SMALL)
    missed = []
    for name, (start, stop) in offsets_of(content).items():
        header = content.rindex(HEADER, 0, start)
        places = [*range(header, header + 4), *range(header + 30, header + 30 + len(name)), *range(start, stop)]
        missed += [offset for offset in places if not problems_of(flipped(content, offset))]
    assert missed == []
    start, _ = offsets_of(content)["archive/data/5"]
    with pytest.raises(CorruptCheckpointError, match="data/5"):
        asyncckpt.load(put(tmp_path, flipped(content, start)))


class ShrinkingReader(BytesReader):
    """A file that somebody empties after so many reads."""

    def __init__(self, content: bytes, num_reads: int) -> None:
        super().__init__(content)
        self.num_reads = num_reads

    def read_into(self, offset: int, view: memoryview) -> None:
        self.num_reads -= 1
        if self.num_reads < 0:
            raise EOFError("the file ends at byte 0")
        super().read_into(offset, view)


@pytest.mark.parametrize("which", ["small", "large"])
def test_file_that_shrinks_while_it_is_verified(which: str, request: pytest.FixtureRequest) -> None:
    """A problem in the report, not an exception; and each record that could not be read is named."""
    content = request.getfixturevalue(which)
    reader = ShrinkingReader(content, 1 << 30)
    assert verify_reader(reader, "x.pt").ok
    num_reads = (1 << 30) - reader.num_reads
    for allowed in range(num_reads):
        problems = verify_reader(ShrinkingReader(content, allowed), "x.pt").problems
        assert problems
        assert "ends at byte 0" in problems[-1]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_mutations_are_detected(small: bytes, data: st.DataObject) -> None:
    """Overwritten, inserted, removed and repeated runs of bytes."""
    start = data.draw(st.integers(0, len(small) - 1))
    stop = data.draw(st.integers(start, min(len(small), start + 200)))
    middle = data.draw(st.one_of(st.binary(max_size=200), st.just(small[start:stop] * 2), st.just(b"")))
    mutated = small[:start] + middle + small[stop:]
    assert (mutated == small) == (not problems_of(mutated))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=500), start=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02"]))
def test_random_bytes_are_no_checkpoint(content: bytes, start: bytes) -> None:
    assert problems_of(start + content)


# --- files that are something else ---


def _random_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes/readme.txt", "hello")
    return buffer.getvalue()


FOREIGN: dict[str, bytes] = {
    "text": b"loss: 0.5\n" * 100,
    "zip": _random_zip(),
    "empty zip": b"PK\x05\x06" + bytes(18),
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100),
    "gzip": gzip.compress(b"hello" * 100),
    "empty": b"",
    "one byte": b"P",
    "pickle": b"\x80\x04K\x01.",
    "zeros": bytes(100_000),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, content)
    assert not asyncckpt.verify(path).ok
    for weights_only in (True, False):
        with pytest.raises(CorruptCheckpointError, match=r"not|empty|no records"):
            asyncckpt.load(path, weights_only=weights_only)


def test_directories_pipes_and_sockets_are_refused(tmp_path: Path) -> None:
    """At once: opening a pipe would wait for somebody to write to it."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path, tmp_path / "pipe", tmp_path / "socket", "/dev/null"):
            for function in (asyncckpt.load, asyncckpt.verify):
                with pytest.raises(CorruptCheckpointError, match="not a checkpoint"):
                    function(path)


@pytest.mark.parametrize("name", ["absent.pt", "absent/file.pt", "file.pt/below"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    put(tmp_path, b"x")
    for function in (asyncckpt.load, asyncckpt.verify):
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint at") as caught:
            function(tmp_path / name)
        assert isinstance(caught.value, FileNotFoundError)


def test_path_types(small: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, small)
    assert_same(asyncckpt.load(str(path)), asyncckpt.load(path))
    assert asyncckpt.verify(str(path)).ok
    for function in (asyncckpt.load, asyncckpt.verify):
        with pytest.raises(TypeError, match="bytes"):
            function(os.fsencode(path))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="not a kind of storage"):
            function("carrier-pigeon://bucket/key.pt")


# --- the legacy format ---


def test_legacy_files_load_with_a_warning(tmp_path: Path) -> None:
    torch.save(SMALL, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="legacy format.*unverified"):
        loaded = asyncckpt.load(tmp_path / "old.pt")
    assert_same(loaded, SMALL)


@pytest.mark.filterwarnings("ignore:.*legacy format")
def test_damaged_legacy_files_give_typed_errors(tmp_path: Path) -> None:
    """They hold no checksums, so a flip may go unseen; but what is raised is ours."""
    torch.save(SMALL, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        with pytest.raises(CheckpointError):
            asyncckpt.load(put(tmp_path, content[: rng.randrange(len(content))]))
        with contextlib.suppress(CheckpointError):
            asyncckpt.load(put(tmp_path, flipped(content, rng.randrange(len(content)))))


# --- hostile files ---


class Runs:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["asyncckpt", "torch", "legacy"])
@pytest.mark.filterwarnings("ignore:.*legacy format")
def test_code_in_a_file_runs_only_when_asked_for_by_name(writer: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    state = {"weights": torch.ones(3), "extra": [Runs(marker)]}
    if writer == "asyncckpt":
        path.write_bytes(image_of(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=writer == "torch")
    if writer != "legacy":
        assert asyncckpt.verify(path).ok
    with pytest.raises(UnsafeCheckpointError, match=r"refers to posix\.mkdir.*weights_only=False"):
        asyncckpt.load(path)
    assert not marker.exists()
    asyncckpt.load(path, weights_only=False)
    assert marker.exists()


def make_archive(records: dict[str, bytes]) -> bytes:
    """A well-formed archive of any records, as our own writer lays it out."""
    layout = plan_layout((name, len(content)) for name, content in records.items())
    crcs = [crc32(content) for content in records.values()]
    parts = [
        local_header(record, crc) + content
        for record, crc, content in zip(layout.records, crcs, records.values(), strict=True)
    ]
    return b"".join((*parts, central_directory(layout, crcs)))


PICKLE = b"\x80\x02K\x01."  # the number 1


def _change(content: bytes, signature: bytes, at: int, form: str, value: int, which: int = 0) -> bytes:
    """Overwrite one field of the nth structure with this signature."""
    position = -1
    for _ in range(which + 1):
        position = content.index(signature, position + 1)
    changed = bytearray(content)
    struct.pack_into(form, changed, position + at, value)
    return bytes(changed)


def _zip64(count: int, size: int, offset: int, locator: int | None = None) -> bytes:
    """An archive of one record whose directory is described by zip64 end records alone."""
    plain = make_archive({"data.pkl": PICKLE})
    directory_at = plain.index(b"PK\x01\x02")
    body = plain[: plain.index(b"PK\x05\x06")]
    if size < 0:
        size, offset = len(body) - directory_at, directory_at
    end = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, offset)
    end += struct.pack("<IIQI", 0x07064B50, 0, len(body) if locator is None else locator, 1)
    return body + end + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def _deflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", PICKLE)
        archive.writestr("archive/data/0", bytes(50 << 20))
    return buffer.getvalue()


def _bomb_of_overlapping_entries() -> bytes:
    """Ten thousand directory entries that share one record."""
    content = make_archive({"data.pkl": PICKLE, "data/0": bytes(60_000)})
    at, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entry = content[content.index(b"PK\x01\x02", at + 1) : end]
    entries = b"".join(entry.replace(b"data/0", b"%06d" % index) for index in range(10_000))
    directory = content[at:end] + entries
    return (
        content[:at] + directory + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 10_002, 10_002, len(directory), at, 0)
    )


def _named_oddly() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, payload in (("data.pkl", PICKLE), (METADATA_RECORD, b"{}"), ("data/ü", b"")):
            archive.writestr(f"archive/{name}", payload)
    return content.getvalue()


TWO = make_archive({"data.pkl": PICKLE, "data/0": b"x" * 100, "data/1": b"y" * 100})
OURS = make_archive({"data.pkl": PICKLE, METADATA_RECORD: b"{}"})
ENTRY, END, HEADER = b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04"

HOSTILE: dict[str, bytes] = {
    "overlapping records": _change(TWO, ENTRY, 42, "<I", 0, which=1),
    "overlapping bomb": _bomb_of_overlapping_entries(),
    "a name that is no ASCII": _named_oddly(),
    "duplicate names": TWO.replace(b"data/1", b"data/0"),
    "record past the end": _change(TWO, ENTRY, 42, "<I", 1 << 30, which=2),
    "giant record": _change(_change(TWO, ENTRY, 20, "<I", 0xFFFFFFF0), ENTRY, 24, "<I", 0xFFFFFFF0),
    "lost zip64 sizes": _change(_change(TWO, ENTRY, 20, "<I", 0xFFFFFFFF), ENTRY, 24, "<I", 0xFFFFFFFF),
    "giant count": _change(TWO, END, 10, "<H", 0xFFFE),
    "low count": _change(TWO, END, 10, "<H", 2),
    "no records": _change(TWO, END, 10, "<H", 0),
    "giant directory": _change(TWO, END, 12, "<I", 0xFFFFFFFE),
    "directory outside": _change(TWO, END, 16, "<I", 0xFFFFFFFE),
    "directory in the data": _change(TWO, END, 16, "<I", 0),
    "long name in the directory": _change(TWO, ENTRY, 28, "<H", 0xFFFF),
    "long extra in the directory": _change(TWO, ENTRY, 30, "<H", 0xFFFF),
    "long comment in the directory": _change(TWO, ENTRY, 32, "<H", 0xFFFF),
    "long name in a header": _change(TWO, HEADER, 26, "<H", 0xFFFF),
    "long extra in a header": _change(TWO, HEADER, 28, "<H", 0xFFFF, which=2),
    "other name in a header": TWO.replace(b"data/1", b"data/9", 1),
    "zip64: count of 2^60": _zip64(1 << 60, -1, 0),
    "zip64: count of 2^60 in a directory of 2^63": _zip64(1 << 60, 1 << 63, 0),
    "zip64: offset of 2^63": _zip64(1, 100, 1 << 63),
    "zip64: end outside": _zip64(1, -1, 0, locator=1 << 63),
    "zip64: end at the start": _zip64(1, -1, 0, locator=0),
    "zip64: no end record": _change(_zip64(1, -1, 0), b"PK\x06\x06", 0, "<I", 0),
    "deflated": _deflated(),
    "deep metadata": make_archive({"data.pkl": PICKLE, METADATA_RECORD: b'{"a":' + b"[" * 1_000_000}),
    "deep valid metadata": make_archive(
        {"data.pkl": PICKLE, METADATA_RECORD: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"}
    ),
    "metadata that is a list": make_archive({"data.pkl": PICKLE, METADATA_RECORD: b"[1]"}),
    "metadata that is not UTF-8": make_archive({"data.pkl": PICKLE, METADATA_RECORD: b'{"\xff": 1}'}),
    "metadata of 10^9 bytes": _change(_change(OURS, ENTRY, 20, "<I", 10**9, which=1), ENTRY, 24, "<I", 10**9, which=1),
    "large metadata": make_archive({"data.pkl": PICKLE, METADATA_RECORD: b"{" + b" " * (17 << 20) + b"}"}),
    "no pickle": make_archive({"data/0": b"x"}),
}


def test_compressed_records_are_named() -> None:
    assert problems_of(_deflated()) == ("record archive/data.pkl is compressed, which torch never writes",)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_give_typed_errors_fast_and_small(content: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, content)
    tracemalloc.start()
    try:
        assert not asyncckpt.verify(path).ok
        with pytest.raises(CorruptCheckpointError):
            asyncckpt.load(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 48 << 20


FAR = 64 << 30
SPARSE = {  # number of records, bytes of the directory, its offset; -1: the truth
    "a record smaller than the gap after it": (-1, -1, -1),
    "a directory long before the end": (2, 110, 0),
    "a directory of 64 GB with two records": (2, FAR, 0),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("lies", SPARSE.values(), ids=SPARSE)
def test_huge_files_are_not_read_on_the_word_of_a_lie(lies: tuple[int, int, int], tmp_path: Path) -> None:
    content = make_archive({"data.pkl": PICKLE, "data/0": b"x"})
    at, end = content.index(ENTRY), content.index(END)
    count, size, offset = (truth if lie == -1 else lie for lie, truth in zip(lies, (2, end - at, FAR), strict=True))
    tail = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, offset)
    tail += struct.pack("<IIQI", 0x07064B50, 0, FAR + end - at, 1)
    path = tmp_path / "sparse.pt"
    with path.open("wb") as file:
        file.write(content[:at])
        file.seek(FAR)
        file.write(content[at:end] + tail + content[end:])
    tracemalloc.start()
    try:
        asyncckpt.verify(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 48 << 20


REDUCE_TO_NOTHING = b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R."
PICKLES: dict[str, tuple[bytes, type[CheckpointError]]] = {
    "empty": (b"", CorruptCheckpointError),
    "unfinished": (b"\x80\x02}q", CorruptCheckpointError),
    "no stack": (b"\x80\x02.", CorruptCheckpointError),
    "no memo": (b"\x80\x02h\x07.", CorruptCheckpointError),
    "not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", CorruptCheckpointError),
    "string of 4 GB": (b"\x80\x02X\xff\xff\xff\xff.", CheckpointError),
    "eval": (REDUCE_TO_NOTHING, UnsafeCheckpointError),
    "unknown opcode": (b"\x80\x02\xfe.", UnsafeCheckpointError),
    "persistent id of no kind": (b"\x80\x02K\x01Q.", CheckpointError),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("content", "error"), PICKLES.values(), ids=PICKLES)
def test_nonsense_pickles_give_typed_errors(content: bytes, error: type[CheckpointError], tmp_path: Path) -> None:
    with pytest.raises(error):
        asyncckpt.load(put(tmp_path, make_archive({"data.pkl": content, "version": b"3\n"})))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_pickles_with_right_checksums_give_typed_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A writer that makes nonsense on purpose: what weights_only lets through, or an error of ours."""
    records = payloads(image_of({"a": torch.arange(5), "b": [1, "x"]}))
    mutated = bytearray(records["data.pkl"])
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    path = put(tmp_path_factory.getbasetemp(), make_archive(records | {"data.pkl": bytes(mutated)}), "mutated.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(CheckpointError, MemoryError):
            asyncckpt.load(path)


# --- errors that are the caller's own ---


def _fail(*_: object) -> Any:
    raise KeyError("mine")


class Vanishing:
    """A class that will not be there when its file is loaded."""


def test_the_callers_own_errors_pass_unchanged(small: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, small)
    with pytest.raises(KeyError, match="mine"):
        asyncckpt.load(path, map_location=_fail)
    with pytest.raises(RuntimeError, match="nonsense") as caught:
        asyncckpt.load(path, map_location="nonsense")
    assert not isinstance(caught.value, CheckpointError)


def test_a_class_that_is_gone_is_not_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, image_of(Vanishing()))
    monkeypatch.delattr(f"{__name__}.Vanishing")
    with pytest.raises(AttributeError, match="Vanishing"):
        asyncckpt.load(path, weights_only=False)


# --- tensors in use ---


@pytest.fixture
def shared_mapping() -> Iterator[None]:
    with torch.serialization.set_default_mmap_options(MAP_SHARED):
        yield


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.usefixtures("shared_mapping")
def test_writes_to_loaded_tensors_never_change_the_file(small: bytes, mmap: bool, tmp_path: Path) -> None:
    path = put(tmp_path, small)
    for tensor in asyncckpt.load(path, mmap=mmap)["weights"].values():
        tensor.fill_(-1)
    assert path.read_bytes() == small
    assert torch.serialization.get_default_mmap_options() == MAP_SHARED


def test_concurrent_loads_map_privately(small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option is process-wide in older torch: a load that ends must not take it away from one under way."""
    path = put(tmp_path, small)
    seen: list[int | None] = []
    torch_load = torch.load

    def note(*args: Any, **options: Any) -> Any:
        before = torch.serialization.get_default_mmap_options()
        loaded = torch_load(*args, **options)
        seen.extend([before, torch.serialization.get_default_mmap_options()])
        return loaded

    monkeypatch.setattr(torch, "load", note)

    def work() -> None:
        with torch.serialization.set_default_mmap_options(MAP_SHARED):
            for _ in range(5):
                for tensor in asyncckpt.load(path)["weights"].values():
                    tensor.fill_(-1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(seen) == {MAP_PRIVATE}
    assert len(seen) == 2 * 4 * 5
    assert path.read_bytes() == small


def test_replacing_or_deleting_the_file_leaves_loaded_tensors(large: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, large)
    loaded = asyncckpt.load(path)
    other = put(tmp_path, bytes(len(large)), "other")
    os.replace(other, path)
    path.unlink()
    expected = payloads(large)
    for index, tensor in enumerate(loaded):
        assert tensor.numpy().tobytes() == expected[f"data/{index}"]


def test_what_was_verified_is_what_is_loaded(small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file comes under the name between the two."""
    path = put(tmp_path, small)
    other = put(tmp_path, image_of({"other": 1}), "other.pt")
    check = load_module._check

    def check_then_replace(*args: Any) -> Any:
        checked = check(*args)
        os.replace(other, path)
        return checked

    monkeypatch.setattr(load_module, "_check", check_then_replace)
    assert_same(asyncckpt.load(path), SMALL)
    monkeypatch.undo()
    assert asyncckpt.load(path) == {"other": 1}


@pytest.mark.parametrize(
    "map_location",
    [None, "cpu", "meta", torch.device("cpu"), torch.device("meta"), {"cpu": "meta"}, lambda storage, _: storage],
    ids=str,
)
@pytest.mark.parametrize("mmap", [True, False])
def test_map_location_is_torchs(small: bytes, map_location: Any, mmap: bool, tmp_path: Path) -> None:
    path = put(tmp_path, small)
    loaded = asyncckpt.load(path, map_location, mmap=mmap)
    assert_same(loaded, torch.load(path, map_location=map_location, mmap=mmap, weights_only=True))


def test_archive_is_parsed_as_zipfile_does(small: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(small)) as archive:
        theirs = [(info.filename, info.header_offset, info.file_size, info.CRC) for info in archive.infolist()]
    assert [tuple(entry) for entry in read_archive(BytesReader(small)).entries] == theirs
