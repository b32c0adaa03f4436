"""results.json as a picture."""

from __future__ import annotations

from pathlib import Path

from bench.figures import Bar

_COLOURS = {"host": "#9aa5b1", "running VM": "#2f6fdb", "new VM": "#1f9d63", "original": "#d08a2e"}


def plot(bars: list[Bar], path: Path) -> None:
    """The medians as bars, on a logarithmic scale, since the original is two orders away."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.42 * len(bars)))
    shown = bars[::-1]
    medians = [bar.summary["median_ms"] for bar in shown]
    axes.barh([bar.label for bar in shown], medians, color=[_COLOURS[bar.of] for bar in shown])
    for index, bar in enumerate(shown):
        text = f"{bar.summary['median_ms']:.2f} ms  (n={bar.summary['n']})"
        axes.text(bar.summary["median_ms"] * 1.08, index, text, va="center")
    axes.set_xscale("log")
    axes.set_xlim(right=max(medians) * 8)
    axes.set_xlabel("median, milliseconds (logarithmic)")
    axes.set_title("agentos beside bare processes, bubblewrap and the original")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
