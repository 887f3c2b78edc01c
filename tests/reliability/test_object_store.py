"""The network and the store fail, at every request that a save makes, or the saver dies in it: nothing is visible that
is not whole, nothing acknowledged is missing, the next opening leaves no trace of what was given up, and nothing of
other people is touched.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import s3fs
import torch
from storage.s3_proxy import ANY, HARMS, Fault, Harm, S3Proxy, s3_proxy
from storage.s3_server import S3Server

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointManager, CheckpointWriteError, StorageBusyError
from asyncckpt.naming import BEST_NAME, is_claimed_name, is_temporary_name
from asyncckpt.service import worker
from asyncckpt.storage import places, s3_requests
from asyncckpt.storage.s3 import S3Storage
from reliability.gates import SEED, count, report

NUM_PLANS = count(10, full=300)
NUM_KILLS = count(2, full=30)
BUCKET = "gate7"
PART_BYTES = 5 << 20  # the least that S3 takes
NUMEL = 1_400_000  # of four bytes: two parts
LOSSES = [3.0, 5.0, 2.0]  # the second drops nothing, since the first is the best; the third drops both
TIMEOUT_SECS = 120.0
# A fault that passes, and one that does not (or only after long, where each strike takes so long).
TIMES: dict[Harm, tuple[int, ...]] = {
    **dict.fromkeys(HARMS, (1, 2, 1000)),
    "stall": (1, 2, 6),
    "hang": (1, 2, 6),
    "delay": (1, 2),
}
WITH_A_BODY = ("put_object", "upload_part", "complete_multipart_upload")
THEIRS = "theirs/upload.bin"


@cache
def storage_at(endpoint: str) -> S3Storage:
    """One client for all, since making one takes as long as all that a plan does with it."""
    return S3Storage(S3Server(endpoint).options, least_part_bytes=PART_BYTES, beat_secs=0.2, lease_secs=2.0)


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, short leases, deadlines and pauses."""
    monkeypatch.setitem(places._MAKERS, "s3", lambda made: storage_at(made.options["endpoint_url"]))
    monkeypatch.setattr(s3_requests, "_LEAST_SECS", 1.0)
    monkeypatch.setattr(s3_requests, "_MAX_TRIES", 4)
    monkeypatch.setattr(s3_requests, "_LEAST_BYTES_PER_SEC", PART_BYTES)
    monkeypatch.setattr(s3_requests, "_FIRST_PAUSE_SECS", 0.01)
    monkeypatch.setattr(s3_requests, "_MAX_PAUSE_SECS", 0.05)
    monkeypatch.setattr(worker, "_FIRST_PAUSE_SECS", 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


class Store:
    """The bucket, looked at by other means than the code under test."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self._client: s3fs.S3FileSystem = server.client()
        if not self._client.exists(BUCKET):
            self._client.mkdir(BUCKET)

    def begin_upload(self, key: str) -> str:
        """A multipart upload of somebody else's, with a part."""
        upload = str(self._client.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)["UploadId"])
        self._client.call_s3("upload_part", Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"theirs")
        return upload

    def uploads(self, prefix: str) -> set[tuple[str, str]]:
        answer = self._client.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=prefix)
        assert not answer.get("IsTruncated")
        return {(upload["Key"], upload["UploadId"]) for upload in answer.get("Uploads", ())}

    def names(self, directory: str) -> set[str]:
        try:
            return {path.rsplit("/", 1)[1] for path in self._client.ls(directory, detail=False)}
        except FileNotFoundError:
            return set()


@dataclass
class Place:
    """A directory of the store, in which somebody else has an upload under way too."""

    store: Store
    name: str

    def __post_init__(self) -> None:
        theirs = f"{self.name}/checkpoint_by_hand.pt"
        self._theirs = {(theirs, self.store.begin_upload(theirs))}

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.name}"

    def check_visible(self, where: str) -> None:
        """Every checkpoint that can be seen is whole."""
        for name in self.store.names(self.url):
            if name.endswith(".pt"):
                report = asyncckpt.verify(f"{self.url}/{name}", storage_options=self.store.server.options)
                assert report.ok, f"{where}: {name}: {report.problems}"

    def sweep_what_savers_left(self, where: str) -> None:
        """A saver of single files has no claim, so nobody may know that it is dead; but a note tells of all it left."""
        storage = S3Storage(self.store.server.options)
        for name in self.store.names(self.url):
            if is_temporary_name(name):
                assert not is_claimed_name(name), f"{where}: {name} should have been swept"
                assert storage.sweep_file(f"{self.url}/{name}"), where

    def check_clean(self, where: str) -> None:
        """Nothing of ours is left that is no checkpoint, and all of theirs."""
        left = [name for name in self.store.names(self.url) if is_temporary_name(name)]
        assert not left, f"{where}: notes are left: {left}"
        assert self.store.uploads(self.name + "/") == self._theirs, where


