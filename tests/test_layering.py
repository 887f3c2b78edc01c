"""The layout shows the way of the data: imports go down only, and the writer side knows no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncckpt

PACKAGE = Path(asyncckpt.__file__).parent

# From the top down. A module may import from its own line's modules only if they are listed in the same line, and from
# every line below.
LAYERS = [
    "__main__",
    "cli.app cli.run",
    "cli.inspection cli.difference cli.copies cli.listing cli.verification cli.upkeep cli.advice cli.diagnosis",
    "doctor.examination",
    "doctor.destination doctor.machine doctor.process doctor.speed doctor.store",
    "doctor.file_system doctor.child",
    "doctor.finding",
    "cli.tensors",
    "cli.output cli.options",
    "manager",
    "opening pace",
    "mirror_tier",
    "resume distributed.ddp preemption",
    "state.restore state.sampler",
    "state.capture",
    "state.stateful",
    "state.rng",
    "distributed.ranks distributed.sharding",
    "service.default copying",
    "service.saver",
    "service.options service.request service.queues",
    "service.process_queue",
    "service.succession",
    "service.handover service.obstacles",
    "service.mirror_process",
    "service.writer service.mirror",
    "service.replicator",
    "service.callbacks",
    "service.queue",
    "service.worker",
    "service.messages service.writer_process",
    "service.connection",
    "service.watchdog",
    "service.ledger",
    "service.handle service.admission service.order service.memory service.exit",
    "registry.replication",
    "image.transfer",
    "registry.directory",
    "registry.index",
    "registry.files",
    "registry.recovery registry.turns registry.mirror_note",
    "registry.backlog",
    "registry.registry",
    "image.snapshot",
    "image.fence",
    "image.load",
    "image.partial",
    "image.torch_file image.sparse_file image.mapped_file",
    "image.streaming image.checked_file",
    "image.staging",
    "image.plan",
    "image.payloads image.whole_checksum",
    "image.file",
    "image.verify image.fetch",
    "storage.places",
    "storage.schemes",
    "storage.obstore_client",
    "storage.s3 storage.sftp storage.fsspec_objects storage.fsspec_rename storage.fsspec_memory",
    "storage.fsspec_storage storage.sftp_requests",
    "storage.claim storage.s3_requests storage.fsspec_files storage.journal",
    "storage.fsspec_errors storage.options",
    "storage.local",
    "storage.links storage.directory_lock",
    "storage.temporary storage.directories",
    "storage.files",
    "progress warn",
    "storage.base storage.system_calls storage.bounded",
    "image.checksum",
    "image.layout image.arena",
    "policies registry.retention overhead image.selection",
    "init",
    "naming events threads interval",
    "records",
    "errors version",
    "paths",
]
TORCH_FREE = {
    *("errors", "events", "init", "naming", "records", "threads", "version", "policies", "interval", "overhead"),
    *("mirror_tier", "opening", "pace", "warn"),
    *("registry.registry", "registry.retention", "registry.backlog", "registry.recovery", "registry.directory"),
    *("registry.files", "registry.index", "registry.turns", "registry.mirror_note"),
    *("registry.replication", "service.mirror", "service.mirror_process", "service.replicator"),
    *(f"image.{name}" for name in ("layout", "arena", "checksum", "verify", "file", "payloads", "whole_checksum")),
    *(f"image.{name}" for name in ("checked_file", "sparse_file", "selection", "fetch", "transfer")),
    *("paths", "progress", "copying", "cli.copies"),
    *(f"storage.{name}" for name in ("places", "s3", "s3_requests", "claim", "journal", "obstore_client")),
    *("storage.schemes", "storage.options", "storage.sftp", "storage.sftp_requests"),
    *(f"storage.fsspec_{name}" for name in ("storage", "objects", "rename", "memory", "files", "errors")),
    *("storage.base", "storage.local", "storage.system_calls"),
    *(f"storage.{name}" for name in ("files", "directories", "temporary", "links", "directory_lock", "bounded")),
    *(
        f"cli.{name}"
        for name in ("output", "options", "listing", "verification", "upkeep", "advice", "diagnosis", "run")
    ),
    "doctor.store",
    *(f"doctor.{name}" for name in ("finding", "child", "file_system", "destination", "machine", "process", "speed")),
    "doctor.examination",
    *(f"service.{name}" for name in ("queue", "worker", "watchdog", "handle", "admission", "order", "memory", "exit")),
    *(f"service.{name}" for name in ("process_queue", "succession", "handover", "obstacles")),
    *(f"service.{name}" for name in ("queues", "callbacks", "ledger")),
    *(f"service.{name}" for name in ("writer", "writer_process", "messages", "connection")),
}


def modules() -> dict[str, Path]:
    paths = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "asyncckpt":
            candidates = (".".join(parts[1:end]) for end in (len(parts), len(parts) - 1))
            yield next((candidate for candidate in candidates if candidate in known), name)


def test_every_module_has_its_layer() -> None:
    assert set(modules()) == {name for layer in LAYERS for name in layer.split()}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down_only(module: str) -> None:
    depth = {name: index for index, layer in enumerate(LAYERS) for name in layer.split()}
    for imported in own_imports(modules()[module], modules()):
        assert depth[imported] >= depth[module], f"{module} imports {imported}, which lies above it"


@pytest.mark.parametrize("module", sorted(TORCH_FREE))
def test_the_writer_side_is_free_of_torch(module: str) -> None:
    known = modules()
    assert not [name for name in imports(known[module]) if name.split(".")[0] in ("torch", "numpy")]
    assert set(own_imports(known[module], known)) <= TORCH_FREE
