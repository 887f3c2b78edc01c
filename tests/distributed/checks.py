"""What ranks do in the tests, by name; the tests look at what comes back. Every rank runs every check."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

from asyncckpt import (
    AsyncCheckpointSaver,
    CheckpointManager,
    CorruptCheckpointError,
    EveryMinutes,
    EverySteps,
    KeepLast,
    PreemptionGuard,
    load_distributed_checkpoint,
    save_distributed_checkpoint,
)
from asyncckpt.distributed.ranks import OtherRankError, Ranks
from asyncckpt.image.file import open_to_load
from asyncckpt.storage import system_calls
from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalStorage
from distributed.training import Training, own_numbers, seed_own_numbers

Outcome = dict[str, Any]


def outcome(action: Callable[[], Any]) -> Outcome:
    """What an action returned or raised, as JSON takes it."""
    try:
        return {"result": action()}
    except BaseException as error:
        cause = error.__cause__
        met_on = cause.rank if isinstance(cause, OtherRankError) else None
        return {"raised": type(error).__name__, "message": str(error), "met_on": met_on}


def manager_of(directory: str, **options: Any) -> CheckpointManager:
    return CheckpointManager(directory, **{"lock_timeout_secs": 0.1, "retries": 0, **options})


def rank() -> int:
    return distributed.get_rank()


# --- ranks ---


class UnpicklableError(ValueError):
    """As errors that hold a lock, a socket or a frame."""

    def __init__(self, message: str) -> None:
        super().__init__(message, threading.Lock())


class SaysMoreError(ValueError):
    """Its pickle is not good: `args` are not what the constructor takes."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def _raise(kind: str) -> None:
    if kind == "UnpicklableError":
        raise UnpicklableError("boo")
    if kind == "SaysMoreError":
        raise SaysMoreError("boo", "bar")
    raise {
        "ValueError": ValueError("boo"),
        "CorruptCheckpointError": CorruptCheckpointError("boo"),
        "OSError": OSError(errno.EIO, "boo", "/a"),
        "KeyboardInterrupt": KeyboardInterrupt("boo"),
        "SystemExit": SystemExit("boo"),
    }[kind]


def fail(method: str, kinds: dict[str, str]) -> Outcome:
    """Fail on the ranks that are named, in an action of `method`."""

    def act() -> str:
        if str(rank()) in kinds:
            _raise(kinds[str(rank())])
        return "done"

    ranks = Ranks()
    methods: dict[str, Callable[[], Any]] = {
        "on_first": lambda: ranks.on_first(act),
        "on_all": lambda: ranks.on_all(act),
        "contribute": lambda: ranks.on_first_from_all(act, lambda contributions: contributions),
    }
    return outcome(methods[method])


def contribute() -> Any:
    """Tensors and what shares them, from every rank."""

    def make() -> Any:
        return {"rank": rank(), "tensor": torch.full((2,), rank())}

    def describe(contributions: list[Any]) -> Any:
        assert all(contribution["tensor"].device.type == "cpu" for contribution in contributions)
        return [(contribution["rank"], contribution["tensor"].tolist()) for contribution in contributions]

    return Ranks().on_first_from_all(make, describe)


def tell_what_has_no_pickle() -> list[Outcome]:
    ranks = Ranks()
    return [
        outcome(lambda: ranks.on_first(threading.Lock) and None),
        outcome(lambda: ranks.on_first_from_all(threading.Lock, len)),
    ]


def without_a_backend_for_the_cpu(directory: str) -> Any:
    """As after `init_process_group("nccl")`: torch would send objects by the GPU's backend."""
    size = distributed.get_world_size()
    distributed.barrier()
    results = []
    for number, backend in enumerate(["cuda:gloo", "cuda:gloo", "gloo"]):
        own_rank = rank()
        distributed.destroy_process_group()
        store = f"file://{directory}/store{number}"
        distributed.init_process_group(backend, init_method=store, rank=own_rank, world_size=size)
        ranks = Ranks()
        results.append([ranks.on_first(lambda: "told"), ranks.on_all(lambda: "all"), contribute(), contribute()])
    return results


