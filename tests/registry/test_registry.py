"""The registry as a value: one best, order by commit, strict JSON, and nothing believed that a file could lie about."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.errors import RegistryError
from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.registry import (
    DamagedRegistryError,
    PendingDelete,
    Registry,
    decode_registry,
    describe_in_file,
    encode_registry,
    read_description,
)

EMPTY = Registry("0123456789abcdef", "val_loss", "min")


def info(sequence: int, val_loss: float | None = 1.0, *, step: int | None = None, name: str = "") -> CheckpointInfo:
    return CheckpointInfo(
        filepath=Path(name or f"checkpoint_{sequence}.pt"),
        epoch=1,
        global_step=10 * sequence if step is None else step,
        val_loss=val_loss,
        val_metrics={"accuracy": 0.5},
        timestamp="2026-01-02T03:04:05+00:00",
        num_bytes=100,
        train_loss=2.0,
        sequence=sequence,
    )


def registry_of(*infos: CheckpointInfo) -> Registry:
    registry = EMPTY
    for each in infos:
        registry = registry.with_checkpoint(each)
    return registry


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([], None),
        ([1.0], 1),
        ([1.0, 2.0], 1),
        ([2.0, 1.0], 2),
        ([1.0, 1.0], 1),  # a tie is no improvement
        ([math.nan], None),
        ([None], None),
        ([math.nan, 3.0, None], 2),
        ([1.0, math.nan], 1),
        ([math.inf, 5.0], 2),
        ([math.inf], 1),
        ([1.0, -math.inf], 2),
    ],
)
def test_at_most_one_is_best(losses: list[float | None], best: int | None) -> None:
    """The first of the smallest; NaN and None never are."""
    registry = registry_of(*(info(number, loss) for number, loss in enumerate(losses, 1)))
    assert [each.sequence for each in registry.checkpoints if each.is_best] == ([best] if best else [])
    assert (registry.best and registry.best.sequence) == best


def test_best_by_another_metric() -> None:
    registry = registry_of(
        replace(info(1, 1.0), val_metrics={"accuracy": 0.9}), replace(info(2, 0.5), val_metrics={"accuracy": 0.1})
    )
    assert registry.best is not None
    assert registry.best.sequence == 2
    by_accuracy = registry.monitoring("accuracy", "max")
    assert by_accuracy.best is not None
    assert (by_accuracy.best.sequence, by_accuracy.best_score) == (1, 0.9)
    assert registry.monitoring("missing", "max").best is None


def test_latest_is_the_last_commit_whatever_its_step() -> None:
    registry = registry_of(info(1, step=10_000), info(3, step=8_000), info(2, step=12_000))
    assert [each.sequence for each in registry.checkpoints] == [1, 2, 3]
    assert registry.latest is not None
    assert registry.latest.global_step == 8_000
    assert registry.last_sequence == 3


def test_a_pin_stays_with_the_name() -> None:
    """When a save that was under way while it was pinned commits the name again."""
    registry = registry_of(info(1, name="a.pt"), info(2))
    registry = registry.with_pin(registry.checkpoints[0], is_pinned=True)
    assert [each.pinned for each in registry.checkpoints] == [True, False]
    assert [each.pinned for each in registry.with_checkpoint(info(3, name="a.pt")).checkpoints] == [False, True]
    assert not registry.with_pin(registry.checkpoints[0], is_pinned=False).checkpoints[0].pinned


def test_a_name_committed_again_replaces_its_entry() -> None:
    """And leaves the list of files to delete."""
    registry = registry_of(info(1, name="a.pt"), info(2, name="b.pt")).keeping({2})
    assert registry.pending_deletes == (PendingDelete("a.pt", 1),)
    again = registry.with_checkpoint(info(3, name="a.pt"))
    assert again.pending_deletes == ()
    again = again.with_checkpoint(info(4, name="b.pt"))
    assert [(str(each.filepath), each.sequence) for each in again.checkpoints] == [("a.pt", 3), ("b.pt", 4)]


def test_numbers_are_never_given_twice() -> None:
    registry = registry_of(info(1), info(2)).keeping(set())
    assert registry.checkpoints == ()
    assert registry.last_sequence == 2


def test_deleted_files_leave_the_list() -> None:
    registry = registry_of(info(1), info(2), info(3)).keeping({3})
    registry = registry.deleted([PendingDelete("checkpoint_1.pt", 1)])
    assert registry.pending_deletes == (PendingDelete("checkpoint_2.pt", 2),)


# --- registry.json ---


def test_round_trip() -> None:
    registry = registry_of(
        replace(info(1, math.nan), pinned=True),
        info(2, -math.inf),
        replace(info(3, None), train_loss=None, pinned=True),
        replace(info(4), protected=True),
    ).keeping({1, 2, 3, 4})
    registry = replace(registry, pending_deletes=(PendingDelete("old.pt", 7),), last_sequence=9)
    text = encode_registry(registry)
    again = decode_registry(text)
    assert encode_registry(again) == text
    assert again.checkpoints[1:] == registry.checkpoints[1:]
    assert math.isnan(again.checkpoints[0].val_loss or 0)
    assert again.pending_deletes == registry.pending_deletes
    assert again.last_sequence == 9


def test_it_is_strict_json_with_the_known_keys() -> None:
    """Any JSON reader takes it, NaN and infinities and all."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(encode_registry(registry_of(info(1, math.nan), info(2, 0.5))), parse_constant=refuse)
    assert document["best_score"] == 0.5
    assert document["best_checkpoint_path"] == "best_model.pt"
    assert {"filepath", "epoch", "global_step", "val_loss", "val_metrics", "timestamp", "is_best"} <= set(
        document["checkpoints"][0]
    )
    assert document["checkpoints"][0]["val_loss"] == "NaN"
    assert document["checkpoints"][0]["filepath"] == "checkpoint_1.pt"


