"""A secret is in no log, no error, no object, no process's arguments: a canary is looked for in all of them."""

from __future__ import annotations

import logging
import secrets
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointError, CheckpointManager
from asyncckpt.naming import ALIVE_NAME, CLAIM_NAME, REGISTRY_NAME
from asyncckpt.service.process_queue import ProcessQueue
from storage.s3_server import SECRET, S3Server

BUCKET = "secrets"
TIMEOUT_SECS = 120.0


@pytest.fixture
def url(server: S3Server) -> str:
    client = server.client()
    if not client.exists(BUCKET):
        client.mkdir(BUCKET)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


def save(manager: CheckpointManager, step: int) -> BaseException | None:
    handle = manager.save(torch.nn.Linear(2, 2), None, epoch=0, global_step=step, val_loss=1.0)
    assert handle is not None
    return handle.exception(TIMEOUT_SECS)


def error_of(action: Callable[[], object]) -> BaseException | None:
    try:
        action()
    except (OSError, CheckpointError) as error:
        return error
    return None


def text_of(error: BaseException | None) -> str:
    """All that can be seen of an error and what it was raised from."""
    assert error is not None
    return "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))


def test_nothing_that_is_written_holds_it(server: S3Server, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither objects, nor logs at their most talkative, nor what the system shows of the writer process."""
    caplog.set_level(logging.DEBUG)
    with CheckpointManager(url, storage_options=server.options) as manager:
        assert save(manager, 1) is None
        queue = manager._saver._queue
        assert isinstance(queue, ProcessQueue), "a URL is written by the writer process"
        seen = [Path(f"/proc/{queue.pid}/{name}").read_bytes() for name in ("cmdline", "environ", "fd/2")]
        client = server.client()
        seen += [client.cat_file(f"{url}/{name}") for name in (REGISTRY_NAME, CLAIM_NAME, ALIVE_NAME)]
    assert all(seen[:2])
    assert not [text for text in seen if SECRET.encode() in text]
    assert caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("writer", "wrong"),
    [
        ("process", {"key": "wrong"}),
        ("thread", {"key": "wrong"}),
        ("thread", {"endpoint_url": "http://127.0.0.1:9"}),
        ("thread", {"endpoint_url": "?"}),
    ],
)
def test_no_error_holds_it(
    server: S3Server, url: str, writer: Any, wrong: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """However a save or a load fails, with all that it was raised from."""
    caplog.set_level(logging.DEBUG)
    options = server.options | wrong
    with AsyncCheckpointSaver(writer=writer, storage_options=options, retries=0) as saver:
        errors = [saver.save({}, f"{url}/a.pt").exception(TIMEOUT_SECS)]
    errors.append(error_of(partial(asyncckpt.load, f"{url}/a.pt", storage_options=options)))
    with CheckpointManager(url, writer=writer, storage_options=options) as manager:
        errors.append(error_of(partial(save, manager, 1)))
    assert not [text for text in map(text_of, errors) if SECRET in text]
    assert SECRET not in caplog.text


@pytest.mark.parametrize("secret", [SECRET, f"{SECRET}/with/slashes"])
def test_a_url_with_credentials_is_refused_untold(
    server: S3Server, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They don't belong there; and what refuses them does not repeat them."""
    caplog.set_level(logging.DEBUG)
    url = f"s3://key:{secret}@{BUCKET}/run"
    endpoint = f"http://key:{SECRET}@127.0.0.1:9"
    errors = []
    with AsyncCheckpointSaver() as saver, pytest.raises(CheckpointError, match="storage_options") as caught:
        saver.save({}, f"{url}/a.pt")
    errors.append(caught.value)
    with pytest.raises(CheckpointError, match="storage_options") as caught:
        CheckpointManager(url)
    errors.append(caught.value)
    for options in ({"endpoint_url": endpoint}, {"client_kwargs": {"endpoint_url": endpoint}}):
        with pytest.raises(CheckpointError, match="pass them as key and secret") as caught:
            asyncckpt.load(f"s3://{BUCKET}/run/a.pt", storage_options=options)
        errors.append(caught.value)
    assert not [text for text in map(text_of, errors) if SECRET in text]
    assert SECRET not in caplog.text