# --- the manager ---


def save(directory: str, num_steps: int = 2, wrapped: bool = True) -> Any:
    training = Training(wrapped=wrapped).advance(num_steps)
    with manager_of(directory) as manager:
        handle = training.save(manager)
        assert handle is not None
        manager.wait()
        return {"digest": training.digest(), "skipped": handle.skipped, "done": handle.done()}


def load(directory: str, wrapped: bool = True) -> str:
    with manager_of(directory) as manager:
        return Training(7, wrapped=wrapped).load(manager, stateful={}).digest()


class Loader:
    """A data loader's position, as each rank has its own."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def save_own(directory: str) -> list[float]:
    """Save what is each rank's own; the random numbers that follow."""
    training = Training()
    with manager_of(directory) as manager:
        seed_own_numbers(rank())
        training.save(
            manager,
            stateful={"sampler": training.sampler, "shared": Loader(10 + rank())},
            rank_stateful={"loader": Loader(20 + rank())},
        )
        manager.wait()
        return own_numbers()


def load_own(directory: str) -> Any:
    """Load what is each rank's own; the random numbers that follow, and the positions."""
    training, shared, loader = Training(), Loader(), Loader()
    seed_own_numbers(99)
    with manager_of(directory) as manager:
        training.load(
            manager, stateful={"sampler": training.sampler, "shared": shared}, rank_stateful={"loader": loader}
        )
    return own_numbers(), shared.position, loader.position


def numbers_of_seed(seed: int) -> list[float]:
    seed_own_numbers(seed)
    return own_numbers()


def save_best_only(directory: str, losses: list[float]) -> list[bool]:
    """Whether each save was done, as each rank was told; rank 1 has other losses, which don't count."""
    training = Training(wrapped=False)
    with manager_of(directory, save_best_only=True) as manager:
        handles = [
            training.save(manager, global_step=step, val_loss=loss if rank() == 0 else 9.0 - loss)
            for step, loss in enumerate(losses)
        ]
        return [handle is not None for handle in handles]


def decide_by_steps(directory: str) -> list[int]:
    """The steps that should be saved. The first save is held, so that those before step 8 are skipped."""
    training, gate = Training(wrapped=False), threading.Event()
    decided = []
    with (
        mock.patch.object(system_calls, "rename", _held(gate)),
        manager_of(directory, save_policy=EverySteps(3), max_in_flight=1, when_full="skip") as manager,
    ):
        for step in range(1, 13):
            if step >= 8:
                gate.set()
                manager.wait()
            if manager.should_save(step):
                decided.append(step)
                training.save(manager, global_step=step)
    return decided


def _held(gate: threading.Event) -> Callable[[str, str], None]:
    """A rename that waits: nothing is committed before."""

    def rename(source: str, destination: str) -> None:
        gate.wait()
        os.rename(source, destination)

    return rename


def decide_by_time(directory: str, late_rank: int) -> bool:
    """One rank's clock is an hour ahead of when the manager was made."""
    now = time.monotonic
    late = mock.patch("time.monotonic", side_effect=lambda: now() + 3600)
    with manager_of(directory, save_policy=EveryMinutes(30)) as manager, late if rank() == late_rank else nullcontext():
        return manager.should_save(1)


def fall_back(directory: str, blind_rank: int, kind: str) -> Any:
    """Two checkpoints, of which one rank can't read the newer one; what is loaded."""
    training = Training().advance(1)
    with manager_of(directory) as manager:
        training.save(manager)
        digest = training.digest()
        training.advance(1).save(manager)
        manager.wait()
        blind = mock.patch("asyncckpt.registry.directory.open_to_load", _blind(kind))
        with blind if rank() == blind_rank else nullcontext():
            fresh = Training(7)
            loaded = outcome(lambda: fresh.load(manager).step)
        return {**loaded, "digest": fresh.digest(), "saved": digest}


