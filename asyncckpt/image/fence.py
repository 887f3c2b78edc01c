"""Overlap: which storages may be staged late, and the fence that training may not pass before they are.

Only `optimizer.step` writes parameters and optimizer state, so their copies may run during the next forward and
backward. One permanent global hook before every optimizer's step holds it until they are done. The hook is global
because per-instance hooks miss wrapped optimizers and run after older ones, and permanent because a changing set of
hooks makes compiled steps recompile.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from asyncckpt.errors import TornSnapshotError
from asyncckpt.image.plan import Plan
from asyncckpt.image.staging import StorageCopies, find_torn
from asyncckpt.records import Timings


class LateStaging:
    """The late part of one overlapped snapshot; the fence stands from `stand` to `retire`.

    It stands on when the copies are made, open: whoever steps then is noted, so that only other writes count as torn.
    """

    def __init__(self, copies: StorageCopies, versions: Sequence[tuple[torch.Tensor, int]], timings: Timings) -> None:
        self._timings = timings
        self._copies = copies
        self._versions = versions
        self._storages = frozenset(tensor.untyped_storage()._cdata for tensor, _ in versions)
        self._torn: TornSnapshotError | None = None
        self._passed = threading.RLock()  # guards the two
        self._is_passed = False
        self._done = threading.Event()

    def stand(self) -> None:
        """Put the fence up; `finish` and `retire` must follow, whatever happens."""
        with _lock:
            _pending.append(self)

    def concerns(self, optimizer: Any) -> bool:
        return any(tensor.untyped_storage()._cdata in self._storages for tensor in _optimizer_tensors(optimizer))

    def hold(self) -> None:
        """Keep the caller from writing before the copies are made.

        Device memory: the device is made to wait, the CPU goes on (so versions are compared now, before they change).
        Host memory: the caller waits.
        """
        if self._copies.needs_host:
            started = time.perf_counter()
            self._done.wait()
            self._timings.fence_secs += time.perf_counter() - started
        self._copies.wait_on_devices()
        self.let_pass()

    def finish(self) -> None:
        """Make the copies, then open the fence. Blocks, without the GIL; raises `TornSnapshotError`."""
        try:
            self._copies.copy_host()
            self._copies.synchronize()
            self.check()
        finally:
            self._done.set()
        if self._torn is not None:
            raise self._torn

    def let_pass(self) -> None:
        """The caller is about to write by right: look for torn tensors a last time."""
        with self._passed:
            self.check()
            self._is_passed = True
        if self._done.is_set():
            self.retire()

    def retire(self) -> None:
        """Take the fence down: somebody has passed it, or the snapshot is committed or given up."""
        with _lock:
            if self in _pending:
                _pending.remove(self)

    def check(self) -> None:
        """Look for torn tensors, unless the fence was passed: from then on they change by right.

        Once the copies are made is not enough: an operation bumps the version only when it ends, which may be later.
        """
        with self._passed:
            if not self._is_passed:
                self._torn = self._torn or find_torn(self._versions)

    @property
    def torn(self) -> TornSnapshotError | None:
        """What `check` found."""
        return self._torn


def late_keys(plan: Plan, optimizers: Sequence[Any]) -> set[int]:
    """The keys of the storages on which every tensor belongs to the optimizers.

    Everything else (buffers, averaged weights, frozen weights, generators) may be written by forward passes or the
    user, so it is copied at once.
    """
    steppers = [stepper for optimizer in optimizers if (stepper := _stepper(optimizer)) is not None]
    regions = {_region(tensor) for stepper in steppers for tensor in _optimizer_tensors(stepper)}
    return {key for key, views in plan.views.items() if all(_region(view) in regions for view in views)}


def split_versions(plan: Plan, late: set[int]) -> tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]:
    """The tensors of the plan, with their versions: those that are copied at once, those that are late."""
    identities = {plan.views[key][0].untyped_storage()._cdata for key in late}
    parts: tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]] = ([], [])
    for tensor, version in plan.versions:
        is_late = bool(late) and _is_plain(tensor) and tensor.untyped_storage()._cdata in identities
        parts[is_late].append((tensor, version))
    return parts


def why_not_overlap(optimizers: Sequence[Any], modules: Sequence[torch.nn.Module]) -> str | None:
    """The reason why the fence can't guard this state, so that it must be staged at once; None when it can."""
    for optimizer in optimizers:
        if _stepper(optimizer) is None:
            return f"{type(optimizer).__name__} has no step hooks"
        if any(group.get("capturable") for group in optimizer.param_groups):
            return f"{type(optimizer).__name__} is capturable: a replayed CUDA graph runs no hooks"
    for module in modules:
        for name, child in module.named_modules():
            if isinstance(child, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and child.max_norm is not None:
                return f"{name or type(child).__name__} has max_norm, so it writes its weight in forward"
    if _inside_step(sys._getframe()):
        return "the save was made inside optimizer.step"
    return None


def guard(optimizers: Sequence[Any], modules: Sequence[torch.nn.Module]) -> None:
    """Put the fence up: before every step from now on, and before `load_state_dict` of these. Cheap when repeated."""
    global _step_is_hooked
    if not _step_is_hooked:
        _step_is_hooked = True
        register_optimizer_step_pre_hook(_before_step)
    for optimizer in optimizers:
        if isinstance(optimizer, Optimizer) and optimizer not in _guarded:
            _guarded.add(optimizer)
            optimizer.register_load_state_dict_pre_hook(_before_optimizer_load)
    for module in modules:
        if module not in _guarded:
            _guarded.add(module)
            module.register_load_state_dict_pre_hook(_before_module_load)


_lock = threading.RLock()
_pending: list[LateStaging] = []
_guarded: weakref.WeakSet[Any] = weakref.WeakSet()
_step_is_hooked = False


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for staging in tuple(_pending):
        if staging.concerns(optimizer):
            staging.hold()


def _before_optimizer_load(optimizer: Any, state_dict: Any) -> None:
    _before_step(optimizer, (), {})


def _before_module_load(*args: Any) -> None:
    for staging in tuple(_pending):
        staging.hold()


def _forget_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it
    _pending.clear()  # the thread that would open these fences lives in the parent


os.register_at_fork(after_in_child=_forget_in_child)

# Marked by hand: torch.compiler.disable would import all of dynamo, seconds of it, for a hook that never needs it.
_before_step._torchdynamo_disable = True  # type: ignore[attr-defined]


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Parameters first: a step's own are found at the first look."""
    for group in optimizer.param_groups:
        yield from (tensor for tensor in group["params"] if _is_plain(tensor))
    for state in optimizer.state.values():
        yield from _tensors_in(state)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if _is_plain(value):
            yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _tensors_in(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _tensors_in(child)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _region(tensor: torch.Tensor) -> tuple[int, int | torch.SymInt, torch.Size, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.size(), tensor.stride()


def _stepper(optimizer: Any) -> Any:
    """The optimizer whose step runs the hooks: itself, or the one that it wraps; None if neither does.

    What only a wrapper owns (the low-precision copies of a mixed-precision wrapper, say) is written outside that step.
    """
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if candidate is not None and getattr(type(candidate).step, "hooked", False):
            return candidate
    return None


def _inside_step(frame: FrameType | None) -> bool:
    """Whether the calling thread is inside a hooked step: its snapshot would hold a half-made update."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename == _HOOKED_STEP_FILE and "profile_name" in frame.f_locals:
            return True
        frame = frame.f_back
    return False


_HOOKED_STEP_FILE = Optimizer.profile_hook_step.__code__.co_filename
