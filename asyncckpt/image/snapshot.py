"""Snapshots: from a plan to an image in an arena, at once or behind the fence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from asyncckpt.image import fence
from asyncckpt.image.arena import Arena, ArenaPool
from asyncckpt.image.checksum import ImageSource, StagedImage
from asyncckpt.image.plan import Plan
from asyncckpt.image.staging import StorageCopies, find_torn, stage_contents, warm
from asyncckpt.image.streaming import StreamedImage
from asyncckpt.records import Timings
from asyncckpt.threads import Latch, ThreadGroup, once
from asyncckpt.warn import warn

SnapshotMode = Literal["copy", "overlap"]
SNAPSHOT_MODES: tuple[str, ...] = get_args(SnapshotMode)


class Snapshot:
    """An image, complete or on its way to being so. `release` gives its memory back."""

    def __init__(self, pool: ArenaPool, arena: Arena, source: ImageSource) -> None:
        self.source: ImageSource | None = source
        self._pool = pool
        self._arena: Arena | None = arena
        self._staged = Latch()
        self._error: BaseException | None = None
        self._staging: fence.LateStaging | None = None

    @property
    def is_complete(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return self._staged.is_set()

    @property
    def arena(self) -> Arena | None:
        """Where the image lies; None once it is released."""
        return self._arena

    def complete(self, error: BaseException | None = None, staging: fence.LateStaging | None = None) -> None:
        """Staging is over; `staging` was its late part."""
        self._error = error
        self._staging = staging
        self._staged.set()

    def wait(self) -> ImageSource:
        """The bytes to write, once they are final. Blocks; raises what went wrong while staging."""
        self._staged.wait()
        if self._error is not None:
            raise self._error
        assert self.source is not None
        return self.source

    def let_pass(self) -> None:
        """Somebody has seen that staging is over, and may write to the state from now on."""
        staging = self._staging
        if staging is not None:
            staging.let_pass()

    def check(self) -> None:
        """Raise if a tensor turns out, only now, to have been written to while it was copied."""
        staging = self._staging
        if staging is not None:
            staging.check()
            if staging.torn is not None:
                raise staging.torn

    def release(self) -> None:
        """Give the memory back. Waits until staging is over; safe to call twice."""
        self._staged.wait()
        staging, self._staging = self._staging, None  # it keeps the tensors
        self._error = None  # its traceback has frames that hold this snapshot
        if staging is not None:
            staging.retire()
        arena, self._arena, self.source = self._arena, None, None
        if arena is not None:
            self._pool.release(arena)


class Snapshotter:
    """Takes snapshots in one mode, out of one pool of arenas: late parts on `stagers`, copies on `copiers`."""

    def __init__(self, mode: SnapshotMode, max_arenas: int, stagers: ThreadGroup, copiers: ThreadGroup) -> None:
        self._mode = mode
        self._pool = ArenaPool(max_arenas, self._make_arena)
        self._stagers = stagers
        self._copiers = copiers

    def _make_arena(self, num_bytes: int) -> Arena:
        """Not on the calling thread, where Ctrl-C between the kernel's doing and our knowing would lose memory."""
        made: list[Arena] = []
        self._copiers.run_on_all(lambda: made.append(Arena(num_bytes)), 1)
        return made.pop()

    def take(
        self,
        plan: Plan,
        optimizers: Sequence[Any],
        modules: Sequence[torch.nn.Module],
        timings: Timings,
        on_staged: Callable[[], None],
    ) -> Snapshot:
        """Stage the planned state: all of it before returning, or in overlap mode all but what the fence guards.

        `on_staged` is called once nothing of the live state is needed any more, on whichever thread that happens.
        """
        started = time.perf_counter()
        late_keys = self._late_keys(plan, optimizers, modules)
        versions, late_versions = fence.split_versions(plan, late_keys)
        arena = self._pool.acquire(plan.layout.num_bytes)
        snapshot = Snapshot(self._pool, arena, StagedImage(plan.layout, arena.buffer))
        copies: list[StorageCopies] = []
        finish: Callable[[], None] | None = None
        try:
            stage_contents(plan, arena.buffer)
            rest = set(range(len(plan.storages))) - late_keys
            copies.append(at_once := StorageCopies(plan, arena, rest, self._copiers, beside_training=False))
            copies.append(late := StorageCopies(plan, arena, late_keys, self._copiers, beside_training=True))
            at_once.start()
            if late_keys:
                at_once.wait_on_devices()  # device memory is safe then from all that is queued later
            late.start()
            at_once.copy_host()
            if not late_keys:
                at_once.synchronize()
            arena.used_bytes = max(arena.used_bytes, plan.layout.num_bytes)
            if (torn := find_torn(versions)) is not None:
                raise torn
            if late_keys:
                fence.guard(optimizers, modules)
                staging = fence.LateStaging(late, late_versions, timings)
                finish = once(lambda: _finish(snapshot, at_once, staging, timings, started, on_staged))
                staging.stand()
                self._stagers.put(finish)
            else:
                timings.stage_secs = time.perf_counter() - started
                snapshot.complete()
                on_staged()
        except BaseException as error:
            # Nothing may still be filling the arena when it is given back, also after Ctrl-C anywhere above.
            if finish is not None:
                self._stagers.put(finish)
            else:
                snapshot.complete(error)
            for started_copies in copies:
                started_copies.synchronize()
            snapshot.release()
            raise
        return snapshot

    def stream(self, plan: Plan, num_bytes: int) -> Snapshot:
        """A snapshot that is staged piece by piece while it is written; the state must not change until then."""
        arena = self._pool.acquire(num_bytes)
        snapshot = Snapshot(self._pool, arena, StreamedImage(plan, arena, num_bytes))
        snapshot.complete()
        return snapshot

    def prepare(self, plan: Plan) -> None:
        """Warm one arena for images of such a plan. Blocks, without the GIL."""
        num_bytes = plan.layout.num_bytes
        arena = self._pool.acquire(num_bytes)
        try:
            warm(arena, num_bytes, pin=any(storage.device.type == "cuda" for storage in plan.storages))
        finally:
            self._pool.release(arena)

    def close(self) -> None:
        """Give all memory back, what is still lent as it returns."""
        self._pool.close()

    def _late_keys(self, plan: Plan, optimizers: Sequence[Any], modules: Sequence[torch.nn.Module]) -> set[int]:
        if self._mode == "copy" or not optimizers:
            return set()
        reason = fence.why_not_overlap(optimizers, modules)
        if reason is not None:
            warn(f"snapshot='overlap' fell back to 'copy' for this save: {reason}")
            return set()
        return fence.late_keys(plan, optimizers)


def _finish(
    snapshot: Snapshot,
    at_once: StorageCopies,
    staging: fence.LateStaging,
    timings: Timings,
    started: float,
    on_staged: Callable[[], None],
) -> None:
    """The background part of an overlapped snapshot."""
    error: BaseException | None = None
    try:
        staging.finish()
        at_once.synchronize()
    except BaseException as caught:
        error = caught
    timings.stage_secs = time.perf_counter() - started
    snapshot.complete(error, staging)
    on_staged()