def _blind(kind: str) -> Any:
    def open_or_not(storage: Storage, path: str, **options: Any) -> Any:
        if "step00000002" in path:
            raise {"EIO": OSError(errno.EIO, "Input/output error", path), "memory": MemoryError("no more")}[kind]
        return open_to_load(storage, path, **options)

    return open_or_not


def load_misfit(directory: str) -> Outcome:
    """Rank 1's model is another one."""
    training = Training(wrapped=False, width=16 if rank() == 0 else 8)
    with manager_of(directory) as manager:
        return outcome(lambda: training.load(manager).step)


def load_from_nothing(directory: str) -> Any:
    model = Training(wrapped=False).model
    with manager_of(directory) as manager:
        return outcome(lambda: [manager.load_latest(model), manager.load_best(model)])


def load_by_name(directory: str, checkpoint: int | str) -> Outcome:
    """Rank 1 asks for another one, which does not count."""
    training = Training(7, wrapped=False)
    with manager_of(directory) as manager:
        return outcome(lambda: manager.load(checkpoint if rank() == 0 else 5, training.model)[1]["global_step"])


class _Unpicklable(Loader):
    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock()}


def save_wrongly(directory: str, what: str) -> Outcome:
    """Something is wrong with the save, on one rank."""
    training = Training(wrapped=False)
    wrong: dict[str, dict[str, Any]] = {
        "unsafe config on 0": {"config": {"path": Path()}},
        "missing metric on 0": {"val_loss": None, "val_metrics": {"accuracy": 1.0}},
        "epoch on 0": {"epoch": "one"},
        "stateful on 0": {"stateful": {"odd": object()}},
        "rank_stateful on 0": {"rank_stateful": {"odd": object()}},
        "rank_stateful on 1": {"rank_stateful": {"odd": object()}},
        "no pickle on 1": {"rank_stateful": {"odd": _Unpicklable()}},
        "one name twice on 1": {"rank_stateful": {"sampler": training.sampler}},
    }
    with manager_of(directory) as manager:
        return outcome(lambda: training.save(manager, **wrong[what] if what.endswith(str(rank())) else {}) and None)


def save_where_it_cannot_be(directory: str) -> list[Outcome]:
    """Below a file; then where somebody else writes."""
    lock = None
    if rank() == 0:
        Path(directory, "file").write_text("")
        Path(directory, "busy").mkdir()
        lock = LocalStorage().lock(f"{directory}/busy", "a test")

    def save_in(name: str) -> None:
        with manager_of(f"{directory}/{name}") as manager:
            Training(wrapped=False).save(manager)

    outcomes = [outcome(lambda: save_in("file/run")), outcome(lambda: save_in("busy"))]
    if lock is not None:
        lock.release()
    return outcomes


def wait_for_what_fails(directory: str) -> list[Outcome]:
    """A failing write; then one that works."""
    training = Training(wrapped=False)
    with manager_of(directory) as manager:
        with mock.patch.object(system_calls, "pwrite", side_effect=OSError(errno.EIO, "Input/output error")):
            training.save(manager)
            failed = outcome(manager.wait)
        training.save(manager)
        return [failed, outcome(manager.wait)]


def wait_for_rank_0(directory: str, pipe: str) -> bool:
    """Rank 0's commit is held for as long as rank 1 may need to come out of `wait()`; whether it did."""
    came_early: list[bool] = []

    def rename(source: str, destination: str) -> None:
        if not came_early:
            with open(pipe, "rb") as told:  # waits until rank 1 is about to wait
                came_early.append(bool(select.select([told], [], [], 0.3)[0]))
        os.rename(source, destination)

    with manager_of(directory) as manager, mock.patch.object(system_calls, "rename", rename):
        Training(wrapped=False).save(manager)
        with open(pipe, "wb", buffering=0) if rank() == 1 else nullcontext() as tell:
            manager.wait()
            if tell is not None:
                with suppress(BrokenPipeError):
                    tell.write(b"out")
        assert manager.latest is not None
    return any(came_early)


