"""The picture: how long training waits, and how long until the checkpoint is durable."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # the backend comes first
from matplotlib.axes import Axes

from benchmarks.samples import Samples
from benchmarks.saving import SavingResults

_BLOCKED, _DURABLE = "#d1495b", "#2e7fb8"
_HEIGHT = 0.36


def plot(saving: SavingResults, path: Path) -> None:
    """Bars on a logarithmic scale, medians of the warm rounds, lines for the range."""
    figure, axes = pyplot.subplots(figsize=(9, 0.75 * len(saving.methods) + 1.8), layout="constrained")
    for row, times in enumerate(saving.methods.values()):
        _bar(axes, row - _HEIGHT / 2, times.blocked, _BLOCKED, "training waits in save()" if row == 0 else None)
        fence = times.part("fence")
        if times.timings and fence.median > 0:
            middle = row - _HEIGHT / 2
            label = "… and at the fence, if the step comes at once"
            axes.barh(middle, fence.median, _HEIGHT, times.blocked.median, color=_BLOCKED, alpha=0.3, label=label)
        _bar(axes, row + _HEIGHT / 2, times.durable, _DURABLE, "until durable" if row == 0 else None)
    for secs, color, label in (
        (saving.memory_copy.median, _BLOCKED, "one memory copy"),
        (saving.raw_write.median, _DURABLE, "raw disk write"),
    ):
        axes.axvline(secs, color=color, linestyle="--", linewidth=1, label=label)
    axes.set_yticks(range(len(saving.methods)), [times.name for times in saving.methods.values()])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("seconds, logarithmic: median of the warm rounds, and range")
    axes.set_title(f"Saving {saving.num_bytes / 1e9:.2f} GB in {saving.num_tensors} tensors")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bar(axes: Axes, height: float, samples: Samples, color: str, label: str | None) -> None:
    median = samples.median
    error = [[median - samples.least], [samples.most - median]]
    axes.barh(height, median, _HEIGHT, color=color, label=label, xerr=error, error_kw={"linewidth": 1})
    text = f"{median * 1000:.1f} ms" if median < 0.1 else f"{median:.2f} s"
    axes.annotate(text, (samples.most, height), (4, 0), textcoords="offset points", va="center", fontsize=8)
