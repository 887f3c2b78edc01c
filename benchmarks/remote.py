"""Uploading, side by side and interleaved: every method once per round, on one S3 server and on one that throws
everything away, alone and beside a busy training thread."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe
from benchmarks.remote_methods import CONDITIONS, REMOTE_METHODS
from benchmarks.samples import Samples

_ROOT = Path(__file__).resolve().parent.parent
_BUCKET = "benchmark"
_SAMPLE_SECS = 0.02
SERVERS = ("SeaweedFS", "discarding")


@dataclass
class Uploads:
    """One method's uploads to one server, alone or beside a busy thread. `speed` in bytes per second, `memory` as a
    share of the state: anonymous memory of trainer and writer process at its peak, beyond what they had before."""

    speed: Samples = field(default_factory=Samples)
    processor_secs: Samples = field(default_factory=Samples)
    memory: Samples = field(default_factory=Samples)
    slowdown: Samples = field(default_factory=Samples)


@dataclass
class RemoteResults:
    """`uploads` by server, condition ("quiet" or "busy") and method; parallel over the rounds."""

    machine: dict[str, str]
    num_bytes: int
    num_rounds: int
    uploads: dict[tuple[str, str, str], Uploads]

    @property
    def servers(self) -> list[str]:
        return list(dict.fromkeys(server for server, _, _ in self.uploads))


def measure_remote(
    num_bytes: int,
    num_rounds: int,
    directory: Path,
    tell: Callable[[str], None],
    *,
    servers: Sequence[str] = SERVERS,
    methods: Sequence[str] = tuple(REMOTE_METHODS),
) -> RemoteResults:
    """One cold round and `num_rounds` warm ones."""
    uploads: dict[tuple[str, str, str], Uploads] = {}
    for server in servers:
        keys = [key for key in methods if server == "SeaweedFS" or key != "dcp"]  # which reads as it writes
        with _STARTS[server](directory) as options, ExitStack() as running:
            children = {key: running.enter_context(_child(key, num_bytes, directory, options)) for key in keys}
            for index in range(num_rounds + 1):
                for condition in CONDITIONS:
                    for key in keys if index % 2 else reversed(keys):
                        tell(f"{server}, {condition}, round {index + 1} of {num_rounds + 1}: {key}")
                        found = uploads.setdefault((server, condition, key), Uploads())
                        children[key].upload(condition, f"s3://{_BUCKET}/{key}/state.pt", found)
    return RemoteResults(describe(directory), num_bytes, num_rounds, uploads)


class _Child:
    """A method in its process."""

    def __init__(self, process: subprocess.Popen[str], options: Mapping[str, Any]) -> None:
        self._process = process
        self._tree = psutil.Process(process.pid)
        self._num_bytes = int(self._ask(json.dumps(dict(options)))["num_bytes"])

    def upload(self, condition: str, url: str, found: Uploads) -> None:
        before, processor_before = self._memory(), self._processor_secs()
        peak, done = [before], threading.Event()

        def watch() -> None:
            while not done.wait(_SAMPLE_SECS):
                peak.append(self._memory())

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            answer = self._ask(f"{condition} {url}")
        finally:
            done.set()
            watching.join()
        found.speed.add(self._num_bytes / answer["secs"])
        found.slowdown.add(answer["slowdown"])
        found.processor_secs.add(self._processor_secs() - processor_before)
        found.memory.add((max(peak) - before) / self._num_bytes)

    def _ask(self, line: str) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def _processes(self) -> list[psutil.Process]:
        return [self._tree, *self._tree.children(recursive=True)]

    def _processor_secs(self) -> float:
        times = [process.cpu_times() for process in self._processes()]
        return float(sum(time.user + time.system for time in times))

    def _memory(self) -> int:
        """Anonymous: the image is shared between trainer and writer process, and both methods and files stay out."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon:"):
                        total += int(line.split()[1]) * 1024
        return total


@contextmanager
def _child(key: str, num_bytes: int, directory: Path, options: Mapping[str, Any]) -> Iterator[_Child]:
    command = [sys.executable, "-m", "benchmarks.remote_methods", key, str(num_bytes), str(directory / "contents")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=_ROOT) as process:
        try:
            yield _Child(process, options)
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        finally:
            process.kill()


@contextmanager
def _seaweedfs(directory: Path) -> Iterator[dict[str, Any]]:
    sys.path.append(str(_ROOT / "tests"))
    from storage.s3_server import s3_server

    data = directory / "server"
    data.mkdir()
    with s3_server(data) as server:
        server.client().mkdir(_BUCKET)
        yield server.options


@contextmanager
def _discarding(directory: Path) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.discarding_s3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        try:
            endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
            client_kwargs = {"region_name": "us-east-1"}
            yield {"key": "key", "secret": "secret", "endpoint_url": endpoint, "client_kwargs": client_kwargs}
        finally:
            process.kill()


_STARTS: dict[str, Callable[[Path], AbstractContextManager[dict[str, Any]]]] = {
    "SeaweedFS": _seaweedfs,
    "discarding": _discarding,
}
