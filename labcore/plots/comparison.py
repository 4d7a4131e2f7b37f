"""Figures that hold the stages against each other: accuracy, costs, answers, confidence."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from labcore.plots.style import BLUE, COLORS, GREY, NAMES, annotate, interval_lengths, new_figure, plain


def accuracy_bars(table: pd.DataFrame) -> Figure:
    """Return accuracies with their confidence intervals; index stage, columns acc, acc_low, acc_high."""
    figure, axes = new_figure(height=2.9, width=6)
    axis, positions, acc = axes[0, 0], np.arange(len(table)), table["acc"]
    axis.errorbar(positions, acc, interval_lengths(table, "acc"), fmt="none", ecolor="0.3", capsize=6)
    for position, (stage, value) in enumerate(acc.items()):
        axis.plot(position, value, "o", markersize=10, color=COLORS.get(stage, GREY))
        annotate(axis, f"{value:.2%}", (position, value), (10, 0), va="center", fontsize=9)
    axis.set_xticks(positions, [NAMES.get(stage, stage) for stage in table.index])
    axis.set_xlim(-0.5, len(table) - 0.3)
    axis.yaxis.set_major_formatter("{x:.2%}")
    axis.set(ylabel="test accuracy", title="Accuracy with its 95 % interval")
    return figure


def cost_bars(size_mb: pd.Series, latency: pd.DataFrame) -> Figure:
    """Return file sizes (MB of 10^6 bytes) beside latencies of one image (ms, with quartiles)."""
    figure, ((sizes, times),) = new_figure(2, height=2.9)
    middle, tops = latency["latency_ms"], latency["latency_ms_high"]
    for axis, values, heights in ((sizes, size_mb, size_mb), (times, middle, tops)):
        names = [NAMES.get(stage, stage) for stage in values.index]
        axis.bar(names, values, color=[COLORS.get(stage, GREY) for stage in values.index], width=0.6)
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
    figure, axes = new_figure(height=3.2, width=6)
    axis, latency, acc = axes[0, 0], table["latency_ms"], table["acc"]
    lengths = interval_lengths(table, "acc")
    axis.errorbar(latency, acc, lengths, fmt="none", ecolor="0.5", elinewidth=1, capsize=3)
    for stage, row in table.iterrows():
        point, area = (row["latency_ms"], row["acc"]), 800 * row["size_mb"] / table["size_mb"].max()
        axis.scatter(*point, s=area, color=COLORS.get(stage, GREY), zorder=3, alpha=0.9)
        offset = (16, 7 if row["acc"] >= acc.median() else -13)  # networks of one speed lie close
        annotate(axis, f"{NAMES.get(stage, stage)}, {row['size_mb']:.2f} MB", point, offset, fontsize=8)
    axis.yaxis.set_major_formatter("{x:.2%}")
    axis.margins(y=0.2)
    axis.set(xlabel="latency, one image (ms)", ylabel="test accuracy", title="Trade-off: area is file size")
    axis.set_xlim(0, 1.35 * latency.max())
    return figure


def confusion_matrix(counts: pd.DataFrame, title: str) -> Figure:
    """Return counts, true classes down, predicted across; the colour scale leaves correct answers out."""
    figure, axes = new_figure(height=4.6, width=6)
    axis, wrong, annotated = axes[0, 0], counts.to_numpy().astype(float), len(counts) <= 20
    np.fill_diagonal(wrong, np.nan)
    names = plain(counts.index) if annotated else "auto"
    numbers = {"annot": counts.to_numpy() if annotated else False, "annot_kws": {"fontsize": 7}, "fmt": "d"}
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
        names = plain(table.index) if annotated else "auto"
        rows = names if axis is axes[0, 0] else False
        sns.heatmap(table, ax=axis, xticklabels=names, yticklabels=rows, **numbers, **look)
        axis.set(xlabel="predicted", ylabel="", title=f"{NAMES.get(stage, stage)} minus FP32 (images)")
        axis.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("true")
    return figure


def class_change(change_pp: pd.DataFrame) -> Figure:
    """Return the change of accuracy per class against FP32 in percentage points; index class, columns stages.

    Of more than 20 classes, the 20 that change most.
    """
    if len(change_pp) > 20:
        change_pp = change_pp.loc[change_pp.abs().max(axis=1).nlargest(20).index]
    figure, axes = new_figure(height=2.8)
    axis, positions, stages = axes[0, 0], np.arange(len(change_pp)), change_pp.columns
    width = 0.8 / len(stages)
    for number, stage in enumerate(stages):
        shifted = positions + (number - (len(stages) - 1) / 2) * width
        axis.bar(
            shifted, change_pp[stage], width, color=COLORS.get(stage, GREY), label=NAMES.get(stage, stage)
        )
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xticks(positions, plain(change_pp.index), rotation=45, ha="right", fontsize=8)
    axis.set(ylabel="change (percentage points)", title="Accuracy per class against FP32")
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
        look = {"color": COLORS.get(stage, GREY), "edgecolor": "white", "zorder": 2}
        axis.bar(bars["low"], bars["accuracy"], bars["high"] - bars["low"], align="edge", **look)
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1.2, linestyle=":", zorder=3)
        share = table["count"] / table["count"].sum()
        look = {"color": BLUE, "marker": "s", "markersize": 3, "linewidth": 1, "zorder": 4}
        axis.plot(table["confidence"], share, label="share of the images", **look)
        title = f"{NAMES.get(stage, stage)}: ECE {errors[stage]:.3f}"
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=title)
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    return figure
