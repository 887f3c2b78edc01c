"""REMOTE.md: uploads held against their targets, and all figures as tables. Pure: figures in, text out."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.remote import RemoteResults, Uploads
from benchmarks.remote_methods import REMOTE_METHODS
from benchmarks.report import VERDICTS, spread, table
from benchmarks.targets import Row, ratio

_MIB = 1 << 20


def judge_remote(results: RemoteResults) -> list[Row]:
    return [row for server in results.servers for row in _judge(results, server)]


def _judge(results: RemoteResults, server: str) -> Iterator[Row]:
    quiet, busy = (
        {key: found for (where, when, key), found in results.uploads.items() if (where, when) == (server, condition)}
        for condition in ("quiet", "busy")
    )
    of_raw = quiet["obstore"].speed.over(quiet["raw"].speed)
    yield Row(
        f"{server}: client='obstore', share of obstore's own put",
        "≥ 0.95",
        ratio(of_raw),
        of_raw.median >= 0.95,
        _against(quiet["obstore"], quiet["raw"]) + "; the image's checksums come before the first byte, two small "
        "requests for the note around it",
    )
    ahead = busy["s3fs"].speed.over(busy["pipe"].speed)
    yield Row(
        f"{server}, busy training thread: asyncckpt faster than s3fs pipe_file by",
        "≥ 3 x",
        ratio(ahead),
        ahead.median >= 3,
        _against(busy["s3fs"], busy["pipe"]) + "; the writer process gives way to training wherever cores are short",
    )
    for key in ("s3fs", "obstore"):
        share = quiet[key].memory
        name = REMOTE_METHODS[key].name
        yield Row(f"{server}: extra memory, {name}", "≤ 0.1 x state", f"{share.median:.2f} x", share.median <= 0.1)


def _against(one: Uploads, other: Uploads) -> str:
    return f"{one.speed.median / _MIB:.0f} MiB/s against {other.speed.median / _MIB:.0f}"


def remote_markdown(results: RemoteResults, rows: list[Row], command: str) -> str:
    """The whole page."""
    return "\n".join(
        line for section in (_head(results, command), _tables(results, rows), _about()) for line in section
    )


def _head(results: RemoteResults, command: str) -> Iterator[str]:
    yield f"""# Benchmark results: uploading to S3

Written by `{command}`.
A state of {results.num_bytes / 1e6:.0f} MB goes to an S3 server on the same machine: SeaweedFS, and one that throws
everything away, for the ceiling of the clients. Every method has a process of its own; within a round each uploads
once, in turn. Ratios are taken within a round and given as their median, with the range in brackets; warm rounds:
{results.num_rounds}. *Busy*: beside a training thread that never lets go of the GIL by itself. *Memory*: anonymous
memory of trainer and writer process at its peak beyond what they had before, without the snapshot.
"""
    yield from table(("machine", ""), ([key, value] for key, value in results.machine.items()))


def _tables(results: RemoteResults, rows: list[Row]) -> Iterator[str]:
    yield "## Targets\n"
    yield from table(
        ("what", "target", "measured", "", "speeds, and what limits them"),
        ([row.what, row.target, row.measured, VERDICTS[row.met], row.why] for row in rows),
    )
    header = (
        *("method", "MiB/s", "processor, s", "memory, x state"),
        *("MiB/s, busy", "memory, busy", "training step, busy, x"),
    )
    for server in results.servers:
        yield f"## {server}\n"
        lines = []
        for (where, when, key), quiet in results.uploads.items():
            if (where, when) == (server, "quiet"):
                busy = results.uploads[server, "busy", key]
                lines.append(
                    [
                        REMOTE_METHODS[key].name,
                        *(spread(quiet.speed, 1 / _MIB), f"{quiet.processor_secs.median:.2f}"),
                        *(f"{quiet.memory.median:.2f}", spread(busy.speed, 1 / _MIB), f"{busy.memory.median:.2f}"),
                        f"{busy.slowdown.median:.2f}",
                    ]
                )
        yield from table(header, lines)


def _about() -> Iterator[str]:
    yield "What was measured:\n"
    for method in REMOTE_METHODS.values():
        yield f"- **{method.name}**: {method.about}"
    yield ""
