"""The ways of uploading that are compared, each in a process of its own that does one upload per line on its stdin:
`python -m benchmarks.remote_methods KEY NUM_BYTES FILE`, the storage options as JSON on the first line. It answers each
`quiet` or `busy` with a URL in one line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncckpt
from benchmarks.training import BusyPython
from benchmarks.workload import Workload

_PART_BYTES = 16 << 20
_NUM_PARALLEL = 8
_UNDISTURBED_SECS = 0.5


class RemoteMethod(ABC):
    """A way of uploading. What `stage` stages, if anything, is not timed; `send` blocks until all is there."""

    key: str
    name: str
    about: str

    def __init__(self, options: dict[str, Any], num_bytes: int, file: Path) -> None:
        self.options = options
        self.num_bytes = num_bytes

    def stage(self, url: str) -> None:  # noqa: B027  # most have nothing to stage
        pass

    @abstractmethod
    def send(self, url: str) -> None: ...

    def close(self) -> None:  # noqa: B027
        pass


def _contents(num_bytes: int) -> bytes:
    """As little compressible as weights are: some servers compress what they can."""
    return os.urandom(num_bytes)


def _file_in_page_cache(file: Path, key: str, num_bytes: int) -> Path:
    """One of the method's own, beside `file`."""
    own = file.with_name(f"{file.name}-{key}")
    own.write_bytes(_contents(num_bytes))
    return own


class OursByS3fs(RemoteMethod):
    key = "s3fs"
    name = "asyncckpt"
    about = "AsyncCheckpointSaver, from the staged snapshot to the acknowledgement; its writer process uploads by s3fs."
    client = "s3fs"

    def __init__(self, options: dict[str, Any], num_bytes: int, file: Path) -> None:
        super().__init__({**options, "client": self.client}, num_bytes, file)
        self._workload = Workload(num_bytes)
        self.num_bytes = self._workload.num_bytes
        self._saver = asyncckpt.AsyncCheckpointSaver(storage_options=self.options)

    def stage(self, url: str) -> None:
        self._handle = self._saver.save(self._workload.state(), url)

    def send(self, url: str) -> None:
        self._handle.result()

    def close(self) -> None:
        self._saver.close()


class OursByObstore(OursByS3fs):
    key = "obstore"
    name = "asyncckpt, client='obstore'"
    about = "the same, the writer process uploading by obstore."
    client = "obstore"


class S3fsMethod(RemoteMethod):
    """Through an s3fs file system in the training process."""

    def __init__(self, options: dict[str, Any], num_bytes: int, file: Path) -> None:
        import s3fs

        super().__init__(options, num_bytes, file)
        self.file_system = s3fs.S3FileSystem(**options, use_listings_cache=False)


class S3fsPipe(S3fsMethod):
    key = "pipe"
    name = "s3fs pipe_file"
    about = "s3fs's pipe_file of bytes in memory, in the training process, with its defaults."

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._contents = _contents(self.num_bytes)

    def send(self, url: str) -> None:
        self.file_system.pipe_file(url, self._contents)


class S3fsPut(S3fsMethod):
    key = "put"
    name = "s3fs put_file"
    about = "s3fs's put_file of a local file that is in the page cache, 8 parts at a time."

    def __init__(self, options: dict[str, Any], num_bytes: int, file: Path) -> None:
        super().__init__(options, num_bytes, file)
        self._file = _file_in_page_cache(file, self.key, num_bytes)

    def send(self, url: str) -> None:
        self.file_system.put_file(str(self._file), url, max_concurrency=_NUM_PARALLEL)


class Boto3(RemoteMethod):
    key = "boto3"
    name = "boto3 upload_file"
    about = (
        "boto3's upload_file of a local file that is in the page cache, in the training process: 16 MiB parts, by 8 "
        "threads."
    )

    def __init__(self, options: dict[str, Any], num_bytes: int, file: Path) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig

        super().__init__(options, num_bytes, file)
        self._file = _file_in_page_cache(file, self.key, num_bytes)
        self._client = boto3.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            **options["client_kwargs"],
        )
        self._config = TransferConfig(
            multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_NUM_PARALLEL
        )

    def send(self, url: str) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self._client.upload_file(str(self._file), bucket, key, Config=self._config)


class RawObstore(RemoteMethod):
    key = "raw"
    name = "obstore put"
    about = "obstore's own put of memory, in the training process: 16 MiB parts, 8 at a time, each with its checksum."

    def __init__(self, options: dict[str, Any], num_bytes: int, file: Path) -> None:
        super().__init__(options, num_bytes, file)
        self._contents = memoryview(_contents(num_bytes))

    def send(self, url: str) -> None:
        import obstore
        from obstore.store import S3Store

        bucket, _, key = url.removeprefix("s3://").partition("/")
        store = S3Store(
            bucket,
            endpoint=self.options["endpoint_url"],
            region=self.options["client_kwargs"]["region_name"],
            access_key_id=self.options["key"],
            secret_access_key=self.options["secret"],
            checksum_algorithm="crc64nvme",
            client_options={"allow_http": True},
        )
        obstore.put(store, key, self._contents, chunk_size=_PART_BYTES, max_concurrency=_NUM_PARALLEL)


class Dcp(RemoteMethod):
    key = "dcp"
    name = "DCP FsspecWriter"
    about = "torch.distributed.checkpoint.save with its FsspecWriter over s3fs, one process, in the training process."

    def __init__(self, options: dict[str, Any], num_bytes: int, file: Path) -> None:
        super().__init__(options, num_bytes, file)
        self._workload = Workload(num_bytes)
        self.num_bytes = self._workload.num_bytes

    def send(self, url: str) -> None:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self._workload.state(), storage_writer=FsspecWriter(url, **self.options), no_dist=True)


REMOTE_METHODS: dict[str, type[RemoteMethod]] = {
    method.key: method for method in (OursByS3fs, OursByObstore, S3fsPipe, S3fsPut, Boto3, RawObstore, Dcp)
}


def upload_quietly(method: RemoteMethod, url: str) -> dict[str, float]:
    method.stage(url)
    started = time.perf_counter()
    method.send(url)
    return {"secs": time.perf_counter() - started, "slowdown": 1.0}


def upload_while_busy(method: RemoteMethod, url: str) -> dict[str, float]:
    """Beside a training thread of pure Python; by how much its steps take longer meanwhile."""
    trainer = BusyPython()
    usual = statistics.median(trainer.run_for(_UNDISTURBED_SECS))
    method.stage(url)
    ended: list[float] = []

    def send() -> None:
        method.send(url)
        ended.append(time.perf_counter())

    thread = threading.Thread(target=send)
    started = time.perf_counter()
    thread.start()
    during = trainer.run_while(thread.is_alive)
    thread.join()
    return {"secs": ended[0] - started, "slowdown": statistics.median(during) / usual}


CONDITIONS: dict[str, Callable[[RemoteMethod, str], dict[str, float]]] = {
    "quiet": upload_quietly,
    "busy": upload_while_busy,
}


def main(key: str, num_bytes: str, file: str) -> None:
    method = REMOTE_METHODS[key](json.loads(sys.stdin.readline()), int(num_bytes), Path(file))
    print(json.dumps({"num_bytes": method.num_bytes}), flush=True)
    for line in sys.stdin:
        condition, url = line.split()
        print(json.dumps(CONDITIONS[condition](method, url)), flush=True)
    method.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
