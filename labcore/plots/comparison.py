"""Figures that hold the stages against each other: accuracy, costs, answers, confidence."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from labcore.plots.style import BLUE, COLORS, NAMES, annotate, interval_lengths, new_figure, plain


def accuracy_bars(table: pd.DataFrame) -> Figure:
    """Return accuracies with their confidence intervals; index stage, columns acc, acc_low, acc_high."""
    figure, ((axis,),) = new_figure(height=2.9, width=6)
    positions, lengths = range(len(table)), interval_lengths(table, "acc")
    axis.errorbar(positions, table["acc"], lengths, fmt="none", ecolor="0.3", capsize=6)
    for position, (stage, value) in enumerate(table["acc"].items()):
        axis.plot(position, value, "o", markersize=10, color=COLORS[stage])
        annotate(axis, f"{value:.2%}", (position, value), (10, 0), va="center", fontsize=9)
    axis.set_xticks(positions, [NAMES[stage] for stage in table.index])
    axis.set_xlim(-0.5, len(table) - 0.3)
    axis.yaxis.set_major_formatter("{x:.2%}")
    axis.set(ylabel="test accuracy", title="Accuracy with its 95 % interval")
    return figure


def cost_bars(size_mb: pd.Series, latency: pd.DataFrame) -> Figure:
    """Return file sizes (MB of 10^6 bytes) beside latencies of one image (ms, with quartiles)."""
    figure, ((sizes, times),) = new_figure(2, height=2.9)
    middle, tops = latency["latency_ms"], latency["latency_ms_high"]
    for axis, values, heights in ((sizes, size_mb, size_mb), (times, middle, tops)):
        axis.bar(values.index.map(NAMES), values, color=values.index.map(COLORS), width=0.6)
        for position, (value, height) in enumerate(zip(values, heights, strict=True)):
            annotate(axis, f"{value:.2f}", (position, height), (0, 4), ha="center", fontsize=8)
        axis.set_ylim(0, 1.18 * heights.max())
    sizes.set(ylabel="file size (MB)", title="Size")
    times.set(ylabel="latency, one image (ms)", title="Latency")
    errors = interval_lengths(latency, "latency_ms")
    times.errorbar(range(len(latency)), middle, errors, fmt="none", ecolor="0.3", capsize=4)
    return figure


def tradeoff(table: pd.DataFrame) -> Figure:
    """Return accuracy against latency; the area of a point is its file's size.

    Index stage; columns acc, acc_low, acc_high, latency_ms, size_mb.
    """
    figure, ((axis,),) = new_figure(height=3.2, width=6)
    latency, acc, lengths = table["latency_ms"], table["acc"], interval_lengths(table, "acc")
    axis.errorbar(latency, acc, lengths, fmt="none", ecolor="0.5", elinewidth=1, capsize=3)
    for stage, row in table.iterrows():
        point, area = (row["latency_ms"], row["acc"]), 800 * row["size_mb"] / table["size_mb"].max()
        axis.scatter(*point, s=area, color=COLORS[stage], zorder=3, alpha=0.9)
        offset = (16, 7 if row["acc"] >= acc.median() else -13)  # networks of one speed lie close
        annotate(axis, f"{NAMES[stage]}, {row['size_mb']:.2f} MB", point, offset, fontsize=8)
    axis.yaxis.set_major_formatter("{x:.2%}")
    axis.margins(y=0.2)
    axis.set(xlabel="latency, one image (ms)", ylabel="test accuracy", title="Trade-off: area is file size")
    axis.set_xlim(0, 1.35 * latency.max())
    return figure


def confusion_matrix(counts: pd.DataFrame, title: str) -> Figure:
    """Return counts, true classes down, predicted across; the colour scale leaves correct answers out."""
    figure, ((axis,),) = new_figure(height=4.6, width=6)
    wrong, annotated = counts.mask(np.eye(len(counts), dtype=bool)).to_numpy(), len(counts) <= 20
    names = list(map(plain, counts.index)) if annotated else "auto"
    numbers = {"annot": counts if annotated else False, "annot_kws": {"fontsize": 7}, "fmt": "d"}
    look = {"cmap": "Blues", "linewidths": 0.3, "cbar_kws": {"label": "wrong answers"}}
    sns.heatmap(wrong, ax=axis, xticklabels=names, yticklabels=names, **numbers, **look)
    for position, count in enumerate(np.diag(counts) if annotated else ()):
        axis.text(position + 0.5, position + 0.5, count, ha="center", va="center", fontsize=7, color="0.35")
    axis.grid(False)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def confusion_difference(differences: dict[str, pd.DataFrame]) -> Figure:
    """Return how each stage's confusion matrix differs from FP32's: what went up and what went down."""
    figure, axes = new_figure(len(differences), height=4.1, width=8.4)
    limit = max(1, *(int(table.abs().to_numpy().max()) for table in differences.values()))
    annotated = all(len(table) <= 12 for table in differences.values())
    numbers = {"annot": annotated, "annot_kws": {"fontsize": 6}, "fmt": "+d"}
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "cbar": False, "linewidths": 0.3}
    for axis, (stage, table) in zip(axes.flat, differences.items(), strict=True):
        sns.heatmap(table.rename(index=plain, columns=plain), ax=axis, **numbers, **look)
        axis.set(xlabel="predicted", ylabel="true", title=f"{NAMES[stage]} minus FP32 (images)")
        axis.tick_params(labelsize=7)
        axis.label_outer()
    return figure


def class_change(change_pp: pd.DataFrame) -> Figure:
    """Return changes of accuracy (points) of the 20 classes that change most; index class, columns stages."""
    if len(change_pp) > 20:
        change_pp = change_pp.loc[change_pp.abs().max(axis=1).nlargest(20).index]
    figure, ((axis,),) = new_figure(height=2.8)
    bars = change_pp.rename(columns=NAMES)
    bars.plot.bar(ax=axis, width=0.8, color=[COLORS[stage] for stage in change_pp])
    axis.autoscale(axis="x")
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(change_pp)), map(plain, change_pp.index), rotation=45, ha="right", fontsize=8)
    axis.set(xlabel="", ylabel="change (percentage points)", title="Accuracy per class against FP32")
    axis.legend(fontsize=8)
    return figure


def reliability(tables: dict[str, pd.DataFrame], errors: dict[str, float]) -> Figure:
    """Return accuracy against confidence, one panel per stage; on the diagonal a network is as sure as right.

    Columns low, high, confidence, accuracy, count; the line at the foot is the share of the images in a bin.
    A bin of fewer than ten images has no bar.
    """
    figure, axes = new_figure(len(tables), height=3.2, width=8.4, sharey=True)
    for axis, (stage, table) in zip(axes.flat, tables.items(), strict=True):
        bars = table[table["count"] >= 10]
        look = {"color": COLORS[stage], "edgecolor": "white", "zorder": 2}
        axis.bar(bars["low"], bars["accuracy"], bars["high"] - bars["low"], align="edge", **look)
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1.2, linestyle=":", zorder=3)
        share = table["count"] / table["count"].sum()
        look = {"color": BLUE, "marker": "s", "markersize": 3, "linewidth": 1, "zorder": 4}
        axis.plot(table["confidence"], share, label="share of the images", **look)
        title = f"{NAMES[stage]}: ECE {errors[stage]:.3f}"
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=title)
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    return figure
