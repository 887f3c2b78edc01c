"""Images without disks: the bytes of a checkpoint file made in memory, and a reader over bytes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import torch
from torch.storage import UntypedStorage

from asyncckpt.image.arena import Arena
from asyncckpt.image.checksum import ImageSource, StagedImage
from asyncckpt.image.plan import Plan, plan_state
from asyncckpt.storage.base import Reader

from .compare import storage_bytes


class BytesReader(Reader):
    """A file that is held in memory."""

    def __init__(self, content: bytes | bytearray) -> None:
        self._content = content
        self.num_bytes = len(content)

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > len(self._content):
            raise EOFError(f"the file ends at byte {len(self._content)}")
        view[:] = memoryview(self._content)[offset : offset + len(view)]

    def close(self) -> None:
        pass


def write_out(source: ImageSource, piece_bytes: int) -> bytes:
    """The file that a writer would make; every byte must come exactly once."""
    content = bytearray(source.num_bytes)
    written = 0
    for window in source.windows(piece_bytes):
        for offset, view in window:
            assert 0 < len(view) <= piece_bytes
            content[offset : offset + len(view)] = view
            written += len(view)
    assert written == len(content) == source.num_bytes
    return bytes(content)


def stage(plan: Plan, piece_bytes: int = 1 << 20) -> bytes:
    """The file's bytes, from an image filled one storage after another."""
    arena = Arena(plan.layout.num_bytes)
    try:
        arena.buffer[:] = b"\xaa" * arena.num_bytes  # what an earlier image left there
        for record, content in zip(plan.layout.records, plan.contents, strict=True):
            payload = storage_bytes(content) if isinstance(content, UntypedStorage) else content or b""
            arena.buffer[record.offset : record.offset + len(payload)] = payload
        return write_out(StagedImage(plan.layout, arena.buffer), piece_bytes)
    finally:
        arena.close()


def image_of(state: object, metadata: Mapping[str, object] | None = None) -> bytes:
    """The file that asyncckpt writes for `state`."""
    return stage(plan_state(state, metadata))


def torch_file(state: object) -> bytes:
    """The file that torch.save writes for `state`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def payloads(content: bytes) -> dict[str, bytes]:
    """Every record of a zip archive, by its name without the folder."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
