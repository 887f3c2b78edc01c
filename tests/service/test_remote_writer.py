"""The writer process and a store: killed in the middle of an upload, it is replaced by one that goes on with it."""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from storage.s3_proxy import Fault, s3_proxy
from storage.s3_server import BUCKET, S3Server

import asyncckpt
from asyncckpt.service.process_queue import ProcessQueue
from service.disk import children, wait_for

NUM_PARTS = 13
NUM_SENT = 5  # when it is killed
PART_BYTES = 16 << 20


def test_killed_in_the_middle_of_an_upload(server: S3Server) -> None:
    """Only the parts that are missing are sent by the next one; nothing of it all is left."""
    url = f"s3://{BUCKET}/{secrets.token_hex(4)}/state.pt"
    state = {"weights": torch.arange(((NUM_PARTS - 1) * PART_BYTES + PART_BYTES // 2) // 8)}
    before = children()
    with s3_proxy(server) as proxy, asyncckpt.AsyncCheckpointSaver(storage_options=proxy.server.options) as saver:
        proxy.arm(Fault("stall", "upload_part checkpoint", number=NUM_SENT + 1, times=100))
        handle = saver.save(state, url)
        wait_for(lambda: num_parts_in(str(saver.storage.journals)) == NUM_SENT)
        queue = saver._queue
        assert isinstance(queue, ProcessQueue)
        assert queue.pid is not None
        os.kill(queue.pid, signal.SIGKILL)
        proxy.arm(None)
        handle.result(120)
        of_next = proxy.seen[proxy.seen.index("list_parts checkpoint") :]  # before it come the dead one's last words
        assert of_next.count("upload_part checkpoint") == NUM_PARTS - NUM_SENT
        assert of_next.count("create_multipart_upload checkpoint") == 0
    assert asyncckpt.verify(url, storage_options=server.options).ok
    assert torch.equal(asyncckpt.load(url, storage_options=server.options)["weights"], state["weights"])
    client = server.client()
    assert [path.rsplit("/", 1)[1] for path in client.ls(url.rsplit("/", 1)[0], detail=False)] == ["state.pt"]
    assert not client.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=url.split("/", 3)[3]).get("Uploads")
    assert not Path(str(saver.storage.journals)).exists()
    wait_for(lambda: children() == before)


def num_parts_in(journals: str) -> int:
    """Of the one upload under way."""
    found = list(Path(journals).glob("*.journal"))
    return len(found[0].read_bytes().splitlines()) - 1 if found else 0


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_an_object_of_6_gib(server: S3Server) -> None:
    """More than one PUT may hold, from less memory than that: it goes up, comes back, and is what it was."""
    num_bytes = (6 << 30) + 4321
    url = f"s3://{BUCKET}/{secrets.token_hex(4)}/large.pt"
    tensor = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))  # pages that nobody touches cost nothing
    places = torch.tensor([0, 1 << 20, (4 << 30) - 1, 4 << 30, num_bytes - 1])
    tensor[places] = torch.arange(1, 6, dtype=torch.uint8)
    options = server.options
    saver = asyncckpt.AsyncCheckpointSaver(storage_options=options, memory_limit=256 << 20)
    with saver, pytest.warns(UserWarning, match="over memory_limit"):
        saver.save({"weights": tensor}, url).result(1200)
    report = asyncckpt.verify(url, storage_options=options)
    assert (report.ok, report.num_bytes > num_bytes) == (True, True)
    loaded = asyncckpt.load(url, storage_options=options)["weights"]
    assert loaded[places].tolist() == [1, 2, 3, 4, 5]
    assert int(loaded.count_nonzero()) == 5
    server.client().rm_file(url)
