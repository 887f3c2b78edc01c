"""RESULTS.md: the figures as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.samples import Samples
from benchmarks.targets import Results, Row, ms, ratio
from benchmarks.training import SlowdownResults

PLOT_NAME = "results.png"
VERDICTS = {True: "met", False: "**not met**", None: "does not apply"}


def markdown(results: Results, rows: Sequence[Row], command: str) -> str:
    """The whole page."""
    sections = (
        _head(results, command),
        _targets(rows),
        _saving(results),
        _training(results),
        _loading(results),
        _startup(results),
    )
    return "\n".join(line for section in sections for line in section)


def _head(results: Results, command: str) -> Iterator[str]:
    saving = results.saving
    yield f"""# Benchmark results

Written by `{command}`. The state is a GPT-like model with AdamW:
{saving.num_bytes / 1e9:.2f} GB in {saving.num_tensors} tensors (the targets are for states of 1 to 4 GB).

Within a round every method runs once, in an order that rotates. Ratios are taken within a round and given as their
median, with the range in brackets; warm rounds: {len(saving.memory_copy.warm)}. The first, cold round is reported
apart; in it an optimizer step follows each save() at once, to catch snapshots that tear. Every file was loaded and
compared, bit for bit, with the state at the time of the save, and the state changes from save to save. *Durable*
means that data and directory entry are on disk (fsync). All methods share one process, as they would share a
trainer's: memory that a method has freed stays warm in the C allocator for the next one that clones.
"""
    yield from table(("machine", ""), ([key, value] for key, value in results.machine.items()))


def _targets(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Targets\n"
    header = ("what", "target", "measured", "", "what limits it")
    yield from table(header, ([row.what, row.target, row.measured, VERDICTS[row.met], row.why] for row in rows))


def _saving(results: Results) -> Iterator[str]:
    saving = results.saving
    gigabytes = saving.num_bytes / 1e9
    yield f"""## Saving

![Time that training waits and time until durable, by method]({PLOT_NAME})

Copying the state's bytes from one warm tensor to another: {spread(saving.memory_copy)} s
({gigabytes / saving.memory_copy.median:.1f} GB/s). Writing them past the page cache (`O_DIRECT`, 8 MiB chunks, the
better of 1 and 4 threads, allocated before, file and directory synced): {spread(saving.raw_write)} s
({gigabytes / saving.raw_write.median:.2f} GB/s).
"""
    header = (
        *("method", "blocked, first, s", "blocked, warm, s", "durable, first, s", "durable, warm, s"),
        *("extra peak memory", "after close"),
    )
    rows = []
    for key, times in saving.methods.items():
        use = results.memory[key]
        rows.append(
            [
                times.name,
                f"{times.blocked.first:.3f}",
                spread(times.blocked),
                f"{times.durable.first:.2f}",
                spread(times.durable),
                f"{use.peak:.2f} x state",
                f"{use.after_close:.2f} x",
            ]
        )
    yield from table(header, rows)
    yield from _timings(results)
    yield "What was measured:\n"
    for times in saving.methods.values():
        yield f"- **{times.name}**: {times.about}"
    yield ""


def _timings(results: Results) -> Iterator[str]:
    """Where the time of asyncckpt's own saves went, medians."""
    names = ("plan", "stage", "fence", "queue", "checksum", "write", "sync", "commit")
    yield "Where asyncckpt's time goes (checksums are made while writing; the fence is the next step's wait):\n"
    rows = []
    for times in results.saving.methods.values():
        if times.timings:
            parts = (times.part(name) for name in names)
            rows.append([times.name, *(ms(part.median) for part in parts)])
    yield from table(("method", *names), rows)


def _training(results: Results) -> Iterator[str]:
    yield """## Training while a save is written

A small GPT trains on all cores while the big state is written in the background. *In the window*: median step while
writing over median step just before. *Lost*: by how much all steps in the window took longer.
"""
    yield from _slowdowns(results.slowdown.values())
    yield """## A busy Python thread while a save is written

The same beside a training thread that never lets go of the GIL by itself: writing threads have to ask for it, a writer
process has its own.
"""
    yield from _slowdowns(results.busy_python.values())


def _slowdowns(compared: Iterable[SlowdownResults]) -> Iterator[str]:
    header = ("method", "step in the window", "lost per save, s", "stall, s", "window, s")
    yield from table(
        header,
        (
            [found.name, f"{ratio(found.ratio)} x", *(spread(s) for s in (found.lost, found.blocked, found.writing))]
            for found in compared
        ),
    )


def _loading(results: Results) -> Iterator[str]:
    loading = results.loading
    yield """## Loading

From the file to the end of the first optimizer step, seconds. *asyncckpt*: every byte verified, mapped, copied into
model and optimizer. *torch.load*: `weights_only=True`, not mapped, then `load_state_dict`; nothing is verified.
"""
    rows = [[cache, spread(loading.asyncckpt[cache]), spread(loading.torch[cache])] for cache in ("warm", "cold")]
    yield from table(("page cache", "asyncckpt", "torch.load"), rows)


def _startup(results: Results) -> Iterator[str]:
    yield "## Planning and importing\n"
    header = ("tensors", "plan", "torch.save into memory", "plan / torch.save")
    yield from table(
        header,
        (
            [f"{size.num_tensors:,}", ms(size.plan.median), ms(size.torch_save.median), ratio(size.share)]
            for size in results.planning
        ),
    )
    imports = results.imports
    yield (
        f"`import asyncckpt`: {ms(imports.alone.median)} alone; {ms(imports.over_torch.median)} over `import torch` "
        f"({ms(imports.torch.median)}) with every public name used.\n"
    )
    if (writer := results.writer) is not None:
        own = f"{writer.own_bytes.median / 1e6:.0f} MB"
        yield f"A writer process is ready after {ms(writer.ready.median)}, and has {own} of its own.\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def spread(samples: Samples, unit: float = 1.0) -> str:
    """Median and range, times `unit`."""
    median, least, most = samples.median * unit, samples.least * unit, samples.most * unit
    digits = 0 if median >= 100 else 2 if median >= 1 else 3
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"
