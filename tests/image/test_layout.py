"""The layout: files put together from it open everywhere, alignment holds, and the arithmetic holds past 4 GiB."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.image.layout import (
    LARGE_ALIGNMENT,
    LARGE_RECORD_BYTES,
    SMALL_ALIGNMENT,
    Layout,
    central_directory,
    local_header,
    plan_layout,
)
from asyncckpt.image.plan import plan_state
from asyncckpt.image.verify import read_archive
from asyncckpt.storage.local import LocalStorage

from .images import image_of, payloads

EDGE = 0xFFFFFFFF  # from here on, 32 bits don't hold it
SIZES = st.one_of(
    st.integers(0, 300),
    st.integers(0, 70_000),
    st.sampled_from([63, 64, 65, LARGE_RECORD_BYTES - 1, LARGE_RECORD_BYTES, LARGE_RECORD_BYTES + 1]),
)


def assemble(contents: dict[str, bytes]) -> tuple[Layout, bytes]:
    layout = plan_layout((name, len(content)) for name, content in contents.items())
    file = bytearray()
    crcs = []
    for record, content in zip(layout.records, contents.values(), strict=True):
        assert len(file) == record.header_offset
        crcs.append(crc32(content))
        file += local_header(record, crcs[-1])
        assert len(file) == record.offset
        file += content
    assert len(file) == layout.directory_offset
    file += central_directory(layout, crcs)
    assert len(file) == layout.num_bytes
    return layout, bytes(file)


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(SIZES, max_size=20), seed=st.integers(0, 1000))
def test_any_sizes_make_a_zip_file(sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    contents = {f"data/{'n' * rng.randint(0, 80)}{i}": rng.randbytes(size) for i, size in enumerate(sizes)}
    layout, file = assemble(contents)
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"archive/{name}" for name in contents]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert payloads(file) == contents
    for record in layout.records:
        assert record.offset % SMALL_ALIGNMENT == 0
        assert record.num_bytes < LARGE_RECORD_BYTES or record.offset % LARGE_ALIGNMENT == 0
        assert record.offset - record.header_offset < 30 + len(record.name) + 8 + 4 + LARGE_ALIGNMENT + 20


def test_padding_stays_small() -> None:
    """4,096 everywhere would make 41 MB of these."""
    layout = plan_layout((f"data/{index}", 100) for index in range(10_000))
    assert layout.num_bytes < 3 << 20


def test_records_of_a_state() -> None:
    """In torch's order, without the two records that would make newer torch compute places instead of reading them."""
    names = list(payloads(image_of({"a": torch.ones(2), "b": torch.ones(3)})))
    assert names == ["data.pkl", "byteorder", "data/0", "data/1", "version", ".data/serialization_id", "asyncckpt.json"]


def test_equal_states_give_equal_files() -> None:
    state = {"a": torch.ones(2), "b": [torch.zeros(1 << 18)]}
    assert image_of(state, {"n": 1}) == image_of(state, {"n": 1})


def test_digest_tells_layouts_apart() -> None:
    def digest(*sizes: int) -> str:
        return plan_layout((f"data/{index}", size) for index, size in enumerate(sizes)).digest()

    assert digest(10, 20) == digest(10, 20)
    assert len({digest(10, 20), digest(20, 10), digest(10, 21), digest(10), digest()}) == 5
    assert len(digest()) == 64
    assert plan_state({"a": torch.ones(2)}).layout.digest() == plan_state({"b": torch.zeros(2)}).layout.digest()


# --- past 4 GiB, with headers in sparse files ---


def write_sparse(path: Path, sizes: list[int]) -> Layout:
    """A file of that layout whose payloads are holes."""
    layout = plan_layout([*((f"data/{index}", size) for index, size in enumerate(sizes)), ("version", 2)])
    with path.open("wb") as file:
        for record in layout.records:
            file.seek(record.header_offset)
            assert file.write(local_header(record, 7)) == record.offset - record.header_offset
        file.write(b"3\n")
        crcs = [7] * len(sizes) + [crc32(b"3\n")]
        assert file.tell() == layout.directory_offset
        file.write(central_directory(layout, crcs))
        assert file.tell() == layout.num_bytes
    return layout


BOUNDARIES = {
    "one byte below": [EDGE - 1, 5],
    "the edge": [EDGE, 5],
    "one byte above": [EDGE + 1, 5],
    "a terabyte": [1 << 40, 5],
    "record ends below the edge": [EDGE - 4000, 5, 7],
    "many past it": [3 << 30, 3 << 30, 5, 5 << 30, 0, 9],
}


def size_in_local_header(header: bytes) -> int:
    """As a strict reader takes it: the 32-bit field, or the zip64 extra field where that one is full."""
    size, name_bytes = struct.unpack_from("<I", header, 22)[0], struct.unpack_from("<H", header, 26)[0]
    if size != EDGE:
        return int(size)
    kind, length, wide, _ = struct.unpack_from("<HHQQ", header, 30 + name_bytes)
    assert (kind, length) == (1, 16)
    return int(wide)


@pytest.mark.parametrize("sizes", BOUNDARIES.values(), ids=BOUNDARIES)
def test_zip64_boundaries(sizes: list[int], tmp_path: Path) -> None:
    """zipfile, torch and our own reader find every record of huge files where the layout says."""
    path = tmp_path / "sparse.pt"
    layout = write_sparse(path, sizes)
    expected = [(f"archive/{record.name}", record.header_offset, record.num_bytes) for record in layout.records]
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert [(info.filename, info.header_offset, info.file_size) for info in infos] == expected
        for info in infos:
            archive.open(info).close()  # checks the local header against the directory
    assert [size_in_local_header(local_header(record, 7)) for record in layout.records] == [*sizes, 2]
    reader: Any = torch._C.PyTorchFileReader(str(path))
    assert [reader.get_record_offset(record.name) for record in layout.records] == [r.offset for r in layout.records]
    with LocalStorage().open(str(path)) as file:
        entries = read_archive(file).entries
    assert [(entry.name, entry.header_offset, entry.num_bytes) for entry in entries] == expected


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.one_of(st.integers(EDGE - 200_000, EDGE + 200), st.integers(0, 9)), min_size=1, max_size=6))
def test_directory_has_the_planned_size(sizes: list[int]) -> None:
    layout = plan_layout((f"data/{index}", size) for index, size in enumerate(sizes))
    assert len(central_directory(layout, [0] * len(sizes))) == layout.num_bytes - layout.directory_offset
    for record in layout.records:
        assert len(local_header(record, 0)) == record.offset - record.header_offset


@pytest.mark.parametrize("num_records", [0xFFFE, 0xFFFF, 0x10000])
def test_number_of_records_past_16_bits(num_records: int, tmp_path: Path) -> None:
    _, file = assemble({f"{index}": b"" for index in range(num_records)})
    (path := tmp_path / "many.pt").write_bytes(file)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == num_records
    with LocalStorage().open(str(path)) as reader:
        assert len(read_archive(reader).entries) == num_records
    listing = subprocess.run(["unzip", "-Zh", path], capture_output=True, text=True).stdout
    assert f"number of entries: {num_records}" in listing