class Training:
    """A model all of whose weights are the number of the step."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(NUMEL, 1, bias=False)
        self.set(0)

    def set(self, number: int) -> None:
        torch.nn.init.constant_(self.model.weight, float(number))

    @property
    def number(self) -> int:
        numbers = set(self.model.weight.detach().flatten().tolist())
        assert len(numbers) == 1
        return int(numbers.pop())

    def save(self, manager: CheckpointManager, step: int, loss: float | None) -> BaseException | None:
        """Why it failed."""
        self.set(step)
        try:
            handle = manager.save(model=self.model, optimizer=None, epoch=0, global_step=step, val_loss=loss)
        except (CheckpointWriteError, StorageBusyError) as error:  # it could not be opened
            return error
        assert handle is not None
        failure = handle.exception(TIMEOUT_SECS)
        assert failure is None or isinstance(failure, CheckpointWriteError), repr(failure)
        assert handle.wait_over(TIMEOUT_SECS)
        return failure


def manager_of(url: str, server: S3Server) -> CheckpointManager:
    return CheckpointManager(
        url,
        1,
        writer="thread",
        storage_options=server.options,
        save_rng=False,
        retries=1,
        max_consecutive_failures=1000,
    )


def save_by_manager(place: Place, server: S3Server) -> dict[int, BaseException | None]:
    """What became of each step's save."""
    training = Training()
    with manager_of(place.url, server) as manager:
        return {step: training.save(manager, step, loss) for step, loss in enumerate(LOSSES, 1)}


def acknowledged(outcome: dict[int, BaseException | None]) -> list[int]:
    return [step for step, failure in outcome.items() if failure is None]


def check_by_manager(place: Place, outcome: dict[int, BaseException | None], where: str) -> None:
    """As a reader finds it; then the next process goes on."""
    place.check_visible(where)
    steps, options = acknowledged(outcome), place.store.server.options
    training = Training()
    with manager_of(place.url, place.store.server) as manager:
        manager.load_latest(training.model)
        assert training.number >= max(steps, default=0), f"{where}: {steps} were acknowledged"
        assert training.save(manager, len(LOSSES) + 1, None) is None, where
        listed = manager.list_checkpoints()
    for info in listed:
        assert asyncckpt.verify(str(info.filepath), storage_options=options).ok, where
    assert [info.global_step for info in listed][-1] == len(LOSSES) + 1, where
    losses = [info.val_loss for info in listed if info.val_loss is not None]
    assert not steps or min(losses) <= min(LOSSES[step - 1] for step in steps), f"{where}: the best is gone"
    if losses:
        best = asyncckpt.load(f"{place.url}/{BEST_NAME}", storage_options=options)
        assert LOSSES[best["global_step"] - 1] == min(losses), where
    kept = {info.filepath.name for info in listed} | ({BEST_NAME} if losses else set())
    assert {name for name in place.store.names(place.url) if name.endswith(".pt")} == kept, where
    place.check_clean(where)


def save_by_saver(place: Place, server: S3Server) -> dict[int, BaseException | None]:
    """Twice to one path, in parts, and once to another, in one PUT."""
    states = {1: ("latest.pt", 2 * NUMEL), 2: ("latest.pt", NUMEL), 3: ("small.pt", 10)}
    outcome: dict[int, BaseException | None] = {}
    with AsyncCheckpointSaver(
        writer="thread", storage_options=server.options, retries=1, max_consecutive_failures=1000
    ) as saver:
        for number, (name, numel) in states.items():
            handle = saver.save({"number": torch.full((numel,), float(number))}, f"{place.url}/{name}")
            outcome[number] = handle.exception(TIMEOUT_SECS)
    return outcome


def check_by_saver(place: Place, outcome: dict[int, BaseException | None], where: str) -> None:
    place.check_visible(where)
    steps, options, names = acknowledged(outcome), place.store.server.options, place.store.names(place.url)
    for name, numbers in {"latest.pt": [1, 2], "small.pt": [3]}.items():
        newest = max((number for number in numbers if number in steps), default=0)
        assert not newest or name in names, f"{where}: {name} was acknowledged"
        if name in names:
            found = asyncckpt.load(f"{place.url}/{name}", storage_options=options)["number"].unique().tolist()
            assert len(found) == 1, where
            assert newest <= found[0] <= max(numbers), f"{where}: {name} holds {found}, not {newest}"
    with manager_of(place.url, place.store.server) as manager:
        assert Training().save(manager, 1, None) is None, where
    place.sweep_what_savers_left(where)
    place.check_clean(where)


