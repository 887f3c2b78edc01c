"""Files that a trainer replaces, or prunes, while somebody reads them in a store: looked for again, and read anew."""

from __future__ import annotations

import io
import pickle
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from storage.s3_server import S3Server
from storage.s3_server import server as s3  # noqa: F401 (a fixture)
from torch import nn

import asyncckpt
from asyncckpt import CheckpointError, CheckpointManager, CheckpointNotFoundError, KeepLast
from asyncckpt.cli import tensors, verification
from asyncckpt.copying import copy_file
from asyncckpt.errors import CheckpointReadError
from asyncckpt.storage.places import Places
from asyncckpt.storage.s3 import S3Reader

BUCKET = "replaced"


class Meddler:
    """Acts before a checkpoint's file is read from the store, once for each of its `actions`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.actions: Iterator[Callable[[], object]] = iter(())
        self.num_acts = 0
        self.ending = ".pt"  # of the files that it waits for

    def act(self) -> None:
        with self._lock:
            actions, self.actions = self.actions, iter(())  # what is done may read too
            action = next(actions, None)
        if action is not None:
            action()
            self.num_acts += 1
            self.actions = actions


@pytest.fixture
def meddler(monkeypatch: pytest.MonkeyPatch) -> Meddler:
    meddler, read_into = Meddler(), S3Reader.read_into

    def meddled(reader: S3Reader, offset: int, view: memoryview) -> None:
        if reader.path.endswith(meddler.ending):
            meddler.act()
        read_into(reader, offset, view)

    monkeypatch.setattr(S3Reader, "read_into", meddled)
    return meddler


@dataclass(frozen=True)
class Place:
    """A directory in a bucket, with other means to get at it."""

    url: str
    options: dict[str, Any]
    client: Any


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    server: S3Server = request.getfixturevalue("s3")
    client = server.client()
    if not client.exists(BUCKET):
        client.mkdir(BUCKET)
    return Place(f"s3://{BUCKET}/{secrets.token_hex(4)}", server.options, client)


def contents(number: int) -> bytes:
    buffer = io.BytesIO()
    torch.save({"number": number, "tensor": torch.full((1000,), float(number))}, buffer)
    return buffer.getvalue()


def check(state: dict[str, Any], number: int) -> None:
    """All of it of one version."""
    assert state["number"] == number
    assert torch.equal(state["tensor"], torch.full((1000,), float(number)))


def check_whole(is_whole: bool) -> None:
    assert is_whole


WAYS: dict[str, Callable[[str, dict[str, Any], Path], object]] = {
    "load": lambda path, options, _: check(asyncckpt.load(path, storage_options=options), 1),
    "part": lambda path, options, _: check(asyncckpt.load(path, keys=["number", "tensor"], storage_options=options), 1),
    "verify": lambda path, options, _: check_whole(asyncckpt.verify(path, storage_options=options).ok),
    "command": lambda path, options, _: check_whole(verification.gather(Places(options), path).ok),
    "mapped": lambda path, options, _: tensors.load_mapped(Places(options), path),
    "copy": lambda path, options, there: check(
        asyncckpt.load(copy_file(Places(options), path, str(there / "b.pt"), lambda _: None).destination), 1
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_read_anew(meddler: Meddler, place: Place, tmp_path: Path, way: str) -> None:
    path = f"{place.url}/a.pt"
    place.client.pipe_file(path, contents(0))
    meddler.actions = iter([partial(place.client.pipe_file, path, contents(1))])
    WAYS[way](path, place.options, tmp_path)
    assert meddler.num_acts == 1


@pytest.mark.parametrize("way", WAYS)
def test_not_for_ever(meddler: Meddler, place: Place, tmp_path: Path, way: str) -> None:
    path = f"{place.url}/a.pt"
    place.client.pipe_file(path, contents(0))
    meddler.actions = (partial(place.client.pipe_file, path, contents(number)) for number in range(1, 1000))
    with pytest.raises(CheckpointError, match=f"{path} could not be read: .*load another checkpoint") as caught:
        WAYS[way](path, place.options, tmp_path)
    assert isinstance(caught.value, OSError)
    assert meddler.num_acts < 1000


@pytest.mark.parametrize("way", WAYS)
def test_what_is_deleted_is_not_there(meddler: Meddler, place: Place, tmp_path: Path, way: str) -> None:
    path = f"{place.url}/a.pt"
    place.client.pipe_file(path, contents(0))
    meddler.actions = iter([partial(place.client.rm_file, path)])
    with pytest.raises(CheckpointNotFoundError, match=path):
        WAYS[way](path, place.options, tmp_path)


def test_the_error_is_the_same_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(CheckpointReadError("what failed", errno=116)))
    assert (str(error), error.errno) == ("what failed", 116)


class Trainer:
    """Saves ever better models, and keeps but the last."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.step = 0

    def save(self) -> None:
        """What was there before is gone on return."""
        self.step += 1
        model = nn.Linear(10, 10)
        nn.init.constant_(model.weight, self.step)
        place = self._place
        with CheckpointManager(
            place.url, retention=KeepLast(1), writer="thread", storage_options=place.options
        ) as manager:
            manager.save(model, None, 1, self.step, 1.0, 1 / self.step)


@pytest.fixture
def trainer(place: Place) -> Trainer:
    trainer = Trainer(place)
    trainer.save()
    return trainer


@pytest.mark.parametrize(
    ("wanted", "num_saves"), [("latest", 1), ("latest", 10), ("best", 1), ("best", 10), ("best_model.pt", 3)]
)
def test_loading_while_a_trainer_prunes(
    meddler: Meddler, trainer: Trainer, place: Place, wanted: str, num_saves: int
) -> None:
    """However often what was just chosen is gone by the time that it is read, the newest that is there is found."""
    model = nn.Linear(10, 10)
    with CheckpointManager(place.url, storage_options=place.options) as reading:
        loads: dict[str, Callable[[nn.Module], object]] = {
            "latest": reading.load_latest,
            "best": reading.load_best,
            "best_model.pt": partial(reading.load, wanted),
        }
        meddler.actions = iter([trainer.save] * num_saves)
        loads[wanted](model)
    assert meddler.num_acts == num_saves
    assert float(model.weight[0, 0].detach()) == trainer.step == 1 + num_saves


@pytest.mark.parametrize("replaces", [True, False])
def test_listing_while_files_change(meddler: Meddler, trainer: Trainer, place: Place, replaces: bool) -> None:
    """A file that the registry did not name yet, or no longer, goes just as it is looked into."""
    stray = f"{place.url}/checkpoint_epoch0009_step00000009.pt"
    place.client.pipe_file(stray, contents(0))
    change = partial(place.client.pipe_file, stray, contents(1)) if replaces else partial(place.client.rm_file, stray)
    with CheckpointManager(place.url, storage_options=place.options) as reading:
        meddler.actions, meddler.ending = iter([change]), stray
        assert [info.global_step for info in reading.list_checkpoints()] == [1]
        assert meddler.num_acts == 1
