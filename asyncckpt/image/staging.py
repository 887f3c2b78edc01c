"""Staging: copy storages from live state straight to their places in the image.

Host memory is copied by threads of our own, each taking a batch as one native call: the GIL is taken a few times per
gigabyte, not once per tensor (beside a Python-busy trainer 2,000 separate copies took 10 s in place of 0.08), and
no OpenMP team is woken per tensor (with the cores busy, 250 of those took 1.1 s in place of 0.15). Device memory is
copied on a side stream that first waits for the work already queued; on CUDA the arena is registered with the driver
once, so that those copies are truly asynchronous.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

import torch
from torch.storage import UntypedStorage

from asyncckpt.errors import TornSnapshotError
from asyncckpt.image.arena import Arena
from asyncckpt.image.plan import Plan
from asyncckpt.threads import ThreadGroup, num_cores
from asyncckpt.warn import warn

_MAX_COPY_THREADS = 8
_LARGE_BYTES = 1 << 20
_PART_BYTES = 8 << 20
_BATCH_BYTES = 16 << 20  # small enough that threads end together, large enough to take the GIL rarely


def stage_contents(plan: Plan, buffer: memoryview) -> None:
    """Copy everything but the storages: the pickle and the small records."""
    for record, content in zip(plan.layout.records, plan.contents, strict=True):
        if isinstance(content, bytes):
            buffer[record.offset : record.offset + record.num_bytes] = content


class StorageCopies:
    """Copies of the storages with the given keys into an arena.

    `start` queues the device copies, `copy_host` makes the host ones, `synchronize` waits for the device ones. Between
    them, `wait_on_devices` makes the devices' current streams wait for the copies, without blocking the CPU.

    Copies made `beside_training` are batched into few native calls, so that the GIL is taken rarely. While the trainer
    waits it is free, and a memmove per part is a sixth faster, since it writes past the caches.
    """

    def __init__(
        self, plan: Plan, arena: Arena, keys: Set[int], copiers: ThreadGroup, *, beside_training: bool
    ) -> None:
        in_batches: list[_Target] = []
        self._moves: list[_Move] = []
        on_device: dict[torch.device, list[_Target]] = {}
        for target in _targets(plan, keys):
            device = target.storage.device
            if device.type == "cuda":
                on_device.setdefault(device, []).append(target)
            elif device.type == "cpu" and target.num_bytes >= _LARGE_BYTES and not beside_training:
                self._moves += _moves(arena.address, target)
            else:
                in_batches.append(target)
        with _plain_mode():
            image = torch.frombuffer(arena.buffer, dtype=torch.uint8)
            self._batches = _batches(*_split_up(*_pair_up(image, in_batches)))
            self._devices = {device: _pair_up(image, group) for device, group in on_device.items()}
        self._events: dict[torch.device, torch.cuda.Event] = {}
        self._copiers = copiers
        if on_device:
            _register_with_cuda(arena)

    def start(self) -> None:
        """Queue the device copies. Milliseconds."""
        for device, (destinations, sources) in self._devices.items():
            stream = _side_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream), _plain_mode():
                torch._foreach_copy_(destinations, sources, non_blocking=True)
                self._events[device] = stream.record_event()
            for source in sources:
                source.record_stream(stream)  # its memory may be freed while the copy still reads it

    def wait_on_devices(self) -> None:
        """Make each device's current stream wait for its copies. Does not block the CPU."""
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)

    @property
    def needs_host(self) -> bool:
        """Whether any of the copies is made by a CPU thread, so that a fence must block until it is."""
        return bool(self._batches or self._moves)

    def copy_host(self) -> None:
        """Copy host memory. Blocks, without the GIL."""
        batches, moves = iter(self._batches), iter(self._moves)

        def copy() -> None:  # on each thread; the iterators are shared, so each takes what comes next
            for destination, source, num_bytes in moves:
                ctypes.memmove(destination, source, num_bytes)
            with _plain_mode():
                for destinations, sources in batches:
                    _check_still_there(sources)
                    torch._foreach_copy_(destinations, sources)

        if self.needs_host:
            self._copiers.run_on_all(copy)

    def synchronize(self) -> None:
        """Wait until the device copies are there. Blocks, without the GIL."""
        for event in self._events.values():
            event.synchronize()


def _check_still_there(sources: Iterable[torch.Tensor]) -> None:
    """Storages may be shrunk under a late copy, which would read memory that is somebody else's."""
    for source in sources:
        if source.storage_offset() + source.numel() > source.untyped_storage().nbytes():
            raise TornSnapshotError(
                "a tensor was resized while its snapshot was taken, so the snapshot was thrown away"
            )