def act_alone(directory: str, alone: int) -> Any:
    """One rank looks at the directory, and prunes it, while the other does something else."""
    training = Training(wrapped=False)
    with manager_of(directory) as manager:
        for step in (1, 2, 3):
            training.save(manager, global_step=step)
        manager.wait()
    distributed.barrier()
    with manager_of(directory) as manager:
        pruned: list[int | None] = []
        if rank() == alone:
            found = [manager.latest, manager.best, *manager.list_checkpoints()]
            assert None not in found
            assert all(report.ok for report in manager.verify())
            manager.prepare(training.model)
            assert len(manager.prune(KeepLast(1), dry_run=True)) == 1
            pruned = [info.global_step for info in manager.prune(KeepLast(1))]
        return [pruned, outcome(lambda: training.save(manager, global_step=4) and None)]


def leave_early(directory: str, kind: str) -> Outcome:
    """Rank 0 leaves `with` while rank 1 is still inside; then rank 1 raises there."""

    def use() -> int:
        with manager_of(directory) as manager:
            Training(wrapped=False).save(manager)
            if rank() == 1:
                distributed.barrier()
                _raise(kind)
        distributed.barrier()
        return len(manager.list_checkpoints())

    return outcome(use)


def die(directory: str) -> Outcome:
    """Rank 1 is killed; rank 0 notices at its next save, and what was saved before is durable."""
    training, found = Training(wrapped=False), []
    gate = threading.Event()

    def use() -> None:
        with mock.patch.object(system_calls, "rename", _held(gate)), manager_of(directory) as manager:
            training.save(manager)
            if rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                training.save(manager, global_step=1)
            finally:
                gate.set()

    failed = outcome(use)
    with manager_of(directory) as manager:
        found = [info.global_step for info in manager.list_checkpoints()]
    return {**failed, "found": found}


# --- a whole run ---


def train(directory: str, num_steps: int, resume: bool) -> Any:
    """Train, from the beginning or from the latest checkpoint, and save; all that can be compared."""
    with manager_of(directory) as manager:
        training = Training(7 if resume else 0)
        if resume:
            training.load(manager)
        training.advance(num_steps)
        training.save(manager)
        manager.wait()
    return {"losses": training.losses, "digest": training.digest(), "step": training.step, "next": own_numbers()}


# --- preemption ---


def stop_together(signalled_rank: int) -> list[Any]:
    """What the guard says before and after a signal comes to one rank, and whether that was this one."""
    with AsyncCheckpointSaver(writer="thread") as saver, PreemptionGuard(saver, [signal.SIGUSR1]) as guard:
        before = guard.should_stop
        distributed.barrier()  # or a quick rank's signal would be another one's "before"
        if rank() == signalled_rank:
            signal.raise_signal(signal.SIGUSR1)
        after = guard.should_stop
        is_mine = guard.remaining_secs is not None
        with suppress(SystemExit):  # the second signal, which ends the guard's watch
            if is_mine:
                signal.raise_signal(signal.SIGUSR1)
    return [before, after, is_mine]


# --- one file for all ranks ---


def save_file(path: str, wrong_rank: bool = False) -> Outcome:
    training = Training().advance(1)
    given = 0 if wrong_rank else rank()
    saved = outcome(lambda: save_distributed_checkpoint(training.model, training.optimizer, 3, path, given))
    return {**saved, "digest": training.digest(), "exists": Path(path).exists()}


def load_file(path: str, blind_rank: int | None = None, width: int = 16) -> Outcome:
    """`blind_rank` looks at another path, where there is nothing."""
    training = Training(7, width=width)
    before = training.digest()
    where = "/nowhere" if rank() == blind_rank else path
    loaded = outcome(lambda: load_distributed_checkpoint(training.model, training.optimizer, where))
    return {**loaded, "digest": training.digest(), "changed": training.digest() != before}
