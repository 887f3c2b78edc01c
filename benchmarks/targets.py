"""The measured figures held against the targets of the design. Pure: figures in, rows out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.loading import LoadResults
from benchmarks.memory import MemoryUse
from benchmarks.samples import Samples
from benchmarks.saving import SavingResults
from benchmarks.startup import ImportResults, PlanResults, WriterResults
from benchmarks.training import SlowdownResults

PEERS = ("torch", "reference", "dcp", "dcp-kept")


@dataclass
class Results:
    """Everything that one run measured."""

    machine: dict[str, str]
    imports: ImportResults
    planning: list[PlanResults]
    writer: WriterResults | None
    memory: dict[str, MemoryUse]
    saving: SavingResults
    slowdown: dict[str, SlowdownResults]
    busy_python: dict[str, SlowdownResults]
    loading: LoadResults


@dataclass(frozen=True)
class Row:
    """One target. `met` is None where its condition does not hold on this machine; `why` explains a miss, or that."""

    what: str
    target: str
    measured: str
    met: bool | None
    why: str = ""


def judge(results: Results) -> list[Row]:
    rows = [
        *_blocked(results.saving),
        *_durable(results.saving),
        *_memory(results.memory),
        *_training(results.slowdown),
        *_loading(results.loading),
        *_planning(results.planning),
        *_imports(results.imports),
        *_writer(results.writer),
    ]
    return [row if row.met is not True else Row(row.what, row.target, row.measured, True) for row in rows]


def _blocked(saving: SavingResults) -> Iterator[Row]:
    copy, torch_save = saving.methods["copy"], saving.methods["torch"]
    of_memory = saving.memory_copy.over(copy.blocked)
    plan, stage = copy.part("plan"), copy.part("stage")
    yield Row(
        "blocked, copy, warm: share of memcpy speed",
        "≥ 0.85",
        ratio(of_memory),
        of_memory.median >= 0.85,
        f"of {ms(copy.blocked.median)}, staging took {ms(stage.median)} and planning {ms(plan.median)}; copying "
        f"as many bytes between two plain tensors took {ms(saving.memory_copy.median)}",
    )
    peer = min((saving.methods[key] for key in PEERS), key=lambda times: times.blocked.median)
    ahead = peer.blocked.over(copy.blocked)
    yield Row(
        "blocked, copy: shorter than the fastest peer's by",
        "> 1 x",
        f"{ratio(ahead)} ({peer.name})",
        ahead.median > 1,
        f"{peer.name} blocks for {ms(peer.blocked.median)}, copy for {ms(copy.blocked.median)}",
    )
    ahead = torch_save.durable.over(copy.blocked)
    yield Row(
        "blocked, copy: shorter than torch.save + fsync by",
        "≥ 14 x",
        ratio(ahead),
        ahead.median >= 14,
        f"the copy takes {ms(copy.blocked.median)}, and this disk lets torch.save finish in "
        f"{ms(torch_save.durable.median)}; at memcpy speed the ratio would be "
        f"{torch_save.durable.over(saving.memory_copy).median:.1f}",
    )
    overlap = saving.methods["overlap"]
    fence, plan = overlap.part("fence"), overlap.part("plan")
    yield Row(
        f"blocked, overlap: save() alone, {saving.num_tensors} tensors",
        "≤ 15 ms",
        f"{ms(overlap.blocked.median)} (fence: {ms(fence.median)})",
        overlap.blocked.median <= 0.015,
        f"planning took {ms(plan.median)} of it; the rest is finding what may be staged late and starting that",
    )


def _durable(saving: SavingResults) -> Iterator[Row]:
    copy, torch_save, dcp = (saving.methods[key] for key in ("copy", "torch", "dcp"))
    of_raw = saving.raw_write.over(copy.durable)
    stage = copy.part("stage")
    crc = copy.part("checksum")
    after = Samples([timings.write_secs + timings.sync_secs + timings.commit_secs for timings in copy.timings])
    yield Row(
        "durable throughput, copy: share of the raw disk's",
        "≥ 0.9",
        ratio(of_raw),
        of_raw.median >= 0.9,
        f"staging ({ms(stage.median)}) comes before the first byte is written; write, sync and commit alone took "
        f"{ms(after.median)} ({saving.raw_write.over(after).median:.2f} of raw), beside {ms(crc.median)} of checksums; "
        f"raw took {ms(saving.raw_write.median)}",
    )
    raw_to_torch = torch_save.durable.over(saving.raw_write).median
    applies = raw_to_torch >= 3
    for peer, least in ((torch_save, 2.5), (dcp, 3.5)):
        ahead = peer.durable.over(copy.durable)
        yield Row(
            f"durable, copy: faster than {peer.name} by",
            f"≥ {least} x (where raw is ≥ 3 x torch.save's rate)",
            ratio(ahead),
            ahead.median >= least if applies else None,
            f"raw is {raw_to_torch:.1f} x torch.save's rate; {peer.name} takes {ms(peer.durable.median)}, "
            f"copy {ms(copy.durable.median)}, raw {ms(saving.raw_write.median)}",
        )


def _memory(memory: dict[str, MemoryUse]) -> Iterator[Row]:
    for key in ("copy", "overlap"):
        use = memory[key]
        yield Row(
            f"extra peak memory, {key}",
            "≤ 1.05 x state",
            f"{use.peak:.2f} x",
            use.peak <= 1.05,
            f"one image is 1 x; the other {use.peak - 1:.2f} x are buffers of threads and allocators",
        )
        yield Row(
            f"memory kept after close(), {key}",
            "0 (≤ 0.02 x state)",
            f"{use.after_close:.2f} x",
            use.after_close <= 0.02,
            f"{use.after_close:.2f} x of the state stay resident in the process",
        )


def _training(slowdown: dict[str, SlowdownResults]) -> Iterator[Row]:
    copy = slowdown["copy"]
    interval = copy.recommended_interval_secs()
    average = copy.average_slowdown(interval)
    yield Row(
        "training slowdown on average, copy, at the interval of AdaptiveInterval",
        "≤ 3 %",
        f"{average:.1%} (every {interval:.0f} s; in the writing window {copy.ratio.median - 1:+.0%} a step)",
        average <= 0.03,
        f"per save, the stall takes {ms(copy.blocked.median)} and slower steps lose {ms(copy.lost.median)} in a window "
        f"of {copy.writing.median:.2f} s: trainer and writer share the cores",
    )


def _loading(loading: LoadResults) -> Iterator[Row]:
    for cache in ("warm", "cold"):
        ours, plain = loading.asyncckpt[cache], loading.torch[cache]
        speed = plain.over(ours)
        why = f"verified {ms(ours.median)}, plain {ms(plain.median)}"
        if cache == "warm":
            why += f"; checking every byte, which torch.load does not do, takes {ms(loading.verify.median)} of it"
        yield Row(
            f"verified load and first step, {cache} page cache: speed over torch.load's",
            "≥ 1 x",
            ratio(speed),
            speed.median >= 1,
            why,
        )


def _planning(planning: list[PlanResults]) -> Iterator[Row]:
    largest = planning[-1]
    yield Row(
        f"plan time, {largest.num_tensors:,} tensors: share of torch.save's",
        "≤ 0.6",
        ratio(largest.share),
        largest.share.median <= 0.6,
        f"planning takes {ms(largest.plan.median)}, torch.save (into memory) {ms(largest.torch_save.median)}",
    )
    before = planning[-2]
    growth = (largest.plan.median / largest.num_tensors) / (before.plan.median / before.num_tensors)
    yield Row(
        f"plan time is linear: cost per tensor, {largest.num_tensors:,} over {before.num_tensors:,}",
        "≤ 2 x",
        f"{growth:.2f} x",
        growth <= 2,
        f"{before.plan.median / before.num_tensors * 1e6:.1f} µs per tensor became "
        f"{largest.plan.median / largest.num_tensors * 1e6:.1f} µs",
    )


def _imports(imports: ImportResults) -> Iterator[Row]:
    yield Row(
        "importing every name of asyncckpt, over import torch",
        "≤ 150 ms",
        ms(imports.over_torch.median),
        imports.over_torch.median <= 0.15,
        f"import torch itself takes {ms(imports.torch.median)}",
    )
    yield Row(
        "import asyncckpt alone leaves torch out",
        "yes",
        ("no" if imports.imports_torch else "yes") + f" ({ms(imports.alone.median)})",
        not imports.imports_torch,
        "torch is in sys.modules afterwards",
    )


def _writer(writer: WriterResults | None) -> Iterator[Row]:
    if writer is None:
        return
    ready, own_bytes = writer.ready.median, writer.own_bytes.median
    yield Row("a writer process is ready (on an idle machine)", "≤ 500 ms", ms(ready), ready <= 0.5, "a busy machine")
    yield Row(
        "its own memory, without the image",
        "≤ 60 MB",
        f"{own_bytes / 1e6:.0f} MB",
        own_bytes <= 60e6,
        "the interpreter and what it imported",
    )


def ms(secs: float) -> str:
    return f"{secs * 1000:.1f} ms" if secs < 0.1 else f"{secs * 1000:,.0f} ms"


def ratio(samples: Samples) -> str:
    digits = 2 if samples.median < 10 else 1
    return f"{samples.median:.{digits}f} ({samples.least:.{digits}f} to {samples.most:.{digits}f})"