@contextlib.contextmanager
def _plain_mode() -> Iterator[None]:
    """Views made in the caller's inference mode could not be written to by other threads."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def find_torn(versions: Iterable[tuple[torch.Tensor, int]]) -> TornSnapshotError | None:
    """An error if one of the tensors was written to since it had the given version.

    In-place operations bump the version; fused optimizers and writes through `.data` do not, so this is the second
    line of defence behind the fence.
    """
    for tensor, version in versions:
        if tensor._version != version:
            return TornSnapshotError(
                f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} was written to while its snapshot was taken, "
                "so the snapshot was thrown away; call handle.wait_staged() before changing state outside "
                "optimizer.step(), or save with snapshot='copy'"
            )
    return None


def warm(arena: Arena, num_bytes: int, *, pin: bool) -> None:
    """Make the first `num_bytes` of the arena ready for fast staging. Blocks, without the GIL."""
    arena.prefault(num_bytes)
    if pin:
        _register_with_cuda(arena)


def copy_threads() -> ThreadGroup:
    """As many threads as it takes to use up the memory's bandwidth, each copying by itself."""
    return ThreadGroup("copier", min(_MAX_COPY_THREADS, num_cores()), _leave_openmp_alone)


def _leave_openmp_alone() -> None:
    """Keep torch from splitting this thread's copies over an OpenMP team.

    OpenMP's own setting is per thread; torch.set_num_threads would change the whole process. Where the library isn't
    found, copies are split, which is slower on busy machines and otherwise the same.
    """
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if re.search(r"/lib[a-z]*omp[0-9]*[-.][^/]*$", line.rstrip())}
    for library in libraries:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(library).omp_set_num_threads(1)


class _Target(NamedTuple):
    """A storage and its place in the image."""

    offset: int
    num_bytes: int
    storage: UntypedStorage


_Move = tuple[int, int, int]  # to address, from address, bytes
_Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]  # destinations, sources


def _targets(plan: Plan, keys: Set[int]) -> Iterator[_Target]:
    if not keys:
        return
    key = -1
    for record, content in zip(plan.layout.records, plan.contents, strict=True):
        if isinstance(content, UntypedStorage):
            key += 1
            if key in keys and record.num_bytes:
                yield _Target(record.offset, record.num_bytes, content)


def _moves(arena_address: int, target: _Target) -> Iterator[_Move]:
    """A large storage in parts, so that several threads share it."""
    to, source = arena_address + target.offset, target.storage.data_ptr()
    for start in range(0, target.num_bytes, _PART_BYTES):
        yield to + start, source + start, min(_PART_BYTES, target.num_bytes - start)


def _pair_up(image: torch.Tensor, targets: Sequence[_Target]) -> _Pairs:
    """Destination and source of each storage as flat bytes."""
    if not targets:
        return [], []
    # One split call gives all destinations: gap, payload, gap, payload, …, rest.
    sizes: list[int] = []
    position = 0
    for target in targets:
        sizes += (target.offset - position, target.num_bytes)
        position = target.offset + target.num_bytes
    sizes.append(image.numel() - position)
    destinations = list(torch.split_with_sizes(image, sizes)[1::2])
    sources = [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for _, _, s in targets]
    return destinations, sources


def _split_up(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> _Pairs:
    """The same with large tensors in parts, so that several threads share each."""

    def parts(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part for tensor in tensors for part in tensor.split(_PART_BYTES)]

    return parts(destinations), parts(sources)


def _batches(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> list[_Pairs]:
    """Runs of about `_BATCH_BYTES`."""
    batches: list[_Pairs] = []
    start, num_bytes = 0, 0
    for stop, source in enumerate(sources, 1):
        num_bytes += source.numel()
        if num_bytes >= _BATCH_BYTES or stop == len(sources):
            batches.append((destinations[start:stop], sources[start:stop]))
            start, num_bytes = stop, 0
    return batches


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]


_registered: set[int] = set()


def _register_with_cuda(arena: Arena) -> None:
    """Pin the arena, once. Where the driver refuses, copies still work but block the caller."""
    if arena.address in _registered:
        return
    cudart = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(arena.address, arena.num_bytes, 0))
    if error != 0:
        warn(f"the CUDA driver would not pin {arena.num_bytes:,} bytes (error {error}): staging blocks longer")
        return
    address = arena.address
    _registered.add(address)

    def unregister() -> None:
        _registered.discard(address)
        cudart.cudaHostUnregister(address)

    arena.before_close(unregister)