def document(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(encode_registry(registry_of(info(1), info(2))))
    return {**whole, **changes}


def entries(**changes: Any) -> dict[str, Any]:
    return document(checkpoints=[{**document()["checkpoints"][0], **changes}])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(document(run_id="../x")).encode(),
        json.dumps(document(run_id=5)).encode(),
        json.dumps(document(checkpoints={})).encode(),
        json.dumps(document(checkpoints=[{}])).encode(),
        json.dumps(document(last_sequence=-1)).encode(),
        json.dumps(document(monitor_mode="median")).encode(),
        json.dumps(entries(sequence=0)).encode(),
        json.dumps(entries(sequence=2**70)).encode(),
        json.dumps(entries(val_loss="1.0")).encode(),
        json.dumps(entries(num_bytes=-5)).encode(),
        json.dumps(document(checkpoints=[document()["checkpoints"][0]] * 2)).encode(),
        json.dumps(
            document(checkpoints=[document()["checkpoints"][0], entries(sequence=9)["checkpoints"][0]])
        ).encode(),
    ],
)
def test_nonsense_is_damage(text: bytes) -> None:
    with pytest.raises(DamagedRegistryError):
        decode_registry(text)


@pytest.mark.parametrize(
    "name",
    [
        "../x.pt",
        "/etc/x.pt",
        "a/b.pt",
        "..",
        ".",
        "",
        "x",
        ".hidden.pt",
        "best_model.pt",
        "registry.json",
        "a\0.pt",
        "a\\b.pt",
    ],
)
@pytest.mark.parametrize("key", ["checkpoints", "pending_deletes"])
def test_names_that_point_elsewhere_are_damage(name: str, key: str) -> None:
    """Nothing outside the directory, nor anything with another meaning in it, is ever read or deleted on its word."""
    named = (
        entries(filepath=name) if key == "checkpoints" else document(pending_deletes=[{"name": name, "sequence": 1}])
    )
    with pytest.raises(DamagedRegistryError, match="not a checkpoint in this directory"):
        decode_registry(json.dumps(named).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"version": 2}, "later asyncckpt"), ({"version": 99, "checkpoints": None}, "later asyncckpt")],
)
def test_a_later_version_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        decode_registry(json.dumps(document(**changes)).encode())


def test_somebody_elses_registry_is_refused() -> None:
    text = json.dumps({"checkpoints": [], "best_score": 0.5, "best_checkpoint_path": None})
    with pytest.raises(RegistryError, match="not written by asyncckpt"):
        decode_registry(text.encode())


def test_unknown_keys_are_passed_over() -> None:
    decode_registry(json.dumps(document(note="by hand")).encode())


def test_the_marks_are_worked_out_anew() -> None:
    """Two bests, or the wrong one, are not believed."""
    whole = document()
    for entry in whole["checkpoints"]:
        entry["is_best"] = True
    registry = decode_registry(json.dumps(whole).encode())
    assert [each.is_best for each in registry.checkpoints] == [True, False]


# --- what files say of themselves ---


def test_a_file_describes_itself() -> None:
    one = info(5, math.nan)
    metadata = {"name": str(one.filepath), "created": one.timestamp, "metadata": describe_in_file(EMPTY, one)}
    described = read_description(json.loads(json.dumps(metadata)), 100)
    assert described is not None
    assert (described.run_id, described.name) == (EMPTY.run_id, "checkpoint_5.pt")
    assert replace(described.info, val_loss=0.0) == replace(one, val_loss=0.0)
    assert math.isnan(described.info.val_loss or 0)


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"name": "a.pt"}, {"name": "a.pt", "created": "", "metadata": {"run_id": "x", "sequence": 1}}],
)
def test_other_files_do_not(metadata: Any) -> None:
    assert read_description(metadata, 1) is None