WAYS = {"manager": (save_by_manager, check_by_manager), "saver": (save_by_saver, check_by_saver)}


def faults(seen: Counter[str]) -> Iterator[Fault]:
    """Every harm to every request of a kind; and to so many in a row, whatever they are."""
    for harm in HARMS:
        for kind, times in itertools.product(sorted(seen), TIMES[harm]):
            if harm != "corrupt" or kind.startswith(WITH_A_BODY):
                yield from (Fault(harm, kind, number, times) for number in range(1, seen[kind] + 1))
        for times in (3, *TIMES[harm]):
            yield from (Fault(harm, ANY, number, times) for number in range(1, sum(seen.values()) + 1, 5))


def passes(fault: Fault) -> bool:
    """Whether trying again must help."""
    return fault.times <= 2 or fault.harm == "delay"


@pytest.fixture(scope="module")
def store(server: S3Server) -> Store:
    return Store(server)


@pytest.fixture
def proxy(server: S3Server) -> Iterator[S3Proxy]:
    with s3_proxy(server) as proxy:
        yield proxy


@pytest.mark.timeout(3600)
def test_every_fault_is_survived(store: Store, proxy: S3Proxy) -> None:
    """A fault that passes costs no checkpoint; one that does not costs that one at most, and nothing that was there."""
    theirs = {(THEIRS, store.begin_upload(THEIRS))}
    plans: list[tuple[str, Fault]] = []
    for way, (save, check) in WAYS.items():
        place = Place(store, f"clean-{way}")
        proxy.arm(None)
        assert acknowledged(save(place, proxy.server)) == [1, 2, 3]
        plans += [(way, fault) for fault in faults(Counter(proxy.seen))]
        check(place, {}, f"no fault, by {way}")
    random.Random(SEED).shuffle(plans)
    figures: Counter[str] = Counter()
    for number, (way, fault) in enumerate(plans[:NUM_PLANS]):
        save, check = WAYS[way]
        where = f"{fault}, by {way} (seed {SEED})"
        place = Place(store, f"plan{number}")
        proxy.arm(fault)
        outcome = save(place, proxy.server)
        was_hit = proxy.num_hits > 0
        proxy.arm(None)
        figures["struck"] += was_hit
        figures["saves"] += len(outcome)
        figures["failed"] += sum(failure is not None for failure in outcome.values())
        if passes(fault) or not was_hit:
            assert acknowledged(outcome) == list(outcome), f"{where}: {outcome}"
        check(place, outcome, where)
    assert store.uploads("theirs/") == theirs
    assert figures["struck"] > NUM_PLANS / 2
    report(
        "7 object store",
        f"{NUM_PLANS} fault plans of {len(plans)}, {figures['struck']} struck, {figures['saves']} saves of which "
        f"{figures['failed']} failed: nothing torn, lost or left",
    )


@pytest.mark.timeout(3600)
def test_a_trainer_killed_at_any_request(store: Store, proxy: S3Proxy) -> None:
    """The request has arrived, or has not: who comes next waits for the dead one's lease, and cleans up."""
    place = Place(store, "clean-kill")
    proxy.arm(None)
    save_by_manager(place, proxy.server)
    moments = list(Counter(proxy.seen).elements())
    choose = random.Random(SEED).choice
    num_acks = 0
    for number in range(NUM_KILLS):
        kind = choose(moments)
        fault = Fault(choose(("stall", "hang")), kind, choose(range(moments.count(kind))) + 1, times=1000)
        where = f"killed at: {fault} (seed {SEED})"
        place = Place(store, f"kill{number}")
        proxy.arm(fault)
        steps = kill_when_hit(proxy, place)
        num_acks += len(steps)
        proxy.arm(None)
        check_by_manager(place, dict.fromkeys(steps), where)
    report("7 object store, SIGKILL", f"{NUM_KILLS} kills, {num_acks} saves acknowledged: nothing torn, lost or left")


def kill_when_hit(proxy: S3Proxy, place: Place) -> list[int]:
    """The steps that a trainer had acknowledged when it was killed in the middle of a request."""
    command = [sys.executable, "-m", "reliability.object_store_trainer", proxy.server.endpoint, place.url]
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        while not proxy.hit.wait(0.1) and trainer.poll() is None:
            pass
        trainer.kill()
        assert trainer.stdout is not None
        acks = [int(line.removeprefix("ack ")) for line in trainer.stdout if line.startswith("ack ")]
    assert proxy.hit.is_set() or len(acks) == len(LOSSES)
    return acks
