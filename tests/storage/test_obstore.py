"""obstore in the writer process, and nowhere else: this process never uses it, since other tests fork."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt.errors import CheckpointError, MissingExtraError
from asyncckpt.storage.obstore_client import ObstoreStorage
from asyncckpt.storage.places import Places
from storage import conformance
from storage.s3_server import S3Server

BUCKET = "obstore"
_ROOT = Path(__file__).resolve().parents[2]
_LARGE_BYTES = (16 << 20) + 1  # more than what is left to s3fs
# What it has a part in; the whole contract takes minutes.
_OWN_TESTS = (
    *(
        "written_is_there",
        "before_commit",
        "one_act",
        "any_range",
        "past_the_end",
        "a_reader_stays",
        "killed",
        "living",
    ),
    *("versions_are", "checksum", "encryption", "aborted_file", "half_a_file", "lost_answer", "explained"),
)

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="obstore needs Python 3.11")


@pytest.fixture
def place(server: S3Server) -> str:
    client = server.client()
    if not client.exists(BUCKET):
        client.mkdir(BUCKET)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


def test_the_contract() -> None:
    """In a process of its own, since it forks no more once it has used obstore."""
    contract = Path(__file__).with_name("obstore_contract.py")
    selected = "not lock and not small and (" + " or ".join(_OWN_TESTS) + ")"
    command = [sys.executable, "-m", "pytest", "-q", str(contract), "-k", selected]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "tests")])}
    done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_save_goes_through_the_writer_process(server: S3Server, place: str) -> None:
    """It arrives whole, with the checksum that only obstore makes; the trainer has nothing to do with obstore."""
    state = {"weight": torch.arange(_LARGE_BYTES // 4, dtype=torch.float32)}
    options = {**server.options, "client": "obstore"}
    with asyncckpt.AsyncCheckpointSaver(storage_options=options) as saver:
        saver.save(state, f"{place}/state.pt")
    assert _checksums(server, f"{place}/state.pt") == {"ChecksumCRC64NVME"}
    loaded: Any = asyncckpt.load(f"{place}/state.pt", storage_options=options)
    assert torch.equal(loaded["weight"], state["weight"])
    assert "obstore" not in sys.modules
    assert server.client().ls(place, detail=False) == [f"{place.removeprefix('s3://')}/state.pt"]


def test_a_manager_saves_and_loads(server: S3Server, place: str) -> None:
    """Registry, claim, best and all."""
    model = torch.nn.Linear(2100, 2100)
    options = {**server.options, "client": "obstore"}
    with asyncckpt.CheckpointManager(f"{place}/run", storage_options=options) as manager:
        for epoch in (1, 2):
            manager.save(
                model=model, optimizer=None, epoch=epoch, global_step=epoch, train_loss=0.5, val_loss=0.1 * epoch
            )
        manager.wait()
        assert manager.latest is not None
        assert _checksums(server, str(manager.latest.filepath)) == {"ChecksumCRC64NVME"}
    other = torch.nn.Linear(2100, 2100)
    with asyncckpt.CheckpointManager(f"{place}/run", storage_options=options) as manager:
        epoch, _ = manager.load_latest(other)
    assert epoch == 2
    assert torch.equal(other.weight, model.weight)


def test_elsewhere_s3fs_takes_its_place(server: S3Server, place: str, caplog: pytest.LogCaptureFixture) -> None:
    """A process that may fork is told so once, and its files arrive all the same."""
    storage = Places({**server.options, "client": "obstore"})
    content = conformance.make_content(_LARGE_BYTES)
    with caplog.at_level(logging.INFO, "asyncckpt"):
        for name in ("first", "second"):
            conformance.put_by_upload(storage, f"{place}/{name}", content)
            assert server.client().cat_file(f"{place}/{name}") == content
    assert [record.message for record in caplog.records] == [
        f"{place}/first: sent by s3fs: only the writer process can use obstore"
    ]
    assert "obstore" not in sys.modules


def test_options_that_it_would_not_heed(server: S3Server) -> None:
    """An object that is not encrypted as asked, or a proxy that is passed by, is worse than an error."""
    for options, named in (
        ({"requester_pays": True}, "requester_pays"),
        ({"config_kwargs": {"proxies": {}}}, "config_kwargs.proxies"),
        ({"s3_additional_kwargs": {"ACL": "private"}}, "s3_additional_kwargs.ACL"),
    ):
        with pytest.raises(CheckpointError, match=rf"would not heed {named};"):
            ObstoreStorage(options)


def test_there_are_two_clients() -> None:
    """Any other name is an error that says which there are."""
    with pytest.raises(CheckpointError, match=r"'s3fs' or 'obstore', not 'boto'"):
        Places({"client": "boto"}).list_names("s3://bucket/run")


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to get it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "obstore" else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install asyncckpt\[obstore\]"):
        Places({"client": "obstore"}).list_names("s3://bucket/run")


def _checksums(server: S3Server, path: str) -> set[str]:
    """Which checksums the store keeps with the object."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    found = server.client().call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    return {name for name in found if name.startswith("Checksum")} - {"ChecksumType"}
