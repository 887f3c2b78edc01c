"""`storage_options`, as people have them from elsewhere: those that are ours to say, and those that can't be used."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt import AsyncCheckpointSaver, CheckpointError, CheckpointManager
from asyncckpt.storage.s3_requests import S3Requests
from storage.s3_server import BUCKET, SECRET, S3Server
from storage.test_s3_secrets import text_of

TIMEOUT_SECS = 120.0


@pytest.fixture
def url(server: S3Server) -> str:
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


def save(url: str, options: dict[str, Any]) -> None:
    """In the writer process."""
    with AsyncCheckpointSaver(storage_options=options) as saver:
        saver.save({"a": torch.ones(3)}, f"{url}/a.pt").result(TIMEOUT_SECS)


def save_by_thread(url: str, options: dict[str, Any]) -> None:
    with AsyncCheckpointSaver(writer="thread", storage_options=options) as saver:
        saver.save({"a": torch.ones(3)}, f"{url}/a.pt").result(TIMEOUT_SECS)


def save_by_manager(url: str, options: dict[str, Any]) -> None:
    with CheckpointManager(url, storage_options=options) as manager:
        handle = manager.save(torch.nn.Linear(2, 2), None, epoch=0, global_step=1, val_loss=1.0)
        assert handle is not None
        handle.result(TIMEOUT_SECS)


def load(url: str, options: dict[str, Any]) -> None:
    asyncckpt.load(f"{url}/a.pt", storage_options=options)


def verify(url: str, options: dict[str, Any]) -> None:
    asyncckpt.verify(f"{url}/a.pt", storage_options=options)


def load_by_manager(url: str, options: dict[str, Any]) -> None:
    with CheckpointManager(url, storage_options=options) as manager:
        manager.load_latest(torch.nn.Linear(2, 2))


WAYS = (save, save_by_thread, save_by_manager, load, verify, load_by_manager)

MAKE_NO_DIFFERENCE: list[dict[str, Any]] = [
    {"skip_instance_cache": True, "use_listings_cache": True, "listings_expiry_time": 60, "max_paths": 10},
    {"config_kwargs": None, "s3_additional_kwargs": None, "asynchronous": False, "loop": None},
]
CAN_NOT_BE_USED: list[tuple[dict[str, Any], str]] = [
    ({"asynchronous": True}, "asynchronous can't be chosen"),
    ({"nonsense": SECRET}, "s3fs can't have 'nonsense'"),
    ({"config_kwargs": {"nonsense": SECRET}}, "config_kwargs can't have 'nonsense'"),
    ({"client_kwargs": {"nonsense": SECRET}}, "client_kwargs can't have 'nonsense'"),
    ({"config_kwargs": SECRET}, "config_kwargs is a dict, not str"),
    ({"key": 5}, "key is a str, not int"),
    ({"secret": [SECRET]}, "secret is a str, not list"),
    ({"endpoint_url": "nonsense"}, "endpoint_url is no URL"),
    ({"profile": "nonsense"}, "check profile"),
    ({"config_kwargs": {"retries": 5}}, "config_kwargs"),
    ({"s3_additional_kwargs": {"Metadata": SECRET}}, "Metadata in s3_additional_kwargs is a dict of str"),
    ({"s3_additional_kwargs": {"Metadata": {"a": 5}}}, "Metadata in s3_additional_kwargs is a dict of str"),
    ({"token": f"{SECRET}\n"}, "token holds a line end"),
    ({"secret": f"{SECRET}\r\n"}, "secret holds a line end"),
    ({"key": f"\x1b{SECRET}"}, "key holds a line end, or another character that does not print"),
    ({"key": None, "secret": None, "client_kwargs": {"aws_session_token": f"{SECRET}\n"}}, "aws_session_token holds"),
]


@pytest.mark.parametrize("options", MAKE_NO_DIFFERENCE, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_what_is_ours_to_say_makes_no_difference(
    server: S3Server, url: str, options: dict[str, Any], client: str
) -> None:
    if client == "obstore":
        pytest.importorskip("obstore")
    save(url, server.options | options | {"client": client})
    load(url, server.options | options | {"client": client})


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("options", "says"), CAN_NOT_BE_USED, ids=lambda case: case if isinstance(case, str) else "")
def test_what_can_not_be_used_is_named(
    server: S3Server, url: str, options: dict[str, Any], says: str, way: Callable[[str, dict[str, Any]], None]
) -> None:
    """And no value is, which may be a secret."""
    with pytest.raises(CheckpointError, match=rf"^storage_options.*{says}") as caught:
        way(url, server.options | options)
    assert SECRET not in text_of(caught.value)


def test_options_are_a_dict(url: str) -> None:
    with pytest.raises(TypeError, match="storage_options is a dict, not str"):
        asyncckpt.load(f"{url}/a.pt", storage_options="nonsense")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [AttributeError, KeyError, AssertionError])
def test_a_mistake_in_a_program_is_no_fault_of_the_store(
    server: S3Server, url: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported as what it is, at once, and nobody is told to try again."""
    requests, asked = S3Requests(server.options), []

    async def mistaken(*_: Any, **__: Any) -> None:
        asked.append(True)
        raise kind("nonsense")

    monkeypatch.setattr(requests._connected(), "_call_s3", mistaken)
    with pytest.raises(kind, match="nonsense"):
        requests.send("head_object", BUCKET, Key="a")
    assert len(asked) == 1
